"""Figures and table of vit_sparse_fl.

    python plots/vit.py --data-dir results --out-dir results/plots                  # all that the runs allow
    python plots/vit.py cross gains layers --data-dir vit_sparse_fl/results/rates.jsonl
    python plots/tables.py vit_sparse_fl                                            # plots/vit_runs.py

    curves          validation accuracy and loss against rounds: heterogeneity_curves.png, local_steps_curves.png,
                    strategies_curves.png (dense, each mask strategy, top-k updates), central_curves.png (epochs)
    heterogeneity   test accuracy against classes per client (Nc) upwards, IID last; Dirichlet apart, not joined
    local_steps     test accuracy against local steps J, the rounds, which go down as J goes up, under it
    strategies      strategy_comparison.png: test accuracy of each method at one sparsity, every seed, mean and spread
    sparsity        test accuracy against the fraction of weights that is frozen, dense and central beside it
    layers          mask_layers.png: the fraction of each tensor that the masks keep (`kept` in the results: a log
                    of runs will do); a strategy that keeps nothing of some has collapsed them
    interference    {heterogeneity,local_steps,strategies}_interference.png: between the clients, against rounds
    cross           cross_losses.png: each client's update against its own and the others' losses (vit_interference.py)
    gains           gains.png: what others lose against what a client gains, dense training's rates as a line
    shards          clients x classes of the lowest seed, from shards.json in its folder, or of a run of a log from
                    shards/RUN.json beside the log (a heat map cannot be averaged)

Lines are means over seeds, their bands minimum to maximum; points have bars of one standard deviation and a dot a seed.
`--at best` takes the test accuracy after the best validated round instead of the last. Runs that diverged (what that
is: plots/vit_runs.py) are counted where they belong and part of no mean. Accuracies have a line at that before training
and one at chance (1 / classes), or the caption says it where the axis does not reach it; cosine, diversity and drift to
the mean one of orthogonal updates, sign conflicts one of random signs of as many clients as take part (not the level of
top-k updates, of which fewer clients have each weight).

Along an axis, points of a method that has one learning rate at each place are one line, whatever the rates.
"""

import json
import math

import numpy as np

from common.cli import UsageError, run_main
from common.curves import GREY, break_lines, new_figure, number, set_title
from common.participation import per_round
from plots import style
from plots.deltas import draw_layers
from plots.runs import LeftOut, describe
from plots.seeds import curves_of, label, lines_of, usual_variants
from plots.style import (
    Figure,
    bars,
    caption,
    each_group,
    legend_below,
    looks_of,
    panel_axes,
    seed_spread,
    whole_numbers,
)
from plots.vit_interference import CROSS, GAINS
from plots.vit_runs import (
    FREE,
    KEYS,
    STUDY,
    TABLE,
    before_training,
    broken,
    class_count,
    say_diverged,
    seeds_said,
    shards_order,
)

__all__ = ["FIGURES", "STUDY", "TABLE"]

# ---- what a figure shows

UNMASKED = ("central", "dense")
# the shards depend on these only
DEALT = ("dataset", "classes", "data", "val_split", "num_clients")


def varying(*free):
    """A select of groups of dense runs that differ in `free`, first of all in its first key."""

    def choose(runs, notes):
        several = len({str(run.setting.get(free[0])) for run in runs}) > 1
        return curves_of(runs, free, notes=notes) if several else []

    return each_group(choose, free, lambda run: run.kind == "dense")


def usual_curves(least):
    """A choice of the usual variant of each method, of so many methods at least."""

    def choose(runs, notes):
        curves = usual_variants(curves_of(runs, notes=notes), notes)
        return curves if len(curves) >= least else []

    return choose


def along(*axis, free=FREE, references=("central",)):
    """A select of (lines of two points or more along `axis`, curves of the kinds `references`).

    A line is a method with its values of the other keys in `free`.
    """

    def choose(runs, notes):
        lying = [run for run in runs if run.kind not in references and axis[0] in run.setting]
        curves = curves_of(lying, free, axis, notes)
        lines = [line for line in lines_at_any_rate(curves) if len({str(curve.place[axis[0]]) for curve in line}) > 1]
        if not lines:
            return None
        label([curve for line in lines for curve in line])
        alone = [curve.label for curve in curves if not any(curve in line for line in lines)]
        if alone:
            name = f"{len(alone)} methods with one value of {axis[0].replace('_', ' ')}"
            notes.append(LeftOut(name, f"a line needs two: {'; '.join(alone)}"))
        return lines, curves_of([run for run in runs if run.kind in references], notes=notes)

    return each_group(choose, free)


def lines_at_any_rate(curves):
    """The curves as lines along the axis: of a method with one curve at each place one, whatever their rates."""
    methods = {}
    for curve in curves:
        key = curve.kind, *(pair for pair in curve.args.items() if pair[0] != "lr")
        methods.setdefault(key, []).append(curve)
    for same in methods.values():
        tuned = len({tuple(curve.place.values()) for curve in same}) == len(same)
        if tuned and len({curve.args.get("lr") for curve in same}) > 1:
            for curve in same:
                curve.args.pop("lr", None)
        yield from [same] if tuned else lines_of(same)


def two_federated(runs, notes):
    curves = curves_of(runs, notes=notes)
    return curves if sum(not curve.central for curve in curves) > 1 else []


def has_mask(run):
    return "kept" in run.results


def shards_of(runs, notes):
    """{sharding: (seed, counts [clients, classes])} of the lowest seed that has them."""
    maps = {}
    for run in sorted(runs, key=lambda run: (str(run.seed).zfill(20), str(run.folder))):
        path = run.folder / "shards.json" if run.folder else run.log.parent / "shards" / f"{run.name}.json"
        name = run.setting.get("shards")
        if path.is_file() and name not in maps:
            maps[name] = run.seed, read_counts(path)
    return dict(sorted(maps.items(), key=lambda item: shards_order(item[0]), reverse=True))


def read_counts(path):
    """int array [clients, classes] of shards.json. Raises UsageError for a damaged one."""
    try:
        counts = np.array(json.loads(path.read_text(encoding="utf-8"))["counts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): delete it or run again") from error
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or not counts.any():
        raise UsageError(f"{path} is damaged: counts must be whole numbers, clients x classes: delete it or run again")
    return counts


central = each_group(lambda runs, notes: curves_of(runs, notes=notes), keep=lambda run: run.central)
two_methods = each_group(usual_curves(2), keep=lambda run: not run.central)
strategies = each_group(two_federated)
with_masks = each_group(usual_curves(1), keep=has_mask)
with_shards = each_group(shards_of, [key for key in KEYS if key not in DEALT], lambda run: not run.central)

# ---- what numbers are judged by

CHANCE = {"color": GREY, "linestyle": (0, (1, 2)), "linewidth": 1.0}
BEFORE = {"color": "black", "linestyle": (0, (6, 2, 1, 2)), "linewidth": 0.9}
ROOM = 0.1  # so much of its length an axis may grow by for chance


def accuracy_levels(axis, curves, of="", vertical=False):
    """Lines at the accuracy (%) before training and, where it fits, at chance: (what the caption must say of these).

    of: said of the first. It is the mean over the runs that log it, where those of one seed agree on it.
    """
    line, ends = (axis.axvline, axis.get_xlim) if vertical else (axis.axhline, axis.get_ylim)
    runs = [run for curve in curves for run in curve.runs]
    starts = {}
    for run in runs:
        if not math.isnan(start := 100 * before_training(run)):
            starts.setdefault(run.seed, []).append(start)
    if starts and all(np.ptp(values) < 0.5 for values in starts.values()):
        start = np.mean([np.mean(values) for values in starts.values()])
        line(start, label=f"before training{of}: {start:.1f} %", zorder=1, **BEFORE)
    counts = {class_count(run) for run in runs}
    if len(counts) > 1 or None in counts:
        return ""
    (low, high), chance = ends(), 100 / counts.pop()
    if chance < low - ROOM * (high - low):
        return f", chance: {chance:.3g} %"
    line(chance, label=f"chance: {chance:.3g} %", zorder=1, **CHANCE)
    return ""


def interference_level(axis, field, curves):
    """A line at what a measure of INTERFERENCE is of updates that have nothing to do with each other, if it has one.

    Signs at random: of m clients p move a weight up, p ~ binomial(m, 1/2); the level is 1 - E|2 p - m| / m.
    """
    args = curves[0].runs[0].args
    if field == "drift" or "num_clients" not in args:
        return
    m = per_round(args["participation_rate"], args["num_clients"])
    conflict = 1 - sum(math.comb(m, p) * abs(2 * p - m) for p in range(m + 1)) / (m * 2**m)
    orthogonal = {"update_cosine": 0, "gradient_diversity": 1, "drift_to_mean": math.sqrt(m - 1)}
    name = "orthogonal updates" if field in orthogonal else f"random signs of {m} clients"
    axis.axhline(orthogonal.get(field, 100 * conflict), label=name, zorder=1, **CHANCE)


# ---- curves over rounds

ACCURACY = [("val_accuracy", "Validation accuracy (%)", 100), ("val_loss", "Validation loss (nats)", 1)]
# With d_k the update of client k in a round, theta the server's weights; of a masked run, those that it keeps.
INTERFERENCE = [
    ("update_cosine", "Cosine between updates", 1),  # mean over pairs; 1: all pull the same way
    ("gradient_diversity", "Gradient diversity", 1),  # sum |d_k|^2 / |sum d_k|^2 (Yin et al. 2018)
    ("sign_conflict", "Sign conflict (%)", 100),  # mean of 1 - |n+ - n-| / (n+ + n-) over weights
    ("drift", "Drift |d| / |theta| (%)", 100),
    ("drift_to_mean", "Drift to mean |d - mean| / |mean|", 1),
]


def measured(select):
    """`select`, restricted to runs whose metrics.jsonl holds measures of interference."""

    def has_measures(run):
        there = any(not math.isnan(number(row.get(field))) for row in run.rows for field, *_ in INTERFERENCE)
        return there and run.kind != "lora"  # whose factors are not unique

    return lambda runs, notes: select([run for run in runs if has_measures(run)], notes)


def rounds_figure(title, panels, x_label="Round", columns=2):
    """A draw of a panel per (field, y label, factor) against rounds; panels whose field no curve has are left out."""

    def draw(setting, curves, args):
        there = [panel for panel in panels if any(np.isfinite(curve.series(panel[0])[1]).any() for curve in curves)]
        there, unsaid = there or panels[:1], ""
        say_diverged(curves)
        wide = min(columns, len(there))
        figure, axes = panel_axes(len(there), wide, (4.4 if wide < 3 else 3.5) * wide + 0.4, 2.8, 1.1)
        looks, alpha = looks_of(curves), 0.15 if len(curves) < 5 else 0.08
        for axis, (field, y_label, factor) in zip(axes, there, strict=True):
            style.draw_rounds(axis, curves, looks, field, factor, spread="range", alpha=alpha)
            for curve in curves:
                if not curve.counted:  # in the legend
                    axis.plot([], [], label=curve.label, **looks[curve.label])
            if field == "val_accuracy":
                unsaid = accuracy_levels(axis, curves)
            elif (field, y_label, factor) in INTERFERENCE:
                interference_level(axis, field, curves)
            axis.set_xlabel(x_label)
            axis.set_ylabel(y_label)
        if len(there) % wide > 0 and max(len(curve.label) for curve in curves) < 45:
            entries = {}  # in the cell without a panel
            for handle, name in (
                entry for axis in axes for entry in zip(*axis.get_legend_handles_labels(), strict=True)
            ):
                entries.setdefault(name, handle)
            figure.axes[-1].legend(entries.values(), entries, loc="center")
        else:
            legend_below(figure, axes)
        caption(figure, f"{title}: {seeds_said(curves)}{unsaid}", setting, curves)
        return figure

    return draw


def between(title):
    return rounds_figure(f"Interference between clients, {title}", INTERFERENCE, columns=3)


# ---- accuracy against a factor

POINTS = "bars and bands: standard deviation, dots: seeds"


def points_figure(title, x_label, tick, order=lambda *place: place):
    """A draw of the test accuracy against a factor: a line per method, dots for the seeds, bars for their deviation.

    tick, order: of the values that lie on the axis, the text and the sort key. Lines stand side by side at a tick, so
    that no bar hides another; none leads to Dirichlet's shards, which are no number of classes. How many seeds diverged
    stands under their place.
    """

    def draw(setting, what, args):
        lines, references = what
        field, y_label = f"test_accuracy_{args.at}", accuracy_label(args)
        every = [curve for line in lines for curve in line]
        there = sorted({tuple(curve.place.values()) for curve in every}, key=lambda place: order(*place))
        figure, axes = new_figure(height=4.4)
        axis, looks = axes[0, 0], looks_of([line[0] for line in lines])
        step = min(0.12, 0.7 / len(lines))
        for i, line in enumerate(lines):
            shift, own = (i - (len(lines) - 1) / 2) * step, looks[line[0].label]
            values = {}
            for curve in line:
                x = there.index(tuple(curve.place.values()))
                if curve.counted:
                    values[x] = 100 * curve.results(field)
                if broken(curve):
                    at = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "center", "va": "bottom"}
                    axis.annotate(broken(curve), (x + shift, 0.01), size=7.5, color=own["color"], **at)
            single = [x for x in sorted(values) if str(there[x][0]).startswith("Dirichlet")]
            joined = [x for x in sorted(values) if x not in single]
            for places, more in ((joined, {"label": line[0].label}), (single, {"linestyle": ""})):
                look = own | {"capsize": 3, "markersize": 6} | more
                bars(axis, [x + shift for x in places], [values[x] for x in places], **look)
            for x, seeds in sorted(values.items()):
                if len(seeds) > 1:  # beside the bar
                    beside = [x + shift + step / 2.5] * len(seeds)
                    axis.plot(beside, seeds, ".", color=own["color"], markersize=4, zorder=3)
        style.reference_lines(axis, references, field, 100, "{}: {:.1f} %")
        unsaid = accuracy_levels(axis, [*every, *references], " (validation)")
        if any(len({curve.runs[0].args.get("lr") for curve in line}) > 1 for line in lines):
            unsaid += ", each point at its own lr"
        axis.set_xticks(range(len(there)), [tick(*place) for place in there])
        axis.set_xlim(-0.5, len(there) - 0.5)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        legend_below(figure, [axis])
        caption(figure, f"{title}: {seeds_said(every, POINTS)}{unsaid}", setting, every)
        return figure

    return draw


def sparsity_tick(value):
    return f"{value:g}\n({100 * (1 - value):.3g} % kept)"


def accuracy_label(args):
    return f"Test accuracy (%), {'last round' if args.at == 'last' else 'best validated round'}"


def draw_strategies(setting, curves, args):
    """A row per method: every seed a dot, the mean with a bar, and the number."""
    field = f"test_accuracy_{args.at}"
    rows = [curve for curve in curves if not curve.central]
    figure, axes = new_figure(width=7.2, height=1.9 + 0.42 * len(rows))
    axis, looks = axes[0, 0], looks_of(rows)
    central, dense = ([curve for curve in curves if curve.kind == kind] for kind in UNMASKED)
    style.reference_lines(axis, [*central, *dense[:1]], field, 100, "{}: {:.1f} %", vertical=True)
    for i, curve in enumerate(rows):
        values, words = 100 * curve.results(field), [broken(curve)]
        if curve.counted:
            mean, spread, look = values.mean(), seed_spread(values), looks[curve.label] | {"linestyle": "-"}
            axis.errorbar([mean], [i], xerr=[spread] if spread else None, capsize=4, markersize=7, **look)
            words.insert(0, f"{mean:.1f}" + (f" +- {spread:.1f}" if spread else ""))
        if len(values) > 1:
            axis.plot(values, np.full(len(values), i + 0.22), ".", color=look["color"], markersize=5)
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axis.annotate("\n".join(filter(None, words)), (1.01, i), size=8.5, **place)
    axis.axhline(len(dense) - 0.5, color=GREY, linewidth=0.5)
    axis.set_yticks(range(len(rows)), [break_lines(curve.label, 34) for curve in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.set_xlabel(accuracy_label(args))
    unsaid = accuracy_levels(axis, curves, " (validation)", vertical=True)
    legend_below(figure, [axis])
    caption(figure, f"Mask strategies: {seeds_said(rows, POINTS)}{unsaid}", setting, rows)
    return figure


# ---- shards


def draw_shards(setting, maps, args):
    """A heat map of clients x classes for each sharding, white at 0, all on one logarithmic scale."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    wide = math.ceil(len(maps) / math.ceil(len(maps) / 4))
    figure, axes = panel_axes(len(maps), wide, 2.7 * wide + 1.6, 3.2, 0.8)
    # a single one must differ from none, in grey too
    colors = ListedColormap(colormaps["cividis_r"](np.linspace(0.12, 1, 256))).with_extremes(bad="white")
    top = max(2, *(counts.max() for _, counts in maps.values()))
    for axis, (name, (seed, counts)) in zip(axes, maps.items(), strict=True):
        shown = np.ma.masked_equal(counts, 0)
        image = axis.imshow(shown, cmap=colors, norm=LogNorm(1, top), aspect="auto", interpolation="nearest")
        axis.grid(False)
        held = (counts > 0).sum(axis=1)
        classes = f"{held.min()}" if held.min() == held.max() else f"{held.min()} to {held.max()}"
        axis.set_title(
            f"{name} (seed {seed})\n{classes} {'class' if classes == '1' else 'classes'} a client", fontsize=9
        )
        axis.set_xlabel("Class")
        whole_numbers(axis.xaxis)
        whole_numbers(axis.yaxis)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("Client")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04)
    bar.set_label("Images (white: none)")
    ticks = [m * 10**e for e in range(7) for m in (1, 2, 5) if m * 10**e <= top]
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.minorticks_off()
    set_title(figure, f"Images of each class at each client\n{describe(STUDY, setting)}")
    return figure


# ---- all of them

SHARDINGS = "runs of train_federated.py with two shardings, such as --nc 1 and --nc 5"
STEPS = "runs of train_federated.py with two values of --local-steps, such as 4 and 8"
SPARSE = "runs of train_federated_sparse.py with"
MASKS = f"{SPARSE} two strategies, or one and a run of train_federated.py"
STRATEGIES = f"{SPARSE} two of --mask-strategy {', '.join(list(STUDY.kinds)[2:7])}"
RATIOS = f"{SPARSE} two of --sparsity-ratio, such as 0.5 and 0.9"
# what runs differ in -> (select, title over rounds, title of the interference, what it needs)
VARIED = {
    "heterogeneity": (varying("shards"), "Classes per client (Nc)", "by classes per client (Nc)", SHARDINGS),
    "local_steps": (varying("local_steps", "num_rounds"), "Local steps (J) per round", "by local steps (J)", STEPS),
    "strategies": (two_methods, "Dense and sparse fine-tuning", "dense and sparse", MASKS),
}
EPOCHS = rounds_figure("Central training", ACCURACY, "Epoch")
BY_SHARDS = points_figure("Heterogeneity", "Shards (Nc: classes per client)", str, shards_order)
BY_STEPS = points_figure("Local steps", "Local steps J (rounds of the run)", "{}\n({} rounds)".format)
BY_SPARSITY = points_figure("Sparsity", "Sparsity (weights that are trained)", sparsity_tick)
FIGURES = {
    "curves": [
        *(Figure(f"{a}_curves", select, rounds_figure(t, ACCURACY), n) for a, (select, t, _, n) in VARIED.items()),
        Figure("central_curves", central, EPOCHS, "runs of train_centralized.py"),
    ],
    "heterogeneity": [Figure("heterogeneity", along("shards"), BY_SHARDS, SHARDINGS)],
    "local_steps": [Figure("local_steps", along("local_steps", "num_rounds"), BY_STEPS, STEPS)],
    "strategies": [Figure("strategy_comparison", strategies, draw_strategies, STRATEGIES)],
    "sparsity": [Figure("sparsity", along("sparsity", free=("sparsity",), references=UNMASKED), BY_SPARSITY, RATIOS)],
    "layers": [Figure("mask_layers", with_masks, draw_layers, f"{SPARSE} `kept` in their results")],
    "interference": [
        Figure(f"{a}_interference", measured(select), between(title), f"{needs}, with update_cosine in metrics.jsonl")
        for a, (select, _, title, needs) in VARIED.items()
    ],
    "cross": [CROSS],
    "gains": [GAINS],
    "shards": [Figure("shards", with_shards, draw_shards, "federated runs with shards.json in their folder")],
}


def add_at(parser):
    at = "test accuracy after the last or best validated round"
    parser.add_argument("--at", choices=["last", "best"], default="last", help=at)


def build_parser():
    return style.figure_parser(STUDY, FIGURES, add_at)


if __name__ == "__main__":
    run_main(lambda args: style.draw_figures(STUDY, FIGURES, args), build_parser().parse_args())
