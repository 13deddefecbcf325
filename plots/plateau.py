"""llm_noniid's preset `rounds`: what skew costs in time and what it costs for good; plots/noniid.py has the study.

Both are against IID with the same algorithm, clients a round and seed. Time: the first round at which the validation
accuracy, a mean of three evaluations, is SHARE of IID's last quarter. For good: test accuracy after the last round, and
beside it the validation accuracy of the last quarter of the rounds, on which the clients of one round weigh less. It is
for good only where the accuracy no longer rises: the last column says by how much it still did. Both test accuracies'
differences, to IID and to FedAvg on the same clients, are corrected by Holm together.
"""

import numpy as np
import pandas as pd

from plots.pairs import after_holm, compared, paired, spread

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


def plateau_table(about, rows, baseline):
    """[a table of long runs under skew]; [] without. baseline(row, rows, "iid" or "fedavg"): what is compared with."""
    long = [row for row in rows if not row.central and (row["num_rounds"] or 0) >= LEAST]
    pairs = [(row, baseline(row, rows, "iid") or row) for row in long]
    if all(row is iid for row, iid in pairs):
        return []
    made = []
    for row, iid in pairs:
        base, test, fedavg = quarter(iid), row.results("test_accuracy"), baseline(row, rows, "fedavg")
        mine, theirs = rounds_to(row, SHARE * base), rounds_to(iid, SHARE * base)
        known, got = row is not iid, np.isfinite(mine)
        made.append(
            [
                row.label,
                f"{np.median(mine):g}" if np.isfinite(np.median(mine)) else f"> {row['num_rounds']}",
                f"{got.sum()} of {len(mine)}",
                compared(np.log(mine / theirs), 2, sign="", scale=np.exp) if known and got.all() else "-",
                spread(100 * test, 1),
                compared(100 * paired(iid.results("test_accuracy"), test), 1, sign="") if known else "-",
                compared(100 * paired(test, fedavg.results("test_accuracy")), 1) if fedavg else "-",
                compared(100 * paired(base, quarter(row)), 1, sign="") if known else "-",
                compared(100 * (quarter(row) - quarter(row, last=False)), 1),
            ]
        )
    decide = [cell for line in made for cell in line[5:7]]
    p = after_holm(decide, [cell != "-" for cell in decide])
    lines = [[*line[:6], p[2 * i], line[6], p[2 * i + 1], *line[7:]] for i, line in enumerate(made)]
    heads = ["method", "rounds to 95 %", "got there", "times IID's", "test accuracy", "points below IID"]
    heads += ["p after Holm", "points above FedAvg", "its p", "below IID, last quarter", "rise in the last quarter"]
    return [(f"Time and plateau, {about}", "", [heads, *lines])]
