"""vit_sparse_fl's interference replay: what the others lose at equal gain, client by client.

plots/vit.py has the study. At a checkpoint every method has trained the same client at several rates, so that each has
a curve of the others' loss over the client's own gain. Two methods are compared on a client by the mean distance of the
two curves' logarithms over the gains that both reach; a split's value is the mean over its clients and checkpoints, and
splits are what a t test counts. `shorter` is dense training's update at one rate, scaled: what a shorter step does.
"""

import math

import numpy as np

from plots.pairs import after_holm, compared

LEAST = 0.1  # nats of gain: below, the others' loss is noise of 64 images
POINTS = 9  # of the gains that two curves share
DENSE, SHORTER = "dense", "shorter"


def curve(rows, j):
    """[2, n] logarithms of client j's gain and of the others' loss, from the smallest factor on, as long as the gain
    rises and both are positive."""
    points = []
    for row in sorted(rows, key=lambda row: row["factor"]):
        gain, loss = row["gain"][j], row["others"][j]
        good = None not in (gain, loss) and min(gain, loss) > 0 and (not points or gain > points[-1][0])
        if good:
            points.append((gain, loss))
        elif points:
            break
    return np.log(points or np.empty((0, 2))).T


def apart(mine, base):
    """The mean distance of two curves over the gains that both reach, in logarithms of the others' loss; nan: none."""
    if min(mine.shape[1], base.shape[1]) < 2:
        return math.nan
    low, high = max(mine[0, 0], base[0, 0], math.log(LEAST)), min(mine[0, -1], base[0, -1])
    if low >= high:
        return math.nan
    at = np.linspace(low, high, POINTS)
    return float(np.mean(np.interp(at, *mine) - np.interp(at, *base)))


def distances(run, method, base, rounds=None):
    """[clients of all checkpoints (or of these rounds)] `apart` of a run; nan where there is nothing to compare."""
    found = []
    for line in run["curve"]:
        if "replay" in line and (rounds is None or line["round"] in rounds):
            mine, other = line["replay"][method], line["replay"][base]
            found += [apart(curve(mine, j), curve(other, j)) for j in range(len(mine[0]["gain"]))]
    return np.array(found)


def replay_tables(groups):
    """A table a federation: [(heading, runs)] -> as `plots.tables.tables_of`."""
    found = []
    for about, runs in groups:
        every = [run for _, run in runs.iterrows()]
        first = next(line for line in every[0]["curve"] if "replay" in line)
        rounds = sorted({line["round"] for run in every for line in run["curve"] if "replay" in line})

        def cell(method, base, some=None, every=every):
            values = [distances(run, method, base, some) for run in every]
            means = [np.nanmean(one) for one in values if np.isfinite(one).any()]
            return compared(means, 2, sign="", scale=math.exp)

        lines = []
        for method in (name for name in first["replay"] if name != DENSE):
            counted = np.isfinite(np.concatenate([distances(run, method, DENSE) for run in every])).mean()
            to_shorter = "-" if method == SHORTER else cell(method, SHORTER)
            at = [cell(method, DENSE, {t}).partition(" ")[0] for t in rounds]
            lines.append([method.replace("_", " "), cell(method, DENSE), to_shorter, *at, f"{100 * counted:.0f}"])
        p = after_holm([line[1] for line in lines], [True] * len(lines))
        lines = [[*line[:2], one, *line[2:]] for line, one in zip(lines, p, strict=True)]
        ends = [f"before round {t}" for t in rounds]
        heads = ["others' loss at equal gain", "over dense", "p after Holm", "over shorter", *ends, "clients counted %"]
        found.append((f"Interference replay, {about}", "", [heads, *lines]))
    return found
