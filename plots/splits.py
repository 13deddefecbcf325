"""lora_glue_fl's preset `split`: what svd's split of the singular values brings and what its smaller error does.

plots/glue.py has the study. naive with svd's split serves naive's product in svd's factors. It less naive is the split
alone; svd less it is the error alone. Losses are read off the curve: after half of the rounds, the lowest of all, after
the last.
"""

import pandas as pd

from plots.pairs import compared, holm, paired

EFFECTS = {  # name: ((rule, its split), less whose, whether it decides)
    "split: naive with svd's - naive": (("naive", "us"), ("naive", None), True),
    "error: svd - naive with svd's split": (("svd", "us"), ("naive", "us"), True),
    "both: svd - naive": (("svd", "us"), ("naive", None), False),
    "svd, balanced split - naive": (("svd", "balanced"), ("naive", None), False),
    "svd, all of S in A - naive": (("svd", "sv"), ("naive", None), False),
}
HEADS = ("after {half} rounds", "lowest of {last}", "after {last} rounds")


def has_splits(rows):
    """Whether the naive mean ran with a split and without."""
    return {("naive", "us"), ("naive", None)} <= {(row.kind, row["split"]) for row in rows}


def losses(row, name="val_loss"):
    """DataFrame: a line a seed; after half of the rounds, the lowest of all, after the last."""
    t, values = row.rounds(name)
    every = pd.DataFrame(values, row.counted.index, t.astype(int))
    return pd.DataFrame({0: every[t[-1] // 2], 1: every.min(axis=1), 2: every[t[-1]]})


def effects(rows):
    """[(name, differences [seeds, 3] of validation loss, of held-out loss, whether it decides)], of what there is."""
    found, each = [], {(row.kind, row["split"]): row for row in rows}
    for name, (a, b, decides) in EFFECTS.items():
        if a in each and b in each:
            apart = [paired(losses(each[a], field), losses(each[b], field)) for field in ("val_loss", "held_out_loss")]
            found.append((name, *apart, decides))
    return found


def split_table(groups):
    """[a table of the effects] over all groups [(setting, rows)] that have both; [] without one."""
    lines, ends = [], (0, 0)
    for setting, rows in groups:
        if has_splits(rows):
            ends, shards = (setting["rounds"] // 2, setting["rounds"]), setting["shards"].partition(",")[0]
            lines += [(f"{shards}, {name}", *rest) for name, *rest in effects(rows)]
    if not lines:
        return []
    made = [
        (name, [compared(val[i], 4) for i in range(3)], [compared(held[i], 4) for i in (0, 1)], decides)
        for name, val, held, decides in lines
    ]
    corrected = iter(holm([cell.p for _, cells, _, decides in made if decides for cell in cells[:2]]))
    heads = [head.format(half=ends[0], last=ends[1]) for head in HEADS]
    pairs = [word for head in heads[:2] for word in (head, f"p, {head}")]
    table = [["validation loss", *pairs, heads[2], *(f"held out, {head}" for head in heads[:2])]]
    for name, val, held, decides in made:
        p = [f"{next(corrected):.2g}" if decides else "-" for _ in range(2)]
        table.append([name, val[0], p[0], val[1], p[1], val[2], *held])
    about = "Effects of the split and of the error, differences in nats, seeds; p: after Holm over those that decide"
    return [(about, "", table)]
