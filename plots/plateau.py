"""llm_noniid's preset `rounds`: what skew costs in time and what it costs for good; plots/noniid.py has the study.

Both are against IID with the same algorithm, clients a round and seed. Time: the first round at which the validation
accuracy, a mean of the last three evaluations, is SHARE of IID's last quarter; and the other way round, the first at
which IID's is the row's own last quarter. For good: test accuracy after the last round; beside it validation accuracy
over the last quarter of the rounds, on which the clients of one round weigh less, and how much of that cost went since
the quarter before. Both differences of test accuracy, to IID and to FedAvg under the same skew, are corrected by Holm
together. A seed that diverged got nowhere. At equal bytes: SCAFFOLD sends twice as much a round, so that beside it
stands FedAvg with as many bytes in all, in twice the rounds.
"""

import math

import numpy as np
import pandas as pd

from common.curves import GREY, number, set_title
from plots.pairs import after_holm, compared, paired
from plots.style import legend_below, look, panel_axes, seeds_range

SHARE, LEAST = 0.95, 30  # of IID's accuracy; rounds from which there is a plateau to speak of


def accuracy(row):
    """Validation accuracy [S, E] after the evaluated rounds but 0, nan where a seed ended before: a DataFrame."""
    every = {
        seed: {
            line["round"]: number(line["val_accuracy"]) for line in lines if line["round"] and "val_accuracy" in line
        }
        for seed, lines in row.counted["curve"].items()
    }
    return pd.DataFrame.from_dict(every, orient="index", dtype=float).sort_index(axis=1)


def quarter(row, last=True):
    """The mean accuracy of the last quarter of the rounds, or of the one before it: a Series by seed."""
    values, end = accuracy(row), row["num_rounds"] * (1 if last else 0.75)
    inside = [t for t in values.columns if end - row["num_rounds"] / 4 < t <= end]
    return values[inside].mean(axis=1, skipna=False)


def rounds_to(row, targets):
    """The first round at which the mean of three evaluations is a seed's target: a Series, inf where it never is, nan
    without a target."""
    values = accuracy(row)
    every = (values + values.shift(1, axis=1) + values.shift(2, axis=1)) / 3
    first = {
        seed: next((t for t in every if every.loc[seed, t] >= target), np.inf) if np.isfinite(target) else np.nan
        for seed, target in targets.items()
        if seed in every.index
    }
    return pd.Series(first, dtype=float)


def rounds_cell(rounds, row):
    """`12 (4 of 5)`: the median, and how many seeds got there, of those with a target and those that diverged."""
    every = np.append(rounds.dropna(), np.full(len(row.runs) - len(row.counted), np.inf))
    if not len(every):
        return "-"
    middle = np.median(every)
    got = f"{np.isfinite(every).sum()} of {len(every)}"
    return f"{middle:g} ({got})" if np.isfinite(middle) else f"> {row['num_rounds']} ({got})"


def long_runs(rows):
    """The federated rows with enough rounds, and evaluations of accuracy, for a plateau; and those that diverged."""
    rows = [row for row in rows if not row.central and (row["num_rounds"] or 0) >= LEAST]
    return [row for row in rows if row.counted.empty or len(accuracy(row).columns) > 2]


def plateau_table(about, rows, baseline):
    """[a table of long runs under skew]; [] without. baseline(row, rows, "iid", "fedavg" or "bytes"): its opponent."""
    long = long_runs(rows)
    pairs = [(row, iid if (iid := baseline(row, rows, "iid")) in long else row) for row in long]
    if all(row is iid for row, iid in pairs):
        return []
    made = []
    for row, iid in pairs:
        base, test = quarter(iid), row.results("test_accuracy")
        above = [
            compared(100 * paired(test, other.results("test_accuracy")), 1) if other else "-"
            for other in (baseline(row, rows, against) for against in ("fedavg", "bytes"))
        ]
        mine, theirs = rounds_to(row, SHARE * base), rounds_to(iid, SHARE * base)
        all_there = len(mine) and np.isfinite(mine).all() and len(row.counted) == len(row.runs)
        costs = [100 * paired(quarter(iid, last), quarter(row, last)) for last in (True, False)]
        known = row is not iid
        made.append(
            [
                row.label,
                rounds_cell(mine, row) if known or row.args["partition"] == "IID" else "-",
                compared(np.log(mine / theirs), 2, sign="", scale=np.exp) if known and all_there else "-",
                rounds_cell(rounds_to(iid, quarter(row)), row) if known else "-",
                compared(100 * paired(iid.results("test_accuracy"), test), 1, sign="") if known else "-",
                *above,
                compared(costs[0], 1, sign="") if known else "-",
                compared(costs[1] - costs[0], 1) if known else "-",
            ]
        )
    decide = [cell for line in made for cell in line[4:6]]
    p = after_holm(decide, [hasattr(cell, "p") for cell in decide])
    lines = [[*line[:5], p[2 * i], line[5], p[2 * i + 1], *line[6:]] for i, line in enumerate(made)]
    heads = ["method", "rounds to 95 %", "times IID's", "its end in IID's rounds", "points below IID", "p after Holm"]
    heads += ["points above FedAvg", "its p", "above FedAvg, equal bytes", "below IID, last quarter", "gone in it"]
    return [(f"Time and plateau, {about}", "", [heads, *(line for line in lines if set(line[1:]) != {"-"})])]


# ---- the figure


def draw(about, rows):
    """Test accuracy after the last round against the clients' skew: a panel per share of clients a round, a line per
    algorithm, number of rounds and local work; a dot is a seed, dotted is the model before training."""
    lines, kinds = {}, list(dict.fromkeys(map(line_of, rows)))
    for row in rows:
        lines.setdefault(row["participation_rate"], {}).setdefault(line_of(row), []).append(row)
    places = [name for name, *_ in kinds]
    looks = {one: look(len(set(places[:i]) - {one[0]}), places[:i].count(one[0])) for i, one in enumerate(kinds)}
    skews = sorted({skew_of(row) for row in rows}, reverse=True)
    figure, axes = panel_axes(len(lines), sharey=True)
    for axis, (share, each) in zip(axes, sorted(lines.items(), reverse=True), strict=True):
        first = [row.rounds("val_accuracy")[1][:, :1] for some in each.values() for row in some]
        start = 100 * np.concatenate([values.ravel() for values in first]).mean()
        for i, kind in enumerate(kinds):
            if kind not in each:
                continue
            some = sorted(each[kind], key=skew_of, reverse=True)
            steps = [skews.index(skew_of(row)) for row in some]
            x = np.add(steps, 0.1 * (i - (len(kinds) - 1) / 2))
            values = [100 * row.results("test_accuracy") for row in some]
            shown = looks[kind]
            label = "{}, {} rounds".format(*kind) + f" of {kind[2]}" * (len({local for *_, local in kinds}) > 1)
            gaps = np.flatnonzero(np.diff(steps) > 1) + 1  # no line over a skew that was not run
            means = np.insert([one.mean() for one in values], gaps, np.nan)
            axis.plot(np.insert(x, gaps, np.nan), means, label=label, **shown)
            for place, one, row in zip(x, values, some, strict=True):
                axis.plot([place] * len(one), one, "o", markersize=2.5, color=shown["color"], alpha=0.7)
                if lost := len(row.runs) - len(one):
                    height = one.mean() if len(one) else start
                    axis.annotate(f"{lost} of {len(row.runs)} diverged", (place, height), fontsize=8)
        axis.axhline(start, color=GREY, linestyle=":", linewidth=1, label="before training")
        axis.set_xticks(range(len(skews)), ["IID" if math.isinf(skew) else f"{skew:g}" for skew in skews])
        axis.set_xlabel("Dirichlet's alpha: to the right more skew")
        clients = rows[0].first["setting"]["clients"]
        axis.set_title(f"{share * clients:g} of {clients} clients a round", fontsize=9.5)
    axes[0].set_ylabel("Test accuracy after the last round (%)")
    legend_below(figure, axes)
    set_title(figure, f"What skewed labels cost (dots: {seeds_range(rows)} seeds)\n{about}")
    return figure


def line_of(row):
    """Its line in the figure: the algorithm's name, the rounds, a client's work in one."""
    return row.name, row["num_rounds"], row.first["setting"].get("local")


def skew_of(row):
    """Dirichlet's alpha, inf of IID clients."""
    return math.inf if row.args["partition"] == "IID" else row.args["alpha"]
