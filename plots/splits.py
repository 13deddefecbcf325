"""lora_glue_fl's preset `split`: what svd's split of the singular values does and what its product; plots/glue.py has
the study.

`naive --split us` serves naive's product in svd's factors. Less naive, it is the split: the product is the same. Svd
less it is the product: the split is the same, the error is smaller, and A spans other rows. Each has its own best rate,
which the head takes too, or all have naive's. In round 1 a split does nothing yet: what differs there is the rate.
"""

import numpy as np
import pandas as pd

from plots.pairs import after_holm, compared, paired

SHORT = 4  # rounds
NAIVE, AGAIN, SVD = ("naive", None), ("naive_split", "us"), ("svd", "us")  # (kind, split)
EFFECTS = {  # name: (whose loss, less whose, at one rate, whether it decides)
    "split: naive in svd's split - naive": (AGAIN, NAIVE, False, True),
    "product: svd - naive in svd's split": (SVD, AGAIN, False, True),
    "both: svd - naive": (SVD, NAIVE, False, False),
    "split, at naive's rate": (AGAIN, NAIVE, True, False),
    "product, at naive's rate": (SVD, AGAIN, True, False),
    "svd, balanced split - svd": (("svd", "balanced"), SVD, False, False),
    "svd, all of S in A - svd": (("svd", "sv"), SVD, False, False),
}
HEADS = ("after 1 round", f"after {SHORT} rounds", "lowest", "at the held-out's lowest")


def evaluated(row):
    """The rounds from 0 on whose loss is known, on the held-out examples too."""
    return [i for i, t in enumerate(row.rounds("held_out_loss")[0]) if t == i]


def losses(row):
    """DataFrame [seeds, HEADS] of validation losses after round 1, SHORT, in the best round, and in that which is best
    on the held-out examples; nan for the last two of a run of SHORT rounds."""
    t, values = row.rounds("val_loss")
    held = row.rounds("held_out_loss")[1][:, 1:].argmin(axis=1) + 1
    long = t[-1] > SHORT
    lowest = [values[:, 1:].min(axis=1), values[np.arange(len(values)), held]]
    every = [values[:, 1], values[:, SHORT], *(one if long else np.full(len(values), np.nan) for one in lowest)]
    return pd.DataFrame(dict(zip(HEADS, every, strict=True)), row.counted.index)


def effects(rows):
    """[(name, differences [seeds, HEADS], whether it decides)] of rows of one kind of shards; [] without a split."""
    each, found = {}, []
    for row in sorted(rows, key=lambda row: row["rounds"]):  # of several rates the one that ran longest is its own
        each[row.kind, row["split"]] = each[row.kind, row["split"], row["learning_rate"]] = row
    if {NAIVE, AGAIN} - set(each):
        return []
    rate = each[NAIVE]["learning_rate"]
    for name, (a, b, same, decides) in EFFECTS.items():
        mine, base = (each.get((*key, rate) if same else key) for key in (a, b))
        if mine and base and not (same and mine is each[a] and base is each[b]):
            found.append((name, paired(losses(mine), losses(base)), decides))
    return found


def split_table(groups):
    """[a table of the effects] over all groups [(setting, rows)], those of one kind of shards together; [] without."""
    shards, lines = {}, []
    for setting, rows in groups:
        shards.setdefault(setting.get("shards"), []).extend(row for row in rows if len(evaluated(row)) > SHORT)
    for name, rows in shards.items():
        lines += [(f"{name.partition(',')[0]}, {effect}", *rest) for effect, *rest in effects(rows)]
    if not lines:
        return []
    made = [(name, [compared(apart[head].dropna(), 4) for head in HEADS], decides) for name, apart, decides in lines]
    deciding = [cell for _, cells, _ in made for cell in cells[1:3]]
    p = iter(after_holm(deciding, [decides for *_, decides in made for _ in range(2)]))
    table = [["validation loss", HEADS[0], HEADS[1], f"p, {HEADS[1]}", HEADS[2], f"p, {HEADS[2]}", HEADS[3]]]
    for name, (first, short, lowest, held), _ in made:
        table.append([name, first, short, next(p), lowest, next(p), held])
    about = "Effects of the split and of the product, differences in nats, seeds; p: after Holm over those that decide"
    return [(about, "", table)]
