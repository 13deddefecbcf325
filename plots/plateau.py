"""llm_noniid's preset `rounds`: what skew costs in time and what it costs for good; plots/noniid.py has the study.

Both are against IID with the same algorithm, clients a round and seed. Time: the first round at which the validation
accuracy, a mean of the last three evaluations, is SHARE of IID's last quarter; and the other way round, the first at
which IID's is the row's own last quarter. For good: test accuracy after the last round; beside it validation accuracy
over the last quarter of the rounds, on which the clients of one round weigh less, and how much of that cost went since
the quarter before. Both differences of test accuracy, to IID and to FedAvg under the same skew, are corrected by Holm
together. A seed that diverged got nowhere.
"""

import numpy as np
import pandas as pd

from plots.pairs import after_holm, compared, paired

SHARE, LEAST = 0.95, 30  # of IID's accuracy; rounds from which there is a plateau to speak of


def curve(row):
    """(rounds [E], running mean of three evaluations' accuracy [S, E]), of those from the third on."""
    t, values = row.rounds("val_accuracy")
    after = t > 0
    t, values = t[after], values[:, after]
    return t[2:], (values[:, 2:] + values[:, 1:-1] + values[:, :-2]) / 3


def quarter(row, last=True):
    """The mean accuracy of the last quarter of the rounds, or of the one before it: a Series by seed."""
    t, values = row.rounds("val_accuracy")
    end = t[-1] if last else 0.75 * t[-1]
    inside = (t > end - t[-1] / 4) & (t <= end)
    return pd.Series(values[:, inside].mean(axis=1), row.counted.index)


def rounds_to(row, targets):
    """The first round of the curve at which a seed has its target: a Series, inf where it never has."""
    t, values = curve(row)
    every = pd.DataFrame(values, row.counted.index, t)
    seeds = every.index.intersection(targets.index)
    return pd.Series({s: next((x for x in t if every.loc[s, x] >= targets[s]), np.inf) for s in seeds}, dtype=float)


def rounds_cell(rounds, row):
    """`12 (4 of 5)`: the median, and how many of the row's seeds got there."""
    every = np.append(rounds, np.full(len(row.runs) - len(rounds), np.inf))
    middle = np.median(every)
    got = f"{np.isfinite(every).sum()} of {len(every)}"
    return f"{middle:g} ({got})" if np.isfinite(middle) else f"> {row['num_rounds']} ({got})"


def plateau_table(about, rows, baseline):
    """[a table of long runs under skew]; [] without. baseline(row, rows, "iid" or "fedavg"): what is compared with."""
    long = [row for row in rows if not row.central and (row["num_rounds"] or 0) >= LEAST]
    long = [row for row in long if len(row.rounds("val_accuracy")[0]) > 3]
    pairs = [(row, iid if (iid := baseline(row, rows, "iid")) in long else row) for row in long]
    if all(row is iid for row, iid in pairs):
        return []
    made = []
    for row, iid in pairs:
        base, test, fedavg = quarter(iid), row.results("test_accuracy"), baseline(row, rows, "fedavg")
        mine, theirs = rounds_to(row, SHARE * base), rounds_to(iid, SHARE * base)
        all_there = np.isfinite(mine).sum() == len(row.runs)
        costs = [100 * paired(quarter(iid, last), quarter(row, last)) for last in (True, False)]
        known = row is not iid
        made.append(
            [
                row.label,
                rounds_cell(mine, row),
                compared(np.log(mine / theirs), 2, sign="", scale=np.exp) if known and all_there else "-",
                rounds_cell(rounds_to(iid, quarter(row)), row) if known else "-",
                compared(100 * paired(iid.results("test_accuracy"), test), 1, sign="") if known else "-",
                compared(100 * paired(test, fedavg.results("test_accuracy")), 1) if fedavg else "-",
                compared(costs[0], 1, sign="") if known else "-",
                compared(costs[1] - costs[0], 1) if known else "-",
            ]
        )
    decide = [cell for line in made for cell in line[4:6]]
    p = after_holm(decide, [np.isfinite(getattr(cell, "p", np.nan)) for cell in decide])
    lines = [[*line[:5], p[2 * i], line[5], p[2 * i + 1], *line[6:]] for i, line in enumerate(made)]
    heads = ["method", "rounds to 95 %", "times IID's", "its end in IID's rounds", "points below IID", "p after Holm"]
    heads += ["points above FedAvg", "its p", "below IID, last quarter", "gone in it"]
    return [(f"Time and plateau, {about}", "", [heads, *lines])]
