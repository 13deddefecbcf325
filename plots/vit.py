"""Tables and figures of vit_sparse_fl.

    python plots/tables.py vit_sparse_fl --against dense
    python plots/vit.py --data-dir results --out-dir results/plots                  # all that the runs allow
    python plots/vit.py gains --data-dir vit_sparse_fl/results/rates.jsonl

    strategies  strategy_comparison.png: test accuracy of a federation's methods, each at its best validated rate
    gains       gains.png: what the others lose, M_ij, against what a client gains by its own update, -M_ii; how far a
                client moves decides both, so that a mask reduces interference where it lies below dense training's line

Runs that diverged are counted where they belong and part of no mean.
"""

import hashlib
import json
import math
import re

import numpy as np

from common.cli import run_main
from common.curves import break_lines, new_figure, number
from plots import style
from plots.pairs import Cell, difference, interval, p_value, pairs_cell, spread
from plots.read import Study, not_finite, order_of
from plots.rows import base_name, distance, groups, plain, rows_of
from plots.style import caption, legend_below, looks_of, numbered, panel_axes, seed_spread, seeds_text
from plots.tables import Table, over_rounds, result, seeds, sent, whole

# ---- the study

FEDERATION = ("num_clients", "participation_rate", "shards", "local_steps", "num_rounds")
START = ("dataset", "classes", "data", "val_split", "model", "weights", "image_size", "init_from")
KEYS = (*START, *FEDERATION, "sparsity")
FREE = ("shards", "local_steps", "num_rounds", "sparsity")  # in which the rows of one table may differ
OWN, OTHERS = "interference_own", "interference_others"
LEAST = 0.2  # nats: where clients gain less, by the cosine's end, they hardly move


def kind_of(command, flags):
    if command == "train_centralized":
        return "central"
    if command == "train_federated_topk" or flags.get("upload") == "topk":
        return "topk"
    if command == "train_federated":
        return "lora" if flags.get("lora_r") else "dense"
    return "given" if flags.get("mask") else str(flags.get("mask_strategy"))


def setting_of(run):
    central = run["kind"] == "central"
    hidden = ("data", "shards", "sparsity") + (FEDERATION if central else ())
    # a flag without a value is a value too: pretrained from nothing is not like anything
    values = {key: "" if run.get(f"--{key}") is None else plain(run[f"--{key}"]) for key in KEYS if key not in hidden}
    for key in ("weights", "init_from", "model"):
        values[key] = base_name(values[key], inner=("final",)) if values[key] else ""
    # `--classes` left out and all of them given are the same
    if run["data"].get("classes") and run.get("--classes") != "rest":
        values["classes"] = json.dumps(run["data"]["classes"])
    sums = {key: value for key, value in run["data"].items() if key.startswith("sha256")}
    values["data"] = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:8]
    if not central:
        values["shards"] = shards_name(run)
    if run["kind"] not in ("central", "dense"):
        values["sparsity"] = run.get("--sparsity_ratio")
    return values


def shards_name(run):
    """`IID`, `Nc 5`, `Dirichlet 0.1`: how a run deals the images to the clients."""
    names = {"iid": "IID", "dirichlet": f"Dirichlet {run.get('--alpha')}"}
    return names.get(run.get("--sharding"), f"Nc {run.get('--nc')}")


def order(key, value):
    """IID first, then ever more of skew, Dirichlet last."""
    if key != "shards":
        return order_of(value)
    kind, _, level = str(value).partition(" ")
    return 0, -("Dirichlet", "Nc", "IID").index(kind), -float(level or 0), ""


def classes_words(value):
    """`classes 50 to 99` of the range [50, 100]."""
    if value == "rest":
        return "classes of no pretraining"
    ends = re.findall(r"\d+", str(value))
    return f"classes {ends[0]} to {int(ends[1]) - 1}" if len(ends) == 2 else f"classes {value}"


def diverged(run):
    """An update or the last loss was not finite, or accuracy ended below half of that before training (round 0)."""
    rows = run["curve"]
    last, before = (rows[-1] if rows else {}), math.nan
    if rows and rows[0].get("round") == 0:
        before = number(rows[0].get("val_accuracy"))
    left_out = any(row.get("left_out_updates") for row in rows)
    not_a_number = last.get("val_loss") is not None and math.isnan(number(last["val_loss"]))
    below = run["status"] == "finished" and number(last.get("val_accuracy")) < before / 2
    return not_finite(run) or left_out or not_a_number or below


STUDY = Study(
    name="vit_sparse_fl",
    commands=("train_centralized", "train_federated", "train_federated_sparse", "train_federated_topk"),
    kinds={
        "central": "Central",
        "dense": "Dense FedAvg",
        "least_sensitive": "Least sensitive",
        "most_sensitive": "Most sensitive",
        "lowest_magnitude": "Lowest magnitude",
        "highest_magnitude": "Highest magnitude",
        "random": "Random",
        "topk": "Top-k updates",
        "given": "Mask from a file",
        "lora": "Federated LoRA",
    },
    kind=kind_of,
    setting=setting_of,
    keys=KEYS,
    said=frozenset(KEYS)
    | frozenset(
        "sharding nc alpha min_samples allow_unused_classes sparsity_ratio upload mask mask_strategy use_amp"
        " num_classes hp_search hp_epochs hp_lrs hp_weight_decays heterogeneity_experiment nc_values j_values"
        " local_steps_experiment compare_strategies sparsity_experiment sparsity_values interference_every"
        " interference_clients interference_images".split()
    ),
    words={
        "shards": "{}",
        "local_steps": "J {}",
        "num_rounds": "{} rounds",
        "sparsity": "sparsity {}",
        "calibration": "{} calibration",
        "calibration_rounds": "{} calibration rounds",
        "calibrate_on": "calibrated on {}",
        "fisher_samples": "{} Fisher samples",
        "mask_scope": "{} threshold",
        "mask_omit": lambda kind: None if kind == "none" else f"without {kind}",
        "lora_r": lambda rank: f"rank {rank}" if rank else None,
        "download": lambda how: "top-k down too" if how == "topk" else None,
        "error_feedback": lambda on: on and "error feedback",
        "drift_matched": lambda on: on and "drift matched",
        "batch_size": "batch {}",
        "num_clients": "{} clients",
        "participation_rate": "participation {}",
        "epochs": "{} epochs",
        "init_from": "from {}",
        "image_size": "{} px",
        "dataset": "{}",
        "classes": classes_words,
        "model": "{}",
        "data": None,
        "val_split": None,
        "freeze_head": lambda frozen: "head frozen" if frozen else "head trained",
        "freeze_backbone": lambda frozen: frozen and "head only",
        "pretrained": lambda on: "pretrained" if on else "from scratch",
    },
    order=order,
    diverged=diverged,
)

# ---- the table


def federation(row):
    return {key: row.args.get(key) for key in FREE if key in FEDERATION}


def validated(row):
    """The mean best validation accuracy of a row's seeds, by which a rate is chosen."""
    values = row.results("val_accuracy_best")
    return values.mean() if len(values) and np.isfinite(values).all() else -math.inf


def is_dense(row):
    """Whether clients train all weights, at any rate."""
    return row.kind == "dense" and not row["freeze_backbone"]


def base_of(row, rows, kind):
    """The row of `kind` with which a row is compared (see WORDS), None without one."""

    def apart(other):
        return distance(row, other) - (row.args.get("lr") != other.args.get("lr"))

    def fits(other):
        if other.kind != kind or federation(other) != federation(row):
            return False
        if row.kind != kind:
            return True
        if len(other.runs) != len(row.runs):
            return len(other.runs) > len(row.runs)
        alone = kind == "dense" and not is_dense(row)
        return validated(other) > validated(row) and (alone or apart(other) == 0)

    def key(other):
        return apart(other), -len(other.runs), -validated(other)

    return None if row.central else min(filter(fits, rows), key=key, default=None)


def accuracy(row):
    return 100 * row.results("test_accuracy_last")


def share_of_own(row):
    return -row.mean_over_rounds(OTHERS) / row.mean_over_rounds(OWN)


def gains(run):
    """{round: (nats that clients gain by their own updates, nats that the others lose)}, means over the clients."""
    every = {row["round"]: (row.get(OWN), row.get(OTHERS)) for row in run["curve"]}
    return {t: (-number(own), number(others)) for t, (own, others) in every.items() if None not in (own, others)}


def at_equal_gain(row, dense):
    """{seed: log of the others' loss over what it is under dense training where clients gain as much}.

    The mean over the rounds; dense training's is, round by round, on the lines between its rates in log-log. Without
    rounds outside of its gains, those where at no rate it gains LEAST, and those where nobody loses.
    """
    apart = {}
    for seed, run in row.counted.iterrows():
        same = [gains(one.counted.loc[seed]) for one in dense if seed in one.counted.index]
        ratios = []
        for t, (gain, loss) in gains(run).items():
            at_rates = sorted(one[t] for one in same if min(one.get(t, (0, 0))) > 0)
            x, y = np.log(at_rates).T.reshape(2, -1)
            if gain > 0 < loss and len(x) > 1 and x[0] <= math.log(gain) <= x[-1] >= math.log(LEAST):
                ratios.append(math.log(loss) - np.interp(math.log(gain), x, y))
        if ratios:
            apart[seed] = np.mean(ratios)
    return apart


def equal_gain_cell(row, rows):
    """The mean ratio and its 95 % interval, of logarithms, over starts; `-` of dense training itself."""
    if row.central or is_dense(row):
        return "-"
    ends = of_starts(row, at_equal_gain(row, list(filter(is_dense, rows))))
    if not len(ends):
        return "-"
    shown = ", ".join(f"{math.exp(end):.2f}" for end in interval(ends)) if len(ends) > 1 else "?"
    return Cell(f"{math.exp(np.mean(ends)):.2f} [{shown}], {len(ends)}", p_value(ends))


def of_starts(row, of_seeds):
    """The values of {seed: value}; where seeds begin with several pretrainings means over the seeds of each."""
    every = {}
    for seed, value in sorted(of_seeds.items()):
        every.setdefault(str(row.counted.loc[seed].get("--init_from")), []).append(value)
    return [np.mean(values) for values in every.values()] if len(every) > 1 else sum(every.values(), [])


def against(kind, values, digits):
    """A cell: the paired difference of what `values` gives to the row of `kind`."""

    def cell(row, rows):
        base = base_of(row, rows, kind)
        if base in (None, row):
            return "-"
        mine, other = values(row), values(base)
        both = mine.index.intersection(other.index)
        return pairs_cell(of_starts(row, dict(mine.loc[both] - other.loc[both])), digits)

    return cell


def against_dense(row, rows):
    base = base_of(row, rows, "dense")
    return "-" if base in (None, row) else difference(accuracy(row), accuracy(base))


def of_weights(name, factor=1.0, digits=None):
    """`over_rounds` of a measure of updates of weights: LoRA's are of its factors, which are not unique."""
    cell = over_rounds(name, factor, digits)
    return lambda row, rows: "-" if row.kind == "lora" else cell(row, rows)


def broken(row):
    """`1 of 3 diverged`; "" where none of the seeds did."""
    count = len(row.runs) - len(row.counted)
    return f"{count} of {len(row.runs)} diverged" if count else ""


FAILED = {"diverged": lambda row, _: f"{len(row.runs) - len(row.counted)} of {len(row.runs)}"}
LAST, DRIFT = {"test % (last)": result("test_accuracy_last", 100, 2)}, {"drift %": of_weights("drift", 100, 3)}
CROSS = {
    "own loss": over_rounds(OWN, 1, 4),
    "others' loss": over_rounds(OTHERS, 1, 4),
    "random signs": of_weights("interference_chance", 1, 4),
    "others / own": lambda row, _: spread(share_of_own(row), 3),
    "merge gap": over_rounds("merge_gap", 1, 4),
    "between - within": of_weights("cosine_excess", 1, 3),
    "at random": of_weights("cosine_chance", 1, 3),
}


def columns(rows, args):
    """The columns; of losses under each other's updates, and of what is sent down, where runs have them."""
    if getattr(args, "against", None):
        return {
            **LAST,
            f"vs {args.against}": against(args.against, accuracy, 2),
            **FAILED,
            "lr": lambda row, _: str(row.args.get("lr", "-")),
            **DRIFT,
            "weights kept %": result("kept_weights", 100, 1),
            "biases kept %": result("kept_biases", 100, 1),
            **CROSS,
            f"others / own vs {args.against}": against(args.against, share_of_own, 3),
            "others' loss, times dense's at equal gain": equal_gain_cell,
            "seeds": seeds,
        }
    return {
        **LAST,
        "test % (best)": result("test_accuracy_best", 100, 2),
        "val % (best)": result("val_accuracy_best", 100, 2),
        "vs dense": against_dense,
        **FAILED,
        "MB up": sent("bytes_up"),
        "cosine": of_weights("update_cosine", 1, 3),
        "diversity": of_weights("gradient_diversity", 1, 3),
        "sign conflict %": of_weights("sign_conflict", 100, 1),
        **DRIFT,
        "drift to mean": of_weights("drift_to_mean", 1, 2),
        **({"MB down": sent("bytes_down")} if any(row.kind == "topk" for row in rows) else {}),
        **(CROSS if any(crossed(run) for row in rows for _, run in row.runs.iterrows()) else {}),
        "rounds": whole("rounds"),
        "minutes": result("seconds", 1 / 60, 1),
        "seeds": seeds,
    }


def crossed(run):
    """Whether a run's rows hold losses under other clients' updates, or would if it had not diverged before."""
    measured = any(row.get(OWN) is not None for row in run["curve"])
    return run["kind"] != "central" and bool(measured or (run["diverged"] and run.get("--interference_every")))


def asked(runs, args):
    """The runs; with --against those of federations, and central ones from the same start."""
    if not args.against:
        return runs
    starts = [str({key: setting_of(run).get(key) for key in START}) for _, run in runs.iterrows()]
    there = {start for start, kind in zip(starts, runs["kind"], strict=True) if kind != "central"}
    return runs[[start in there for start in starts]]


WORDS = """Accuracies are in %, after the last round or with the weights of the best validated one; `vs dense`: the
difference, in points, to the row of dense FedAvg in the same federation that differs least, rates apart. `diverged`:
how many seeds broke down, which count in no mean and no difference: an update of any round or the last loss was not
finite, or the last validation accuracy is below half of that before training. Cosine, diversity, sign conflict and
drift are means over the evaluated rounds, the losses under each other's updates over those of --interference-every.

--against dense, random: a table a federation, as paired differences in test accuracy and in `others / own`, what the
others lose for what a client gains, to the row of dense FedAvg or of random masks in the same federation that differs
least (rates apart: of several the one with the best validation accuracy; a row of that method itself to the one with
more seeds, with as many to a rate that validates better): runs of one seed share split, pretraining and shards. Where
seeds begin with several pretrainings, a pair is the mean over the seeds of one of them. `others' loss, times dense's at
equal gain`: the others' loss where clients gain as much as in dense training at several rates, round by round (lines
between these in log-log; mean ratio and interval of logarithms; without rounds where those are below 0.2 nats).
"""


def add_flags(parser):
    text = "paired differences with 95 %% intervals to dense FedAvg or random masks (default: the table of results)"
    parser.add_argument("--against", choices=["dense", "random"], help=text)


TABLE = Table(
    STUDY, columns, WORDS, free=lambda args: ("sparsity",) if args.against else FREE, flags=add_flags, select=asked
)


# ---- figures


def federations(runs, notes):
    """[(setting, rows)] of each federation: the rows of the table with --against."""
    of = groups(runs, STUDY, ("sparsity",))
    return [(setting, rows_of(some, STUDY, ("sparsity",), notes=notes)) for setting, some in of]


def at_best_rate(rows):
    """Of federated rows that differ in their rate only the one with the best validation accuracy."""
    best = {}
    for row in rows:
        key = row.kind, str({name: value for name, value in row.args.items() if name != "lr"})
        if key not in best or validated(row) > validated(best[key]):
            best[key] = row
    return [row for row in rows if row in best.values() and not row.central]


def strategies(runs, args, notes):
    """A row per method: every seed a dot, the mean with a bar, and the number."""
    drawn = []
    for setting, rows in federations(runs, notes):
        rows = at_best_rate(rows)
        if len({row.kind for row in rows}) < 2:
            continue
        figure, axes = new_figure(width=7.2, height=1.9 + 0.42 * len(rows))
        axis, looks = axes[0, 0], looks_of(rows)
        for row in (row for row in rows if is_dense(row) and len(row.counted)):
            axis.axvline(accuracy(row).mean(), zorder=1, label=row.label, **style.REFERENCE)
        for i, row in enumerate(rows):
            values, words = accuracy(row), [broken(row)]
            if len(values):
                look = looks[row.label] | {"linestyle": "-"}
                axis.errorbar([values.mean()], [i], xerr=[seed_spread(values)], capsize=4, markersize=7, **look)
                axis.plot(values, np.full(len(values), i + 0.22), ".", color=look["color"], markersize=5)
                words.insert(0, spread(values, 1))
            place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
            axis.annotate("\n".join(filter(None, words)), (1.01, i), size=8.5, **place)
        axis.set_yticks(range(len(rows)), [break_lines(row.label, 34) for row in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(False, axis="y")
        axis.set_xlabel("Test accuracy (%), last round")
        legend_below(figure, [axis])
        caption(figure, f"Mask strategies: {seeds_text(rows, 'bars: standard deviation, dots: seeds')}", setting, rows)
        drawn.append(figure)
    yield from numbered("strategy_comparison", drawn)


# ---- what the others lose against what a client gains


def losses_at(rows):
    """{round: {label: (gains [S], the others' losses [S])}}, of rounds where dense training gains enough."""
    rounds = {}
    for row in rows:
        for run in (run for _, run in row.counted.iterrows()):
            for t, pair in gains(run).items():
                rounds.setdefault(t, {}).setdefault(row.label, []).append(pair)
    line = {row.label for row in rows if is_dense(row)} or {row.label for row in rows}
    rounds = {t: {name: np.array(pairs).T for name, pairs in at.items()} for t, at in sorted(rounds.items())}
    return {t: at for t, at in rounds.items() if any(at[name][0].mean() >= LEAST for name in line & at.keys())}


def equal_gain(runs, args, notes):
    """The others' loss against the own gain, a point a row, dense training's rates joined."""
    drawn, there = [], runs[[crossed(run) for _, run in runs.iterrows()]]
    for setting, rows in federations(there, notes) if len(there) else ():
        rows = [row for row in rows if len(row.counted)]
        for row in rows:
            row.label += f" ({broken(row)})" if broken(row) else ""
        if not (rounds := losses_at(rows)):
            continue
        looks, names = looks_of(rows), {row.label: f"{i}  {row.label}" for i, row in enumerate(rows, 1)}
        figure, axes = panel_axes(len(rounds), width=5.2 * len(rounds), height=4.0, sharex=True, sharey=True)
        for axis, (t, there) in zip(axes, rounds.items(), strict=True):
            line = sorted(tuple(there[r.label].mean(axis=1)) for r in rows if is_dense(r) and r.label in there)
            axis.plot(*np.array(line).reshape(-1, 2).T, color="black", linewidth=1.1, zorder=1)
            for name, pair in there.items():
                (x, y), bars = pair.mean(axis=1), [seed_spread(values) for values in pair]
                spreads = {key: [bar] for key, bar in zip(("xerr", "yerr"), bars, strict=True) if bar}
                shown = looks[name] | {"linestyle": "", "label": names[name], "markersize": 4}
                axis.errorbar([x], [y], capsize=2, elinewidth=0.8, **spreads, **shown)
                axis.annotate(names[name].split()[0], (x, y), (3, 3), textcoords="offset points", fontsize=7.5)
            axis.set_title(f"round {t}")
            axis.set_xlabel("A client's gain, $-M_{ii}$ (nats)")
        axes[0].set_ylabel("The others' loss, $M_{ij}$ (nats)")
        legend_below(figure, axes)
        shown = seeds_text(rows, "bars: standard deviation")
        caption(figure, f"Interference at equal gain: {shown}", setting, rows)
        drawn.append(figure)
    yield from numbered("gains", drawn)


FIGURES = {
    "strategies": (strategies, "runs of train_federated_sparse.py of two strategies in one federation"),
    "gains": (equal_gain, "federated runs with --interference-every"),
}


def build_parser():
    return style.figure_parser(STUDY, FIGURES)


if __name__ == "__main__":
    run_main(lambda args: style.draw_figures(STUDY, FIGURES, args), build_parser().parse_args())
