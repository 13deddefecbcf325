"""Tables and figures of vit_sparse_fl.

    python plots/tables.py vit_sparse_fl
    python plots/vit.py --data-dir results --out-dir results/plots                  # all that the runs allow
    python plots/vit.py replay --data-dir vit_sparse_fl/results/replay.jsonl

    strategies  strategy_comparison.png: test accuracy of a federation's methods, each at its best rate
    replay      replay.png: what an update costs the others, over that of dense training, at equal gain and from
                the same weights; a panel a federation

Both take the rows of the tables. Runs that diverged are counted there and part of no mean.
"""

import json
import math

import numpy as np

from common.curves import GREY, break_lines, new_figure, number, set_title
from plots import style
from plots.pairs import compared, estimate, pooled, spread
from plots.read import Study, not_finite, plain
from plots.replay import draw_replays, replay_tables
from plots.rows import at_best_rate, comparable, describe
from plots.style import looks_of, numbered
from plots.tables import Table, over_rounds, result, seeds

# ---- the study

FEDERATION = ("num_clients", "participation_rate", "shards", "local_steps", "num_rounds")
KEYS = ("dataset", "classes", "data", "val_split", "model", "image_size", "init_from", *FEDERATION, "sparsity")
MASKS = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random")
OWN, OTHERS = "interference_own", "interference_others"
LEAST = 0.2  # nats: where clients gain less, by the cosine's end, they hardly move


def kind_of(command, flags):
    if command in ("train_centralized", "replay"):
        return "central" if command == "train_centralized" else command
    if command == "train_federated_topk" or flags.get("upload") == "topk":
        return "topk"
    if command == "train_federated":
        return "lora" if flags.get("lora_r") else "dense"
    return "given" if flags.get("mask") else str(flags.get("mask_strategy"))


def setting_of(run):
    central = run["kind"] == "central"
    hidden = ("data", "shards", "sparsity") + (FEDERATION if central else ())
    # a flag without a value is a value too: pretrained from nothing is not like anything
    values = {key: "" if run.get(f"--{key}") is None else plain(run[f"--{key}"]) for key in KEYS if key not in hidden}
    # `--classes` left out and all of them given are the same
    if run["data"].get("classes") and run.get("--classes") != "rest":
        values["classes"] = json.dumps(run["data"]["classes"])
    values["data"] = json.dumps(run["data"].get("sha256"), sort_keys=True)
    if not central:
        names = {"iid": "IID", "dirichlet": f"Dirichlet {run.get('--alpha')}"}
        values["shards"] = names.get(run.get("--sharding"), f"classes a client: {run.get('--nc')}")
    if run["kind"] not in ("central", "dense"):
        values["sparsity"] = run.get("--sparsity_ratio")
    return values


def diverged(run):
    """An update or the last loss was not finite, or accuracy ended below half of that of round 0."""
    rows = run["curve"] or [{}]
    left_out = any(row.get("left_out_updates") for row in rows)
    not_a_number = rows[-1].get("val_loss") is not None and math.isnan(number(rows[-1]["val_loss"]))
    first, last = (number(row.get("val_accuracy")) for row in (rows[0], rows[-1]))
    return not_finite(run) or left_out or not_a_number or rows[0].get("round") == 0 and last < first / 2


STUDY = Study(
    name="vit_sparse_fl",
    commands=("train_centralized", "train_federated", "train_federated_sparse", "train_federated_topk", "replay"),
    kinds={
        "central": "Central",
        "dense": "Dense FedAvg",
        **{name: name.replace("_", " ").capitalize() for name in MASKS},
        "topk": "Top-k updates",
        "given": "Mask from a file",
        "lora": "Federated LoRA",
        "replay": "Interference replay",
    },
    kind=kind_of,
    setting=setting_of,
    keys=KEYS,
    free=("sparsity",),
    said=frozenset(KEYS)
    | set("sharding nc alpha sparsity_ratio upload mask mask_strategy use_amp interference_every".split()),
    words={
        "shards": "{}",
        "local_steps": "{} local steps",
        "num_rounds": "{} rounds",
        "mask_scope": "{} threshold",
        "mask_omit": lambda kind: None if kind == "none" else f"without {kind}",
        "lora_r": lambda rank: f"rank {rank}" if rank else None,
        "download": lambda how: "top-k down too" if how == "topk" else None,
        "error_feedback": lambda on: on and "error feedback",
        "drift_matched": lambda on: on and "drift matched",
        "num_clients": "{} clients",
        "data": None,
        "val_split": None,
        "freeze_head": lambda frozen: "head frozen" if frozen else "head trained",
        "freeze_backbone": lambda frozen: frozen and "head only",
    },
    diverged=diverged,
)

# ---- the table


def validated(row):
    """(seeds that did not diverge, their mean best validation accuracy): by these a rate is chosen."""
    return len(row.counted), row.results("val_accuracy_best").mean()


def is_dense(row):
    """Whether clients train all weights, at any rate."""
    return row.kind == "dense" and not row["freeze_backbone"]


def base_of(row, rows):
    """The row with which a federated one is compared: dense training at its best rate; None without one."""
    return None if row.central else max(filter(is_dense, rows), key=validated, default=None)


def accuracy(row):
    return 100 * row.results("test_accuracy_last")


def of_starts(row, of_seeds):
    """The values of {seed: value}; where seeds begin with several pretrainings means over the seeds of each."""
    every = {}
    for seed, value in sorted(of_seeds.items()):
        every.setdefault(str(row.counted.loc[seed].get("--init_from")), []).append(value)
    return [np.mean(values) for values in every.values()] if len(every) > 1 else sum(every.values(), [])


def beyond_dense(row, rows):
    """list: points of test accuracy above dense training, of each start that both have."""
    if (base := base_of(row, rows)) in (None, row):
        return []
    return of_starts(row, (accuracy(row) - accuracy(base)).dropna())


def gains(run):
    """{round: (nats that clients gain by their own updates, nats that the others lose)}, means over the clients."""
    every = {row["round"]: (row.get(OWN), row.get(OTHERS)) for row in run["curve"]}
    return {t: (-number(own), number(others)) for t, (own, others) in every.items() if None not in (own, others)}


def at_equal_gain(row, rows):
    """list: of each start the log of the others' loss over what it is under dense training where clients gain as much.

    The mean over the rounds; dense training's is, round by round, on the lines between its rates in log-log. Without
    rounds outside of its gains, those where at no rate it gains LEAST, and those where nobody loses.
    """
    if row.central or is_dense(row):
        return []
    apart = {}
    for seed, run in row.counted.iterrows():
        same = [gains(one.counted.loc[seed]) for one in rows if is_dense(one) and seed in one.counted.index]
        ratios = []
        for t, (gain, loss) in gains(run).items():
            at_rates = sorted(one[t] for one in same if min(one.get(t, (0, 0))) > 0)
            x, y = np.log(at_rates).T.reshape(2, -1)
            if gain > 0 < loss and len(x) > 1 and x[0] <= math.log(gain) <= x[-1] >= math.log(LEAST):
                ratios.append(math.log(loss) - np.interp(math.log(gain), x, y))
        if ratios:
            apart[seed] = np.mean(ratios)
    return of_starts(row, apart)


def pool_of(values, rows):
    return pooled([values(row, rows) for row in rows])


def difference(values, **form):
    """A cell: `-1.86 [-2.55, -1.17], 3`; of the base itself `0 (36 df)`, what the spread is pooled over."""

    def cell(row, rows):
        pool = pool_of(values, rows)
        if row is base_of(row, rows) and pool[1]:
            return f"{form.get('scale', float)(0):g} ({pool[1]} df)"
        return compared(values(row, rows), 2, pool, **form)

    return cell


COLUMNS = {
    "test %": result("test_accuracy_last", 100, 2),
    "vs dense": difference(beyond_dense),
    "lr": lambda row, _: str(row.args.get("lr", row["lr"])),
    "drift %": lambda row, rows: "-" if row.kind == "lora" else over_rounds("drift", 100, 3)(row, rows),
    "gain": over_rounds(OWN, -1, 3),
    "others' loss": over_rounds(OTHERS, 1, 3),
    "at equal gain": difference(at_equal_gain, sign="", scale=math.exp),
    "diverged": lambda row, _: str(len(row.runs) - len(row.counted)),
    "seeds": seeds,
}


WORDS = """A table a federation. `test %`: accuracy after the last round. `vs dense`: points of it above dense training
at its best rate (most seeds that did not diverge, then validation accuracy), seed by seed; the means over the seeds of
a pretraining where there are several; behind the bracket how many pairs. `drift %`: length of a client's update over
that of the weights. `gain`, `others' loss` (--interference-every): nats by which a client's update lowers its own loss
and raises the others', means over rounds. `at equal gain`: the others' loss over that under dense training where
clients gain as much, round by round (lines between its rates in log-log; geometric mean; without rounds where it gains
less than 0.2 nats). Brackets: 95 % intervals by a t test whose standard deviation is pooled over the table's rows; its
degrees of freedom (df) stand in the row of dense training at its best rate. `diverged`: seeds that broke down, part of
no mean: an update or the last loss was not finite, or the last validation accuracy is below half of that before
training.
"""


def replayed(runs):
    """[(setting, row)] of the runs of replay.py."""
    of_replay = runs[runs["kind"] == "replay"]
    every = comparable(of_replay, STUDY) if len(of_replay) else []
    return [(setting, row) for setting, rows in every for row in rows]


def further(runs):
    """(the runs without those of replay.py, and without their pretrainings where there is nothing else; its tables)."""
    found = [
        (", ".join([describe(STUDY, setting), *row.label.split(", ")[1:]]), row.counted)
        for setting, row in replayed(runs)
    ]
    usual = runs[runs["kind"] != "replay"]
    return usual[:0] if found and set(usual["kind"]) == {"central"} else usual, replay_tables(found)


TABLE = Table(STUDY, COLUMNS, WORDS, further=further)


# ---- figures


def title(figure, words, row):
    """Two lines: what is drawn, and where."""
    place = describe(STUDY, row.first["setting"], ("shards", "local_steps", "num_rounds"))
    set_title(figure, f"{words}\n{place}")


def strategies(every):
    """A row per method: the mean accuracy with the interval of its difference to dense training, and the number."""
    rows = at_best_rate(every, {"lr"}, validated)
    if len({row.kind for row in rows}) < 2:
        return None
    figure, axes = new_figure(width=7.2, height=1.5 + 0.4 * len(rows))
    axis, looks = axes[0, 0], looks_of(rows)
    if dense := base_of(rows[0], every):
        axis.axvline(accuracy(dense).mean(), zorder=1, color=GREY, linestyle=(0, (6, 2)))
    for i, row in enumerate(rows):
        values, apart = accuracy(row), beyond_dense(row, every)
        mean, _, high, _ = estimate(apart, pool_of(beyond_dense, every)) if apart else (math.nan,) * 4
        bar = None if math.isnan(high) else [high - mean]
        look = looks[row.label] | {"linestyle": "-"}
        axis.errorbar([values.mean()], [i], xerr=bar, capsize=4, markersize=7, **look)
        count = f"\n{broken} of {len(row.runs)} diverged" if (broken := len(row.runs) - len(row.counted)) else ""
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axis.annotate(spread(values, 1) + count, (1.01, i), **place)
    axis.set_yticks(range(len(rows)), [break_lines(row.label, 34) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.set_xlabel("Test accuracy (%), last round")
    title(figure, "Each method at its best rate; bars: 95 % of the difference to dense training", rows[0])
    return figure


def of_each(stem, draw):
    """A figure's function: draw(rows) of every federation, where there is one to draw."""

    def figures(runs, args, notes):
        return numbered(stem, filter(None, (draw(rows) for _, rows in comparable(runs, STUDY, notes))))

    return figures


def replays(runs, args, notes):
    """One figure of all federations, in the order of the tables."""
    groups = [(setting["shards"], row.counted) for setting, row in replayed(runs)]
    return numbered("replay", [draw_replays(groups)] if groups else [])


FIGURES = {
    "strategies": (of_each("strategy_comparison", strategies), "two strategies' runs in one federation"),
    "replay": (replays, "runs of replay.py"),
}


if __name__ == "__main__":
    style.main(STUDY, FIGURES)
