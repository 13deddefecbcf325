"""What all figures share: their command line, the look of a method, panels, lines with bands, captions, legends.

A study declares FIGURES: {name: (function, the runs that it needs, in words)}; function(runs, args, notes) yields
(file name, matplotlib's Figure) for each file. It takes the rows of the study's table (plots.rows.comparable).
A colour and a marker belong to a method, in all figures of a study; its variants differ in dash and filling, so that a
figure says the same in grey.

A band is one sample standard deviation over seeds each way. Paired differences and ratios have bars, their 95 %
t interval (plots.pairs).
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError, run_main
from common.curves import COLORS, DASHES, GREY, MARKERS, new_figure, save_figure, style
from plots.read import read

# ---- the command line


def main(study, figures, more=lambda parser: None):
    """The command line of a study's figures: `python plots/vit.py strategies gains --data-dir results`."""
    parser = Parser(f"Draws figures of {study.name}'s runs.")
    names = ", ".join(figures)
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=f"any of {names} (default: all that the runs allow)")
    parser.add_argument("--data-dir", nargs="+", default=["results"], help="folders with run folders, or logs")
    parser.add_argument("--out-dir", default="results/plots", help="folder for the figures")
    more(parser)
    run_main(lambda args: draw_figures(study, figures, args), parser.parse_args())


def draw_figures(study, figures, args):
    """Draws the figures that `args.names` asks for (all without names); prints what it wrote and left out.

    Raises UsageError for an unknown name and when nothing could be drawn.
    """
    if unknown := [name for name in args.names if name not in figures]:
        raise UsageError(f"no figure {unknown[0]!r} in {study.name}: choose from {', '.join(figures)}")
    notes, wrote, missing = [], [], []
    runs = read(args.data_dir, study, notes=notes)
    for name, figure in each_figure(figures, runs, args, notes, missing):
        wrote.append(save_figure(figure, Path(args.out_dir) / f"{name}.png"))
    for line in [*(f"wrote {path}" for path in wrote), *(dict.fromkeys([*missing, *notes]) if wrote else ())]:
        print(line)
    if not wrote:
        where = ", ".join(map(str, args.data_dir))
        raise UsageError(f"no figure could be drawn from {where}: {'; '.join(missing)}")


def each_figure(figures, runs, args, notes, missing):
    """Yields (file name, figure) inside `style()`: save it before the next; `missing` gets what could not be drawn."""
    for name in getattr(args, "names", None) or figures:
        function, needs = figures[name]
        count = 0
        with style():
            for count, drawn in enumerate(function(runs, args, notes), 1):  # noqa: B007
                yield drawn
        if not count:
            missing.append(f"not drawn: {name} needs {needs}")


def numbered(stem, figures):
    """(file name, figure) of several figures of a kind: the first has the plain name, further ones a number."""
    for i, figure in enumerate(figures, 1):
        yield stem + (f"_{i}" if i > 1 else ""), figure


# ---- captions and legends


def seeds_range(rows):
    """`3`, or `1 to 3` where rows have different numbers of seeds."""
    counts = [len(row.runs) for row in rows]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def legend_below(figure, axes):
    """One legend of all axes below the panels, as many columns as fit (at most four)."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    columns = max(1, min(4, len(entries), int(figure.get_figwidth() * 13 / (max(map(len, entries)) + 9))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(entries) / columns) - 1))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


# ---- looks


def looks_of(rows):
    """{label: colour, marker, dash, filling} of rows, those of their method's place in its study.

    Further variants of a method have the next dashes and open markers; central training is grey.
    """
    looks, seen = {}, Counter()
    for row in rows:
        federated = [kind for kind in row.study.kinds if kind not in row.study.central]
        i = federated.index(row.kind) if row.kind in federated else len(federated)
        if row.label not in looks:
            own = {"color": GREY, "marker": "*"} if row.central else {}
            looks[row.label] = look(0 if row.central else i, seen[row.kind]) | own
            seen[row.kind] += 1
    return looks


def look(i, variant=0):
    """Colour, marker and dash of place `i`; of its variants other dashes and open markers."""
    # places COLORS apart have one colour: the dash is shifted there, so that dash and colour never agree
    dash = DASHES[(i + i // len(DASHES) + variant) % len(DASHES)]
    filling = {"markerfacecolor": "white"} if variant else {}
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": dash} | filling


# ---- panels and what lies in them


def panel_axes(count, wide=None, width=None, height=2.9, extra=1.5, **kwargs):
    """A figure with `count` axes in rows of at most `wide` (3; four make a square): (figure, list of axes).

    height: of a row of panels, extra: of title and legend, inches.
    """
    wide = min(wide or (2 if count == 4 else 3), count)
    rows, width = math.ceil(count / wide), width or {1: 6.4, 2: 8.4}.get(wide, 3.5 * wide + 0.4)
    figure, axes = new_figure(rows, wide, width=width, height=height * rows + extra, **kwargs)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def band(axis, x, values, label, look, alpha=0.1):
    """The mean of values [S, E] over x [E], about six markers on it, and a band of a standard deviation each way."""
    mean, spread = values.mean(axis=0), np.std(values, axis=0, ddof=1) if len(values) > 1 else 0.0
    axis.plot(x, mean, label=label, markevery=max(1, len(x) // 6), **look)
    axis.fill_between(x, mean - spread, mean + spread, color=look["color"], alpha=alpha, linewidth=0)


def whole_numbers(axis):
    """Makes a matplotlib axis (`axes.xaxis`) have ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
