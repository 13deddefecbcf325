"""vit_sparse_fl's interference replay: what the others lose at equal gain, client by client.

plots/vit.py has the study. At a checkpoint every method has trained the same client at several rates, so that each has
a curve of the others' loss over the client's own gain. Compared are the areas under two curves over the gains that both
reach (and dense training and `shorter` too, so that all cells of a row are of the same gains), summed over a split's
clients and checkpoints: others may gain, and small gains weigh little. A split's value is the logarithm of the ratio of
two such sums, and splits are what a t test counts. `shorter` is dense training's update at the run's rate, scaled: what
the length of a step alone does. Lengths are compared in the same way.
"""

import math

import numpy as np

from plots.pairs import after_holm, compared

LEAST = 0.1  # nats of gain: below, a client's curve is noise of 64 images
POINTS = 33  # of the gains that the curves share
DENSE, SHORTER = "dense", "shorter"
OTHERS, DRIFT = 1, 2


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
    """[curves, 3] areas under each curve over the gains that all reach, from LEAST on; None without such gains. The
    first is of the gain itself. Between two points the value over the gain is a line, so that both a value in
    proportion to the gain and one to its square are met."""
    if min(one.shape[1] for one in curves) < 2:
        return None
    low, high = max(LEAST, *(one[0, 0] for one in curves)), min(one[0, -1] for one in curves)
    if low >= high:
        return None
    at = np.linspace(low, high, POINTS)
    found = np.array([[at, *(at * np.interp(at, one[0], values) for values in one[1:])] for one in curves])
    return (high - low) * (found[..., 1:] + found[..., :-1]).mean(-1) / 2


def sums(run, method, rounds=None):
    """([method, dense, shorter] x [gain, others, drift] summed over the clients of the checkpoints (or of these
    rounds), the share of the clients that count)."""
    found, n = [], 0
    for line in run["curve"]:
        if "replay" in line and (rounds is None or line["round"] in rounds):
            three = [line["replay"][name] for name in (method, DENSE, SHORTER)]
            n += len(three[0][0]["gain"])
            found += [areas([curve(rows, j) for rows in three]) for j in range(len(three[0][0]["gain"]))]
    counted = [one for one in found if one is not None]
    return sum(counted, np.zeros((3, 3))), len(counted) / n


def replay_tables(groups):
    """A table a federation: [(heading, a DataFrame of runs, one a split)] -> as `plots.tables.tables_of`."""
    found = []
    for about, runs in groups:
        every = [run for _, run in runs.iterrows()]
        first = next(line for line in every[0]["curve"] if "replay" in line)
        rounds = sorted({line["round"] for run in every for line in run["curve"] if "replay" in line})
        lines = []
        for method in (name for name in first["replay"] if name != DENSE):
            whole, shares = zip(*(sums(run, method) for run in every), strict=True)
            at = [[sums(run, method, {t})[0] for run in every] for t in rounds]
            mine = [ratio(whole, 0, 1), "-", "-", "-"]
            if method != SHORTER:
                mine = [mine[0], ratio(whole, 2, 1), ratio(whole, 0, 2), ratio(whole, 0, 1, DRIFT)]
            each = [ratio(some, 0, 1).partition(" ")[0] for some in at]
            lines.append([method.replace("_", " "), *mine, *each, f"{100 * np.mean(shares):.0f}"])
        p = after_holm([line[1] for line in lines], [hasattr(line[1], "p") for line in lines])
        lines = [[*line[:2], one, *line[2:]] for line, one in zip(lines, p, strict=True)]
        heads = ["others' loss at equal gain", "over dense", "p after Holm", "shorter over dense", "over shorter"]
        heads += ["length over dense", *(f"before round {t}" for t in rounds), "clients counted %"]
        found.append((f"Interference replay, {about}", "", [heads, *lines]))
    return found


def ratio(splits, i, j, of=OTHERS):
    """The cell of curve i's sums over curve j's; a split counts where both are positive."""
    logs = [math.log(one[i, of] / one[j, of]) for one in splits if min(one[i, of], one[j, of]) > 0]
    return compared(logs, 2, sign="", scale=math.exp)
