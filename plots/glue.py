"""Tables and figures of lora_glue_fl.

python plots/tables.py lora_glue_fl --data-dir lora_glue_fl/results/trajectories.jsonl
python plots/glue.py --data-dir lora_glue_fl/results/trajectories.jsonl --out-dir results/plots

lag     lag.png: what the naive mean costs. On the left the validation loss of naive and of the rules that ran at its
        rate, mean over seeds, by round; on the right their loss minus naive's, seed by seed: mean and 95 % interval of
        a paired t test. A figure per federation
"""

import json
from dataclasses import replace

import numpy as np

from common.curves import GREY, new_figure, number, set_title
from plots import style
from plots.pairs import OWN, compared, estimate, paired, spread
from plots.read import Study, base_name, order_of
from plots.rows import comparable, describe, words_for
from plots.splits import split_table
from plots.style import legend_below, looks_of, numbered, seeds_range, whole_numbers
from plots.tables import Table, over_rounds, result, seeds, sent

TASKS = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP"}
TASKS |= {"mnli": "MNLI", "wnli": "WNLI"}
METRICS = {  # by which a task is judged, and its column
    "cola": ("val_matthews", "Matthews correlation (x 100)"),
    "stsb": ("val_pearson", "Pearson correlation (x 100)"),
}
SERVED = ("svd_rank", "served_scale")  # of svd, where they are not the clients'
KEYS = ("task", "dataset", "model", "pooling", "rank", "lora_alpha", "clients", "participation", "shards", "rounds")
KEYS += ("local_epochs", "learning_rate", "examples", "data", *SERVED)


def kind_of(command, flags):
    if command != "fedavg_rounds":
        return "full" if command == "baseline_run" else "central"
    rule = "naive" if flags.get("skip_svd") else str(flags.get("aggregate") or "svd")
    return f"{rule}_split" if flags.get("split") and rule != "svd" else rule


def setting_of(run):
    facts, central = run["data"], run["kind"] in STUDY.central
    ranks, examples = run.get("--client_ranks") or facts.get("ranks") or [], facts.get("examples")
    values = {
        "dataset": facts.get("dataset") or run.get("--dataset"),
        "model": base_name(str(facts.get("model"))),
        "task": str(facts.get("task") or run.get("--task_name")).lower(),
        "pooling": run.get("--pooling") or "cls",
        "rank": " ".join(map(str, ranks)) if len(set(ranks)) > 1 else run.get("--lora_r"),
        "lora_alpha": run.get("--lora_alpha"),
        "examples": sum(examples) if isinstance(examples, list) else examples,
    }
    if isinstance(facts.get("sha256"), dict):
        values["data"] = json.dumps({split: str(value)[:8] for split, value in sorted(facts["sha256"].items())})
    # central LoRA stands beside federations of its rate; held-out examples: each rule has a rate chosen on them
    if run["kind"] != "full" and not facts.get("held_out"):
        values["learning_rate"] = run.get("--learning_rate")
    if not central:
        values |= {"clients": facts.get("clients"), "shards": shards_name(facts)}
        values |= {key: run.get(f"--{key}") for key in ("rounds", "local_epochs")}
        values["participation"] = "" if run.get("--participation") in (None, 1) else run["--participation"]
    if run["kind"] == "svd":
        rank = run.get("--svd_rank")
        served = run.get("--alpha") or rank
        values["svd_rank"] = rank if rank != run.get("--lora_r") else ""
        values["served_scale"] = served / rank if rank and served != run.get("--lora_alpha") else ""
    return values


def shards_name(facts):
    """`IID`, `Dirichlet 0.5, equal sizes`, `overlap 0.2`, `category genre`: how the examples were dealt to clients."""
    mode = str(facts.get("mode"))
    name = {"iid": "IID", "dirichlet": "Dirichlet"}.get(mode, mode.replace("_", " "))
    more = {"dirichlet": "dirichlet_alpha", "category": "category_key", "overlap": "overlap_ratio"}
    values = [facts.get(key) for word, key in more.items() if word in mode]
    equal = ", equal sizes" * (facts.get("sizes") == "equal")
    return " ".join([name, *(str(value) for value in values if value is not None)]) + equal


def order(key, value):
    """From what is off on; tasks as above; IID, Dirichlet with alpha downwards, the others by name."""
    if value == "":
        return -1, 0, 0, ""
    if key == "task":
        return 0, list(TASKS).index(value) if value in TASKS else len(TASKS), 0, value
    if key == "shards":
        kind, _, alpha = value.partition(",")[0].partition(" ")
        return {"IID": 0, "Dirichlet": 1}.get(kind, 2), -float(alpha or 0) if kind == "Dirichlet" else 0, 0, value
    return order_of(value)


def results_only(runs):
    """The runs without those that others begin with."""
    starts = {str(start).rpartition("/")[2] for start in runs.get("--init_adapter", ())}
    return runs[[name not in starts for name in runs["name"]]]


STUDY = Study(
    name="lora_glue_fl",
    commands=("fedavg_rounds", "main_glue_lora", "baseline_run"),
    kinds={
        "central": "Central LoRA",
        "full": "Central, all weights",
        "svd": "SVD (FlexLoRA)",
        "naive": "Naive (FedIT)",
        "naive_split": "Naive in svd's factors",
        "ffa": "FFA-LoRA",
        "stack": "Stack (FLoRA)",
        "residual": "Residual (FedEx-LoRA)",
        "rolora": "RoLoRA",
        "rotate": "Rotate (FedRot-LoRA)",
        "head": "Head only",
    },
    kind=kind_of,
    setting=setting_of,
    keys=KEYS,
    free=SERVED,
    # learning_rate tells rules with rates of their own apart
    said=frozenset(KEYS) - {"learning_rate"}
    | frozenset(
        "eval_each_round eval_clients replay do_train do_eval model_size task_name aggregate skip_svd lora_r"
        " client_ranks shard max_examples alpha".split()
    ),
    words={
        "dataset": "{}",
        "model": "{}",
        "pooling": lambda value: None if value == "cls" else f"{value} pooling",
        "task": lambda value: TASKS.get(value, value),
        "data": None,
        "rank": "r {}",
        "lora_alpha": "alpha {:g}",
        "clients": "{} clients",
        "participation": "participation {:g}",
        "shards": "{}",
        "rounds": "{} rounds",
        "local_epochs": "{:g} local epochs",
        "examples": "{:,} training examples",
        "svd_rank": "served at rank {}",
        "served_scale": "served alpha/r {:g}",
        "split": "{} split",
        "svd_split": "{} split",  # its name in older logs
        "learning_rate": "lr {:g}",
        "batch_size": "batch {}",
        "num_train_epochs": "{:g} epochs",
        "init_adapter": "from {}",
    },
    order=order,
    central=frozenset({"central", "full"}),
    adjust=results_only,
)

# ---- the tables


def place(setting):
    """Where a table stands: by `KEYS`, each in its order."""
    return [order(key, setting.get(key, "")) for key in KEYS]


def columns(rows):
    field, head = METRICS.get(rows[0].first["setting"]["task"], ("val_accuracy", "Accuracy (%)"))

    def vs_naive(name, factor, digits):
        """A column of the differences to naive, "-" for naive itself."""

        def cell(row, rows):
            naive = first_of(rows, "naive")
            apart = [] if naive in (None, row) else paired(row.results(name), naive.results(name))
            return compared(factor * np.array(apart), digits)

        return cell

    return {
        head: result(field, 100, 2),
        "vs naive": vs_naive(field, 100, 2),
        "val loss": result("val_loss", 1, 4),
        "val loss vs naive": vs_naive("val_loss", 1, 4),
        "rounds behind": behind_cell,
        "error %": over_rounds("aggregation_error", 100, 2),
        "MB up": sent("bytes_up"),
        "MB down": sent("bytes_down"),
        "seeds": seeds,
    }


def first_of(rows, kind):
    """The first row of `kind`; None without one."""
    return next((row for row in rows if row.kind == kind), None)


def behind_cell(row, rows):
    """How many rounds naive is behind residual of its rate: `+0.16 [+0.14, +0.18], 5`."""
    exact = [one for one in rows if one.kind == "residual" and one["learning_rate"] == row["learning_rate"]]
    if row.kind != "naive" or not exact or list(row.runs.index) != list(exact[0].runs.index):
        return "-"
    values = [behind(*pair) for pair in zip(curves_of(row), curves_of(exact[0]), strict=True)]
    return compared(values, 2) if np.isfinite(values).all() else "-"


def curves_of(row):
    """For each seed [E, 2]: round and validation loss of each evaluation."""
    return [np.array([(line["round"], number(line["val_loss"])) for line in lines]) for lines in row.counted["curve"]]


def behind(slow, fast):
    """The mean over rounds t of t - u, where `fast` has the loss after u rounds that `slow` has after t: u by straight
    lines between its evaluations. slow, fast: [E, 2], round and loss. nan where one of them does not fall throughout,
    or `fast` never gets there."""
    (t, loss), (u, other) = slow.T, fast.T
    if max(np.diff(loss).max(), np.diff(other).max()) >= 0 or loss.min() < other.min():
        return np.nan
    return float(np.mean(t[1:] - np.interp(-loss[1:], -other, u)))


def further(runs):
    """(the runs without those of --replay, the tables of these and of the effects of a split)."""
    replay = np.array([any(line.get("replay") for line in lines) for lines in runs["curve"]])
    usual = comparable(runs[~replay], STUDY)
    return runs[~replay], (replay_tables(runs[replay]) if replay.any() else []) + split_table(usual)


WORDS = """One table per task and federation, of the last round on the validation examples. `vs naive` is in points (or
100 times the correlation), `val loss vs naive` in nats. Rules whose rate was chosen on held-out examples are compared
each at its own. `rounds behind`: how many rounds naive's loss is behind that of residual, the exact mean, at the same
rate, in the mean over the rounds. `error %`: ||served - mean(BA)|| over ||mean(BA)||, mean over the rounds.
Differences are taken seed by seed: mean [95 % interval of a paired t test], seeds. Fewer than five have no interval:
their own standard deviation is too uncertain, and rows spread too differently for one of all.
"""
TABLE = Table(STUDY, columns, WORDS, place, further, first="rule")


# ---- --replay: what the rules would serve of the same clients

VARIED = ("clients", "shards", "local_epochs", "rank", "lora_alpha", "svd_rank", "served_scale", "learning_rate")
VARIED += ("rounds", "examples")
SAID = ("clients", "shards", "rank", "local_epochs")
PAIRS = {  # column of the table -> rules whose losses' difference it is
    "naive - start": ("naive", "start"),
    "naive - exact": ("naive", "exact"),
    "svd - exact": ("svd", "exact"),
    "naive - exact, half a step": ("naive_half", "exact_half"),
}


def replay_tables(runs):
    """A table for each group of runs that may be compared: a row a setting, differences of validation losses."""
    tables = []
    for setting, rows in comparable(runs, replace(STUDY, free=VARIED)):
        cells = [["setting", "exact", "error % (naive)", *PAIRS]]
        for row in sorted(rows, key=lambda row: [order(key, row.args.get(key, "")) for key in VARIED]):
            every = [curve[-1]["replay"] for curve in row.runs["curve"]]
            about = ", ".join(word for key in SAID for word in words_for(STUDY, key, row.args[key]))
            exact, missed = of(every, "exact", "val_loss"), of(every, "naive", "error") / of(every, "start", "error")
            parts = [about, spread(exact, 3), spread(100 * missed, 1)]
            cells.append([*parts, *(compared(of(every, a) - of(every, b), 4) for a, b in PAIRS.values())])
        about = "one round, validation losses in nats; differences: mean over seeds, how many"
        tables.append((f"{describe(STUDY, setting)}; {about}", "", cells))
    return tables


def of(every, rule, name="val_loss"):
    """[S] a field of a rule, a number a seed; nan for what is not there."""
    return np.array([number(one.get(rule, {}).get(name)) for one in every])


# ---- the figure


def lag(runs, args, notes):
    drawn = []
    for setting, rows in sorted(comparable(runs, STUDY, notes), key=lambda one: place(one[0])):
        naive = first_of(rows, "naive")
        rows = [row for row in rows if naive is not None and row["learning_rate"] == naive["learning_rate"]]
        rows = [row for row in rows if not row.central and len(row.runs) > 1]
        if naive not in rows[:-1]:
            continue
        figure, axes = new_figure(1, 2, width=7.6, height=3.5)
        (left, right), looks, (at, base) = axes[0], looks_of(rows), naive.rounds("val_loss")
        for i, row in enumerate(rows):
            losses, look = row.rounds("val_loss")[1], looks[row.label]
            left.plot(at, losses.mean(axis=0), label=row.name, **look)
            if row is not naive:
                mean, low, high, _ = np.array([estimate(apart) for apart in (losses - base).T]).T  # [E] each
                right.errorbar(at + 0.1 * i, mean, (high - low) / 2, capsize=3, **look)
        right.axhline(0, color=GREY, linewidth=1, zorder=1)
        left.set_ylabel("Validation loss (nats)")
        right.set_ylabel("Loss minus naive's (nats)")
        for axis in (left, right):
            axis.set_xlabel("Round")
            whole_numbers(axis.xaxis)
        legend_below(figure, [left])
        shown = "mean and 95 % interval" if len(naive.runs) >= OWN else "mean"
        title = f"One rate, the same clients and seeds; right: {shown} of {seeds_range(rows)} seeds"
        set_title(figure, f"{title}\n{describe(STUDY, setting, ('task', 'model', 'clients', 'shards'))}")
        drawn.append(figure)
    yield from numbered("lag", drawn)


FIGURES = {"lag": (lag, "runs of fedavg_rounds.py --aggregate naive and another rule at its rate, two seeds of both")}


if __name__ == "__main__":
    style.main(STUDY, FIGURES)
