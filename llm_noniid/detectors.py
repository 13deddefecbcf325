"""Detectors of failing training: pure functions of logged curves, alike after each round and at the end.

    alarms = run_detectors(curves_of(run.metrics()), evaluations)
    figures = scores(curves_of(run.metrics()), evaluations)         # of runs without an alarm too

    diverged      the loss is nan or inf, rose by more than 1 nat in 10 evaluations (FedProx, Li et al. 2020, appendix,
                  in rounds), or stays 30 % above its best
    oscillating   the loss rises, falls and rises again, each time by more than 3 % of itself
    drifting      the clients' gradients lie further apart than those of random clients of their sizes would
    slow          the best loss improved by less than 1 % in 20 evaluations
    left_out      updates that were not finite: a mean without them can look healthy while training breaks

Windows are in evaluations, that before training (round 0) among them, and fit the run: 10 and 20 are a third of the
planned `evaluations` (of a curve alone: of those it has) where that is less, but at least 3. Each detector looks only
back: run on a curve's first t points it gives exactly those alarms of the whole curve whose round is among them. Each
but left_out reports its first alarm only. A score is the largest value / limit so far: an alarm's is above 1.
benchmarks/detectors.py measures both, on synthetic curves and on logs.

Curves: {"round": [...], name: [...]}, of equal length, rounds rising; None is a missing value (skipped), nan and inf
(also as text, as metrics.jsonl has them) are values.
"""

import math
from dataclasses import dataclass

import numpy as np

HELPS = {
    "diverged": "lower --learning-rate or --local-steps, or clip gradients",
    "oscillating": "raise --participation-rate, lower --learning-rate or --local-steps",
    "drifting": "lower --local-steps, raise --mu (fedprox), take scaffold, or --cluster updates",
    "slow": "it has converged, or raise --learning-rate, --local-steps, --participation-rate",
    "left_out": "lower --learning-rate, clip gradients, or --amp off",
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
    times, values = _points(rounds, losses)
    window = _fit(window, evaluations or len(rounds))
    best = np.minimum.accumulate(values)
    for i, (t, f) in enumerate(zip(times.tolist(), values.tolist(), strict=True)):
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


def swing(losses):
    """The largest d by which a curve rises, then falls, then rises again: [windows] for losses [windows, n].

        max over i < j < k < l of min(f_j - f_i, f_j - f_k, f_l - f_k), at least 0

    A curve that falls has 0, and so have one spike, one bump and one jump, whatever their size; f_t = +-a has 2 a.
    """
    f = np.atleast_2d(losses)
    drop = f[:, :, None] - f[:, None, :]  # [windows, j, k] f_j - f_k
    later = np.triu(np.ones(drop.shape[1:], dtype=bool), 1)  # j < k
    rise = f - np.minimum.accumulate(f, axis=1)  # [windows, j]
    fall = np.where(later, np.minimum(rise[:, :, None], drop), 0).max(axis=1)  # [windows, k] a rise and then a fall
    return np.where(later, np.minimum(fall[:, :, None], -drop), 0).max(axis=(1, 2))  # [windows]


def oscillating(rounds, losses, evaluations=None, window=16, floor=0.03):
    """`swing` of the last 4 to 16 evaluations against floor * the best loss until then: 0.1 nats at a best of 3.2.

    16 evaluations hold two rises of a period of 2 to 8; an older curve is not looked at.
    """
    times, values = _points(rounds, losses)
    times, values = times[np.isfinite(values)], values[np.isfinite(values)]
    if len(values) < 4:
        return
    before = np.pad(values, (window - 1, 0), "edge")  # a start that stays where it is adds no swing
    swings = swing(np.lib.stride_tricks.sliding_window_view(before, window))  # [E]
    limits = floor * np.minimum.accumulate(values)
    for t, value, limit in list(zip(times.tolist(), swings.tolist(), limits.tolist(), strict=True))[3:]:
        words = f"in {window} evaluations the loss rose, fell and rose by {value:.3g} nats (limit {limit:.3g})"
        yield t, value, limit, words


def drifting(rounds, ratios, chances, factor=1.25, hold=3):
    """The lowest of `hold` evaluations' drift ratios, each over its chance level, against `factor`.

    Args: ratios, chances: "drift_ratio" and "drift_ratio_chance", the same of a random repartition of the clients'
        texts into parts of their sizes; evaluations without both are skipped, so that old logs have no drift.
    """
    last = []
    for t, value, chance in zip(rounds, ratios, chances, strict=True):
        if value is None or chance is None or math.isnan(float(value)) or not 0 < float(chance) < math.inf:
            continue
        last = [*last, float(value) / float(chance)][-hold:]
        if len(last) == hold:
            words = f"gradients are {min(last):.3g} times as far apart as chance alone has them (limit {factor:g}) in "
            yield t, min(last), factor, f"{words}{hold} evaluations in a row"


def slow(rounds, losses, evaluations=None, window=20, improvement=0.01):
    """The best loss until now / that of `window` evaluations before, at most 1 - improvement (of a shorter window in
    proportion less). A run that has converged looks the same."""
    times, values = _points(rounds, losses)
    whole, window = window, _fit(window, evaluations or len(rounds))
    improvement *= window / whole
    best = np.minimum.accumulate(np.where(np.isfinite(values), values, np.inf)).tolist()
    for i in range(window, len(best)):
        if 0 < best[i - window] < math.inf:
            share = best[i] / best[i - window]
            words = f"the best loss improved by {1 - share:.2%} in {times[i] - times[i - window]} rounds"
            yield int(times[i]), share, 1 - improvement, f"{words} (limit {improvement:.2%})"


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


def _looks(curves, evaluations):
    """{detector: what it yields} of the detectors that have their curves."""
    rounds, have = curves["round"], curves.keys()
    looks = {}
    if "val_loss" in have:
        every = (diverged, oscillating, slow)
        looks = {of.__name__: of(rounds, curves["val_loss"], evaluations) for of in every}
    if {"drift_ratio", "drift_ratio_chance"} <= have:
        looks["drifting"] = drifting(rounds, curves["drift_ratio"], curves["drift_ratio_chance"])
    if "left_out" in have:
        looks["left_out"] = left_out(rounds, curves["left_out"])
    return looks


def run_detectors(curves, evaluations=None):
    """Every detector that has its curve: a list of `Alarm`s, by round.

    Args: curves: see this module's docstring: "val_loss", "drift_ratio" with "drift_ratio_chance", "left_out" (events
        of `left_out`); one that is not there is not looked at. evaluations: how many the whole run has.
    """
    alarms = []
    for name, looks in _looks(curves, evaluations).items():
        over = [look for look in looks if look[2] is None or look[1] > look[2]]
        for t, value, limit, words in over if name == "left_out" else over[:1]:
            seen = value if math.isfinite(value) else None
            alarms.append(Alarm(name, t, seen, limit, f"round {t}: {words}: {HELPS[name]}"))
    return sorted(alarms, key=lambda a: (a.round, DETECTORS.index(a.detector)))


def scores(curves, evaluations=None):
    """{detector: its largest value / limit, of left_out how many clients}; nan where it saw nothing it could judge.

    Args: as of `run_detectors`. inf is a loss that was not finite.
    """
    found = dict.fromkeys(DETECTORS, math.nan)
    for name, looks in _looks(curves, evaluations).items():
        values = [value if not limit else value / limit for _, value, limit, _ in looks]
        if name == "left_out":
            found[name] = float(sum(values))
        elif values:
            found[name] = max(values)
    return found


def curves_of(rows):
    """The lines of metrics.jsonl (dicts with "round") as curves; None where a line lacks a name."""
    names = dict.fromkeys(["round", *(name for row in rows for name in row)])
    return {name: [row.get(name) for row in rows] for name in names}


def stops(alarms, stop_on):
    """The first alarm that ends a run under --stop-on, one of `flags.STOP_ON`; None when none does."""
    ending = {"never": (), "divergence": ("diverged",), "any": DETECTORS}[stop_on]
    return next((alarm for alarm in alarms if alarm.detector in ending), None)


def _fit(window, evaluations):
    """A window of a run with so many evaluations: a third of them at most, 3 at least."""
    return max(3, min(window, evaluations // 3))


def _points(rounds, values):
    """The rounds with a value, and the values: int64 and fp64 arrays."""
    pairs = [(t, float(v)) for t, v in zip(rounds, values, strict=True) if v is not None]  # "nan" and "inf" too
    return np.array([t for t, _ in pairs], dtype=np.int64), np.array([v for _, v in pairs], dtype=np.float64)
