"""How often each detector of llm_noniid is right: alarms on synthetic curves of a known kind.

    python benchmarks/detectors.py
    python benchmarks/detectors.py --eval-every 5 --curves 5000

A row is a kind of curve, a column a detector: the share of curves with an alarm, and behind it the median number of
rounds from the onset to the alarm where the detector should fire ("+"). Where it should not, the share is its rate of
false alarms. Losses fall as 3.2 + exp(-t/12) nats, as a small language model's, unless the kind says otherwise; 10
clients; drift is that of updates g + n_k with |n_k|^2 = v |g|^2, exact for high dimensions, with a jitter of 10 %.
Signs alone: what an oscillation detector does without the noise floor, a sign-change rate above 3/4 in some window.
"""

import argparse
import math
import statistics
import time

import numpy as np

from common.seeding import stream
from llm_noniid.detectors import run_detectors, sign_change_rate

ROUNDS, CLIENTS = 50, 10
COLUMNS = ("diverged", "oscillating", "drifting", "slow", "left_out")


def falling(draw, n, noise=0.01, over=12):
    """Losses [n, ROUNDS + 1] (round 0 is before training)."""
    return 3.2 + np.exp(-np.arange(ROUNDS + 1) / over) + noise * draw.standard_normal((n, ROUNDS + 1))


def steady(draw, n, noise=0.01, per_20=0.06):
    """Falls by the share `per_20` of itself in 20 rounds, throughout."""
    t = np.arange(ROUNDS + 1)
    return 3.5 * (1 - per_20) ** (t / 20) + noise * draw.standard_normal((n, ROUNDS + 1))


def plateau(draw, n, noise):
    return 3.2 + noise * draw.standard_normal((n, ROUNDS + 1))


def after(draw, n, shape):
    """A falling curve plus shape(rounds since an onset that differs from curve to curve)."""
    onset = draw.integers(10, 30, (n, 1))
    return falling(draw, n) + shape(np.maximum(np.arange(ROUNDS + 1) - onset, 0)), None, onset[:, 0]


def broken(draw, n):
    onset = draw.integers(10, 46, (n, 1))
    values = draw.choice([np.nan, np.inf], (n, 1))
    return np.where(np.arange(ROUNDS + 1) < onset, falling(draw, n), values), None, onset[:, 0]


def spike(draw, n):
    losses = steady(draw, n)
    losses[np.arange(n), draw.integers(5, 45, n)] += 0.5
    return losses


def bump(draw, n):
    """The first rounds make it worse: 0.6 nats, over after ten rounds."""
    t = np.arange(ROUNDS + 1)
    return falling(draw, n) + 0.6 * t / 3 * np.exp(1 - t / 3)


def swings(draw, n, size, period):
    t, phase = np.arange(ROUNDS + 1), draw.uniform(0, 2 * math.pi, (n, 1))
    wave = (-1.0) ** t if period == 2 else np.sin(2 * math.pi * t / period + phase)
    return steady(draw, n) + size * wave


def random_walk(draw, n):
    return steady(draw, n, per_20=0.1) + np.cumsum(0.02 * draw.standard_normal((n, ROUNDS + 1)), axis=1)


def drift(draw, n, v):
    """Relative drift [n, ROUNDS + 1]; v: |n_k|^2 / |g|^2 of each round."""
    v = np.broadcast_to(v, (n, ROUNDS + 1))
    values = np.sqrt(v * (1 - 1 / CLIENTS) / (1 + v / CLIENTS))
    return values * np.exp(0.1 * draw.standard_normal(values.shape))


def kinds(draw, n):
    """Yields (name, detectors that should fire, losses, drift or None, onsets or None)."""
    since = np.arange(ROUNDS + 1)
    yield "falling, noise 0.003", (), steady(draw, n, 0.003), drift(draw, n, 0.5), None
    for noise in (0.01, 0.02, 0.03):
        yield f"falling, noise {noise}", (), steady(draw, n, noise), drift(draw, n, 1.0), None
    yield "falling, one spike of 0.5", (), spike(draw, n), None, None
    yield "a bump of 0.6 at the start", (), bump(draw, n), None, None
    yield "random walk, falling", (), random_walk(draw, n), None, None
    yield "converged after 20 rounds", ("slow",), falling(draw, n, over=4), None, np.full(n, 20)
    for noise in (0.01, 0.03):
        yield f"pure noise {noise}", ("slow",), plateau(draw, n, noise), None, np.zeros(n)
    for share in (0.003, 0.009, 0.015, 0.02):
        slow = ("slow",) if share < 0.01 else ()
        yield f"falls {share:.1%} in 20 rounds", slow, steady(draw, n, 0.003, share), None, np.zeros(n)
    yield "not finite from one round on", ("diverged",), *broken(draw, n)
    for rate in (0.2, 0.1, 0.05):
        yield f"rises {rate} a round", ("diverged",), *after(draw, n, lambda t, r=rate: r * t)
    yield "doubles in 10 rounds", ("diverged",), *after(draw, n, lambda t: 3.2 * (2 ** (t / 10) - 1))
    yield "jumps by 0.8 and stays", ("diverged",), *after(draw, n, lambda t: 0.8 * (t > 0))
    yield "jumps by 1.2 and stays", ("diverged",), *after(draw, n, lambda t: 1.2 * (t > 0))
    for size in (0.02, 0.05, 0.2):
        yield f"+-{size} every round", ("oscillating",), swings(draw, n, size, 2), None, np.zeros(n)
    for period in (3, 4, 6):
        yield f"sine 0.2, period {period}", ("oscillating",), swings(draw, n, 0.2, period), None, np.zeros(n)
    for noise in (0.05, 0.1, 0.2):
        yield f"few clients: noise {noise}", ("oscillating",), steady(draw, n, noise), None, np.zeros(n)
    late = drift(draw, n, 1 + 1e3 * (since > 25))
    yield "no shared part after round 25", ("drifting",), steady(draw, n), late, np.full(n, 25)
    yield "own parts of thrice the shared", ("drifting",), steady(draw, n), drift(draw, n, 9.0), np.zeros(n)
    yield "own parts of twice the shared", (), steady(draw, n), drift(draw, n, 4.0), None
    fading = drift(draw, n, 20 ** (since / ROUNDS))
    yield "alike clients, converging", (), falling(draw, n), fading, None
    yield "two clients left out", ("left_out",), steady(draw, n), None, np.full(n, 25)


def rates(n, eval_every=1, seed=0):
    """{kind: ({detector: share of alarms}, {detector: median delay in rounds or None}, expected, signs alone)}."""
    rounds, result = np.arange(0, ROUNDS + 1, eval_every), {}
    for name, expected, losses, drifts, onsets in kinds(stream(seed, "detectors"), n):
        found = {column: [] for column in COLUMNS}
        for i in range(n):
            curves = {"round": rounds.tolist(), "val_loss": losses[i, rounds].tolist()}
            if drifts is not None:
                curves |= {"relative_drift": drifts[i, rounds].tolist(), "effective_clients": [CLIENTS] * len(rounds)}
            if "left_out" in expected:
                curves["left_out"] = [[[26, 3], [27, 5]] if t == 30 else None for t in rounds.tolist()]
            first = {}
            for alarm in run_detectors(curves):
                first.setdefault(alarm.detector, alarm.round)
            for column, at in first.items():
                found[column].append(at - (0 if onsets is None else onsets[i]))
        result[name] = (
            {column: len(at) / n for column, at in found.items()},
            {column: statistics.median(at) if at and onsets is not None else None for column, at in found.items()},
            expected,
            signs_alone(losses[:, rounds]),
        )
    return result


def signs_alone(losses, window=10, above=0.75):
    """The share of curves with a window whose sign-change rate is above 3/4, and the share of windows."""
    if losses.shape[1] < window or not np.isfinite(losses).all():
        return None
    windows = np.lib.stride_tricks.sliding_window_view(losses, window, axis=1)  # [n, windows, window]
    hits = sign_change_rate(windows.reshape(-1, window)).reshape(windows.shape[:2]) > above
    return float(hits.any(axis=1).mean()), float(hits.mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--curves", type=int, default=1000, help="curves of each kind")
    parser.add_argument("--eval-every", type=int, default=1, help="rounds between two evaluations")
    options = parser.parse_args()
    started = time.process_time()
    table = rates(options.curves, options.eval_every)
    seconds = time.process_time() - started
    print(f"{options.curves} curves of each kind, {ROUNDS} rounds, evaluated every {options.eval_every}; + should fire")
    print(f"{'':33}" + "".join(f"{column:>16}" for column in COLUMNS) + f"{'signs alone':>14}{'(windows)':>10}")
    for name, (shares, delays, expected, signs) in table.items():
        cells = []
        for column in COLUMNS:
            late = delays[column] if column in expected else None
            cells.append(f"{shares[column]:7.1%}{'+' if column in expected else ' '}")
            cells[-1] += f" {late:4.0f} r" if late is not None else ""
        text = "".join(f"{cell:>9}".ljust(16) for cell in cells)
        print(f"{name:33}  {text}" + (f"{signs[0]:9.1%}{signs[1]:11.1%}" if signs else f"{'-':>9}{'-':>11}"))
    print(
        f"{seconds:.1f} CPU seconds, {1e3 * seconds / (options.curves * len(table)):.2f} ms a curve for all detectors"
    )


if __name__ == "__main__":
    main()
