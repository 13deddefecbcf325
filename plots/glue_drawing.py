"""What the figures of lora_glue_fl share: their scripts' flags, a panel per task and federation, one legend."""

import functools
import math
from collections import Counter

import numpy as np

from common.curves import COLORS, DASHES, GREY, MARKERS, new_figure, set_title
from plots import vit_drawing
from plots.deltas import whole_numbers
from plots.glue_runs import FIGURE, METRICS, RULES, TASKS, describe, evaluated, find_runs, suffixes
from plots.vit_drawing import seed_spread

REFERENCE_COLORS = {"central": GREY, "full": "black"}
REFERENCE_DASHES = {"central": ((0, (6, 2)), (0, (2, 2)), (0, (9, 2, 2, 2))), "full": ((0, (1, 3)), (0, (1, 1)))}
ALSO_COMMON = ("rounds", "local_epochs", "learning_rate")
WRAP = 3  # columns, where the panels make no grid of tasks and federations


def figure_parser(description):
    """The parser of a script that draws figures of lora_glue_fl."""
    parser = vit_drawing.figure_parser(description)
    add_tasks(parser)
    return parser


def add_tasks(parser):
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="only these (default: all)")


def draw_all(args, figures):
    """`vit_drawing.draw_all` of this study's runs."""
    vit_drawing.draw_all(args, figures, functools.partial(find_runs, tasks=args.tasks), suffixes)


def panel_axes(panels, height=2.9):
    """A figure with an axis for every panel: (figure, list of axes, in the panels' order).

    A row per task and a column per federation where that leaves few gaps, else rows of three panels.
    """
    tasks = list(dict.fromkeys(panel.task for panel in panels))
    places = [panel.title.partition(", ")[2] for panel in panels]
    columns = list(dict.fromkeys(places))
    cells = [(tasks.index(panel.task), columns.index(place)) for panel, place in zip(panels, places, strict=True)]
    grid = min(len(tasks), len(columns)) > 1 and len(columns) <= 4 and len(set(cells)) == len(panels)
    if not grid or 3 * len(panels) < 2 * len(tasks) * len(columns):
        wide = min(WRAP, len(panels))
        cells = [divmod(i, wide) for i in range(len(panels))]
    rows, wide = max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1
    width = 6.4 if wide == 1 else 4.0 * wide + 0.4 if wide < 3 else 3.5 * wide + 0.4
    figure, axes = new_figure(rows, wide, width=width, height=height * rows + 1.6)
    for row in range(rows):
        for column in range(wide):
            if (row, column) not in cells:
                axes[row, column].set_axis_off()
    chosen = [axes[cell] for cell in cells]
    counts = [seeds_range(panel.curves) for panel in panels]
    for axis, panel, count in zip(chosen, panels, counts, strict=True):
        seeds = f" ({count} seed{'s' * (count != '1')})" if len(set(counts)) > 1 else ""
        axis.set_title(panel.title + seeds, fontsize=9.5)
    return figure, chosen


def looks_of(panels):
    """label -> colour, dash and marker of each curve in the panels: a rule's own, the same in all figures.

    A variant of a rule, which has more words in its label, takes one that no rule has.
    """
    looks, more = {}, len(RULES)
    for panel in panels:
        for curve in panel.curves:
            if curve.label in looks:
                continue
            if curve.label == curve.name and curve.kind in RULES:
                i = RULES.index(curve.kind)
            else:
                i, more = more, more + 1
            looks[curve.label] = {
                "color": COLORS[i % len(COLORS)],
                "linestyle": DASHES[(i + i // len(DASHES)) % len(DASHES)],
                "marker": MARKERS[i % len(MARKERS)],
            }
    return looks


def markers_at(i, points, lines):
    """`markevery` of line `i` of `lines`: about six markers a line, not at the same points for all."""
    every = max(1, points // 6)
    return (i * every // max(1, lines)) % every, every


def draw_rounds(axis, curves, looks, name, factor=100, x_name=None, x_factor=1.0):
    """A line per curve: its mean over seeds against rounds (or the mean of field `x_name`), a band of +- one s.d."""
    for i, curve in enumerate(curves):
        rounds, values = evaluated(curve, name)
        x = rounds
        if x_name is not None:
            at, found = evaluated(curve, x_name)
            values = values[:, np.isin(rounds, at)]
            x = x_factor * found[:, np.isin(at, rounds)].mean(axis=0)
        if len(x):
            band(axis, x, factor * values, curve.label, markers_at(i, len(x), len(curves)), looks[curve.label])


def band(axis, x, values, label, every, look):
    """Mean and +- one sample standard deviation of values [S, E] over x [E]."""
    mean = values.mean(axis=0)
    axis.plot(x, mean, label=label, markevery=every, **look)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axis.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=0.1, linewidth=0)


def draw_references(axis, panel):
    """A horizontal line at the last metric of each central curve, with a band of +- one standard deviation."""
    seen = Counter()
    for curve in panel.references:
        values = 100 * curve.results(panel.metric)
        if not np.isfinite(values).all():
            continue
        dashes = REFERENCE_DASHES[curve.kind]
        look = {"color": REFERENCE_COLORS[curve.kind], "linestyle": dashes[seen[curve.kind] % len(dashes)]}
        seen[curve.kind] += 1
        axis.axhline(values.mean(), linewidth=1.4, zorder=1, label=curve.label, **look)
        spread = seed_spread(values)
        if spread:
            axis.axhspan(
                values.mean() - spread, values.mean() + spread, color=look["color"], alpha=0.13, linewidth=0, zorder=0
            )


def round_axis(axis):
    axis.set_xlim(left=0)
    whole_numbers(axis.xaxis)
    axis.set_xlabel("Round")


def metric_label(metric):
    """`Matthews correlation (x 100)` of `val_matthews`."""
    name = metric.removeprefix("val_")
    return METRICS.get(name, f"{name.replace('_', ' ')} (x 100)")


def finish(figure, axes, title, setting, panels, notes=""):
    """One legend below all panels, the title over them with what they have in common."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    widest = max(map(len, entries), default=1)
    columns = max(1, min(4, int(figure.get_figwidth() * 13 / (widest + 9))))
    if entries:
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(entries) / columns) - 1))
    about = describe(setting | common(panels), (*FIGURE, *ALSO_COMMON))
    set_title(figure, "\n".join([title, about] + [notes] * bool(notes)))


def common(panels):
    """What else all panels of a figure agree on, for its caption."""
    found = {key: {panel.setting.get(key) for panel in panels} for key in ALSO_COMMON}
    return {key: value for key, values in found.items() if len(values) == 1 for value in values if value is not None}


def seeds_text(curves, what="bands"):
    """`mean of 3 seeds, bands: standard deviation`, or a range of counts where they differ."""
    count = seeds_range(curves)
    return "one seed" if count == "1" else f"mean of {count} seeds, {what}: standard deviation"


def seeds_range(curves):
    """`3`, or `1 to 3` where curves have different numbers of seeds."""
    counts = sorted({len(curve.runs) for curve in curves})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def all_curves(panels):
    """The federated curves of all panels."""
    return [curve for panel in panels for curve in panel.curves]
