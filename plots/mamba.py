"""Tables and figures of mamba_fl.

    python plots/tables.py mamba_fl --data-dir mamba_fl/results/gap.jsonl
    python plots/mamba.py --data-dir results --out-dir results/plots         # all; also plots/plot_perplexities.py
    python plots/mamba.py gap frontier --data-dir mamba_fl/results/gap.jsonl mamba_fl/results/tuning/gap.jsonl

    central_vs_fed           1_central_vs_fed_{config}.png: central and FedAvg at the fewest local updates (LU)
    lu_comparison            2_lu_comparison_{config}.png: FedAvg at each LU
    method_comparison        3_method_comparison_{config}.png: the federated methods at the fewest LU
    multi_config_comparison  4_multi_config_comparison.png: depths, central and FedAvg at the fewest LU
    gap                      5_gap.png: FedAvg's test perplexity over central training's against LU, a line for each
                             form of --client-state: left all at central training's lowest rate, right each at its best
    frontier                 6_frontier.png: test perplexity against the bytes that a client sends and receives

A figure holds only runs with the same data, tokenizer, model, length and budget; a further such group gets a figure of
its own. Perplexity is exp(mean NLL per token), so its axis is logarithmic. Runs of --tune are in no mean.
"""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np

from common.cli import UsageError, run_main
from common.curves import break_lines, log_axis, new_figure, number, set_title
from common.participation import per_round
from plots import style
from plots.pairs import ratio, ratio_cell
from plots.read import Study
from plots.rows import base_name, describe, groups, label, nearest, rows_of
from plots.style import REFERENCE, band, caption, look, looks_of, markers_at, numbered, seeds_text
from plots.tables import Table, result, seeds, whole

# ---- the study

KINDS = {"central": "Central"}
KINDS |= {f"fed_{name.lower()}": f"Fed{name}" for name in ("Avg", "Momentum", "Entropy", "Fisher")}
SIZES = {"d_model": None, "d_state": 128, "headdim": 64, "expand": 2}  # and the values that go without saying
KEYS = ("dataset", "data", "tokenizer", "config", "shape", "val_sequences", "sequence_length", "budget", "sync")
# what a federated run and the central one that it is measured by may differ in
FREE = {"local_updates", "rounds", "participation", "client_weights", "client_optimizer", "client_state", "sync"}
FREE |= {"budget", "alpha_global", "personal", "lr", "batch_size", "n_epochs"}


def setting_of(run):
    data, flags = run["data"], ["dataset", "sequence_length", "val_sequences"]
    flags += [] if run["kind"] == "central" else ["budget", "sync"]
    values = {key: run.get(f"--{key}") for key in flags}
    values["config"] = f"pure_ssm_{run['--layers']}_layer" if run.get("--layers") else str(run.get("--config"))
    values["tokenizer"] = base_name(str(run.get("--tokenizer") or data.get("tokenizer")))
    sums = [str(data[key])[:8] for key in ("sha256", "tokenizer_sha256") if data.get(key)]
    values["data"] = " ".join(sums) or None
    if data.get("variant") not in (None, values["dataset"]):
        values["dataset"] += f" ({data['variant']})"
    sizes = {key: run.get(f"--{key}") for key in SIZES}
    values["shape"] = ", ".join(f"{key} {v}" for key, v in sizes.items() if v not in (None, SIZES[key]))
    return values


def layers_words(config):
    n = str(config).removeprefix("pure_ssm_").removesuffix("_layer")
    return f"{n} layer{'s' * (n != '1')}" if n.isdigit() else config


STUDY = Study(
    name="mamba_fl",
    commands=tuple(KINDS),
    kinds=KINDS,
    kind=lambda command, flags: command,
    setting=setting_of,
    keys=KEYS,
    said=frozenset((*KEYS, *SIZES, "layers", "client_val_sequences")),
    words={
        "local_updates": "LU {}",  # says most, so it comes first
        "batch_size": "batch {}",
        "beta1": "b1 {}",
        "beta2": "b2 {}",
        "client_optimizer": "client {}",
        "client_state": "{} client state",
        "init_from": "from {}",
        "lr": "lr {}",
        "lr_scheduler": "{} rate",
        "momentum_form": "{}",
        "n_epochs": "{} epochs",
        "num_clients": "{} clients",
        "rounds": "{} rounds",
        "scheduled": lambda who: None if who == "clients" else f"scheduled {who}",
        "server_beta2": "server b2 {}",
        "server_bias_correction": lambda on: on and "server bias correction",
        "server_lr": "server lr {}",
        "server_momentum": "momentum {}",
        "server_optimizer": "{}",
        "server_tau": None,
        "sharding": "{} shards",
        "warmup_steps": "warm-up {}",
        "dataset": "{}",
        "data": None,
        "tokenizer": lambda name: f"tokenizer {name.rpartition('/')[2]}",
        "config": layers_words,
        "shape": "{}",
        "val_sequences": "{} validation sequences",
        "sequence_length": "length {}",
        "sync": "sync every {}",
    },
    spoken=frozenset({"local_updates"}),
    lengths=("rounds", "n_epochs"),
    budget="tokens",
)


def of_config(runs, config):
    """The runs of one configuration (all for None). Raises UsageError where there are none."""
    names = [setting_of(run)["config"] for _, run in runs.iterrows()]
    if config is not None and config not in names:
        raise UsageError(f"no run of --config {config}: there are {', '.join(sorted(set(names)))}")
    return runs[[config in (None, name) for name in names]]


# ---- the table


def central_of(row, rows):
    """The central row that a federated one is measured by, None without one: with as many tokens, as large a batch
    (of all clients together) where there is one, and least different in what else both have; of several rates the
    best on validation, for each has its own best rate."""

    def batch(one):
        return one["batch_size"] * (1 if one.central else per_round(one["participation"] or 1.0, one["num_clients"]))

    def apart(one):
        unlike = sum(row[name] != one[name] for name in {*row.args, *one.args} - FREE)
        return batch(one) != batch(row), unlike, one.results("final_val_ppl").mean()

    return min((one for one in of_as_many_tokens(row, rows) if one.central), key=apart, default=None)


def plain_of(row, rows):
    """FedAvg of all parameters with each client's own moments at as many local updates and tokens, the least different;
    None without."""

    def plain(one):
        usual = one["client_state"] in (None, "keep") and one["personal"] in (None, "none")
        return one.kind == "fed_avg" and usual and one["local_updates"] == row["local_updates"]

    return nearest(row, [one for one in of_as_many_tokens(row, rows) if plain(one)])


def of_as_many_tokens(row, rows):
    """Those trained on as many tokens as `row`, within 2 %."""
    tokens = row.results("tokens").mean()
    return [one for one in rows if abs(one.results("tokens").mean() / tokens - 1) < 0.02]


def ratio_to(base_of):
    """A cell: the test perplexity over that of base_of(row, rows); 1 of a base itself."""

    def cell(row, rows):
        base = base_of(row, rows)
        if row.central or base in (None, row):
            return "-" if base is None and not row.central else "1"
        return ratio_cell(row.results("test_ppl_last"), base.results("test_ppl_last"))

    return cell


COLUMNS = {
    "final val ppl": result("final_val_ppl"),
    "best val ppl": result("best_val_ppl"),
    "test ppl (best)": result("test_ppl_best"),
    "test ppl (last)": result("test_ppl_last"),
    "test ratio to central": ratio_to(central_of),
    "to FedAvg at its LU": ratio_to(plain_of),
    "tokens": whole("tokens"),
    "minutes": result("seconds", 1 / 60),
    "seeds": seeds,
}
WORDS = """`test ratio to central`: of the perplexities, the geometric mean over the seeds that both have and the 95 %
interval of a paired t test of its logarithm; `to FedAvg at its LU`: to FedAvg of all parameters with moments of each
client's own. `final val ppl` is of all validation text, `best val ppl` of its first sequences.
"""


def add_config(parser):
    parser.add_argument("--config", metavar="NAME", help="only this one, such as pure_ssm_1_layer (default: all)")


TABLE = Table(STUDY, COLUMNS, WORDS, flags=add_config, select=lambda runs, args: of_config(runs, args.config))


# ---- figures 1 to 4, perplexity against tokens: the source's


def fewest_updates(rows, kinds=tuple(KINDS)):
    """Of these kinds central rows and the federated ones with the fewest local updates of any."""
    fewest = min((row["local_updates"] for row in rows if not row.central), default=None)
    return [row for row in rows if row.kind in kinds and (row.central or row["local_updates"] == fewest)]


def perplexities(draw, stem, title, choose, varied, free=()):
    """A figure for every group of runs. choose(rows) -> its rows, if varied(row) has two values; free: the settings in
    which they may differ."""

    def figures(runs, args, notes):
        by_config = defaultdict(list)
        for setting, members in groups(of_config(runs, getattr(args, "config", None)), STUDY, free):
            tuned = members["tuning"].astype(bool)
            rows = choose(rows_of(members if tuned.all() else members[~tuned], STUDY, free, notes=notes))
            if len({varied(row) for row in rows} - {None}) > 1:
                label(rows)
                by_config[setting.get("config")].append(draw(title, setting, rows))
        for config, drawn in sorted(by_config.items()):
            yield from numbered("_".join(filter(None, [stem, config])), drawn)

    return figures


def tokens_panel(axis, rows, names):
    """Perplexity against tokens: a line with its band per row. What happens in the first twentieth of the tokens is
    alike for all and would squeeze the rest: it sets no axis."""
    from matplotlib.ticker import EngFormatter

    looks, extent = looks_of(rows), []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        x, values = row.rounds("val_ppl", "tokens")
        band(axis, x, values, name, looks[row.label], markers_at(i, len(x), len(rows)), alpha=0.2)
        late = values[:, x >= 0.05 * x.max(initial=0)]
        extent += late[np.isfinite(late) & (late > 0)].tolist()
    if extent:
        log_axis(axis, min(extent), max(extent))
    axis.set_xlim(left=0)
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.set_xlabel("Tokens seen, all clients together")
    axis.set_ylabel("Validation perplexity")


def draw_curves(title, setting, rows):
    """Figures 1, 2 and 4; the legend has the final perplexities."""
    figure, axes = new_figure(height=4.4)
    tokens_panel(axes[0, 0], rows, [f"{row.label}: {row.results('final_val_ppl').mean():.4g}" for row in rows])
    style.legend_below(figure, axes.flat)
    caption(figure, f"{title}, at the end: all validation text; {seeds_text(rows)}", setting, rows)
    return figure


def draw_methods(title, setting, rows):
    """Figure 3: left, perplexity against tokens; right, which names the lines, the final one of each seed and the mean.

    Methods often differ by less than a line's width on the left.
    """
    figure, axes = new_figure(columns=2, width=10.0, height=max(4.2, 1.6 + 0.4 * len(rows)))
    (axis, ends), looks = axes[0], looks_of(rows)
    tokens_panel(axis, rows, [row.label for row in rows])
    for place, row in enumerate(rows):
        values, own = row.results("final_val_ppl"), looks[row.label]
        ends.plot(values, [place] * len(values), "|", color=own["color"], markersize=9)
        ends.plot([values.mean()], [place], **own | {"markersize": 7, "linestyle": ""})
    ends.set_yticks(range(len(rows)), [break_lines(row.label, 32) for row in rows])
    ends.invert_yaxis()
    ends.set_xlabel("Final validation perplexity (bars: seeds)")
    caption(figure, f"{title}: {seeds_text(rows)}", setting, rows)
    return figure


# ---- figures 5 and 6: what is left of the federated gap when every row has its own rate

FORMS = {  # --client-state: how its line is called
    "keep": "each client its own (keep)",
    "average": "averaged",
    "pooled": "of the pooled batch (pooled)",
    "reset": "none (reset)",
    "fedadamw": "FedAdamW",
}
CENTRALLY = ("central", 0)
VARIED = {"client_state", "alpha_global", "local_updates", "lr", "rounds"}


def rates_of(runs):
    """{(form, LU): {rate: its row}} of FedAvg, CENTRALLY of central training: of those alike in all else, most.

    Of two rows at one rate the one of more seeds.
    """
    rows, found = rows_of(runs, STUDY), defaultdict(dict)

    def rest(row):
        return frozenset((key, value) for key, value in row.args.items() if key not in VARIED)

    alike = Counter((rest(row), row.results("tokens").mean()) for row in rows if row.kind == "fed_avg").most_common(1)
    federated = [
        row for row in rows if row.kind == "fed_avg" and (rest(row), row.results("tokens").mean()) == alike[0][0]
    ]
    central = central_of(federated[0], rows) if federated else None
    for row in rows:
        if row in federated or central and row.central and rest(row) == rest(central):
            rates = found[CENTRALLY if row.central else (row["client_state"], row["local_updates"])]
            rates[row["lr"]] = max(rates.get(row["lr"], row), row, key=lambda one: len(one.runs))
    return found


def of_gap(draw, stem):
    def figures(runs, args, notes):
        drawn = []
        for setting, members in groups(of_config(runs, getattr(args, "config", None)), STUDY):
            tuned = members["tuning"].astype(bool)
            kept, rates = rates_of(members[~tuned]), rates_of(members[tuned])
            if CENTRALLY in rates and CENTRALLY in kept:
                # each at the rate that has most seeds, of these the best on validation
                best = {
                    at: min(rows.values(), key=lambda row: (-len(row.runs), row.results("final_val_ppl").mean()))
                    for at, rows in kept.items()
                }
                drawn.append(draw(setting, best, rates))
        yield from numbered(stem, drawn)

    return figures


def forms(places):
    """(form, its LUs, its look) of the forms that there are, in the order of FORMS."""
    for i, form in enumerate(FORMS):
        if lus := sorted(lu for name, lu in places if name == form):
            yield form, lus, look(i) | {"markersize": 6}


def last(row):
    """The last validation perplexity of a run of --tune, nan where it is not finite."""
    return number(row.first["curve"][-1]["val_ppl"])


def draw_gap(setting, kept, rates):
    figure, axes = new_figure(columns=2, width=6.9, height=3.5, sharey=True)
    left, right = axes[0]
    common, base = min(rates[CENTRALLY]), kept[CENTRALLY].results("test_ppl_last")
    for form, lus, own in forms(rates):
        at = [lu for lu in lus if common in rates[form, lu]]
        left.plot(at, [last(rates[form, lu][common]) / last(rates[CENTRALLY][common]) for lu in at], **own)
    for form, lus, own in forms(kept):
        points = np.array([ratio(kept[form, lu].results("test_ppl_last"), base)[:3] for lu in lus])  # [LU, 3]
        bars = np.abs(points[:, 1:] - points[:, :1]).T
        right.errorbar(lus, points[:, 0], bars, capsize=3, label=FORMS[form], **own)
    left.set_title(f"All at one rate, {common:g} (validation)", fontsize=9)
    right.set_title(f"Each at its best rate ({style.seeds_range(list(kept.values()))} seeds, 95 %)", fontsize=9)
    ticks = sorted({lu for form, lu in kept if form in FORMS})
    for axis in (left, right):
        axis.axhline(1, color="black", linewidth=0.9, linestyle=(0, (6, 2)))
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
        axis.set_xlabel("Local updates a round (LU)")
        axis.tick_params(labelleft=True)
    left.set_ylabel("Perplexity over central training's")
    named = right.get_legend_handles_labels()
    left.legend(*named, loc="upper left", title="AdamW's moments", title_fontsize=8, fontsize=8)
    set_title(figure, f"FedAvg against central training on as many tokens\n{describe(STUDY, setting)}")
    return figure


def draw_frontier(setting, kept, rates):
    figure, axes = new_figure(width=5.6, height=4.2)
    axis, everything = axes[0, 0], []
    for form, lus, own in forms(kept):
        points = [(sent(kept[form, lu]), kept[form, lu].results("test_ppl_last").mean()) for lu in lus]
        for lu, point in zip(lus, points, strict=True):
            axis.annotate(f"{lu}", point, (3, 4), textcoords="offset points", fontsize=7.5)
        everything += [y for _, y in points]
        axis.plot(*zip(*points, strict=True), label=FORMS[form], **own)
    central = kept[CENTRALLY].results("test_ppl_last").mean()
    axis.axhline(central, label="central training", **REFERENCE)
    axis.set_xscale("log")
    log_axis(axis, min(central, *everything), max(everything))
    axis.set_xlabel("Sent and received by a client (MB); numbers: LU")
    axis.set_ylabel("Test perplexity, mean over seeds")
    axis.legend(title="AdamW's moments", title_fontsize=9)
    set_title(figure, f"Perplexity against bytes\n{describe(STUDY, setting)}")
    return figure


def sent(row):
    """Megabytes that a client sends and receives in a run."""
    last = row.first["curve"][-1]
    return (last["bytes_up"] + last["bytes_down"]) / row["num_clients"] / 1e6


def two_kinds(rows):
    return fewest_updates(rows, ("central", "fed_avg"))


def fed_avg(rows):
    return [row for row in rows if row.kind == "fed_avg"]


def method(row):
    return None if row.central else row.kind


CENTRAL_VS_FED = "1_central_vs_fed", "Central and federated training", two_kinds, lambda row: row.kind
LU_COMPARISON = "2_lu_comparison", "Local updates (LU) per round", fed_avg, lambda row: row["local_updates"]
METHOD_COMPARISON = "3_method_comparison", "Federated methods", fewest_updates, method
CONFIGS = "4_multi_config_comparison", "Depth of the model", two_kinds, lambda row: row.args["config"], ("config",)
ENOUGH = "runs of fed_avg.py and central.py with as many tokens, and runs of --tune"
FIGURES = {
    "central_vs_fed": (
        perplexities(draw_curves, *CENTRAL_VS_FED),
        "runs of central.py and of fed_avg.py with the same data, model and length",
    ),
    "lu_comparison": (
        perplexities(draw_curves, *LU_COMPARISON),
        "runs of fed_avg.py with two values of --local_updates, such as 1 and 8",
    ),
    "method_comparison": (
        perplexities(draw_methods, *METHOD_COMPARISON),
        "runs of two federated methods at the same --local_updates",
    ),
    "multi_config_comparison": (
        perplexities(draw_curves, *CONFIGS),
        "runs of one method with two depths, such as --layers 1 and --layers 2",
    ),
    "gap": (of_gap(draw_gap, "5_gap"), ENOUGH),
    "frontier": (of_gap(draw_frontier, "6_frontier"), ENOUGH),
}


def build_parser():
    return style.figure_parser(STUDY, FIGURES, add_config)


def main(args):
    style.draw_figures(replace(STUDY, tuning=True), FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
