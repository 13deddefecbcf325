"""What the figures of vit_sparse_fl share: their scripts' flags, curves over rounds, accuracy by a factor."""

import math
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError
from common.curves import COLORS, DASHES, GREY, MARKERS, line_style, new_figure, save_figure, set_title, style
from plots.deltas import whole_numbers
from plots.run_folders import seeds_text
from plots.vit_runs import KINDS, describe, find_runs, setting_of, suffixes, usual

REFERENCE_DASHES = {"central": (0, (6, 2)), "dense": (0, (2, 1.5))}


def figure_parser(description, at=False):
    """The parser of a script that draws figures; `at` adds the choice of the test accuracy."""
    parser = Parser(description)
    parser.add_argument("--data-dir", default="results", help="folder with run folders, searched with all below it")
    parser.add_argument("--out-dir", default="results/plots", help="folder for the figures")
    parser.add_argument("--format", choices=["png", "pdf"], default="png")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    if at:
        parser.add_argument(
            "--at",
            choices=["last", "best"],
            default="last",
            help="test accuracy after the last or best validated round",
        )
    return parser


def draw_all(args, figures, find=find_runs, suffixes=suffixes):
    """Draws each of `figures`, (file name, select, draw), for every group of runs that fits; prints what it wrote.

    select(runs, notes) -> (list[(setting, what to draw)], what was lacking); draw(figure's setting, what) -> Figure,
    called inside `style()`. find(folder, unfinished) -> (runs, notes) and suffixes(settings) are those of the study.
    Raises UsageError when nothing could be drawn.
    """
    runs, notes = find(args.data_dir, args.unfinished)
    drawn, missing = [], []
    for name, select, draw in figures:
        chosen, lacking = select(runs, notes)
        if not chosen:
            missing.append(f"{name}.{args.format} needs {lacking}")
        for (setting, what), suffix in zip(chosen, suffixes([setting for setting, _ in chosen]), strict=True):
            with style():
                path = Path(args.out_dir) / f"{name}{suffix}.{args.format}"
                drawn.append(save_figure(draw(setting, what), path))
    for line in [f"wrote {path}" for path in drawn] + [f"not drawn: {text}" for text in missing if drawn] + notes:
        print(line)
    if not drawn:
        raise UsageError(f"no figure could be drawn from {args.data_dir}: {'; '.join(missing)}")


def caption(figure, title, setting, curves=()):
    """The title over a figure: what it shows, the setting that all share, and what its labels leave unsaid."""
    words = [title, describe(setting_of(setting, curves))]
    if shared := usual(curves):
        words.append(f"unless said otherwise: {shared}")
    set_title(figure, "\n".join(words))


def rounds_figure(curves, panels, title, setting, x_label="Round", columns=2):
    """A panel per (field, y label, factor): mean over seeds against rounds with the range of the seeds as a band.

    Panels whose field no curve has are left out. One legend, in the cell that no panel takes or below the panels.
    """
    panels = [panel for panel in panels if any(np.isfinite(curve.series(panel[0])[1]).any() for curve in curves)]
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    long = max(len(curve.label) for curve in curves) > 44
    inside = rows * columns > len(panels) and not long
    below = 0 if inside else 0.2 * math.ceil(len(curves) / (1 if long else 2))
    wide = 4.4 if columns < 3 else 3.5
    figure, axes = new_figure(rows, columns, width=wide * columns + 0.4, height=2.8 * rows + 0.9 + below)
    looks = looks_of(curves)
    for i, axis in enumerate(axes.flat):
        if i >= len(panels):
            axis.set_axis_off()
            continue
        field, y_label, factor = panels[i]
        for j, curve in enumerate(curves):
            rounds, mean, low, high = curve.series(field)
            look = line_style(looks[j], len(rounds), len(KINDS))
            axis.plot(rounds, factor * mean, label=curve.label, **look)
            alpha = 0.15 if len(curves) < 5 else 0.08
            axis.fill_between(rounds, factor * low, factor * high, color=look["color"], alpha=alpha, linewidth=0)
        axis.set_xlim(left=0)
        whole_numbers(axis.xaxis)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if inside:
        axes.flat[-1].legend(handles, labels, loc="center")
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if long else 2)
    caption(figure, f"{title}: {seeds_text(curves)}", setting, curves)
    return figure


def looks_of(curves):
    """Index of each curve's look: that of its kind, the same in all figures, where no kind is there twice."""
    kinds = [curve.kind for curve in curves]
    fixed = [kind for kind in KINDS if kind != "central"]
    if len(set(kinds)) < len(kinds) or not set(kinds) <= set(fixed):
        return list(range(len(curves)))
    return [fixed.index(kind) for kind in kinds]


def points_figure(lines, references, ticks, position, field, x_label, y_label, title, setting, apart=()):
    """Percent `field` against a factor: a line per method, dots for the seeds, bars for their standard deviation.

    lines: list of lists of Curves; position(curve) -> x; ticks: [(x, text)], evenly spaced; references: Curves
    without the factor, drawn as horizontal lines; apart: positions that no line leads to. Lines stand side by side
    at a tick, so that no bar hides another.
    """
    figure, axes = new_figure(width=6.4, height=4.2 + 0.2 * math.ceil((len(lines) + len(references)) / 2))
    axis = axes[0, 0]
    step = min(0.12, 0.7 / len(lines))
    for i, (curves, k) in enumerate(zip(lines, looks_of([curves[0] for curves in lines]), strict=True)):
        shift = (i - (len(lines) - 1) / 2) * step
        curves = sorted(curves, key=position)
        values = {position(curve): 100 * curve.results(field) for curve in curves}
        joined = [x for x in values if x not in apart]
        look = {"color": COLORS[k % len(COLORS)], "marker": MARKERS[k % len(MARKERS)], "capsize": 3, "markersize": 6}
        for places, dash, text in ((joined, DASHES[k % len(DASHES)], curves[0].label), ([*apart], "", None)):
            places = [x for x in places if x in values]
            axis.errorbar(
                [x + shift for x in places],
                [values[x].mean() for x in places],
                yerr=[seed_spread(values[x]) for x in places],
                linestyle=dash,
                label=text,
                **look,
            )
        for x, seeds in values.items():
            if len(seeds) > 1:  # beside the bar
                beside = [x + shift + step / 2.5] * len(seeds)
                axis.plot(beside, seeds, ".", color=look["color"], markersize=4, zorder=3)
    reference_lines(axis, references, field)
    axis.set_xticks([x for x, _ in ticks], [text for _, text in ticks])
    axis.set_xlim(ticks[0][0] - 0.5, ticks[-1][0] + 0.5)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if max(map(len, labels)) > 44 else 2)
    every = [curve for curves in lines for curve in curves]
    caption(figure, f"{title}: {spread_text(every)}", setting, every)
    return figure


def reference_lines(axis, curves, field, vertical=False):
    """A line at the mean of each curve with a band of one standard deviation: what the others are measured by."""
    for curve in curves:
        values = 100 * curve.results(field)
        mean, spread = values.mean(), seed_spread(values)
        line, span = (axis.axvline, axis.axvspan) if vertical else (axis.axhline, axis.axhspan)
        look = {"color": GREY if curve.kind == "central" else "black", "linestyle": REFERENCE_DASHES[curve.kind]}
        line(mean, linewidth=1.3, zorder=1, label=f"{curve.label}: {mean:.1f} %", **look)
        if spread:
            span(mean - spread, mean + spread, color=GREY, alpha=0.15, linewidth=0, zorder=0)


def accuracy_label(at):
    return f"Test accuracy (%), {'last round' if at == 'last' else 'best validated round'}"


def seed_spread(values):
    """Sample standard deviation over seeds (n - 1 in the denominator); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread_text(curves):
    """`mean of 3 seeds, bars and bands: standard deviation, dots: seeds`, or a range of counts where they differ."""
    counts = sorted({len(curve.runs) for curve in curves})
    if counts == [1]:
        return "one seed"
    count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean of {count} seeds, bars and bands: standard deviation, dots: seeds"
