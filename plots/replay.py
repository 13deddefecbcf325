"""vit_sparse_fl's interference replay: what the others lose at equal gain, client by client.

plots/vit.py has the study. At a checkpoint every method has trained the same client at several rates, so that each has
a curve of the others' loss over the client's own gain. Compared are the areas under two curves over the gains that both
reach (and dense training and `shorter` too, so that all cells of a row are of the same gains), summed over a split's
clients and checkpoints: others may gain, and small gains weigh little. A split's value is the logarithm of the ratio of
two such sums, and splits are what a t test counts. `shorter` is dense training's update at the run's rate, scaled: what
the length of a step alone does. Lengths are compared in the same way.

python plots/vit.py replay --data-dir vit_sparse_fl/results/replay.jsonl        # the ratios, a panel a federation
"""

import math

import numpy as np

from common.curves import GREY, break_lines, set_title
from plots.pairs import after_holm, compared, estimate
from plots.style import panel_axes

LEAST = 0.1  # nats of gain: below, a client's curve is noise of 64 images
DENSE, SHORTER = "dense", "shorter"
NAMES = {
    "topk": "Top-k updates",
    "least_per_layer": "Least sensitive, layer threshold",
    SHORTER: "Dense, one update scaled",
}
OTHERS, DRIFT, CUBIC = 1, 2, 3
SHOWN = 2.0  # the figure's largest ratio: beyond it an arrow and the number


def curve(rows, j):
    """[3, n] client j's gains, and of each the others' loss and the update's length over the gain: from the first
    gain on, with the factor, as long as the gain rises."""
    points = []
    for row in sorted(rows, key=lambda row: row["factor"]):
        gain, *values = (row[name][j] for name in ("gain", "others", "drift"))
        if gain is None or None in values or (points and gain <= points[-1][0]):
            break
        if gain > 0:
            points.append((gain, *(value / gain for value in values)))
    return np.array(points or np.empty((0, 3))).T


def areas(curves):
    """[curves, 4] areas under each curve over the gains that all reach, from LEAST on: of the gain itself, the others'
    loss, the length, and the others' loss along cubic curves; None without such gains.

    Between two points the value over the gain is a line, so that both a value in proportion to the gain and one to its
    square are met; the value is a parabola then, and Simpson's rule exact. The cubic curves (monotone, Fritsch and
    Carlson) are of the others' loss over the gain: how far the two lie apart is what the few rates leave open.
    """
    if min(one.shape[1] for one in curves) < 2:
        return None
    low, high = max(LEAST, *(one[0, 0] for one in curves)), min(one[0, -1] for one in curves)
    if low >= high:
        return None
    from scipy.interpolate import PchipInterpolator  # only here: it takes a while to import

    at = np.unique(np.clip(np.concatenate([one[0] for one in curves]), low, high))
    at = np.stack([at[:-1], (at[:-1] + at[1:]) / 2, at[1:]])  # [3, pieces]
    weights = np.array([[1], [4], [1]]) / 6 * (at[2] - at[0])
    found = []
    for gain, *values in curves:
        mine = [at, *(at * np.interp(at, gain, one) for one in values)]
        cubic = PchipInterpolator(gain, gain * values[0]).integrate(low, high)
        found.append([*((weights * one).sum() for one in mine), cubic])
    return np.array(found)


def sums(run, method):
    """({round: [method, dense, shorter] x the four `areas`, summed over its clients}, the share of all clients that
    count)."""
    found, counted, n = {}, 0, 0
    for line in run["curve"]:
        if "replay" in line:
            three = [line["replay"][name] for name in (method, DENSE, SHORTER)]
            each = [areas([curve(rows, j) for rows in three]) for j in range(len(three[0][0]["gain"]))]
            some = [one for one in each if one is not None]
            found[line["round"]] = sum(some, np.zeros((3, 4)))
            counted, n = counted + len(some), n + len(each)
    return found, counted / n


def replay_tables(groups):
    """A table a federation: [(heading, a DataFrame of runs, one a split)] -> as `plots.tables.tables_of`."""
    found = []
    for about, runs in groups:
        every = [run for _, run in runs.iterrows()]
        rounds = sorted({line["round"] for run in every for line in run["curve"] if "replay" in line})
        lines = []
        for method in methods_of(every):
            apart, shares = zip(*(sums(run, method) for run in every), strict=True)
            whole = [sum(one.values()) for one in apart]
            mine = [ratio(whole, 0, 1), ratio(whole, 0, 1, CUBIC), more(whole), "-", "-", "-"]
            if method != SHORTER:
                mine[3:] = [ratio(whole, 2, 1), ratio(whole, 0, 2), ratio(whole, 0, 1, DRIFT)]
            at = [[one[t] for one in apart if t in one] for t in rounds]
            each = [ratio(some, 0, 1).split(",")[0].split(" ")[0] for some in at]
            lines.append([name_of(method), *mine, *each, f"{100 * np.mean(shares):.0f}"])
        p = after_holm([line[1] for line in lines], [hasattr(line[1], "p") for line in lines])
        lines = [[*line[:2], one, *line[2:]] for line, one in zip(lines, p, strict=True)]
        heads = ["others' loss at equal gain", "over dense", "p after Holm", "cubic", "nats a nat"]
        heads += ["shorter over dense", "over shorter", "length over dense"]
        heads += [*(f"before round {t}" for t in rounds), "clients counted %"]
        found.append((f"Interference replay, {about}", "", [heads, *lines]))
    return found


def methods_of(runs):
    """All but dense training, in the order of the log."""
    first = next(line for line in runs[0]["curve"] if "replay" in line)
    return [method for method in first["replay"] if method != DENSE]


def name_of(method):
    return NAMES.get(method, method.replace("_", " ").capitalize())


def logs(splits, i, j, of=OTHERS):
    """Logarithms of curve i's sums over curve j's; nan of a split where one is not positive."""
    return [math.log(a / b) if min(a, b) > 0 else math.nan for a, b in (one[[i, j], of] for one in splits)]


def ratio(splits, i, j, of=OTHERS):
    """The cell of such ratios."""
    return compared(logs(splits, i, j, of), 2, sign="", scale=math.exp)


def more(splits):
    """The cell of what the others lose more than under dense training, in nats for each nat of gain."""
    return compared([one[0, OTHERS] / one[0, 0] - one[1, OTHERS] / one[1, 0] for one in splits], 2)


# ---- the figure


def draw_replays(groups):
    """The ratios to dense training with their intervals, a row a method: [(a panel's title, runs, one a split)]."""
    figure, axes = panel_axes(len(groups), width=8.6, height=3.1, extra=0.7, sharey=True)
    for axis, (about, runs) in zip(axes, groups, strict=True):
        every = [run for _, run in runs.iterrows()]
        methods = methods_of(every)
        axis.axvline(1, color=GREY, linestyle=(0, (6, 2)), zorder=1)
        for i, method in enumerate(methods):
            whole = [sum(sums(run, method)[0].values()) for run in every]
            apart = [one for one in logs(whole, 0, 1) if math.isfinite(one)]
            if not apart:
                continue
            middle, *ends = (math.exp(one) for one in estimate(apart)[:3])
            if middle < SHOWN:
                bars = np.abs(np.array(ends)[:, None] - middle)
                axis.errorbar([middle], [i], xerr=None if np.isnan(bars).any() else bars, fmt="ko", capsize=3)
            else:
                axis.plot([SHOWN], [i], "k>", clip_on=False)
            axis.annotate(f"{middle:.2f}", (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlim(0.6, SHOWN)
        axis.set_xticks([0.6, 0.8, 1, 1.25, 1.6, SHOWN], ["0.6", "0.8", "1", "1.25", "1.6", "2"])
        axis.minorticks_off()
        axis.grid(False, axis="y")
        axis.set_yticks(range(len(methods)), [break_lines(name_of(method), 24) for method in methods])
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_title(f"{about}, {len(every)} splits")
    figure.supxlabel("Loss that an update adds to the other clients', over dense training's at equal gain", fontsize=10)
    set_title(figure, "Left of the line: less interference than when all weights are trained and sent. Bars: 95 %")
    return figure
