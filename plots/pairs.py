"""Differences seed by seed, their intervals by a paired t test, Holm's correction over the comparisons of a table.

    python plots/tables.py mamba_fl --data-dir mamba_fl/results/gap.jsonl --holm

Two runs of one seed have the same shards and the same start, so that the spread of their differences is the one to
judge by. A Series indexed by seed minus another aligns them. Fewer than OWN differences say too little of their spread:
they take the one `pooled` over the rows of a table, where these spread alike, and have no interval where they do not.
Of ratios all of this is said of the logarithms.
"""

import math

import numpy as np
import pandas as pd

OWN = 5  # differences from which on their own standard deviation is taken


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

    sd^2 = sum_i sum_j (x_ij - mean_i)^2 / df, df = sum_i (n_i - 1): all rows are taken to spread alike. (nan, 0) where
    no row has two finite values.
    """
    rows = [np.asarray(row, dtype=float) for row in rows]
    rows = [row for row in rows if len(row) > 1 and np.isfinite(row).all()]
    freedom = sum(len(row) - 1 for row in rows)
    return math.sqrt(sum(np.var(row) * len(row) for row in rows) / freedom) if freedom else math.nan, freedom


def estimate(differences, pool=(math.nan, 0)):
    """(mean, low, high, p) of differences: their mean, its 95 % interval, and the p value of a t test that it is 0.

    pool: the `pooled` deviation and its degrees of freedom, in place of the own one of fewer than OWN differences. nan
    for what there is no deviation to judge by.
    """
    from scipy.stats import t as student  # only here: it takes a while to import

    n, mean = len(differences), float(np.mean(differences))
    deviation, freedom = pool if n < OWN else (np.std(differences, ddof=1), n - 1)
    error = float(deviation) / math.sqrt(n)
    half = error * float(student.ppf(0.975, freedom))
    p = 2 * float(student.sf(abs(mean) / error, freedom)) if error > 0 else math.nan
    return mean, mean - half, mean + half, p


def holm(values):
    """Holm's corrected p values, of a list: the k-th smallest of m times m - k + 1, never below the one before."""
    found = pd.Series(values, dtype=float).sort_values()
    steps = found * np.arange(len(found), 0, -1)
    return steps.cummax().clip(upper=1).sort_index().tolist()


def after_holm(cells, decide):
    """[p after Holm's correction over the cells that decide, "-" for the others]. decide: a bool for each.

    A cell that decides and has no p (too few seeds are left) counts among the comparisons all the same.
    """
    corrected = iter(holm([getattr(cell, "p", math.nan) for cell, one in zip(cells, decide, strict=True) if one]))
    found = [next(corrected) if one else math.nan for one in decide]
    return ["-" if math.isnan(p) else f"{p:.2g}" for p in found]


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


def compared(differences, digits=3, pool=(math.nan, 0), sign="+", scale=float):
    """`+0.119 [+0.052, +0.186], 5`: the mean, its interval where `estimate` has one, how many pairs, `4 of 5` where one
    is not finite; `-` without any. scale: what is shown of a value, such as `math.exp` of a logarithm."""
    every = np.asarray(differences, dtype=float)
    pairs = every[np.isfinite(every)]
    if not len(pairs):
        return f"none of {len(every)} finite" if len(every) else "-"
    *numbers, p = estimate(pairs, pool)
    mean, low, high = (f"{scale(one):{sign},.{digits}f}" for one in numbers)
    ends = "" if math.isnan(numbers[1]) else f" [{low}, {high}]"
    return Cell(f"{mean}{ends}, {len(pairs)}{f' of {len(every)}' * (len(pairs) < len(every))}", p)
