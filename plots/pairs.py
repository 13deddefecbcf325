"""Differences seed by seed: paired t intervals, ratios, Holm's correction over the comparisons of a table.

    python plots/tables.py mamba_fl --data-dir mamba_fl/results/gap.jsonl --holm

Two runs of one seed have the same shards and the same start, so that the spread of their differences is the one to
judge by. A Series indexed by seed minus another aligns them. Three differences say little about their spread: `pooled`
takes it from all rows of a table; the other functions use that `pool` in place of the differences' own.
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


def pooled(rows):
    """(standard deviation, degrees of freedom) of several rows' differences about the mean of each, of lists of them.

    sd^2 = sum_i sum_j (x_ij - mean_i)^2 / df, df = sum_i (n_i - 1): all rows are taken to spread alike. Of ratios it
    takes the logarithms. (nan, 0) where no row has two finite values.
    """
    rows = [np.asarray(row, dtype=float) for row in rows]
    rows = [row for row in rows if len(row) > 1 and np.isfinite(row).all()]
    freedom = sum(len(row) - 1 for row in rows)
    return math.sqrt(sum(np.var(row) * len(row) for row in rows) / freedom) if freedom else math.nan, freedom


def pooled_words(pool, digits=3):
    """What stands beside a table whose intervals are of a pooled standard deviation."""
    return f"Intervals: standard deviation {pool[0]:.{digits}f} pooled over the rows, {pool[1]} degrees of freedom."


def error(differences, pool=None):
    """(standard error of their mean, degrees of freedom); nan where they say nothing of it."""
    n = len(differences)
    if pool is None:
        own = np.std(differences, ddof=1) if n > 1 and np.ptp(differences) else 0.0 if n > 1 else math.nan
        pool = own, n - 1
    return float(pool[0]) / math.sqrt(n) if n else math.nan, pool[1]


def interval(differences, level=0.95, pool=None):
    """(low, high) of the t test's interval of the mean of differences; nan of fewer than two without `pool`."""
    from scipy.stats import t as student  # only here: it takes a while to import

    each, freedom = error(differences, pool)
    if not each > 0:  # all alike, or unknown
        return (float(np.mean(differences)),) * 2 if each == 0 else (math.nan, math.nan)
    mean, half = float(np.mean(differences)), each * float(student.ppf((1 + level) / 2, freedom))
    return mean - half, mean + half


def p_value(differences, pool=None):
    """Of the same test: whether the mean of the differences is 0."""
    from scipy.stats import t as student

    each, freedom = error(differences, pool)
    return 2 * float(student.sf(abs(np.mean(differences)) / each, freedom)) if each > 0 else math.nan


def ratio(mine, base, pool=None):
    """(geometric mean, low, high, p) of mine / base over the seeds that both have, of logarithms; nan if not finite."""
    logs = paired(np.log(mine), np.log(base))
    if not len(logs) or not np.isfinite(logs).all():
        return (math.nan,) * 4
    return *np.exp([logs.mean(), *interval(logs, pool=pool)]), p_value(logs, pool)


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
    """`-1.20 ± 0.30, 3`: mean and standard deviation seed by seed, and how many pairs; `-` without any."""
    apart = paired(mine, base)
    text = spread(apart, digits)
    if text == "-":
        return text
    return Cell(f"{text if text.startswith('-') else '+' + text}, {len(apart)}", p_value(apart))


def pairs_cell(every, digits=3, pool=None):
    """`+0.119 [+0.052, +0.186], 3`: the mean of differences, the 95 % interval of a paired t test (`?` of one pair),
    how many pairs, `2 of 3` where one is not finite; `-` without any."""
    every = np.asarray(every, dtype=float)
    pairs = every[np.isfinite(every)]
    if not len(pairs):
        return "-" if not len(every) else f"none of {len(every)} finite"
    low, high = interval(pairs, pool=pool)
    ends = f"{low:+,.{digits}f}, {high:+,.{digits}f}" if math.isfinite(low) else "?"
    count = f"{len(pairs)} of {len(every)}" if len(pairs) < len(every) else len(pairs)
    return Cell(f"{pairs.mean():+,.{digits}f} [{ends}], {count}", p_value(pairs, pool))
