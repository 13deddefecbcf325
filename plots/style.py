"""What all figures share: their command line, the look of a method, panels, lines with bands, captions, legends.

A study declares FIGURES: {name: (function, the runs that it needs, in words)}; function(runs, args, notes) yields
(file name, matplotlib's Figure) for each file. It takes the rows of the study's table (plots.tables.grouped, rows_of).
A look (colour, marker, dash) follows the method, the same in all figures of a study; its variants differ in dash and
filling, so that a figure says the same in grey. Bands and bars of seeds are one standard deviation each way.
"""

import math
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError
from common.curves import COLORS, DASHES, GREY, MARKERS, new_figure, save_figure, set_title, style
from plots.read import read
from plots.rows import describe, differing, usual, with_settings

REFERENCE = {"color": GREY, "linestyle": (0, (6, 2))}  # a line that others are measured by


# ---- the command line


def figure_parser(study, figures, more=lambda parser: None):
    """The parser of a study's script: `python plots/vit.py curves gains --data-dir results`."""
    parser = Parser(f"Draws figures of {study.name}'s runs.")
    names = ", ".join(figures)
    parser.add_argument("names", nargs="*", metavar="FIGURE", help=f"any of {names} (default: all that the runs allow)")
    parser.add_argument("--data-dir", nargs="+", default=["results"], help="folders with run folders, or logs")
    parser.add_argument("--out-dir", default="results/plots", help="folder for the figures")
    parser.add_argument("--format", choices=["png", "pdf"], default="png", help="of the files")
    more(parser)
    return parser


def draw_figures(study, figures, args):
    """Draws the figures that `args.names` asks for (all without names); prints what it wrote and left out.

    Raises UsageError for an unknown name and when nothing could be drawn.
    """
    if unknown := [name for name in args.names if name not in figures]:
        raise UsageError(f"no figure {unknown[0]!r} in {study.name}: choose from {', '.join(figures)}")
    notes, wrote, missing = [], [], []
    runs = read(args.data_dir, study, notes=notes)
    for name, figure in each_figure(study, figures, runs, args, notes, missing):
        wrote.append(save_figure(figure, Path(args.out_dir) / f"{name}.{args.format}"))
    for line in [*(f"wrote {path}" for path in wrote), *(dict.fromkeys([*missing, *notes]) if wrote else ())]:
        print(line)
    if not wrote:
        where = ", ".join(map(str, args.data_dir))
        raise UsageError(f"no figure could be drawn from {where}: {'; '.join(missing)}")


def each_figure(study, figures, runs, args, notes, missing):
    """Yields (file name, figure) inside `style()`: save it before the next; `missing` gets what could not be drawn."""
    runs = with_settings(runs, study)
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


def caption(figure, title, setting, rows):
    """The title over a figure: what it shows, the setting that all share, what its labels leave unsaid, budgets."""
    study, shared = rows[0].study, usual(rows)
    words = [title, describe(study, setting), f"unless said otherwise: {shared}" if shared else ""]
    if ends := differing([row for row in rows if not row.central], study.budget):
        words.append(f"{study.budget} differ: {ends[0]:,.0f} to {ends[1]:,.0f}")
    set_title(figure, "\n".join(filter(None, words)))


def seeds_text(rows, shown="band: standard deviation"):
    """`mean of 3 seeds, band: standard deviation`; `one seed`."""
    count = seeds_range(rows)
    return "one seed" if count == "1" else f"mean of {count} seeds, {shown}"


def seeds_range(rows):
    """`3`, or `1 to 3` where rows have different numbers of seeds."""
    counts = sorted({len(row.runs) for row in rows})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def legend_below(figure, axes):
    """One legend of all axes below the panels, as many columns as fit (at most four)."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    columns = max(1, min(4, len(entries), int(figure.get_figwidth() * 13 / (max(map(len, entries)) + 9))))
    figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(entries) / columns) - 1))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


def folded(title, letters=42):
    """A panel's title on lines of at most so many letters."""
    return textwrap.fill(title, letters)


# ---- looks


def looks_of(rows):
    """{label: colour, marker, dash, filling} of rows, by their method.

    Colour and marker are those of the kind's place in its study; further variants of a kind have the next dashes and
    open markers. In a figure of one kind its rows have looks of their own, in their order.
    """
    factor = len({row.kind for row in rows if not row.central}) == 1
    looks, seen = {}, Counter()
    for row in rows:
        kinds = [kind for kind in row.study.kinds if kind not in row.study.central]
        i = kinds.index(row.kind) if row.kind in kinds else len(kinds)
        variant = seen[row.kind]
        own = look(0, variant) | {"color": GREY, "marker": "*"} if row.central else None
        if row.label not in looks:
            looks[row.label] = own or (look(i + variant) if factor else look(i, variant))
            seen[row.kind] += 1
    return looks


def look(i, variant=0):
    """Colour, marker and dash of place `i`; of its variants other dashes and open markers."""
    # places COLORS apart have one colour: the dash is shifted there, so that dash and colour never agree
    dash = DASHES[(i + i // len(DASHES) + variant) % len(DASHES)]
    filling = {"markerfacecolor": "white"} if variant else {}
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": dash} | filling


def markers_at(i, points, lines):
    """`markevery` of line `i` of `lines`: about six markers a line, not at the same points for all."""
    every = max(1, points // 6)
    return (i * every // max(1, lines)) % every, every


# ---- panels and what lies in them


def panel_axes(count, wide=None, width=None, height=2.9, extra=1.5, **kwargs):
    """A figure with `count` axes in rows of at most `wide` (3; four make a square): (figure, list of axes).

    height: of a row of panels, extra: of title and legend, inches.
    """
    wide = min(wide or (2 if count == 4 else 3), count)
    rows = math.ceil(count / wide)
    width = width or (6.4 if wide == 1 else 4.0 * wide + 0.4 if wide < 3 else 3.5 * wide + 0.4)
    figure, axes = new_figure(rows, wide, width=width, height=height * rows + extra, **kwargs)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def band(axis, x, values, label, look, every=None, spread="sd", alpha=0.1):
    """The mean of values [S, E] over x [E] and a band: one sample standard deviation each way, or spread="range"."""
    mean = values.mean(axis=0)
    axis.plot(x, mean, label=label, markevery=every, **look)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        if spread == "sd":
            low, high = mean - values.std(axis=0, ddof=1), mean + values.std(axis=0, ddof=1)
        axis.fill_between(x, low, high, color=look["color"], alpha=alpha, linewidth=0)


def draw_rounds(axis, rows, looks, name, factor=1.0):
    """A line with its band per row: `factor` * field `name` against the round."""
    for i, row in enumerate(rows):
        at, values = row.rounds(name)
        if values.size:
            band(axis, at, factor * values, row.label, looks[row.label], markers_at(i, len(at), len(rows)))
    axis.set_xlim(left=0)
    whole_numbers(axis.xaxis)
    axis.set_xlabel("Round")


def seed_spread(values):
    """Sample standard deviation over seeds (n - 1 in the denominator); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def whole_numbers(axis):
    """Makes a matplotlib axis (`axes.xaxis`) have ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def heat_map(axis, values, low, high, colors="cividis"):
    """A heat map of a (masked) array [rows, columns], white where it is masked. Returns the image."""
    from matplotlib import colormaps

    colors = (colormaps[colors] if isinstance(colors, str) else colors).with_extremes(bad="white")
    shown = np.ma.masked_array(values)
    image = axis.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.grid(False)
    return image
