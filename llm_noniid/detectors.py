"""Alarms of failing training, from the lines of metrics.jsonl. Both say that training has failed, neither foresees it.

diverged      the loss is nan or inf, rose by more than 1 nat in 10 evaluations (FedProx, Li et al. 2020, appendix,
              in rounds), or stays 30 % above its best; only its first is reported
left_out      updates that were not finite: a mean without them can look healthy while training breaks
"""

import math

JUMP = 1.0  # nats in a window
WINDOW = 10  # evaluations; a third of the planned ones where that is less, but at least 3
RATIO, HOLD = 1.3, 3  # losses in a row that are so many times the best: one bad evaluation is no divergence


def alarms_of(lines, planned):
    """[{"detector", "round", "message"}] of what both detectors see, by round.

    Args: lines: of metrics.jsonl, rounds rising; planned: how many evaluations the whole run has.
    """
    found = [*list(diverged(lines, planned))[:1], *left_out(lines)]
    return sorted(found, key=lambda one: (one["round"], one["detector"]))


def alarm(detector, t, words):
    return {"detector": detector, "round": t, "message": f"round {t}: {words}"}


def diverged(lines, planned):
    losses = [float(line["val_loss"]) for line in lines]  # "nan" and "inf" too
    window, best = max(3, min(WINDOW, planned // 3)), math.inf
    for i, (line, loss) in enumerate(zip(lines, losses, strict=True)):
        best, words = min(best, loss), ""
        if not math.isfinite(loss):
            words = f"the loss is {loss}"
        elif i >= window and loss - losses[i - window] > JUMP:
            rounds = line["round"] - lines[i - window]["round"]
            words = f"the loss rose by {loss - losses[i - window]:.3g} nats in {rounds} rounds (limit {JUMP:g})"
        elif i + 1 >= HOLD and min(losses[i + 1 - HOLD : i + 1]) > RATIO * best:
            words = f"{HOLD} losses in a row are above {RATIO:g} times the best ({best:.3g})"
        if words:
            yield alarm("diverged", line["round"], f"{words}: lower --learning-rate or --local-steps")


def left_out(lines):
    """By round, the clients of which it is the first; "left_out" of a line: pairs [round, client]."""
    first = {}  # client: round
    for t, k in (pair for line in lines for pair in line.get("left_out") or ()):
        first.setdefault(k, t)
    for t in sorted(set(first.values())):
        ids = ", ".join(str(k) for k in sorted(first) if first[k] == t)
        yield alarm("left_out", t, f"updates not finite, left out: client {ids}: lower --learning-rate, or --amp off")
