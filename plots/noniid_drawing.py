"""What the figures of llm_noniid share: their scripts' flags, panels, looks, lines over rounds, marks of alarms."""

import math

import numpy as np

from common.curves import COLORS, DASHES, GREY, MARKERS, new_figure, set_title
from plots import vit_drawing
from plots.deltas import whole_numbers
from plots.glue_drawing import band, markers_at, seeds_range
from plots.glue_runs import evaluated
from plots.noniid_runs import FEDERATED, describe, find_runs, first_alarms, suffixes
from plots.vit_drawing import seed_spread

REFERENCE = {"color": GREY, "linestyle": (0, (6, 2))}
CENTRAL = {**REFERENCE, "marker": "*"}
# detector -> what stands on a curve where it first spoke, and in the caption
ALARMS = {
    "diverged": ("Dv", "diverged"),
    "oscillating": ("Os", "oscillating"),
    "drifting": ("Dr", "drifting"),
    "slow": ("Sl", "slow"),
    "left_out": ("Lo", "updates left out"),
}
# a curve's marker as a letter, so that an alarm's mark says in grey, too, whose it is
SYMBOLS = dict(zip(MARKERS, "\u25cf\u25a0\u25b2\u25c6\u25bc\u271a\u2716\u25c0\u25b6", strict=True))
OFF_SCALE = 2.5  # a curve may take so many times the height of the usual one before it leaves the axis


def figure_parser(description):
    """The parser of a script that draws figures of llm_noniid."""
    return vit_drawing.figure_parser(description)


def draw_all(args, figures):
    """`vit_drawing.draw_all` of this study's runs."""
    vit_drawing.draw_all(args, figures, find_runs, suffixes)


def panel_axes(panels, height=2.9, wrap=3, share_y=True):
    """A figure with an axis for every panel: (figure, list of axes, in the panels' order)."""
    wide = 2 if len(panels) == 4 else min(wrap, len(panels))
    rows = math.ceil(len(panels) / wide)
    width = 6.4 if wide == 1 else 4.0 * wide + 0.4 if wide < 3 else 3.5 * wide + 0.4
    figure, axes = new_figure(rows, wide, width=width, height=height * rows + 1.5, sharey=share_y)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for i, axis in enumerate(axes.flat[: len(panels)]):
        title_panel(axis, panels[i], panels)
        axis.tick_params(labelleft=True)
    return figure, list(axes.flat[: len(panels)])


def title_panel(axis, panel, panels):
    """The panel's title, with its number of seeds where the panels differ in that."""
    counts = [seeds_range(p.curves) for p in panels]
    count = seeds_range(panel.curves)
    seeds = f" ({count} seed{'s' * (count != '1')})" if len(set(counts)) > 1 else ""
    axis.set_title(panel.title + seeds, fontsize=9.5)


def looks_of(panels):
    """label -> colour, dash and marker of each curve in the panels: a kind's own, the same in all figures.

    A variant of a kind, which has more words in its label, takes one that no kind has; so do the values of a factor.
    """
    looks, more = {}, len(FEDERATED)
    factor = not any(curve.label == curve.name for panel in panels for curve in panel.curves)
    for panel in panels:
        for curve in panel.curves:
            if curve.label in looks:
                continue
            if curve.central:
                looks[curve.label] = CENTRAL
                continue
            if curve.label == curve.name and curve.kind in FEDERATED:
                i = FEDERATED.index(curve.kind)
            else:
                i, more = (len(looks), more) if factor else (more, more + 1)
            looks[curve.label] = {
                "color": COLORS[i % len(COLORS)],
                "linestyle": DASHES[(i + i // len(DASHES)) % len(DASHES)],
                "marker": MARKERS[i % len(MARKERS)],
            }
    return looks


def draw_rounds(axis, curves, looks, name):
    """A line per curve: its mean over seeds against rounds, a band of +- one sample standard deviation."""
    for i, curve in enumerate(curves):
        rounds, values = evaluated(curve, name)
        if len(rounds):
            band(axis, rounds, values, curve.label, markers_at(i, len(rounds), len(curves)), looks[curve.label])
    axis.set_xlim(left=0)
    whole_numbers(axis.xaxis)
    axis.set_xlabel("Round")


def draw_references(axis, curves, name):
    """A horizontal line at the last value of each central curve, with a band of +- one standard deviation."""
    for curve in curves:
        values = curve.results(name)
        if not np.isfinite(values).all():
            continue
        mean, spread = values.mean(), seed_spread(values)
        axis.axhline(mean, linewidth=1.4, zorder=1, label=f"{curve.label}, last round", **REFERENCE)
        if spread:
            axis.axhspan(mean - spread, mean + spread, color=GREY, alpha=0.13, linewidth=0, zorder=0)


def keep_on_scale(axes, panels, name):
    """Ends the y axes (all the same) where a curve that diverges would press the others together.

    At the lowest value + OFF_SCALE times the usual curve's height; an arrow shows where a curve leaves. Returns the
    number of curves that leave.
    """
    series = [(axis, *evaluated(curve, name)) for axis, p in zip(axes, panels, strict=True) for curve in p.curves]
    means = [(axis, rounds, values.mean(axis=0)) for axis, rounds, values in series]
    means = [(axis, rounds, mean) for axis, rounds, mean in means if np.isfinite(mean).any()]
    if not means:
        return 0
    low = min(np.nanmin(mean) for _, _, mean in means)
    tops = [np.nanmax(mean) for _, _, mean in means]
    limit = low + OFF_SCALE * max(np.median(tops) - low, 1e-3 * abs(low))
    if max(tops) <= limit:
        return 0
    bottom = axes[0].get_ylim()[0]
    pad = 0.04 * (limit - low)
    for axis in axes:
        axis.set_ylim(max(bottom, low - pad), limit + pad)
    for axis, rounds, mean in means:
        above = np.flatnonzero(mean > limit)
        if len(above):
            i = above[0]
            before = i > 0 and np.isfinite(mean[i - 1])
            share = (limit + pad - mean[i - 1]) / (mean[i] - mean[i - 1]) if before else 1.0
            x = rounds[i] - (1 - min(share, 1.0)) * (rounds[i] - rounds[i - 1]) if before else rounds[i]
            axis.annotate(
                "",
                (x, limit + pad),
                (x, limit - 2 * pad),
                arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0},
                annotation_clip=False,
            )
    return sum(top > limit for top in tops)


def mark_alarms(axis, curves, looks, name, size):
    """Each detector's first alarm as its letters on the mean curve, at the median round of the seeds that have it.

    `Dr 2/3`: in two of three seeds. size: the axis in points (width, height), for marks that do not hide each other.
    Returns the detectors that spoke. Call it once the axis' limits stand.
    """
    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    placed, spoke = [], []
    for curve in curves:
        rounds, values = evaluated(curve, name)
        mean = values.mean(axis=0) if len(rounds) else np.array([])
        known = np.isfinite(mean)
        for detector, times in first_alarms(curve).items():
            t = float(np.median(times))
            y = float(np.interp(t, rounds[known], mean[known])) if known.any() else y1
            y = min(max(y, y0), y1)
            letters = ALARMS.get(detector, (detector[:2].title(), ""))[0]
            n, seeds = len(times), len(curve.runs)
            look = looks[curve.label]
            words = f"{SYMBOLS.get(look['marker'], '')} {letters}" + (f" {n}/{seeds}" if n < seeds else "")
            at = np.array([(t - x0) / (x1 - x0) * size[0], (y - y0) / (y1 - y0) * size[1]])
            step = 10 if y < (y0 + y1) / 2 else -10  # towards the middle
            spot = at + [0, step]
            while any(abs(spot[0] - p[0]) < 5 * len(words) and abs(spot[1] - p[1]) < 10 for p in placed):
                spot = spot + [0, step]
            placed.append(spot)
            spoke.append(detector)
            color, where = look["color"], {"textcoords": "offset points", "annotation_clip": False}
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (t, y), tuple(spot - at), arrowprops=line, zorder=4, **where)
            box = {"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": color, "linewidth": 0.9}
            center = {"ha": "center", "va": "center", "fontsize": 6.5}
            axis.annotate(words, (t, y), tuple(spot - at), bbox=box, zorder=6, **center, **where)
    return spoke


def alarm_words(spoke):
    """`first alarms: Dr drifting, Sl slow (2/3: in two of three seeds)` for a caption; empty without any."""
    names = [" ".join(words) for detector, words in ALARMS.items() if detector in spoke]
    names += sorted({f"{d[:2].title()} {d}" for d in spoke if d not in ALARMS})
    return f"first alarms: {', '.join(names)} (n/m: in n of m seeds)" if names else ""


def finish(figure, axes, title, setting, notes=()):
    """One legend below all panels, the title over them with what they have in common and further lines."""
    entries = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        widest = max(map(len, entries))
        columns = max(1, min(5, len(entries), int(figure.get_figwidth() * 13 / (widest + 9))))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
        figure.set_figheight(figure.get_figheight() + 0.2 * (math.ceil(len(entries) / columns) - 1))
    set_title(figure, "\n".join([title, describe(setting), *filter(None, notes)]))
