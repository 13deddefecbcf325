"""mamba_fl's preset `averages`: the table of effects and the figure; plots/mamba.py has the study.

A row is known by (moments, what, rounds by, R): what: "all" weights, or the group that has a pace of its own; R: how
often that is averaged. Of several rates the best on validation counts.
"""

import math

import numpy as np

from common.curves import new_figure, set_title
from plots import style
from plots.pairs import after_holm, compared, estimate, paired

WAYS = {  # (what, rounds by, moments) -> its line
    (what, by, state): f"{weights}, {rounds}{moments}"
    for what, weights in (("all", "all weights"), ("embedding", "embedding 8 times rarer"))
    for state, moments in (("keep", ""), ("pooled", ", pooled"))
    for by, rounds in (("steps", "equal steps"), ("drift", "equal drift"))
}


def by_groups(rows):
    """Whether some of them average groups of weights at their own pace."""
    return any(row["average_every"] for row in rows)


def has_alone(rows):
    """Whether they have besides what the figure compares: central training at two batches."""
    return by_groups(rows) and len({row["batch_size"] for row in rows if row.central}) > 1


def bytes_of(row):
    """Of one client in the whole run, up and down."""
    ups, downs = (row.rounds(name)[1][:, -1].mean() for name in ("bytes_up", "bytes_down"))
    return (ups + downs) / (row["num_clients"] * (row["participation"] or 1))


def parts_of(row):
    """(moments, what, rounds by, R) of a row of fed_avg.py."""
    what, steps = next(iter(row["average_every"]), ("all", row["local_updates"]))
    averages = row.results("round").mean() * row["local_updates"] / steps
    return row["client_state"], what, row["rounds_by"], round(averages)


def best_of(rows, key):
    """{key(row): row} of these rows, of several the best on validation."""
    worst_first = sorted(rows, key=lambda row: -row.results("final_val_ppl").mean())
    return {key(row): row for row in worst_first}


def federated_and_central(rows):
    """({parts: row} of fed_avg.py, {batch: log test perplexity by seed} of central training)."""
    central = best_of([row for row in rows if row.central], lambda row: row["batch_size"])
    return best_of([row for row in rows if row.kind == "fed_avg"], parts_of), {
        b: logs_of(r) for b, r in central.items()
    }


def logs_of(row):
    return np.log(row.results("test_ppl_last"))


# ---- the table


def effects(rows):
    """[(name, differences of log test perplexity by seed, whether it is one that decides)], of the rows there are."""
    every, central = federated_and_central(rows)
    logs = {name: logs_of(row) for name, row in every.items()}
    sizes = {name: math.log(bytes_of(row)) for name, row in every.items()}
    found, rare, often = [], min(R for *_, R in logs), max(R for *_, R in logs)

    def line(a, moments):
        """The rows that average all weights, with rounds as `a`, by their bytes."""
        return sorted((b for b in logs if b[:3] == (moments, "all", a[2])), key=sizes.get)

    def at_equal_bytes(a, moments):
        """A row against the line through those of `line`, in the logarithms."""
        names = line(a, moments)
        x = [sizes[b] for b in names]
        i = int(np.clip(np.searchsorted(x, sizes[a]), 1, len(x) - 1))
        share = (sizes[a] - x[i - 1]) / (x[i] - x[i - 1])
        return logs[a] - (1 - share) * logs[names[i - 1]] - share * logs[names[i]]

    def add(name, differences, decides=True):
        """A line of the mean over pairs, and one for each R. differences: {row: of its pair}"""
        if differences:
            found.append((name, sum(differences.values()) / len(differences), decides))
            for R in sorted({a[3] for a in differences}) if len(differences) > 1 else ():
                some = [values for a, values in differences.items() if a[3] == R]
                found.append((f"{name}, R = {R}", sum(some) / len(some), False))

    for name, place, to, of in (("drift / steps", 2, "drift", "steps"), ("pooled / keep", 0, "pooled", "keep")):
        pairs = {a: (*a[:place], of, *a[place + 1 :]) for a in logs if a[place] == to}
        add(name, {a: paired(logs[a], logs[b]) for a, b in pairs.items() if b in logs})
    within = [a for a in logs if a[3] < often]
    groups = {a: a[0] for a in within if a[1] == "embedding"}
    pooled = {a: "keep" for a in within if a[:2] == ("pooled", "all")}
    for name, some, decides in (("group / all", groups, True), ("pooled / keep", pooled, False)):
        some = {a: moments for a, moments in some.items() if len(line(a, moments)) > 1}
        add(f"{name} at equal bytes", {a: at_equal_bytes(a, moments) for a, moments in some.items()}, decides)
    base = ("keep", "all", "steps", often)
    held = [a for a in logs if a[1] != "all" and a[::2] + a[3:] == ("keep", "steps", rare)]
    for a in held if rare < often and base in logs else ():
        add(f"{a[1]} held back / all at R = {often}", {a: paired(logs[a], logs[base])})
    if len(central) > 1:
        add("alone / central", {(): paired(central[min(central)], central[max(central)])}, False)
    return found


def effect_table(about, rows):
    """[a table of the effects]; [] where there is none."""
    found = effects(rows) if by_groups(rows) else []
    if not found:
        return []
    names, differences, decide = zip(*found, strict=True)
    cells = [compared(values, scale=math.exp, sign="") for values in differences]
    rows = list(zip(names, cells, after_holm(cells, decide), strict=True))
    return [(f"Effects, {about}", "", [["test perplexity", "ratio, seeds", "p after Holm"], *rows])]


# ---- the figure


def draw(rows, about):
    """Per cent above central training, seed by seed, against a client's bytes: a line for each way to average, R along
    it; dashed: central training at a client's batch, which averages nothing."""
    every, central = federated_and_central(rows)
    largest, alone = central[max(central)], central[min(central)]
    figure, axes = new_figure(width=6.0, height=4.0)
    axis = axes[0, 0]
    for i, ((what, by, state), name) in enumerate(WAYS.items()):
        line = sorted((R, row) for (s, w, b, R), row in every.items() if (w, b, s) == (what, by, state))
        if not line:
            continue
        values = [estimate(paired(logs_of(row), largest))[:3] for _, row in line]
        mean, low, high = 100 * (np.exp(np.array(values).T) - 1)
        x = [bytes_of(row) / 1e6 for _, row in line]
        axis.errorbar(x, mean, [mean - low, high - mean], capsize=2, label=name, **style.look(i // 2, i % 2))
    nothing = 100 * (np.exp(paired(alone, largest).mean()) - 1)
    axis.axhline(nothing, color="black", linestyle="--", linewidth=0.9, label="batch of one client, nothing averaged")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks := [20, 50, 100, 200, 400], ticks)
    axis.set_yticks(ticks := [4, 6, 10, 15, 20, 30, 40], ticks)
    axis.minorticks_off()
    axis.set_xlabel("MB that a client sends and receives in the whole run")
    axis.set_ylabel("Test perplexity above\ncentral training's (%)")
    style.legend_below(figure, axes.flat)
    set_title(figure, f"What averages cost and bring (bars: 95 %, {style.seeds_range(rows)} seeds)\n{about}")
    return figure
