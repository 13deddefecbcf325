"""What all figures share: their command line, the look of a method, panels, lines with bands, captions, legends.

A study declares its figures: {name on the command line: [Figure, ...]}. `draw_figures` selects the runs of each,
draws and saves it, and says in its caption which runs it leaves out; `caption` adds budgets that differ. A look
(colour, marker, dash) follows the method, the same in all figures of a study; variants of a method and values of a
factor differ in dash and filling, so that a figure says the same in grey.
"""

import math
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError
from common.curves import COLORS, DASHES, GREY, MARKERS, new_figure, save_figure, set_title, style
from plots.runs import describe, like_with_like, read_runs, shared_setting, suffixes
from plots.seeds import differing, lines_of, usual

NAMED = 3  # runs that a caption names; the others it counts, the output names all
BANDS, BARS = "bands: standard deviation", "bars: standard deviation"


@dataclass(frozen=True)
class Figure:
    """One kind of file that a study draws; a study's FIGURES has, by name, lists of them or functions (runs, args).

    select(runs, notes) -> list[(setting, what to draw)], appending LeftOut to `notes` (see `each_group`);
    draw(setting, what, args) -> matplotlib's Figure, called inside `style()`; needs: the runs that it needs, in words.
    """

    file: str
    select: Callable
    draw: Callable
    needs: str


# ---- the command line


def figure_parser(study, figures, more=lambda parser: None):
    """The parser of a study's script: `python plots/vit.py heterogeneity sparsity --data-dir results`."""
    parser = Parser(f"Draws figures of {study.name}'s runs.")
    parser.add_argument(
        "names", nargs="*", metavar="FIGURE", help=f"any of {', '.join(figures)} (default: all that the runs allow)"
    )
    parser.add_argument("--data-dir", nargs="+", default=["results"], help="folders with run folders, or logs")
    parser.add_argument("--out-dir", default="results/plots", help="folder for the figures")
    parser.add_argument("--format", choices=["png", "pdf"], default="png", help="of the files")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    more(parser)
    return parser


def draw_figures(study, figures, args, keys=None):
    """Draws the figures that `args.names` asks for (all without names) and prints what it wrote and left out.

    Raises UsageError for an unknown name and when nothing could be drawn.
    """
    unknown = [name for name in args.names if name not in figures]
    if unknown:
        raise UsageError(f"no figure {unknown[0]!r} in {study.name}: choose from {', '.join(figures)}")
    runs, notes = read_runs(args.data_dir, study, unfinished=args.unfinished)
    missing, wrote = [], []
    chosen = [figures[name] for name in args.names or figures]
    for stem, figure in each_figure(chosen, runs, notes, missing, args, keys or study.keys, strict=bool(args.names)):
        wrote.append(save_figure(figure, Path(args.out_dir) / f"{stem}.{args.format}"))
    said = dict.fromkeys([*(f"not drawn: {text}" for text in missing), *map(str, notes)])
    for line in [*(f"wrote {path}" for path in wrote), *(said if wrote else ())]:
        print(line)
    if not wrote:
        where = ", ".join(map(str, args.data_dir))
        raise UsageError(f"no figure could be drawn from {where}: {'; '.join(missing)}")


def each_figure(declared, runs, notes, missing, args, keys, strict=False):
    """Yields (file name without suffix, matplotlib's Figure) inside `style()`; save it before the next one.

    declared: values of a study's FIGURES; notes: LeftOut of the reading, to which each figure's are added; missing:
    gets what could not be drawn and why; keys: of the setting, for the names of further files; strict: a damaged file
    raises UsageError.
    """
    read = list(notes)
    figures = [figure for some in declared for figure in (some(runs, args) if callable(some) else some)]
    for figure in figures:
        more = []
        try:
            chosen = figure.select(runs, more)
            if not chosen:
                missing.append(f"{figure.file}.{args.format} needs {figure.needs}")
            for (setting, what), suffix in zip(chosen, suffixes([s for s, _ in chosen], keys), strict=True):
                with style():
                    drawn = figure.draw(setting, what, args)
                    add_left_out(drawn, [*read, *(note for note in more if note.setting in (None, setting))])
                    yield f"{figure.file}{suffix}", drawn
        except UsageError as error:
            if strict:
                raise
            missing.append(f"{figure.file}.{args.format}: {error}")
        notes += [note for note in more if note not in notes]


def each_group(choose, free=(), keep=lambda run: True):
    """A Figure's select, of the runs that `keep` takes: of each group that agrees but for `free` what is drawn.

    choose(runs, notes) -> what to draw, if anything; what it leaves out is said of the group's figure only.
    """

    def select(runs, notes):
        chosen = []
        for setting, members in like_with_like([run for run in runs if keep(run)], free):
            left_out = []
            if what := choose(members, left_out):
                chosen.append((setting, what))
                notes += [replace(note, setting=setting) for note in left_out]
        return chosen

    return select


# ---- captions and legends


def caption(figure, title, setting, curves, unsaid=True):
    """The title over a figure: what it shows, the setting that all share, what its labels leave unsaid, budgets.

    unsaid: False where the labels say all.
    """
    words = [title, describe(curves[0].study, shared_setting(setting, curves))]
    if unsaid and (shared := usual(curves)):
        words.append(f"unless said otherwise: {shared}")
    set_title(figure, "\n".join(filter(None, [*words, budgets(curves)])))


def budgets(curves):
    """`rounds differ: 15 to 30`; "" if no budget does. A central run's round is another thing: it is not among them."""
    words = []
    for name in curves[0].study.budgets:
        if ends := differing([c for c in curves if not (c.central and name == "rounds")], name):
            words.append(f"{name.replace('_', ' ')} differ: {ends[0]:,.0f} to {ends[1]:,.0f}")
    return ", ".join(words)


def add_left_out(figure, notes):
    """Adds to a figure's title which runs it leaves out; the first NAMED by name."""
    names = list(dict.fromkeys(note.name for note in notes))
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        line = textwrap.fill(f"left out: {'; '.join(names[:NAMED])}{more}", int(figure.get_figwidth() * 14))
        figure.suptitle(f"{figure.get_suptitle()}\n{line}", fontsize=9.5)


def seeds_range(curves):
    """`3`, or `1 to 3` where curves have different numbers of seeds."""
    counts = sorted({len(curve.runs) for curve in curves})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def seeds_text(curves, shown="band: minimum to maximum"):
    """`mean of 3 seeds, band: minimum to maximum`; `one seed`."""
    count = seeds_range(curves)
    return "one seed" if count == "1" else f"mean of {count} seeds, {shown}"


def legend_below(figure, axes, columns=None):
    """One legend of all axes below the panels, as many columns as fit (at most four)."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    if columns is None:
        widest = max(map(len, entries))
        columns = max(1, min(4, len(entries), int(figure.get_figwidth() * 13 / (widest + 9))))
        figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(entries) / columns) - 1))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)


# ---- looks


def looks_of(curves):
    """{label: colour, marker, dash, filling} of curves, by their method.

    Colour and marker are those of the kind's place in its study. Where a figure has several variants of a kind, the
    first has the kind's dash, the others the next ones and open markers. Where it has one kind only, as in a figure of
    a factor, its values have looks of their own, in their order.
    """
    factor = len({curve.kind for curve in curves if not curve.central}) == 1
    looks, seen = {}, Counter()
    for curve in curves:
        if curve.label in looks:
            continue
        variant = seen[curve.kind]
        seen[curve.kind] += 1
        kinds = [kind for kind in curve.study.kinds if kind not in curve.study.central]
        i = kinds.index(curve.kind) if curve.kind in kinds else len(kinds)
        if curve.central:
            looks[curve.label] = look(0, variant) | CENTRAL
        else:
            looks[curve.label] = look(i + variant) if factor else look(i, variant)
    return looks


CENTRAL = {"color": GREY, "marker": "*"}  # a curve of it; as a line to refer to:
REFERENCES = {True: {"color": GREY, "linestyle": (0, (6, 2))}, False: {"color": "black", "linestyle": (0, (2, 1.5))}}


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


# ---- panels


@dataclass
class Panel:
    """Curves in one setting, central ones to refer to, what tells the panel from the figure's others."""

    setting: dict
    curves: list
    references: list = field(default_factory=list)
    title: str = ""


def all_curves(panels):
    return [curve for panel in panels for curve in panel.curves]


def panel_axes(count, wide=None, width=None, height=2.9, extra=1.5, **kwargs):
    """A figure with `count` axes in rows of at most `wide`: (figure, list of axes). Cells without a panel are blank.

    wide: by default 3, and four panels make a square; height: of a row of panels, extra: of title and legend, inches.
    """
    wide = min(wide or (2 if count == 4 else 3), count)
    rows = math.ceil(count / wide)
    if width is None:
        width = 6.4 if wide == 1 else 4.0 * wide + 0.4 if wide < 3 else 3.5 * wide + 0.4
    figure, axes = new_figure(rows, wide, width=width, height=height * rows + extra, **kwargs)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def axes_of(panels, height=2.9, extra=1.5, places=(), **kwargs):
    """A figure with a titled axis for every panel: (figure, list of axes, in the panels' order).

    places: (row, column) names of each panel: they make a grid where that leaves few gaps, else rows of three panels.
    """
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True)) if places else ((), ())
    grid = min(len(rows), len(columns)) > 1 and len(columns) <= 4 and len(set(places)) == len(panels)
    if grid and 3 * len(panels) >= 2 * len(rows) * len(columns):
        width = (4.0 if len(columns) < 3 else 3.5) * len(columns) + 0.4
        figure, axes = new_figure(len(rows), len(columns), width=width, height=height * len(rows) + extra, **kwargs)
        cells = [(rows.index(row), columns.index(column)) for row, column in places]
        for cell in np.ndindex(*axes.shape):
            if cell not in cells:
                axes[cell].set_axis_off()
        chosen = [axes[cell] for cell in cells]
    else:
        figure, chosen = panel_axes(len(panels), height=height, extra=extra, **kwargs)
    title_panels(chosen, panels)
    for axis in chosen:
        axis.tick_params(labelleft=True)
    return figure, chosen


def title_panels(axes, panels):
    """Each panel's title, with its number of seeds where panels differ in that."""
    counts = [seeds_range(panel.curves) for panel in panels]
    for axis, panel, count in zip(axes, panels, counts, strict=True):
        seeds = f" ({count} seed{'s' * (count != '1')})" if len(set(counts)) > 1 else ""
        axis.set_title(textwrap.fill(panel.title + seeds, 42), fontsize=9.5)


def finish(figure, axes, title, setting, keys, panels, spread=BANDS, lines=(), where=""):
    """The legend of all panels below them; over them the title, the setting in words over `keys`, budgets, `lines`.

    spread: what shows how far seeds lie apart; where: said before the number of seeds.
    """
    curves = all_curves(panels)
    legend_below(figure, axes)
    seeds = where + seeds_text(curves, spread)
    about = describe(curves[0].study, setting, keys)
    set_title(figure, "\n".join(filter(None, [f"{title}: {seeds}", about, budgets(curves), *lines])))
    return figure


# ---- lines, points, maps


def band(axis, x, values, label, look, every=None, spread="sd", alpha=0.1):
    """The mean of values [S, E] over x [E] and a band: +- one sample standard deviation, or spread="range"."""
    mean = values.mean(axis=0)
    axis.plot(x, mean, label=label, markevery=every, **look)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        if spread == "sd":
            sd = values.std(axis=0, ddof=1)
            low, high = mean - sd, mean + sd
        axis.fill_between(x, low, high, color=look["color"], alpha=alpha, linewidth=0)


def draw_rounds(axis, curves, looks, name, factor=1.0, x="round", x_factor=1.0, spread="sd", alpha=0.1):
    """A line with its band per curve: `factor` * field `name` against the round (or the field `x`)."""
    for i, curve in enumerate(curves):
        at, values = curve.evaluated(name, x)
        if len(at):
            every = markers_at(i, len(at), len(curves))
            band(axis, x_factor * at, factor * values, curve.label, looks[curve.label], every, spread, alpha)
    axis.set_xlim(left=0)
    if x == "round":
        whole_numbers(axis.xaxis)
        axis.set_xlabel("Round")


def reference_lines(axis, curves, name, factor=1.0, words="{}", vertical=False, looks=None):
    """A line at the mean result of each curve with a band of one standard deviation: what others are measured by.

    words: `{}` for the curve's label, `{:..}` after it for the mean; looks: {label: look} instead of REFERENCES, which
    tells central curves from others. A curve with a value that is not finite has no line.
    """
    for curve in curves:
        values = factor * curve.results(name)
        if not len(values) or not np.isfinite(values).all():
            continue
        mean, sd = values.mean(), seed_spread(values)
        line, span = (axis.axvline, axis.axvspan) if vertical else (axis.axhline, axis.axhspan)
        own = looks[curve.label] if looks else REFERENCES[curve.central]
        line(mean, linewidth=1.4, zorder=1, label=words.format(curve.label, mean), **own)
        if sd:
            span(mean - sd, mean + sd, color=GREY, alpha=0.14, linewidth=0, zorder=0)


def seed_spread(values):
    """Sample standard deviation over seeds (n - 1 in the denominator); 0 for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def whole_numbers(axis):
    """Makes a matplotlib axis (`axes.xaxis`) have ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def bars(axis, at, values, always=True, **look):
    """The mean of each array of `values` (a number a seed) at the places `at`, with a bar of one standard deviation.

    always: bars of no length too.
    """
    spreads = [seed_spread(v) for v in values]
    axis.errorbar(at, [np.mean(v) for v in values], spreads if always or any(spreads) else None, **look)


def draw_along(axis, curves, values_of, tick_of, order_of, hidden=()):
    """Bars at evenly spaced places, a line per method, side by side so that no bar hides another.

    values_of(curve) -> [S]; tick_of(curve) -> the text of its place; order_of(curve) -> a sort key of it; hidden:
    labels of curves without a line.
    """
    places = {tick_of(curve): order_of(curve) for curve in curves}
    ticks = sorted(places, key=places.get)
    lines = [line for line in lines_of(curves) if line[0].label not in hidden]
    step, looks = min(0.1, 0.5 / max(1, len(lines))), looks_of([line[0] for line in lines])
    for i, line in enumerate(lines):
        values = {ticks.index(tick_of(curve)): values_of(curve) for curve in line}
        at = [x for x in sorted(values) if np.isfinite(values[x]).all()]
        x = [place + (i - (len(lines) - 1) / 2) * step for place in at]
        name = line[0].label
        bars(axis, x, [values[place] for place in at], label=name, capsize=3, markersize=6, **looks[name])
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_xlim(-0.5, len(ticks) - 0.5)


def sideways(count):
    """[count] places from -0.5 to 0.5 that part dots of equal height, always the same."""
    return np.arange(count) * 0.618 % 1 - 0.5


def name_places(axis, labels, **kwargs):
    """Named places 0, 1, ... on the x axis, without lines between them."""
    axis.set_xticks(range(len(labels)), labels, fontsize=8, **kwargs)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.grid(False, axis="x")


def heat_map(axis, values, low, high, form=None, colors="cividis", fontsize=5.5, dark_high=False):
    """A heat map of a (masked) array [rows, columns], white where it is masked. Returns the image.

    form(i, j) -> the number in a cell; dark_high: high values are dark.
    """
    from matplotlib import colormaps

    shown = np.ma.masked_array(values)
    colors = (colormaps[colors] if isinstance(colors, str) else colors).with_extremes(bad="white")
    image = axis.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.grid(False)
    for i, j in np.argwhere(~np.ma.getmaskarray(shown)) if form else ():
        dark = (shown[i, j] > (low + high) / 2) == dark_high
        look = {"ha": "center", "va": "center", "fontsize": fontsize, "color": "white" if dark else "black"}
        axis.text(j, i, form(i, j), **look)
    return image
