"""Figures of several panels, as lora_glue_fl and llm_noniid have: a panel a setting, one legend, one caption."""

from dataclasses import dataclass, field

import numpy as np

from common.curves import new_figure, round_ticks, set_title
from plots.runs import describe
from plots.seeds import lines_of
from plots.style import budgets, legend_below, looks_of, panel_axes, seed_spread, seeds_range, seeds_text


@dataclass
class Panel:
    """Curves in one setting, central ones to refer to, what tells the panel from the figure's others."""

    setting: dict
    curves: list
    references: list = field(default_factory=list)
    title: str = ""


def all_curves(panels):
    return [curve for panel in panels for curve in panel.curves]


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
        axis.set_title(panel.title + seeds, fontsize=9.5)


def finish(figure, axes, title, setting, keys, panels, spread="bands", lines=(), where=""):
    """The legend of all panels below them; over them the title, the setting in words over `keys`, budgets, `lines`.

    where: said before the number of seeds.
    """
    curves = all_curves(panels)
    legend_below(figure, axes)
    seeds = where + seeds_text(curves, f"{spread}: standard deviation")
    about = describe(curves[0].study, setting, keys)
    set_title(figure, "\n".join(filter(None, [f"{title}: {seeds}", about, budgets(curves), *lines])))
    return figure


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


def plain_ticks(axis, low, high, most=8):
    """Plain numbers at round places of a logarithmic matplotlib axis (`axes.xaxis`)."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(round_ticks(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


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
