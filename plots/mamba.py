"""Tables and figures of mamba_fl.

    python plots/tables.py mamba_fl --data-dir mamba_fl/results/gap.jsonl
    python plots/mamba.py --data-dir results --out-dir results/plots         # all; also plots/plot_perplexities.py
    python plots/mamba.py gap --data-dir mamba_fl/results/gap.jsonl mamba_fl/results/tuning/gap.jsonl

    gap                      gap.png: FedAvg's test perplexity above central training's against local updates (LU)
    averages                 averages.png: the same against bytes, of run_study.py --preset averages
    central_vs_fed           1_central_vs_fed_{config}.png: central and FedAvg at the fewest local updates
    lu_comparison            2_lu_comparison_{config}.png: FedAvg at each LU
    method_comparison        3_method_comparison_{config}.png: the federated methods at the fewest LU
    multi_config_comparison  4_multi_config_comparison.png: depths, central and FedAvg at the fewest LU

A figure holds only runs with the same data, tokenizer, model and length; a further such group gets a figure of its own.
Perplexity is exp(mean NLL per token). Runs of --tune are in no mean.
"""

import json
import math
from collections import defaultdict
from dataclasses import replace

import numpy as np

from common.cli import UsageError
from common.curves import log_axis, new_figure, set_title
from common.participation import per_round
from plots import style
from plots.averages import by_groups, bytes_of, draw, effect_table, has_alone
from plots.pairs import OWN, Cell, estimate, paired, pooled
from plots.read import Study, base_name, read
from plots.rows import comparable, describe, label
from plots.style import band, look, looks_of, numbered, seeds_range
from plots.tables import Table, result, seeds, whole

# ---- the study

KINDS = {"central": "Central", "fed_avg": "FedAvg", "fed_momentum": "FedMomentum"}
KINDS |= {"fed_entropy": "FedEntropy", "fed_fisher": "FedFisher"}
KEYS = ("dataset", "data", "tokenizer", "config", "d_model", "val_sequences", "sequence_length")
# what a federated run and the central one that it is measured by may differ in
FREE = {"local_updates", "rounds", "participation", "client_weights", "client_optimizer", "client_state", "personal"}
FREE |= {"lr", "batch_size", "n_epochs"}


def setting_of(run):
    data = run["data"]
    values = {key: run.get(f"--{key}") for key in ("dataset", "d_model", "val_sequences", "sequence_length")}
    if data.get("variant") not in (None, values["dataset"]):
        values["dataset"] += f" ({data['variant']})"
    values["data"] = " ".join(str(data[key])[:8] for key in ("sha256", "tokenizer_sha256") if data.get(key)) or None
    values["tokenizer"] = base_name(str(run["--tokenizer"]))
    return values | {"config": f"pure_ssm_{run['--layers']}_layer"}


def with_defaults(runs):
    """Older runs of fed_avg.py lack the flags of what is averaged when."""
    for name, default in (("--rounds_by", "steps"), ("--average_every", []), ("--moments_every", 1)):
        defaults = [default if kind == "fed_avg" else None for kind in runs["kind"]]
        given = runs.get(name, [None] * len(runs))
        runs[name] = [old if value is None else value for value, old in zip(given, defaults, strict=True)]
    return runs


STUDY = Study(
    name="mamba_fl",
    commands=tuple(KINDS),
    kinds=KINDS,
    kind=lambda command, flags: command,
    setting=setting_of,
    keys=KEYS,
    # sync, budget, alpha_global: of older runs, alike in all
    said=frozenset((*KEYS, "layers", "client_val_sequences", "sync", "budget", "alpha_global")),
    words={
        "local_updates": "LU {}",  # says most, so it comes first
        "average_every": lambda text: " and ".join(f"{name} every {steps}" for name, steps in json.loads(text)),
        "rounds_by": {"drift": "rounds by drift", "steps": ""}.get,
        "client_state": "{} moments",
        "moments_every": lambda n: f"sent every {n:g} rounds" if n > 1 else "",
        "lr": "lr {}",
        "rounds": "{} rounds",
        "server_optimizer": "{}",
        "server_tau": None,
        "dataset": "{}",
        "data": None,
        "config": "{}",
    },
    spoken=frozenset({"local_updates"}),
    lengths=("rounds", "n_epochs"),
    adjust=with_defaults,
)


# ---- the table


def central_of(row, rows):
    """The central row that a row is measured by, None without one: with as many tokens, as large a batch (of all
    clients together) where there is one, and least different in what else both have; of several rates the best on
    validation, for each has its own best rate."""

    def batch(one):
        return one["batch_size"] * (1 if one.central else per_round(one["participation"] or 1.0, one["num_clients"]))

    def apart(one):
        unlike = sum(row[name] != one[name] for name in {*row.args, *one.args} - FREE)
        return batch(one) != batch(row), unlike, one.results("final_val_ppl").mean()

    central = [one for one in of_as_many_tokens(row, rows) if one.central]
    return row if row.central else min(central, key=apart, default=None)


def plain_of(row, rows):
    """FedAvg of all parameters with each client's own moments at as many local updates and tokens, the least different;
    None of a central row, and without one."""

    def plain(one):
        usual = one["client_state"] in (None, "keep") and one["personal"] in (None, "none")
        usual = usual and one["rounds_by"] != "drift" and not one["average_every"]
        return one.kind == "fed_avg" and usual and one["local_updates"] == row["local_updates"]

    def apart(one):
        return sum(row.args.get(name) != one.args.get(name) for name in {*row.args, *one.args})

    return None if row.central else min(filter(plain, of_as_many_tokens(row, rows)), key=apart, default=None)


def of_as_many_tokens(row, rows):
    """Those trained on as many tokens as `row`, within 2 %."""
    tokens = row.results("tokens").mean()
    return [one for one in rows if abs(one.results("tokens").mean() / tokens - 1) < 0.02]


def measured(row, base_of, rows):
    """(ratio, low, high, p, df) of the row's test perplexity over that of base_of(row, rows), seed by seed: the
    geometric mean, `estimate`'s interval, and df where its spread is that of all rows (else 0). None of a base itself
    and without one."""

    def logs(one):
        base = base_of(one, rows)
        if base in (None, one):
            return []
        return paired(np.log(one.results("test_ppl_last")), np.log(base.results("test_ppl_last")))

    if not len(mine := logs(row)):
        return None
    pool = pooled(map(logs, rows))
    *found, p = estimate(mine, pool)
    return *np.exp(found), p, pool[1] if len(mine) < OWN else 0


def ratio_to(base_of):
    """A cell: `1.100 [1.087, 1.114] (66 df)`."""

    def cell(row, rows):
        found = measured(row, base_of, rows)
        if found is None or math.isnan(found[0]):
            return "1" if base_of(row, rows) is row else "-"
        mean, low, high, p, df = found
        words = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else ""
        return Cell(f"{mean:.3f}{words}" + (f" ({df} df)" if df else ""), p)

    return cell


def megabytes(row, rows):
    """A cell: what a client sends and receives in the whole run, in MB."""
    return "-" if row.central else f"{bytes_of(row) / 1e6:.1f}"


def columns(rows):
    """Where rows average groups of weights at their own pace their bytes, and no ratio at equal local updates."""
    if not by_groups(rows):
        return COLUMNS
    return {"MB": megabytes} | {head: cell for head, cell in COLUMNS.items() if head != "to FedAvg at its LU"}


COLUMNS = {
    "averages": lambda row, rows: "-" if row.central else whole("round")(row, rows),
    "final val ppl": result("final_val_ppl"),
    "test ppl": result("test_ppl_last"),
    "test ratio to central": ratio_to(central_of),
    "to FedAvg at its LU": ratio_to(plain_of),
    "tokens": whole("tokens"),
    "seeds": seeds,
}
WORDS = """Perplexities are of the last weights, on all of the text. Ratios are of test perplexities, to central
training and to FedAvg of all parameters with moments of each client's own: the geometric mean over the seeds that both
have and the 95 % interval of a paired t test of its logarithm. `(66 df)`: fewer than five seeds, so that the standard
deviation is pooled over the table's rows, with so many degrees of freedom.
"""


def further(runs):
    """The effects of a preset `averages`, beside the usual tables."""
    every = [(describe(STUDY, setting), rows) for setting, rows in comparable(runs, STUDY)]
    return runs, [table for about, rows in every for table in effect_table(about, rows)]


TABLE = Table(STUDY, columns, WORDS, further=further)


# ---- figures 1 to 4, perplexity against tokens: the source's


def add_config(parser):
    parser.add_argument("--config", metavar="NAME", help="only this one, such as pure_ssm_1_layer (default: all)")


def of_config(runs, args):
    """The runs of --config (all without). Raises UsageError where there are none."""
    names, config = [setting_of(run)["config"] for _, run in runs.iterrows()], getattr(args, "config", None)
    if config is not None and config not in names:
        raise UsageError(f"no run of --config {config}: there are {', '.join(sorted(set(names)))}")
    return runs[[config in (None, name) for name in names]]


def fewest_updates(rows, kinds=tuple(KINDS)):
    """Of these kinds central rows and the federated ones with the fewest local updates of any."""
    fewest = min((row["local_updates"] for row in rows if not row.central), default=None)
    return [row for row in rows if row.kind in kinds and (row.central or row["local_updates"] == fewest)]


def perplexities(stem, title, choose, varied, free=()):
    """A figure for every group of runs. choose(rows) -> its rows, if varied(row) has two values; free: the settings in
    which they may differ."""

    def figures(runs, args, notes):
        by_config = defaultdict(list)
        for setting, every in comparable(of_config(runs, args), replace(STUDY, free=free), notes):
            rows = choose(every)
            if len({varied(row) for row in rows} - {None}) > 1:
                label(rows)
                by_config[setting.get("config")].append(draw_curves(title, setting, rows))
        for config, drawn in sorted(by_config.items()):
            yield from numbered("_".join(filter(None, [stem, config])), drawn)

    return figures


def draw_curves(title, setting, rows):
    """Perplexity against tokens, a line with its band per row; the legend has the final perplexities."""
    from matplotlib.ticker import EngFormatter

    figure, axes = new_figure(height=4.4)
    axis, looks, extent = axes[0, 0], looks_of(rows), []
    for row in rows:
        x, values = row.rounds("val_ppl", "tokens")
        band(axis, x, values, f"{row.label}: {row.results('final_val_ppl').mean():.4g}", looks[row.label], alpha=0.2)
        late = values[:, x >= 0.05 * x.max(initial=0)]  # what happens before is alike for all and sets no axis
        extent += late[np.isfinite(late) & (late > 0)].tolist()
    if extent:
        log_axis(axis, min(extent), max(extent))
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.set_xlabel("Tokens seen, all clients together")
    axis.set_ylabel("Validation perplexity")
    style.legend_below(figure, axes.flat)
    count = seeds_range(rows)
    shown = "one seed" if count == "1" else f"mean of {count} seeds, band: standard deviation"
    set_title(figure, f"{title}, at the end: all validation text; {shown}\n{describe(STUDY, setting)}")
    return figure


# ---- the figure of the README

VARIED = {"client_state", "local_updates", "lr", "rounds"}
LINES = {"keep": "each at its best rate", "pooled": "and with pooled moments (three times the bytes)"}


def by_updates(rows, state="keep"):
    """{LU: its FedAvg row with --client-state `state`} of the rows that agree in all else, most; of several rates the
    best on validation."""
    federated = [row for row in rows if row.kind == "fed_avg"]
    rest = [sorted((key, str(value)) for key, value in row.args.items() if key not in VARIED) for row in federated]
    found = {}
    for row, own in zip(federated, rest, strict=True):
        if own == max(rest, key=rest.count) and (row["client_state"] or "keep") == state:
            found.setdefault(row["local_updates"], []).append(row)
    return {lu: min(found[lu], key=lambda row: row.results("final_val_ppl").mean()) for lu in sorted(found)}


def gap(runs, args, notes):
    tried = read(args.data_dir, STUDY, tuning=True)
    tuned = comparable(tried[tried["tuning"].astype(bool)], STUDY)
    drawn = []
    for setting, rows in comparable(of_config(runs, args), STUDY, notes):
        if len(by_updates(rows)) > 1 and any(row.central for row in rows):
            drawn.append(draw_gap(setting, rows, next((some for other, some in tuned if other == setting), [])))
    yield from numbered("gap", drawn)


def draw_gap(setting, rows, tried):
    """Per cent above central training, with the table's intervals, of rows that average more than once.

    tried: rows of --tune, for one rate for all.
    """
    rows = [row for row in rows if row.central or row.results("round").mean() > 1]
    figure, axes = new_figure(width=6.0, height=3.6)
    axis, plain = axes[0, 0], by_updates(rows)
    if rates := [row["lr"] for row in tried if row.central]:
        at_one = [row for row in tried if row["lr"] == min(rates)]
        points = [(lu, measured(row, central_of, at_one)[0]) for lu, row in by_updates(at_one).items() if lu in plain]
        own = {"color": "0.45", "linestyle": (0, (1, 1.2)), "marker": "x"}
        axis.plot(*per_cent(points), label=f"FedAvg and central at one low rate ({min(rates):g}, one seed)", **own)
    for i, (state, name) in enumerate(LINES.items()):
        points = [(lu, *measured(row, central_of, rows)[:3]) for lu, row in by_updates(rows, state).items()]
        if not points:
            continue
        lus, ratios, lows, highs = per_cent(points)
        axis.errorbar(lus, ratios, [ratios - lows, highs - ratios], capsize=3, label=name, **look(i))
        for lu, value, high in zip(lus, ratios, highs, strict=True) if state == "keep" else ():
            axis.annotate(f"{value:.2g} %", (lu, high), (0, 4), textcoords="offset points", ha="center")
    axis.axhline(0, color="black", linewidth=0.9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(plain), [f"{lu}\n{row.results('round').mean():.0f}" for lu, row in plain.items()])
    axis.minorticks_off()
    axis.set_xlabel("Local steps between two averages; below: averages in the whole run")
    axis.set_ylabel("Test perplexity above\ncentral training's (%)")
    axis.set_ylim(top=1.45 * axis.get_ylim()[1])
    axis.legend(loc="upper left")
    words = describe(STUDY, setting, ("dataset", "config", "d_model"))
    set_title(figure, f"The less often FedAvg averages, the more it loses (bars: 95 %)\n{words}")
    return figure


def per_cent(points):
    """(LU, ratio, ...) of each point -> the LUs, and each of the others as per cent above 1."""
    lus, *ratios = np.array(points, dtype=float).T
    return [lus, *(100 * (one - 1) for one in ratios)]


# ---- all of them


def costs(runs, args, notes):
    every = comparable(of_config(runs, args), STUDY, notes)
    told = [(rows, describe(STUDY, setting, ("dataset", "config", "d_model"))) for setting, rows in every]
    yield from numbered("averages", [draw(rows, about) for rows, about in told if has_alone(rows)])


def two_kinds(rows):
    return fewest_updates(rows, ("central", "fed_avg"))


def federated_kind(row):
    return None if row.central else row.kind


def each_update(rows):
    return list(by_updates(rows).values())


FIGURES = {
    "gap": (gap, "runs of central.py, and of fed_avg.py with two values of --local_updates"),
    "averages": (costs, "runs of run_study.py --preset averages"),
    "central_vs_fed": (
        perplexities("1_central_vs_fed", "Central and federated training", two_kinds, lambda row: row.kind),
        "runs of central.py and of fed_avg.py on the same data",
    ),
    "lu_comparison": (
        perplexities("2_lu_comparison", "Local updates (LU) per round", each_update, lambda row: row["local_updates"]),
        "runs of fed_avg.py with two values of --local_updates",
    ),
    "method_comparison": (
        perplexities("3_method_comparison", "Federated methods", fewest_updates, federated_kind),
        "runs of two federated methods at one --local_updates",
    ),
    "multi_config_comparison": (
        perplexities(
            "4_multi_config_comparison",
            "Depth of the model",
            two_kinds,
            lambda row: row.args["config"],
            free=("config",),
        ),
        "runs of one method with two depths, such as --layers 1 and 2",
    ),
}


def main():
    style.main(STUDY, FIGURES, add_config)


if __name__ == "__main__":
    main()
