"""Differences seed by seed: paired t intervals, ratios, Holm's correction over the comparisons of a table.

    python plots/tables.py mamba_fl --data-dir mamba_fl/results/gap.jsonl --holm

Two runs of one seed have the same shards and the same start, so that the spread of their differences is the one to
judge by. A Series indexed by seed minus another aligns them.
"""

import math

import numpy as np
import pandas as pd


class Cell(str):
    """A table's cell that holds a comparison: its text, and `p`, of the t test that its interval is of."""

    def __new__(cls, text, p=math.nan):
        cell = super().__new__(cls, text)
        cell.p = p
        return cell


def paired(mine, base):
    """mine - base over the seeds that both have."""
    return mine.loc[mine.index.intersection(base.index)] - base.loc[mine.index.intersection(base.index)]


def interval(differences, level=0.95):
    """(low, high) of the paired t test's interval of the mean of differences: nan of fewer than two."""
    from scipy.stats import ttest_1samp  # only here: it takes a while to import

    if len(differences) < 2:
        return math.nan, math.nan
    if np.ptp(differences) == 0:  # all alike, up to the last bit: scipy has no interval for that
        return float(np.mean(differences)), float(np.mean(differences))
    return tuple(map(float, ttest_1samp(differences, 0).confidence_interval(level)))


def p_value(differences):
    """Of the same test: whether the mean of the differences is 0."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0).pvalue) if len(differences) > 1 and np.ptp(differences) else math.nan


def ratio(mine, base):
    """(geometric mean, low, high, p) of mine / base over the seeds that both have, of logarithms; nan if not finite."""
    logs = paired(np.log(mine), np.log(base))
    if not len(logs) or not np.isfinite(logs).all():
        return (math.nan,) * 4
    return *np.exp([logs.mean(), *interval(logs)]), p_value(logs)


def holm(values):
    """Holm's corrected p values, of a list: the k-th smallest of m times m - k + 1, never below the one before."""
    found = pd.Series(values, dtype=float).sort_values()
    steps = found * np.arange(len(found), 0, -1)
    return steps.cummax().clip(upper=1).sort_index().tolist()


# ---- cells


def spread(values, digits=None):
    """`141.6 ± 0.5`; the mean alone for one seed; `-` where a value is missing or not finite."""
    if not len(values) or not np.isfinite(values).all():
        return "-"
    mean = np.mean(values)
    if digits is None:
        digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    text = f"{mean:,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):,.{digits}f}"


def difference(mine, base, digits=2):
    """`-1.20 ± 0.30`: seed by seed; `-` without any."""
    text = spread(paired(mine, base), digits)
    return text if text.startswith("-") else "+" + text


def pairs_cell(every, digits=3):
    """`+0.119 [+0.052, +0.186], 3`: the mean of differences, the 95 % interval of a paired t test (`?` of one pair),
    how many pairs, `2 of 3` where one is not finite; `-` without any."""
    every = np.asarray(every, dtype=float)
    pairs = every[np.isfinite(every)]
    if not len(pairs):
        return "-" if not len(every) else f"none of {len(every)} finite"
    ends = ", ".join(f"{end:+,.{digits}f}" for end in interval(pairs)) if len(pairs) > 1 else "?"
    count = f"{len(pairs)} of {len(every)}" if len(pairs) < len(every) else len(pairs)
    return Cell(f"{pairs.mean():+,.{digits}f} [{ends}], {count}", p_value(pairs))


def ratio_cell(mine, base):
    """`1.033 [1.021, 1.045]`: the geometric mean of the ratios and the interval of their logarithms."""
    mean, low, high, p = ratio(mine, base)
    if not math.isfinite(mean):
        return "-"
    return Cell(f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else ""), p)
