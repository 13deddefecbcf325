"""Alarms of failing training: pure functions of logged curves, alike after each round and at the end.

    alarms = run_detectors(curves_of(run.metrics()), evaluations)

    diverged      the loss is nan or inf, rose by more than 1 nat in 10 evaluations (FedProx, Li et al. 2020, appendix,
                  in rounds), or stays 30 % above its best
    left_out      updates that were not finite: a mean without them can look healthy while training breaks

Both say that training has failed, neither foresees it; older logs have alarms of other names too (LOG.md, 2026-11-23).

The window of 10 is in evaluations, that before training (round 0) among them: a third of the planned `evaluations` (of
a curve alone: of those it has) where that is less, but at least 3. Both look only back: run on a curve's first t points
they give exactly those alarms of the whole curve whose round is among them. diverged reports its first alarm only.

Curves: {"round": [...], name: [...]}, of equal length, rounds rising; None is a missing value (skipped), nan and inf
(also as text, as metrics.jsonl has them) are values.
"""

import math
from dataclasses import dataclass

import numpy as np

HELPS = {
    "diverged": "lower --learning-rate or --local-steps",
    "left_out": "lower --learning-rate, or --amp off",
}
DETECTORS = tuple(HELPS)


@dataclass(frozen=True)
class Alarm:
    """What a detector saw: its name, the round, the value that crossed the threshold, and a line for the user.

    value and threshold are None where the loss was not finite (JSON has no nan; the message says which).
    """

    detector: str
    round: int
    value: float | None
    threshold: float | None
    message: str


# ---- the detectors: each yields (round, value, limit, words), an alarm where value > limit


def diverged(rounds, losses, evaluations=None, jump=1.0, window=10, ratio=1.3, hold=3):
    """Not finite, or f_t - f_{t - window} in nats, or the lowest of the last `hold` losses / the best until then - 1.

    hold: one bad evaluation is no divergence.
    """
    pairs = [(t, float(f)) for t, f in zip(rounds, losses, strict=True) if f is not None]  # "nan" and "inf" too
    times, values = [t for t, _ in pairs], np.array([f for _, f in pairs])
    window = max(3, min(window, (evaluations or len(rounds)) // 3))
    best = np.minimum.accumulate(values)
    for i, (t, f) in enumerate(zip(times, values.tolist(), strict=True)):
        if not math.isfinite(f):
            yield t, math.inf, None, f"the loss is {f} (limit: any finite value)"
            return
        if i >= window:
            rise = f - float(values[i - window])
            words = f"the loss rose by {rise:.3g} nats in {t - times[i - window]} rounds (limit {jump:g})"
            yield t, rise, jump, words
        if i + 1 >= hold and best[i] > 0:
            above = float(values[i - hold + 1 : i + 1].min() / best[i]) - 1
            words = f"{hold} losses in a row are {above:.1%} or more above the best (limit {ratio - 1:.0%})"
            yield t, above, ratio - 1, words


def left_out(rounds, events):
    """Clients whose updates were not finite, and so no part of the mean: by round, those of which it is the first.

    Args: events: for each evaluation, the pairs [round, client] since the evaluation before (None: no such round).
    """
    first = {}  # client: round
    for t, k in (pair for pairs in events for pair in pairs or ()):
        first.setdefault(k, t)
    for t in sorted(set(first.values())):
        ids = sorted(k for k in first if first[k] == t)
        words = f"{len(ids)} update{'s' * (len(ids) > 1)} not finite (limit 0), left out: client "
        yield t, len(ids), 0, words + ", ".join(map(str, ids))


# ---- all of them


def run_detectors(curves, evaluations=None):
    """What both detectors see: a list of `Alarm`s, by round.

    Args: curves: see this module's docstring: "val_loss", "left_out" (events of `left_out`); one that is not there is
        not looked at. evaluations: how many the whole run has.
    """
    rounds, nothing = curves["round"], [None] * len(curves["round"])
    looks = diverged(rounds, curves.get("val_loss", nothing), evaluations)
    looks = {
        "diverged": [look for look in looks if look[2] is None or look[1] > look[2]][:1],
        "left_out": left_out(rounds, curves.get("left_out", nothing)),
    }
    alarms = [
        Alarm(name, t, value if math.isfinite(value) else None, limit, f"round {t}: {words}: {HELPS[name]}")
        for name, seen in looks.items()
        for t, value, limit, words in seen
    ]
    return sorted(alarms, key=lambda a: (a.round, a.detector))


def curves_of(rows):
    """The lines of metrics.jsonl (dicts with "round") as curves; None where a line lacks a name."""
    names = dict.fromkeys(["round", *(name for row in rows for name in row)])
    return {name: [row.get(name) for row in rows] for name in names}


def stops(alarms, stop_on):
    """The first alarm that ends a run under --stop-on, one of `flags.STOP_ON`; None when none does."""
    ending = {"never": (), "divergence": ("diverged",), "any": DETECTORS}[stop_on]
    return next((alarm for alarm in alarms if alarm.detector in ending), None)
