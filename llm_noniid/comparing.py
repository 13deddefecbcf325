"""Settings compared over seeds, and the parts of which a verdict is made.

Two settings are compared seed by seed, because two runs of one seed have the same texts and the same model: over the
seeds that both have, d_s = b_s - a_s with mean d and sample standard deviation s.

    more, less   |d| > c s and |d| above the floor (0.01 nats, or 10 % of a measure without a natural scale)
    same         |d| + c s within the floor
    open         anything else, and whatever has one seed only

c is that of the two-sided t-test at 7.4 %: 2.0 for three seeds, 6.0 for two, 1.3 for four. No correction for the number
of comparisons is made. Failure maps have one seed: they stand beside the verdicts and decide none.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

CONFIRMED, REFUTED, UNDECIDED, UNMEASURED = "confirmed", "refuted", "not decided", "not measured"
FLOOR = 0.01  # nats: 1 % of perplexity
RATIO_FLOOR = math.log(1.1)


@dataclass(frozen=True)
class Part:
    """One claim that a verdict rests on: its status and the numbers. beside: said, but not counted."""

    claim: str
    status: str
    numbers: str
    beside: bool = False


def compare(a, b, floor=FLOOR):
    """("more" | "less" | "same" | "open" | "", d, s) of b against a: see this module's docstring.

    Args: a, b: {seed: number}; numbers may be inf (a run that blew up): inf in all seeds of one only is more than any
        number. Returns "" where no seed has both, and s None for one seed.
    """
    seeds = sorted(s for s in a.keys() & b.keys() if a[s] is not None and b[s] is not None)
    if not seeds:
        return "", None, None
    low, high = np.array([a[s] for s in seeds], float), np.array([b[s] for s in seeds], float)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        only = [not np.isfinite(x).any() and np.isfinite(y).all() for x, y in ((high, low), (low, high))]
        word = "more" if only[0] else "less" if only[1] else "open"
        return (word if len(seeds) > 1 else "open"), None, None
    d = float((high - low).mean())
    if len(seeds) == 1:
        return "open", d, None
    s = float((high - low).std(ddof=1))
    width = quantile(len(seeds)) * s
    if abs(d) > max(width, floor):
        return ("more" if d > 0 else "less"), d, s
    return ("same" if abs(d) + width <= floor else "open"), d, s


def quantile(n):
    """c of n seeds: exactly 2 for three."""
    level = student.cdf(2 * math.sqrt(3), 2)
    return student.ppf(level, n - 1) / math.sqrt(n)


def judged(word, wanted):
    """A comparison's word as a status: confirmed if it is `wanted`, refuted if it is decided otherwise."""
    return {"": UNMEASURED, "open": UNDECIDED, wanted: CONFIRMED}.get(word, REFUTED)


def combine(parts, any_of=False):
    """The status of several parts: all of them must hold, or (any_of) one of them."""
    found = {part.status for part in parts if not part.beside}
    decisive, other = (CONFIRMED, REFUTED) if any_of else (REFUTED, CONFIRMED)
    if decisive in found:
        return decisive
    if found <= {UNMEASURED}:
        return UNMEASURED
    return other if found == {other} else UNDECIDED


def majority(runs, holds):
    """(status, how many) of "it holds for most seeds": confirmed above half, refuted for none; one seed decides not."""
    n = sum(1 for run in runs.values() if holds(run))
    if not runs:
        return UNMEASURED, 0
    if len(runs) == 1:
        return UNDECIDED, n
    return (CONFIRMED if 2 * n > len(runs) else REFUTED if n == 0 else UNDECIDED), n


def measure(runs, name, how="last"):
    """{seed: a run's last value, or its mean over the evaluations} of a curve; seeds without one left out."""
    found = {seed: getattr(run, how)(name) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def logs(values):
    """{seed: log of the number}: differences of these are ratios."""
    return {seed: math.log(v) for seed, v in values.items() if v is not None and 0 < v < math.inf}


def spread(values, digits=4):
    """`5.123 ± 0.004` of numbers: mean and sample standard deviation; the mean alone for one."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return f"not finite in {sum(not math.isfinite(v) for v in values)} of {len(values)}"
    mean = f"{np.mean(values):.{digits}g}"
    if len(values) == 1:
        return mean
    s = np.std(values, ddof=1)
    return f"{mean} ± {s if s > 1e-12 * abs(np.mean(values)) else 0:.2g}"  # equal numbers' s is not quite 0


def sides(a, b, d, s, n, unit):
    """Two settings' numbers as text: `3.21 ± 0.02 -> 3.30 ± 0.01 (+0.09 ± 0.01 nats, 3 seeds)`."""
    text = f"{spread(a.values())} → {spread(b.values())}"
    if d is None:
        return text
    seeds = f"{n} seed{'s' * (n != 1)}"
    return f"{text} ({d:+.3g}{'' if s is None else f' ± {s:.2g}'}{f' {unit}' if unit else ''}, {seeds})"


def part(claim, a, b, wanted, unit="nats", floor=FLOOR, ratio=False, beside=False):
    """A `Part`: b is `wanted` ("more", "less") against a; ratio: compared as logs, quoted as they are."""
    left, right = (logs(a), logs(b)) if ratio else (a, b)
    word, d, s = compare(left, right, RATIO_FLOOR if ratio else floor)
    n = len(left.keys() & right.keys())
    numbers = "-" if not word else sides(a, b, d, s, n, "in logs" if ratio else unit)
    return Part(claim, judged(word, wanted), numbers, beside)


def counted(runs, n, what):
    """`2 of 3 seeds failed`; `-` without runs."""
    return "-" if not runs else f"{n} of {len(runs)} seeds {what}"
