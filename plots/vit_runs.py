"""Runs of vit_sparse_fl as tables and figures see them, and its table.

    python plots/tables.py vit_sparse_fl --data-dir results
    python plots/tables.py vit_sparse_fl --data-dir results --against random

Accuracies are in %, after the last round or with the weights of the best validated one; `vs dense`: the difference, in
points, to the row of dense FedAvg in the same federation that differs least, rates apart. `diverged`: how many seeds
broke down, which count in no mean and no difference: an update of any round or the last loss was not finite, or the
last validation accuracy is below half of that before training (round 0). Cosine, diversity, sign conflict and drift are
means over the evaluated rounds (`-` of LoRA, whose factors are not unique), the losses under each other's updates over
those of --interference-every: by a cosine schedule the last round is one of hardly any step. `drift matched`: the row's
rate is the one that gives it dense training's drift.

--against dense, random: the study's question, a table a federation, as paired differences in test accuracy (last) and
in `others / own`, what the others lose for what a client gains, `mean [95 % interval of a paired t test], pairs`, to
the row of dense FedAvg or of random masks in the same federation that differs least (rates apart: of several the one
with the best validation accuracy; a drift-matched row to dense at the matched rate; a row of that method itself, such
as one whose head alone is trained, to the one with more seeds; with as many to a rate that validates better, the head
alone to dense training): runs of one seed share split, pretraining and shards. Where seeds begin with several
pretrainings, a pair is the mean over the seeds of one of them, which are not independent. Beside them what the mask
keeps, and interference with its chance levels: of `others' loss` those of `random signs`, of the `merge gap` -(1 - 1/m)
`own loss` of m clients a round, what averaging alone dilutes, of `between - within` what 95 % of random pairs stay
within (`at random`). `others' loss, times dense's at equal gain`: how far a client moves decides what it gains and what
the others lose; here the second is compared where the first is the same, round by round, with dense training's at
several rates (lines between these in log-log; mean ratio and interval of logarithms; `-` beyond the gains that dense
training has; without rounds where those are below 0.2 nats).
"""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.curves import number
from plots.runs import Study, base_name, not_finite, order_of, text
from plots.seeds import distance, interval
from plots.style import seeds_text
from plots.tables import (
    MINUTES,
    ROUNDS,
    SEEDS,
    Column,
    Table,
    difference,
    over_rounds,
    pairs_cell,
    parts_of,
    result,
    sent,
    spread,
)

# ---- the study

FEDERATION = ("num_clients", "participation_rate", "shards", "local_steps", "num_rounds")
START = ("dataset", "classes", "data", "val_split", "model", "weights", "image_size", "init_from")
KEYS = (*START, *FEDERATION, "sparsity")
FREE = ("shards", "local_steps", "num_rounds", "sparsity")  # in which the rows of one table may differ
SCOPES = {"kind": "a threshold a kind", "unit": "whole heads and neurons", "block": "whole blocks"}
OWN, OTHERS = "interference_own", "interference_others"
LEAST = 0.2  # nats: where clients gain less, by the cosine's end, they hardly move
CALIBRATION = "calibration fisher_form calibration_rounds calibrate_on calibration_clients fisher_samples mask_merge"


def kind_of(command, args):
    if command == "train_centralized":
        return "central"
    if args.get("upload") == "topk":
        return "topk"
    if command == "train_federated":
        return "lora" if args.get("lora_r") else "dense"
    return "given" if args.get("mask") else str(args.get("mask_strategy"))


def setting_of(run):
    args = run.args
    hidden = ("data", "shards", "sparsity") + (FEDERATION if run.kind == "central" else ())
    # a flag without a value is a value too: pretrained from nothing is not like anything
    values = {key: "" if args[key] is None else text(args[key]) for key in KEYS if key in args and key not in hidden}
    for key in ("weights", "init_from", "model"):
        if isinstance(args.get(key), str):
            values[key] = base_name(args[key], inner=("final",))
    # `--classes` left out and all of them given are the same
    if "classes" in run.facts and args.get("classes") != "rest":
        values["classes"] = text(run.facts["classes"])
    sums = {key: value for key, value in run.data.items() if key.startswith("sha256")}
    values["data"] = ""  # old logs do not say: they are compared among themselves
    if sums:
        values["data"] = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:8]
    if "sharding" in args and run.kind != "central":
        values["shards"] = shards_name(args)
    if run.kind not in ("central", "dense") and "sparsity_ratio" in args:
        values["sparsity"] = args["sparsity_ratio"]
    return values


def shards_name(args):
    """`IID`, `Nc 5`, `Dirichlet 0.1`: how the args of a run deal the images to the clients."""
    if args.get("sharding") == "iid":
        return "IID"
    return f"Dirichlet {args.get('alpha')}" if args.get("sharding") == "dirichlet" else f"Nc {args.get('nc')}"


def shards_order(name):
    """A sort key: Dirichlet with alpha upwards, Nc upwards, IID last."""
    kind, _, value = str(name).partition(" ")
    return ("Dirichlet", "Nc", "IID").index(kind), float(value or 0)


def order(key, value):
    # the federation without skew first, then ever more of it
    return (0, *(-v for v in shards_order(value)), "") if key == "shards" else order_of(value)


def classes_words(value, _):
    """`classes 50 to 99` of the range [50, 100]."""
    if value == "rest":
        return "classes of no pretraining"
    ends = re.findall(r"\d+", str(value))
    return f"classes {ends[0]} to {int(ends[1]) - 1}" if len(ends) == 2 else f"classes {value}"


# ---- runs that broke down

DIVERGED = "an update or the loss not finite, or below half of the accuracy before training"


def before_training(run):
    """The validation accuracy before the first round; nan without a round 0."""
    return next((number(row.get("val_accuracy")) for row in run.rows if row.get("round") == 0), math.nan)


def prepared(runs, notes):
    """The runs, marked where they diverged, and where run_all_experiments.py gave them the rate of a drift."""

    def broke_down(run):
        last = run.rows[-1] if run.rows else {}
        left_out = any(row.get("left_out_updates") for row in run.rows)
        not_a_number = last.get("val_loss") is not None and math.isnan(number(last["val_loss"]))
        below = run.status == "finished" and number(last.get("val_accuracy")) < before_training(run) / 2
        return not_finite(run) or left_out or not_a_number or below

    def method(run):
        return run.method | ({"drift_matched": True} if Path(str(run.name)).name.startswith("matched_") else {})

    return [replace(run, diverged=bool(broke_down(run)), method=method(run)) for run in runs]


def class_count(run):
    """How many classes its images have; None where an old log does not say."""
    chosen = run.facts.get("classes") or run.args.get("classes")
    if not isinstance(chosen, list):
        return None
    return len(chosen) if run.args.get("classes") == "rest" or len(chosen) != 2 else chosen[1] - chosen[0]


def broken(curve):
    """`1 of 3 diverged`; "" where none of the seeds did."""
    count = len(curve.runs) - len(curve.counted)
    return f"{count} of {len(curve.runs)} diverged" if count else ""


def say_diverged(curves):
    """Adds to the curves' labels how many seeds diverged."""
    for curve in curves:
        curve.label += f" ({broken(curve)})" if broken(curve) else ""


def seeds_said(curves, shown="band: minimum to maximum"):
    """How many seeds a figure has, and what it calls diverged where runs did."""
    some = f", without diverged runs ({DIVERGED})" if any(map(broken, curves)) else ""
    return seeds_text(curves, shown) + some


STUDY = Study(
    name="vit_sparse_fl",
    commands=("train_centralized", "train_federated", "train_federated_sparse"),
    kinds={
        "central": "Central",
        "dense": "Dense FedAvg",
        "least_sensitive": "Least sensitive",
        "most_sensitive": "Most sensitive",
        "lowest_magnitude": "Lowest magnitude",
        "highest_magnitude": "Highest magnitude",
        "random": "Random",
        "topk": "Top-k updates",
        "given": "Mask from a file",
        "lora": "Federated LoRA",
    },
    kind_of=kind_of,
    setting_of=setting_of,
    keys=KEYS,
    said=frozenset(KEYS)
    | frozenset(
        "sharding nc alpha allow_unused_classes sparsity_ratio upload mask mask_strategy use_amp num_classes"
        " hp_search hp_epochs heterogeneity_experiment nc_values local_steps_experiment j_values compare_strategies"
        " sparsity_experiment sparsity_values".split()
    ),
    unread=(
        (lambda a: a["kind"] == "central", {*FEDERATION, "client_weights", "mask_scope", *CALIBRATION.split()}),
        (lambda a: a["kind"] in ("dense", "topk", "given"), {"mask_scope", *CALIBRATION.split()}),
        (lambda a: a["kind"] in ("lowest_magnitude", "highest_magnitude", "random"), set(CALIBRATION.split())),
        (lambda a: a.get("calibrate_on") != "clients", {"calibration_clients", "mask_merge"}),
    ),
    off={
        "server_lr": (),
        "mask_omit": (),
        "fisher_form": (),
        "error_feedback": (),
        "download": (),
        "lora_r": (),
        "mixup": (),
        "drift_matched": (),
    },
    words={
        "shards": "{}",
        "local_steps": "J {}",
        "num_rounds": "{} rounds",
        "sparsity": "sparsity {}",
        "calibration": "{} calibration",
        "calibration_rounds": "{} calibration rounds",
        "calibrate_on": "calibrated on {}",
        "fisher_samples": "{} Fisher samples",
        "mask_scope": lambda scope, _: SCOPES.get(scope, f"{scope} threshold"),
        "mask_omit": "without {}",
        "lora_r": "rank {}",
        "download": "top-k down too",
        "fisher_form": "{} form",
        "mask_merge": "{} of clients' masks",
        "batch_size": "batch {}",
        "num_clients": "{} clients",
        "participation_rate": "participation {}",
        "epochs": "{} epochs",
        "init_from": "from {}",
        "image_size": "{} px",
        "dataset": "{}",
        "classes": classes_words,
        "model": "{}",
        "data": None,
        "val_split": None,
    },
    yes_no={
        "freeze_head": ("head frozen", "head trained"),
        "freeze_backbone": ("head only", ""),
        "pretrained": ("pretrained", "from scratch"),
        "drift_matched": ("drift matched", ""),
    },
    order=order,
    budgets=("rounds", "images"),
    keeps=not_finite,
    prepared=prepared,
)

# ---- the table


def federation(curve):
    return {key: curve.args.get(key) for key in FREE if key in FEDERATION}


def base_of(curve, curves, kind):
    """The curve of `kind` with which a curve is compared (see this module's docstring), None without one."""

    def apart(other):
        return distance(curve, other) - (curve.args.get("lr") != other.args.get("lr"))

    def validated(other):
        values = other.results("val_accuracy_best")
        return values.mean() if len(values) and np.isfinite(values).all() else -math.inf

    def fits(other):
        if other.kind != kind or federation(other) != federation(curve):
            return False
        if curve.kind != kind:
            return True
        if len(other.runs) != len(curve.runs):
            return len(other.runs) > len(curve.runs)
        alone = kind == "dense" and not is_dense(curve)
        return validated(other) > validated(curve) and (alone or apart(other) == 0)

    def key(other):
        return apart(other), -len(other.runs), -validated(other)

    return None if curve.central else min(filter(fits, curves), key=key, default=None)


def accuracy(curve):
    return 100 * curve.results("test_accuracy_last")


def share_of_own(curve):
    return -curve.mean_over_rounds(OTHERS) / curve.mean_over_rounds(OWN)


def gains(run):
    """{round: (nats that clients gain by their own updates, nats that the others lose)}, means over the clients."""
    every = {row["round"]: (row.get(OWN), row.get(OTHERS)) for row in run.rows}
    return {t: (-number(own), number(others)) for t, (own, others) in every.items() if None not in (own, others)}


def is_dense(curve):
    """Whether clients train all weights, at any rate."""
    return curve.kind == "dense" and not curve.runs[0].args.get("freeze_backbone")


def at_equal_gain(curve, dense):
    """{seed: log of the others' loss over what it is under dense training where clients gain as much}.

    The mean over the rounds; dense training's is, round by round, on the lines between its rates in log-log. Without
    rounds outside of its gains, those where at no rate it gains LEAST, and those where nobody loses.
    """
    apart = {}
    for run in curve.counted:
        same = [gains(other) for c in dense for other in c.counted if other.seed == run.seed]
        ratios = []
        for t, (gain, loss) in gains(run).items():
            at_rates = sorted(one[t] for one in same if min(one.get(t, (0, 0))) > 0)
            x, y = np.log(at_rates).T.reshape(2, -1)
            if gain > 0 < loss and len(x) > 1 and x[0] <= math.log(gain) <= x[-1] >= math.log(LEAST):
                ratios.append(math.log(loss) - np.interp(math.log(gain), x, y))
        if ratios:
            apart[run.seed] = np.mean(ratios)
    return apart


def equal_gain_cell(curve, curves):
    """The mean ratio and its 95 % interval, of logarithms, over starts; `-` of dense training itself."""
    if curve.central or is_dense(curve):
        return "-"
    ends = starts_of(curve, at_equal_gain(curve, list(filter(is_dense, curves))))
    if not len(ends):
        return "-"
    shown = ", ".join(f"{math.exp(end):.2f}" for end in interval(ends)) if len(ends) > 1 else "?"
    return f"{math.exp(ends.mean()):.2f} [{shown}], {len(ends)}"


def crossed(run):
    """Whether a run's rows hold losses under other clients' updates, or would if it had not diverged before."""
    measured = any(row.get(OWN) is not None for row in run.rows)
    return not run.central and (measured or bool(run.diverged and run.args.get("interference_every")))


def over_starts(curve, base, values):
    """Differences, seed by seed, of what `values` gives of a curve, [S]; means over the seeds of a pretraining where
    there are several of these."""
    mine, other = ({run.seed: x for run, x in zip(c.counted, values(c), strict=True)} for c in (curve, base))
    return starts_of(curve, {seed: mine[seed] - other[seed] for seed in sorted(mine.keys() & other.keys())})


def starts_of(curve, of_seeds):
    """The values of {seed: value}; means over the seeds of a pretraining where there are several of these."""
    starts = {run.seed: str(run.args.get("init_from")) for run in curve.counted}
    every = {}
    for seed, value in of_seeds.items():
        every.setdefault(starts[seed], []).append(value)
    return np.array([np.mean(values) for values in every.values()] if len(every) > 1 else sum(every.values(), []))


DIFFERENCE = Column("vs dense", lambda c, all_: difference(c, base_of(c, all_, "dense"), "test_accuracy_last", 100))


def of_weights(head, name, factor=1.0, digits=None):
    """`over_rounds` of a measure of updates of weights: LoRA's are of its factors, which are not unique."""
    whole = over_rounds(head, name, factor, digits)
    return Column(head, lambda curve, curves: "-" if curve.kind == "lora" else whole.cell(curve, curves))


FAILED = Column("diverged", lambda curve, _: f"{len(curve.runs) - len(curve.counted)} of {len(curve.runs)}")
LAST = result("test % (last)", "test_accuracy_last", 100, 2)
DRIFT = of_weights("drift %", "drift", 100, 3)
CROSS = (
    over_rounds("own loss", OWN, 1, 4),
    over_rounds("others' loss", OTHERS, 1, 4),
    of_weights("random signs", "interference_chance", 1, 4),
    Column("others / own", lambda curve, _: spread(share_of_own(curve), 3)),
    over_rounds("merge gap", "merge_gap", 1, 4),
    of_weights("between - within", "cosine_excess", 1, 3),
    of_weights("at random", "cosine_chance", 1, 3),
)


def columns(curves, args):
    """The columns; of losses under each other's updates, and of what is sent down, where runs have them."""
    runs = [run for curve in curves for run in curve.runs]
    if args.against:
        yield from (LAST, Column(f"vs {args.against}", against(args.against, accuracy, 2)), FAILED)
        yield Column("lr", lambda curve, _: str(curve.args.get("lr", "-")))
        yield DRIFT
        yield from (result(f"{part} kept %", f"kept_{part}", 100, 1) for part in ("weights", "biases"))
        yield from CROSS
        yield Column(f"others / own vs {args.against}", against(args.against, share_of_own, 3))
        yield Column("others' loss, times dense's at equal gain", equal_gain_cell)
        yield SEEDS
        return
    yield LAST
    yield result("test % (best)", "test_accuracy_best", 100, 2)
    yield result("val % (best)", "val_accuracy_best", 100, 2)
    yield from (DIFFERENCE, FAILED)
    yield Column("MB up", lambda curve, _: sent(curve, "bytes_up"))
    yield of_weights("cosine", "update_cosine", 1, 3)
    yield of_weights("diversity", "gradient_diversity", 1, 3)
    yield of_weights("sign conflict %", "sign_conflict", 100, 1)
    yield DRIFT
    yield of_weights("drift to mean", "drift_to_mean", 1, 2)
    if any("download" in run.method for run in runs):
        yield Column("MB down", lambda curve, _: sent(curve, "bytes_down"))
    if any(map(crossed, runs)):
        yield from CROSS
    yield from (ROUNDS, MINUTES, SEEDS)


def against(kind, values, digits):
    """A cell: the paired difference of what `values` gives to the curve of `kind`."""

    def cell(curve, curves):
        base = base_of(curve, curves, kind)
        return "-" if base in (None, curve) else pairs_cell(over_starts(curve, base, values), digits)

    return cell


def asked(runs, args):
    """The runs; with --against those of federations, and central ones from the same start."""

    def start(run):
        return [run.setting.get(key) for key in START]

    starts = [start(run) for run in runs if not run.central]
    return [run for run in runs if not args.against or start(run) in starts]


def text_of(runs, notes, args):
    """One table, or with --against one a federation, within which rows are compared."""
    return parts_of(replace(TABLE, text=None, free=("sparsity",) if args.against else FREE), runs, notes, args)


def add_flags(parser):
    text = "the study's question: paired differences with 95 %% intervals to dense FedAvg or random masks, interference"
    parser.add_argument("--against", choices=["dense", "random"], help=text + " (default: the table of results)")


TABLE = Table(
    study=STUDY,
    free=FREE,
    columns=lambda *of: tuple(columns(*of)),
    flags=add_flags,
    select=asked,
    text=text_of,
    words=__doc__.split("\n\n", 2)[2],
)
