"""Runs of llm_noniid as tables and figures see them, and its table.

    python plots/tables.py llm_noniid --data-dir results --target 5
    python plots/tables.py llm_noniid --against iid --fields val_loss val_accuracy

One table per group of runs on the same texts and model with as many clients and rounds. A row is one algorithm with the
settings and arguments that set it apart. Losses are in nats per token (of labels: per text), after the last round;
`accuracy` of labels in %. `vs FedAvg` is the difference in validation loss to FedAvg in the same setting; of FedAvg and
central training, to FedAvg in the setting that most runs share. `mean client`, `worst client`: losses on the clients'
own held-out texts; `gap`: generalisation gap. drift, cosine (mean over pairs of updates, which does not depend on how
many clients there are, as drift does; `-` where one client is alone), gradient variance and 1 - CKA are means over the
evaluated rounds, as are, of runs that log them, `gradient drift`, `chance drift`, `correction` and its cosine
(llm_noniid/drift.py). `to half`: the first round, of each seed, with the loss that this FedAvg of the same seed has at
the middle of its evaluations; --target: with that loss. `failed`: the alarm `diverged`, no finite update, or a last
loss that is not finite, above the first evaluation's or above that before training. `alarms`: the detectors that spoke,
with the number of seeds where not all had one.

--against iid, fedavg: instead the paired differences of any fields, `mean [95 % interval of a paired t test], pairs`,
to the same algorithm under IID, or to FedAvg (nothing personal) on the same partition, at the same local work, rounds
and other flags. Learning rates and mu may differ, as each row's are tuned: of several baselines that with most seeds in
common counts, of those the one with the lowest validation loss.
"""

import math
from dataclasses import replace

import numpy as np

from common.cli import positive_float
from common.curves import failure, number
from plots.runs import (
    Study,
    base_name,
    describe,
    like_with_like,
    not_finite,
    order_of,
    shared_setting,
    text,
    words_for,
)
from plots.seeds import curves_of, distance, lines_of, nearest
from plots.style import Panel, all_curves
from plots.tables import (
    MINUTES,
    ROUNDS,
    SEEDS,
    Column,
    Table,
    difference,
    over_rounds,
    paired_cell,
    parts_of,
    result,
    sent,
    spread,
)

# a panel or table holds only runs that agree on these, apart from what it varies
KEYS = (
    "dataset",
    "target",
    "texts",
    "evaluated",
    "model",
    "train",
    "lora_r",
    "lora_alpha",
    "clients",
    "partition",
    "alpha",
)
KEYS += ("participation", "local", "learning_rate", "rounds")
PLACE = ("partition", "alpha")  # in what the panels of one figure differ
FACTORS = {
    "alpha": "Dirichlet's alpha",
    "participation": "participation",
    "learning_rate": "learning rate",
    "local": "local work",
}
FREE = ("partition", *FACTORS)  # what the rows of one table may differ in
WIDE = (*FREE, "rounds")  # of paired differences and costs: the same budget in fewer rounds of more steps too
TUNED = {"learning_rate", "server_lr", "mu"}  # of each row
DIFFER = {"iid": {*PLACE, "min_samples"}, "fedavg": {"personal"}}  # in what a row and its baseline differ
TRUE_DRIFT = {  # of runs with --drift-samples
    "gradient drift": "drift_ratio",
    "chance drift": "drift_ratio_chance",
    "correction": "correction_ratio",
    "correction cosine": "correction_cosine",
}


def kind_of(command, args):
    cluster = args.get("cluster") or "none"
    return str(args.get("algorithm")) if cluster == "none" else f"clusters_{cluster}"


def setting_of(run):
    args, facts = run.args, run.facts
    counts = facts.get("counts") or {}
    values = {
        "dataset": facts.get("dataset") or args.get("dataset"),
        "target": args.get("target", "text"),  # older runs lack these two
        "train": args.get("train", "lora"),
        "texts": counts.get("train"),
        # what losses are means over: not to be compared between other numbers of texts
        "evaluated": text({name: counts.get(name) for name in ("validation", "test")})
        + f", {args.get('eval_samples')} of each",
        "model": base_name(str(args.get("model"))),
        "clients": facts.get("clients") or args.get("num_clients"),
        "participation": args.get("participation_rate"),
        "local": local_work(args),
        "rounds": args.get("num_rounds"),
    }
    values |= {key: args.get(key) for key in ("lora_r", "lora_alpha", "learning_rate")}
    return values if run.central else values | place_of(args)


def place_of(args):
    """The settings of PLACE that the flags name; a central run's too, which has no partition."""
    alpha = {"alpha": args.get("alpha")} if args.get("partition") == "topic_skew" else {}
    return {"partition": partition_name(args)} | alpha


def local_work(args):
    """`5 local steps`, `1 local epoch`: what a client does in a round."""
    if args.get("local_steps"):
        return f"{args['local_steps']} local step{'s' * (args['local_steps'] != 1)}"
    epochs = args.get("local_epochs")
    return None if epochs is None else f"{epochs:g} local epoch{'s' * (epochs != 1)}"


def partition_name(args):
    """`IID`, `topic skew`, `topic skew (equal sizes)`, `style skew (length)`, `token skew (frequency)`; alpha is a
    setting of its own."""
    name, sizes = str(args.get("partition")), args.get("sizes", "dirichlet")
    more = {"style_skew": args.get("style_criterion"), "token_skew": args.get("skew_type")}.get(name)
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


def prior(run):
    """{field: what knowing how often each label occurs has}: ln C nats a text, an accuracy of 1 / C, of C like shares.

    {} of --target text, and where the log does not say C.
    """
    topics = run.facts.get("label_names") or (run.rows[-1].get("val_topic_loss") if run.rows else None)
    if run.setting["target"] != "label" or not topics:
        return {}
    return {"val_loss": math.log(len(topics)), "val_accuracy": 1 / len(topics)}


def prepared(runs, notes):
    """The runs; where the updates were not finite that round is the last line."""
    return [diverged(run) if not_finite(run) else run for run in runs]


def diverged(run):
    """The run with the round in which its updates were not finite as its last line."""
    t, why = run.ended["round"], run.ended["reason"]
    if run.rows and run.rows[-1]["round"] == t:  # the evaluation that was not
        return run
    alarm = {"detector": "diverged", "round": t, "value": None, "threshold": None, "message": why}
    line = {"round": t, "val_loss": "nan", "worst_client_val_loss": "nan", "alarms": [alarm]}
    return replace(run, rows=[*run.rows, line], results={})


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
    kind_of=kind_of,
    setting_of=setting_of,
    keys=KEYS,
    said=frozenset(KEYS)
    | frozenset(
        "algorithm cluster style_criterion skew_type max_samples num_clients participation_rate local_epochs"
        " local_steps num_rounds eval_samples probe_samples drift_samples sizes stop_on".split()
    ),
    unread=(
        (lambda a: a["algorithm"] != "fedprox", {"mu"}),
        (lambda a: a["algorithm"] != "scaffold", {"scaffold_option"}),
        (lambda a: a["algorithm"] not in ("fedavgm", "fedadam"), {"server_lr"}),
        (lambda a: a["algorithm"] != "fedadamw", {"alpha_global"}),
        (lambda a: a["algorithm"] != "fedavgm", {"server_momentum"}),
        (lambda a: a.get("cluster", "none") == "none", {"num_clusters"}),
        (lambda a: a.get("cluster") != "updates", {"cluster_round"}),
        (lambda a: a.get("partition") != "topic_skew", {"alpha", "min_samples"}),
        (lambda a: a.get("partition") != "style_skew", {"style_criterion"}),
        (lambda a: a.get("partition") != "token_skew", {"skew_type"}),
        (lambda a: a.get("local_steps"), {"local_epochs"}),
        (lambda a: a["kind"] == "central", {"min_samples", "client_weights"}),
    ),
    paths=("tokenizer", "init_from"),
    off={"dropout": (), "init_from": (), "personal": (), "target": (), "train": ()}
    | {"server_lr": ("fedavgm", "fedadam")},
    words={
        "dataset": "{}",
        "target": lambda target, setting: "" if target == "text" else f"predicting the {target}",
        "train": lambda trained, setting: "" if trained == "lora" else "all parameters",
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
        "init_from": "from {}",
        "dropout": "dropout {}",
        "num_clusters": "{} clusters",
        "personal": "personal {}",
        "cluster_round": "grouped after round {}",
        "client_optimizer": "client {}",
        "scaffold_option": "option {}",
        "batch_size": "batch {}",
        "max_length": "{} tokens at most",
    },
    order=order,
    keeps=not_finite,
    prepared=prepared,
)

# ---- panels


def figures_of(runs, notes):
    """A panel per partition: list[(what a figure's panels have in common, list[Panel])], most panels first.

    A panel of one curve is left out where a figure of `factor_figures` has all of its runs.
    """
    varied = [panel for factor in FACTORS for _, panels in factor_figures(runs, [], factor) for panel in panels]
    elsewhere = {run for curve in all_curves(varied) for run in curve.runs}
    figures = []
    for shared, members in like_with_like(runs, PLACE):
        panels = []
        for setting, same in like_with_like(members):
            curves = curves_of([run for run in same if not run.central], notes=notes)
            references = curves_of([run for run in same if run.central], notes=notes)
            if len(curves) > 1 or any(run not in elsewhere for curve in curves for run in curve.runs):
                panels.append(Panel(setting, curves, references, describe(STUDY, setting, PLACE)))
        panels.sort(key=lambda panel: place_order(panel.setting))
        if panels:
            figures.append((shared, panels))
    return sorted(figures, key=lambda figure: (-len(figure[1]), -len(all_curves(figure[1]))))


def place_order(setting):
    return [order(key, setting[key]) for key in PLACE if key in setting]


def factor_figures(runs, notes, factor):
    """A panel per method, in it a curve for each value of `factor`: list[(setting, list[Panel])].

    Only methods with two values or more. Each curve's label is its value.
    """
    figures = []
    there = [run for run in runs if not run.central and factor in run.setting]
    for setting, members in like_with_like(there, (factor,)):
        panels = []
        for line in lines_of(curves_of(members, (factor,), (factor,), notes)):
            if len(line) > 1:
                line = sorted(line, key=lambda curve: order(factor, curve.place[factor]))
                panels.append(Panel(setting, line, title=line[0].label))
                for curve in line:
                    curve.label = ", ".join(words_for(STUDY, factor, curve.place[factor]))
        if panels:
            figures.append((setting, panels))
    return sorted(figures, key=lambda figure: -len(all_curves(figure[1])))


def corrected(runs, notes):
    """As `figures_of`, of SCAFFOLD whose corrections were measured, and FedAvg; at whatever rates."""
    figures = []
    pair = [run for run in runs if run.kind in ("fedavg", "scaffold")]
    for shared, members in like_with_like(pair, (*PLACE, "learning_rate")):
        panels = []
        for setting, same in like_with_like(members, ("learning_rate",)):
            curves = curves_of(same, ("learning_rate",), notes=notes)
            if logged(curves, "correction_ratio"):
                panels.append(Panel(setting, curves, title=describe(STUDY, setting, PLACE)))
        if panels:
            figures.append((shared, sorted(panels, key=lambda panel: place_order(panel.setting))))
    return figures


def central_of(panel):
    """The central curves of the panel's own partition: those whose args name it.

    Elsewhere only their validation loss can be compared: other clients hold other texts.
    """
    place = {key: panel.setting[key] for key in PLACE if key in panel.setting}
    return [curve for curve in panel.references if all(place_of(run.args) == place for run in curve.runs)]


def first_alarms(curve):
    """{detector: [round of each seed's first alarm]} of the seeds that have one, in the order of rounds."""
    alarms = {}
    for run in curve.runs:
        first = {}
        for row in run.rows:
            for alarm in row.get("alarms") or []:
                first.setdefault(str(alarm.get("detector")), int(alarm.get("round", row["round"])))
        for detector, t in first.items():
            alarms.setdefault(detector, []).append(t)
    return dict(sorted(alarms.items(), key=lambda item: sorted(item[1])))


# ---- the table


def plain_fedavg(curve):
    """Whether it is FedAvg of all parameters."""
    return curve.kind == "fedavg" and curve.args.get("personal", "none") == "none"


def usual_fedavg(curves):
    """The plain FedAvg curve that differs least from the federated ones, None without any."""

    def apart(one):
        return sum(distance(one, curve) for curve in curves if not curve.central)

    return min(filter(plain_fedavg, curves), key=apart, default=None)


def against_fedavg(curve, curves):
    """To the FedAvg in the curve's setting that differs least from it; of FedAvg itself to the usual one."""
    base = usual_fedavg(curves)
    if not (plain_fedavg(curve) or curve.central):
        there = [c for c in curves if plain_fedavg(c) and all(c.args.get(k) == curve.args.get(k) for k in FREE)]
        base = nearest(curve, there)
    return difference(curve, base, "val_loss", digits=3)


def baseline(curve, curves, against):
    """The curve that `curve` is compared with (see this module's docstring), None without one or for itself.

    against: "iid" or "fedavg".
    """
    seeds = {run.seed for run in curve.runs}

    def fits(other):
        if against == "iid" and (other.kind != curve.kind or other.args.get("partition") != "IID"):
            return False
        if against == "fedavg" and not plain_fedavg(other):
            return False
        names = other.args.keys() & curve.args.keys() if against == "fedavg" else other.args.keys() | curve.args.keys()
        return all(other.args.get(n) == curve.args.get(n) for n in names - TUNED - DIFFER[against])

    best = max(filter(fits, curves), key=lambda other: tuned_rank(other, seeds), default=None)
    return None if curve.central or best in (None, curve) or not tuned_rank(best, seeds)[0] else best


def tuned_rank(curve, seeds=None):
    """Highest for the learning rate that counts: (how many seeds, of those in `seeds`; minus the mean loss)."""
    n = sum(seeds is None or run.seed in seeds for run in curve.runs)
    return n, -np.nan_to_num(curve.results("val_loss").mean(), nan=math.inf)


def text_of(runs, notes, args):
    """The table, or with --against that of paired differences."""
    table = replace(TABLE, text=None)
    if args.against:
        table = replace(table, free=WIDE, columns=differences_columns)
    return parts_of(table, runs, notes, args)


def differences_columns(curves, args):
    def pair(name):
        return lambda curve, _: paired_cell(curve, baseline(curve, curves, args.against), name)

    words = {"iid": "vs IID", "fedavg": "vs FedAvg"}[args.against]
    columns = []
    for name in args.fields:
        head = name.replace("_", " ")
        columns += [result(head, name, digits=3), Column(f"{head} {words}", pair(name))]
    return *columns, SEEDS


def add_flags(parser):
    text = "say how many rounds a run took to it"
    parser.add_argument("--target", type=positive_float, metavar="LOSS", help=text)
    text = "paired differences with 95 %% intervals, to IID or to FedAvg (default: the table of results)"
    parser.add_argument("--against", choices=DIFFER, help=text)
    text = "results or fields of metrics.jsonl that --against compares (default: val_loss)"
    parser.add_argument("--fields", nargs="+", default=["val_loss"], metavar="FIELD", help=text)


def losses(run):
    """[(round, validation loss)] of its evaluations after a round, nan where it is not finite."""
    return [(row["round"], number(row["val_loss"])) for row in run.rows if "val_loss" in row and row["round"]]


def first_at(run, target):
    return next((t for t, loss in losses(run) if loss <= target), None)


def best(curve, _):
    lowest = [min((loss for _, loss in losses(run) if not math.isnan(loss)), default=math.nan) for run in curve.runs]
    return spread(np.array(lowest), 3)


def to_half(curve, curves):
    """`6/6/never`: the rounds to half of what the usual FedAvg of the same seed trains."""
    base = usual_fedavg(curves)
    middle = {run.seed: losses(run)[(len(losses(run)) - 1) // 2][1] for run in base.runs} if base else {}
    rounds = [first_at(run, middle[run.seed]) for run in curve.runs if run.seed in middle]
    return "/".join("never" if t is None else str(t) for t in rounds) or "-"


def to_target(target):
    """A cell: the rounds to this loss, `>40` where a seed never had it."""

    def cell(curve, _):
        rounds = [first_at(run, target) for run in curve.runs]
        longest = max(run.rows[-1]["round"] for run in curve.runs)
        return f">{longest}" if None in rounds else spread(np.array(rounds, dtype=float), 1)

    return cell


def variance(curve, _):
    """Of the clients' gradient norms: its values lie orders of magnitude apart."""
    values = curve.mean_over_rounds("gradient_norm_variance")
    digits = 2 - math.floor(math.log10(values.mean())) if np.isfinite(values).all() and values.mean() > 0 else 0
    return spread(values, max(0, digits))


def away(curve, _):
    """1 - CKA, from 0 on."""
    return spread(np.maximum(1 - curve.mean_over_rounds("mean_cka"), 0), 3)


def has_failed(run):
    """Whether a run counts as failed: what its log says, else common's rule."""
    said = run.results.get("failed")
    return bool(said if isinstance(said, str) else failure(run.rows))


def alarms(curve, _):
    """`diverged 2/3`: the detectors that spoke; `-` for none."""
    n = len(curve.runs)
    spoke = {name.replace("_", " "): len(times) for name, times in first_alarms(curve).items()}
    return ", ".join(name + (f" {count}/{n}" if count < n else "") for name, count in spoke.items()) or "-"


def logged(curves, name):
    return any(row.get(name) is not None for curve in curves for run in curve.runs for row in run.rows)


def columns(curves, args):
    def there(name, head):
        return head in (args.columns or ()) or logged(curves, name)

    return (
        result("val loss", "val_loss", digits=3),
        *([result("accuracy", "val_accuracy", 100, 1)] if there("val_accuracy", "accuracy") else ()),
        Column("best", best),
        Column("vs FedAvg", against_fedavg),
        result("val ppl", "val_ppl"),
        result("test ppl", "test_ppl"),
        result("bits/byte", "val_bits_per_byte", digits=3),
        result("mean client", "mean_client_val_loss", digits=3),
        result("worst client", "worst_client_val_loss", digits=3),
        result("gap", "generalization_gap", digits=3),
        over_rounds("drift", "relative_drift", digits=2),
        *(over_rounds(head, name, digits=2) for head, name in TRUE_DRIFT.items() if there(name, head)),
        over_rounds("cosine", "update_cosine", digits=3),
        Column("gradient variance", variance),
        Column("1 - CKA", away),
        Column("to half", to_half),
        *([Column(f"to {args.target:g}", to_target(args.target))] if args.target else ()),
        Column("failed", lambda curve, _: f"{sum(map(has_failed, curve.runs))} of {len(curve.runs)}"),
        Column("alarms", alarms),
        Column("MB up", lambda curve, _: "-" if curve.kind == "local" else sent(curve, "bytes_up")),
        ROUNDS,
        MINUTES,
        SEEDS,
    )


TABLE = Table(
    study=STUDY,
    words=__doc__.split("\n\n", 2)[2],
    columns=columns,
    free=FREE,
    flags=add_flags,
    text=text_of,
    about=lambda study, setting, curves: describe(study, shared_setting(setting, curves)),
)
