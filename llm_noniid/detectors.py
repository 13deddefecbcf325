"""The alarm of failing training, from the lines of metrics.jsonl: training has failed; it forecasts nothing.

diverged      the loss is nan or inf, rose by more than 1 nat in 10 evaluations (FedProx, Li et al. 2020, appendix,
              in rounds), or stays 30 % above its best; only its first is reported
"""

import math

JUMP = 1.0  # nats in a window
WINDOW = 10  # evaluations; a third of the planned ones where that is less, but at least 3
RATIO, HOLD = 1.3, 3  # losses in a row that are so many times the best: one bad evaluation is no divergence


def alarms_of(lines, planned):
    """[{"detector", "round", "message"}] of the first alarm, [] without.

    Args: lines: of metrics.jsonl, rounds rising; planned: how many evaluations the whole run has.
    """
    losses = [float(line["val_loss"]) for line in lines]  # "nan" and "inf" too
    window, best = max(3, min(WINDOW, planned // 3)), math.inf
    for i, (line, loss) in enumerate(zip(lines, losses, strict=True)):
        t, best, words = line["round"], min(best, loss), ""
        if not math.isfinite(loss):
            words = f"the loss is {loss}"
        elif i >= window and loss - losses[i - window] > JUMP:
            rounds = t - lines[i - window]["round"]
            words = f"the loss rose by {loss - losses[i - window]:.3g} nats in {rounds} rounds (limit {JUMP:g})"
        elif i + 1 >= HOLD and min(losses[i + 1 - HOLD : i + 1]) > RATIO * best:
            words = f"{HOLD} losses in a row are above {RATIO:g} times the best ({best:.3g})"
        if words:
            message = f"round {t}: {words}: lower --learning-rate or --local-steps"
            return [{"detector": "diverged", "round": t, "message": message}]
    return []
