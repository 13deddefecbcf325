"""Detectors of failing training: pure functions of logged curves, alike after each round and at the end.

    alarms = run_detectors(curves_of(run.metrics()))

    diverged      the loss is nan or inf, rose by more than 1 nat in 10 rounds (FedProx, Li et al. 2020, appendix), or
                  stays 30 % above its best
    oscillating   the loss turns at half of its points or more, by more than 2 % of itself
    drifting      the clients' own parts of their updates stay longer than twice what they share
    slow          the best loss improved by less than 1 % in 20 rounds
    left_out      updates that were not finite: a mean without them can look healthy while training breaks

Each looks only back: run on a curve's first t points it gives exactly those alarms of the whole curve whose round is
among them. Each but left_out reports its first alarm only. benchmarks/detectors.py measures how often each is right.

Curves: {"round": [...], name: [...]}, of equal length, rounds rising; None is a missing value (skipped), nan and inf
(also as text, as metrics.jsonl has them) are values.
"""

import math
from dataclasses import dataclass

import numpy as np

DETECTORS = ("diverged", "oscillating", "drifting", "slow", "left_out")

# The median of |x| of a standard normal x; second differences of white noise have 6 times its variance.
_NORMAL_MEDIAN = 0.6745


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


def diverged(rounds, losses, jump=1.0, window=10, ratio=1.3, hold=3):
    """The first round at which the loss left: an `Alarm`, or None.

    not finite, or f_t - f_s > jump, s the latest evaluation with s <= t - window, or the last `hold` losses all above
    ratio times the best loss until then.

    Args: jump: in nats; window: in rounds; hold: in evaluations (one bad evaluation is no divergence).
    """
    times, values = _points(rounds, losses)
    best = np.minimum.accumulate(values) if len(values) else values
    helps = "lower --learning-rate or --local-steps, or clip gradients"
    for i, (t, f) in enumerate(zip(times.tolist(), values.tolist(), strict=True)):
        if not math.isfinite(f):
            return Alarm("diverged", t, None, None, f"round {t}: the loss is {f} (limit: any finite value): {helps}")
        before = np.searchsorted(times, t - window, side="right") - 1
        rise = f - float(values[before]) if before >= 0 else 0.0
        if rise > jump:
            text = f"the loss rose by {rise:.3g} nats in {t - times[before]} rounds (limit {jump:g})"
            return Alarm("diverged", t, rise, jump, f"round {t}: {text}: {helps}")
        times_best = float(values[i - hold + 1 : i + 1].min() / best[i]) if i + 1 >= hold and best[i] > 0 else 0.0
        if times_best > ratio:
            text = f"{hold} losses in a row are {times_best:.3g} times the best (limit {ratio:g})"
            return Alarm("diverged", t, times_best, ratio, f"round {t}: {text}: {helps}")
    return None


def sign_change_rate(losses):
    """The share of neighbouring differences of opposite sign, [windows] for losses [windows, n].

    The differences are freed of a straight line in time first (a falling curve's own differences are all negative).
    White noise has 2/3. On its own it tells nothing: one in six windows of 10 points of pure noise has more than 3/4.
    """
    from scipy.signal import detrend  # only here: it takes a while to import

    d = detrend(np.diff(np.atleast_2d(losses), axis=1))  # [windows, n - 1]
    return (d[:, 1:] * d[:, :-1] < 0).mean(axis=1)  # [windows]


def amplitude(losses):
    """How much a curve swings, as the standard deviation of white noise that swings as much; [windows].

        median |f_{t+1} - 2 f_t + f_{t-1}| / (0.6745 sqrt 6),   losses [windows, n]

    The median, so that one spike does not count; second differences, so that neither a trend does. f_t = +-a has 2.4 a.
    """
    second = np.diff(np.atleast_2d(losses), n=2, axis=1)  # [windows, n - 2]
    return np.median(np.abs(second), axis=1) / (_NORMAL_MEDIAN * math.sqrt(6))  # [windows]


def oscillating(rounds, losses, window=10, rate=0.5, floor=0.02):
    """The first window that turns often and swings above the noise floor: an `Alarm`, or None.

    sign_change_rate >= rate and amplitude > floor * median loss, over `window` evaluations: 0.02 is 0.06 nats at a loss
    of 3. Swings of a period above 4 evaluations turn too rarely to be seen.
    """
    times, values = _points(rounds, losses)
    times, values = times[np.isfinite(values)], values[np.isfinite(values)]
    if len(values) < window:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(values, window)  # [windows, window]
    limits = floor * np.median(windows, axis=1)
    rates, swings = sign_change_rate(windows), amplitude(windows)
    hits = np.flatnonzero((rates >= rate) & (swings > limits))
    if not len(hits):
        return None
    i = hits[0]
    t, value, limit = int(times[i + window - 1]), float(swings[i]), float(limits[i])
    text = (
        f"round {t}: the loss swings by {value:.3g} nats, turning at {rates[i]:.0%} of the last {window} evaluations "
        f"(limits {limit:.3g} and {rate:.0%}): raise --participation-rate, lower --learning-rate or --local-steps"
    )
    return Alarm("oscillating", t, value, limit, text)


def drifting(rounds, drifts, clients, threshold=2.0, orthogonal=0.9, hold=3):
    """The relative drift is above a threshold in `hold` evaluations in a row: an `Alarm`, or None.

    The limit is min(threshold, orthogonal * sqrt(m - 1)), m = 1 / sum_k p_k^2 clients in the round (m of equal weight):
    updates that share nothing have sqrt(m - 1), so that few clients, or one that outweighs the others, cannot reach a
    fixed threshold (see `diagnostics.relative_drift`). Near an optimum the shared part fades and noise stays: even
    clients that are alike drift then.

    Args: drifts, clients: "relative_drift" and "effective_clients" (m) of `diagnostics.update_figures`, None in rounds
        without a comparison; those and rounds of one client are skipped.
    """
    above = 0
    for t, value, m in zip(rounds, drifts, clients, strict=True):
        if value is None or math.isnan(float(value)) or m <= 1:
            continue
        value, limit = float(value), min(threshold, orthogonal * math.sqrt(m - 1))
        above = above + 1 if value > limit else 0
        if above == hold:
            text = (
                f"round {t}: the relative drift is {value:.3g}, above {limit:.3g} in {hold} evaluations in a row: "
                "lower --local-steps, raise --mu (fedprox), take scaffold, or --cluster updates"
            )
            return Alarm("drifting", t, value if math.isfinite(value) else None, limit, text)
    return None


def slow(rounds, losses, window=20, improvement=0.01):
    """The best loss improved by less than 1 % in 20 rounds: an `Alarm`, or None.

    1 - min_{s <= t} f_s / min_{s <= t - window} f_s < improvement. A run that has converged looks the same.
    """
    times, values = _points(rounds, losses)
    best = np.minimum.accumulate(np.where(np.isfinite(values), values, np.inf)) if len(values) else values
    for t, now in zip(times.tolist(), best.tolist(), strict=True):
        earlier = np.searchsorted(times, t - window, side="right") - 1
        before = float(best[earlier]) if earlier >= 0 else 0.0
        if not 0 < before < math.inf:
            continue
        value = 1 - now / before
        if value < improvement:
            text = (
                f"round {t}: the best loss improved by {value:.2%} in {t - times[earlier]} rounds (limit "
                f"{improvement:.2%}): it has converged, or raise --learning-rate, --local-steps, --participation-rate"
            )
            return Alarm("slow", t, value, improvement, text)
    return None


def left_out(rounds, events):
    """Clients whose updates were not finite and so left out of the mean: a list of `Alarm`s.

    One alarm for each round in which a client is left out for the first time, naming those clients.

    Args: events: for each evaluation, the pairs [round, client] since the evaluation before (None: no such round).
    """
    first = {}  # client: round
    for t, k in (pair for pairs in events for pair in pairs or ()):
        first.setdefault(k, t)
    alarms = []
    for t in sorted(set(first.values())):
        ids = sorted(k for k in first if first[k] == t)
        text = (
            f"{len(ids)} update{'s' * (len(ids) > 1)} not finite (limit 0), left out: client {', '.join(map(str, ids))}"
        )
        helps = "lower --learning-rate, clip gradients, or --amp off"
        alarms.append(Alarm("left_out", t, len(ids), 0, f"round {t}: {text}: {helps}"))
    return alarms


def run_detectors(curves):
    """Every detector that has its curve: a list of `Alarm`s, by round.

    Args: curves: see this module's docstring: "val_loss", "relative_drift" with "effective_clients", "left_out" (events
        of `left_out`); one that is not there is not looked at.
    """
    rounds, alarms = curves["round"], []
    if "val_loss" in curves:
        alarms += [detector(rounds, curves["val_loss"]) for detector in (diverged, oscillating, slow)]
    if "relative_drift" in curves:
        alarms.append(drifting(rounds, curves["relative_drift"], curves["effective_clients"]))
    if "left_out" in curves:
        alarms += left_out(rounds, curves["left_out"])
    return sorted((a for a in alarms if a is not None), key=lambda a: (a.round, DETECTORS.index(a.detector)))


def curves_of(rows):
    """The lines of metrics.jsonl (dicts with "round") as curves; None where a line lacks a name."""
    names = dict.fromkeys(["round", *(name for row in rows for name in row)])
    return {name: [row.get(name) for row in rows] for name in names}


def stops(alarms, stop_on):
    """The first alarm that ends a run under --stop-on, one of `flags.STOP_ON`; None when none does."""
    ending = {"never": (), "divergence": ("diverged",), "any": DETECTORS}[stop_on]
    return next((alarm for alarm in alarms if alarm.detector in ending), None)


def _points(rounds, values):
    """The rounds with a value, and the values: int64 and fp64 arrays."""
    pairs = [(t, float(v)) for t, v in zip(rounds, values, strict=True) if v is not None]  # "nan" and "inf" too
    return np.array([t for t, _ in pairs], dtype=np.int64), np.array([v for _, v in pairs], dtype=np.float64)
