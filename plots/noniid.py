"""Tables and figures of llm_noniid.

python plots/tables.py llm_noniid                                               # from the committed logs
python plots/noniid.py --data-dir results --out-dir results/plots               # all that the runs allow
python plots/noniid.py skew --data-dir llm_noniid/results/rounds.jsonl

skew    accuracy after the last round against alpha, a line per algorithm, rounds and local work, from two alphas on
"""

import json
import math
from pathlib import Path

import numpy as np

from common.curves import number
from plots import style
from plots.pairs import compared, paired, spread
from plots.plateau import LEAST, draw, line_of, long_runs, plateau_table, skew_of
from plots.read import Study, base_name, not_finite, order_of
from plots.rows import at_best_rate, comparable, describe
from plots.style import numbered
from plots.tables import Table, over_rounds, result, seeds

# ---- the study

KEYS = ("dataset", "target", "texts", "evaluated", "model", "train", "lora_r", "lora_alpha", "clients", "partition")
KEYS += ("alpha", "participation", "local", "learning_rate", "rounds")
# what rows of one table may differ in
FREE = ("partition", "alpha", "participation", "learning_rate", "local", "rounds")
SAMPLES = ("--eval_samples", "--test_samples")
TUNED = {"learning_rate", "server_lr", "mu"}  # of each row
# in what a row and its baseline differ
DIFFER = {"iid": {"partition", "alpha", "min_samples"}, "fedavg": {"personal"}, "bytes": {"personal", "rounds"}}
COMMONEST = Path(__file__).resolve().parents[1] / "llm_noniid" / "results" / "commonest.json"
OUTCOMES = {  # --target: (what decides, factor, its column, digits)
    "text": ("val_loss", 1, "val loss", 3),
    "label": ("test_accuracy", 100, "test accuracy", 1),
}
SKEWS = ("iid", "topic_skew")  # what the figure shows


def kind_of(command, flags):
    cluster = flags.get("cluster") or "none"
    return str(flags.get("algorithm")) if cluster == "none" else f"clusters_{cluster}"


def setting_of(run):
    facts, counts = run["data"], run["data"].get("counts") or {}
    values = {
        "dataset": facts.get("dataset") or run.get("--dataset"),
        "target": run.get("--target") or "text",
        "train": run.get("--train") or "lora",
        "texts": counts.get("train"),
        # what losses are means over: not to be compared between other numbers of texts
        "evaluated": json.dumps([counts.get("validation"), counts.get("test"), *map(run.get, SAMPLES)]),
        "model": base_name(str(run.get("--model"))),
        "clients": facts.get("clients") or run.get("--num_clients"),
        "participation": run.get("--participation_rate"),
        "local": local_work(run),
        "rounds": run.get("--num_rounds"),
    }
    values |= {key: run.get(f"--{key}") for key in ("lora_r", "lora_alpha", "learning_rate")}
    alpha = {"alpha": run.get("--alpha")} if run.get("--partition") == "topic_skew" else {}
    return values if run["kind"] == "central" else values | {"partition": partition_name(run)} | alpha


def local_work(run):
    """`5 local steps`, `1 local epoch`: what a client does in a round."""
    steps, epochs = run.get("--local_steps"), run.get("--local_epochs")
    if steps:
        return f"{steps} local step{'s' * (steps != 1)}"
    return None if epochs is None else f"{epochs:g} local epoch{'s' * (epochs != 1)}"


def partition_name(run):
    """`IID`, `topic skew`, `topic skew (equal sizes)`, `style skew (length)`; alpha is a setting of its own."""
    name, sizes = str(run.get("--partition")), run.get("--sizes") or "dirichlet"
    more = {"style_skew": run.get("--style_criterion"), "token_skew": run.get("--skew_type")}.get(name)
    more = f"{sizes} sizes" if name == "topic_skew" and sizes != "dirichlet" else more
    return "IID" if name == "iid" else name.replace("_", " ") + (f" ({more})" if more else "")


def order(key, value):
    """From the least skew and the least work on: partitions as the study names them, alpha downwards."""
    if key == "partition":
        names = ("IID", "topic", "style", "token")
        return names.index(value.split()[0]) if value.split()[0] in names else 9, 0, 0, value
    if key == "local":
        return 0, value.endswith("steps") or value.endswith("step"), float(value.split()[0]), ""
    if key in ("alpha", "participation") and isinstance(value, (int, float)):
        return 0, -value, 0, ""
    return order_of(value)


def with_commonest(runs):
    """The runs; those of the committed logs with what saying a client's commonest topic scores, as newer have."""
    runs, committed = runs.copy(), json.loads(COMMONEST.read_text())
    for i, run in runs.iterrows():
        place = "--partition iid" if run.get("--partition") == "iid" else f"--alpha {run.get('--alpha'):g}"
        place += " --sizes equal" * (run.get("--sizes") == "equal")
        if not run["folder"] and run.get("--max_samples") == 8000 and place in committed and run["seed"] < 5:
            runs.loc[i, "commonest_topic_accuracy"] = committed[place][run["seed"]]
    return runs


STUDY = Study(
    name="llm_noniid",
    commands=("train",),
    kinds={
        "central": "Central",
        "fedavg": "FedAvg",
        "fedprox": "FedProx",
        "scaffold": "SCAFFOLD",
        "fednova": "FedNova",
        "fedavgm": "FedAvgM",
        "fedadam": "FedAdam",
        "fedadamw": "FedAdamW",
        "clusters_updates": "Clusters by updates",
        "clusters_labels": "Clusters by topics",
        "local": "Local only",
    },
    kind=kind_of,
    setting=setting_of,
    keys=KEYS,
    free=FREE,
    said=frozenset(KEYS)
    | frozenset(
        "algorithm cluster num_clusters cluster_round style_criterion skew_type max_samples num_clients sizes stop_on"
        " participation_rate local_epochs local_steps num_rounds eval_samples test_samples probe_samples"
        " drift_samples".split()
    ),
    words={
        "dataset": "{}",
        "target": lambda target: "" if target == "text" else f"predicting the {target}",
        "train": lambda trained: "" if trained == "lora" else "all parameters",
        "texts": "{:,} texts",
        "evaluated": None,
        "model": "{}",
        "lora_r": None,
        "lora_alpha": None,
        "clients": "{} clients",
        "partition": "{}",
        "alpha": "alpha {:g}",
        "participation": "participation {:g}",
        "local": "{}",
        "learning_rate": "lr {:g}",
        "rounds": "{} rounds",
        "mu": "mu {:g}",
        "server_lr": "server lr {:g}",
        "personal": lambda part: None if part == "none" else f"personal {part}",
    },
    order=order,
    diverged=not_finite,
    adjust=with_commonest,
)

# ---- the table


def baseline(row, rows, against):
    """The row that `row` is compared with (see WORDS), None without one or for itself. against: "iid", "fedavg" or
    "bytes" (FedAvg with other rounds, in which a client sends as much in all)."""

    def fits(other):
        if against == "iid" and (other.kind != row.kind or other.args.get("partition") != "IID"):
            return False
        if against != "iid" and (other.kind != "fedavg" or other["personal"] not in (None, "none")):
            return False
        if against == "bytes" and (other["num_rounds"] == row["num_rounds"] or bytes_of(other) != bytes_of(row)):
            return False
        names = {*other.args, *row.args} - TUNED - DIFFER[against]
        return all(other.args.get(name) == row.args.get(name) for name in names)

    seeds = set(row.runs.index)
    best = max(filter(fits, rows), key=lambda other: tuned_rank(other, seeds), default=None)
    return None if row.central or best in (None, row) or not tuned_rank(best, seeds)[0] else best


def bytes_of(row):
    """Of a run, both ways, in the median over seeds: one of them may have ended early."""
    return (row.results("bytes_up") + row.results("bytes_down")).median()


def tuned_rank(row, seeds=None):
    """Highest for the learning rate that counts: (how many seeds, of those in `seeds`; minus the mean loss)."""
    n = sum(seeds is None or seed in seeds for seed in row.runs.index)
    return n, -np.nan_to_num(row.results("val_loss").mean(skipna=False), nan=math.inf)


def failure(rows):
    """Why a run of these lines of metrics.jsonl failed, in words; "" if it did not.

    It raised the alarm `diverged`, or its last validation loss is not finite, above its first evaluation's after a
    round, or above the model's before training (a run that breaks in its first round can fall from then on).
    """
    if any(alarm["detector"] == "diverged" for row in rows for alarm in row.get("alarms") or []):
        return "diverged"
    after = [number(row["val_loss"]) for row in rows if "val_loss" in row and row["round"]]
    if not after or math.isnan(after[-1]):
        return "the loss is not finite" if after else "no evaluation"
    if after[-1] > after[0]:
        return "ends above its first evaluation"
    before = next((number(row["val_loss"]) for row in rows if not row["round"]), math.inf)
    return "ends above the model before training" if after[-1] > before else ""


def failed(row, _):
    # the control's log has no round 0: its results say what that decided
    said = [run["diverged"] or run.get("failed") or failure(run["curve"]) for _, run in row.runs.iterrows()]
    return f"{sum(map(bool, said))} of {len(said)}"


def columns(rows):
    def to(against, name, factor=1, digits=3):
        def cell(row, rows):
            base = baseline(row, rows, against)
            return compared(factor * paired(row.results(name), base.results(name)), digits) if base else "-"

        return cell

    def to_commonest(row, _):
        share = row.results("commonest_topic_accuracy")
        own = row.kind in ("local", "clusters_labels", "clusters_updates") or row["personal"] not in (None, "none")
        gain = 100 * (row.results("mean_client_val_accuracy") - share)
        return compared(gain, 1) if own and share.notna().all() else "-"

    name, factor, head, digits = OUTCOMES[rows[0].first["setting"]["target"]]
    found = {head: result(name, factor, digits)}
    found |= {f"vs {head}": to(head.lower(), name, factor, digits) for head in ("IID", "FedAvg")}
    if name == "test_accuracy":
        found |= {"val loss": result("val_loss", digits=3), "val loss vs FedAvg": to("fedavg", "val_loss")}
        found |= {"own texts": result("mean_client_val_accuracy", 100, 1), "vs commonest": to_commonest}
    else:
        found |= {"mean client": result("mean_client_val_loss", digits=3), "cosine": over_rounds("update_cosine", 1, 3)}
        found["1 - CKA"] = lambda row, _: spread(np.maximum(1 - row.mean_over_rounds("mean_cka"), 0), 3)
    return found | {"failed": failed, "seeds": seeds}


WORDS = """`test accuracy` and `own texts` (each client's own held-out texts, mean over clients) in %; losses in nats
a token, of labels a text, after the last round. `vs IID`, `vs FedAvg`: paired differences to the same algorithm under
IID, and to FedAvg on the same partition, at the same local work, rounds and other flags, with 95 % intervals and the
number of pairs. Learning rates and mu may differ, as each row's are tuned: of several baselines the one with most
seeds in common counts, then the one with the lowest validation loss. `vs commonest`, of models of the clients' own:
`own texts` less what always saying a client's commonest topic scores there. `cosine` (mean over pairs of updates) and
`1 - CKA` are means over rounds. `failed`: the alarm `diverged`, or a last loss that is not finite, above the first
evaluation's or above that before training; runs whose updates were not finite are part of no mean.
"""


def further(runs):
    """What skew costs in time and for good, beside the usual tables."""
    every = [(describe(STUDY, setting), rows) for setting, rows in comparable(runs, STUDY)]
    every = [(about, at_best_rate(rows, TUNED, tuned_rank)) for about, rows in every]
    return runs, [table for about, rows in every for table in plateau_table(about, rows, baseline)]


TABLE = Table(STUDY, columns, WORDS, further=further)

# ---- the figure


def skew(runs, args, notes):
    drawn = []
    for setting, rows in comparable(runs, STUDY, notes):
        rows = at_best_rate([row for row in long_runs(rows) if row["partition"] in SKEWS], TUNED, tuned_rank)
        skews = [(line_of(row), skew_of(row)) for row in rows]
        rows = [row for row in rows if len({skew for line, skew in skews if line == line_of(row)}) > 1]
        if rows:
            drawn.append(draw(describe(STUDY, setting), rows))
    yield from numbered("skew", drawn)


FIGURES = {"skew": (skew, f"runs of {LEAST} rounds and more that predict labels, under IID and topic skew")}


if __name__ == "__main__":
    style.main(STUDY, FIGURES)
