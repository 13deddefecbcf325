"""Figures and table of vit_sparse_fl.

    python plots/vit.py --data-dir results --out-dir results/plots                  # all that the runs allow
    python plots/vit.py heterogeneity sparsity --data-dir vit_sparse_fl/results/stand_in.jsonl
    python plots/tables.py vit_sparse_fl

    curves          validation accuracy and loss against rounds: heterogeneity_curves.png, local_steps_curves.png,
                    strategies_curves.png (dense, each mask strategy, top-k updates), central_curves.png (epochs)
    heterogeneity   test accuracy against classes per client (Nc) upwards, IID last; Dirichlet apart, not joined
    local_steps     test accuracy against local steps J, the rounds, which go down as J goes up, under it
    strategies      strategy_comparison.png: test accuracy of each method at one sparsity, every seed, mean and spread
    sparsity        test accuracy against the fraction of weights that is frozen, dense and central beside it
    layers          mask_layers.png: the fraction of each layer that the masks keep, from mask.safetensors; a strategy
                    that keeps nothing of some layers has collapsed them
    interference    {heterogeneity,local_steps,strategies}_interference.png: between the clients, against rounds
    shards          clients x classes of the lowest seed, from shards.json (a heat map cannot be averaged)

Lines are means over seeds, their bands minimum to maximum; points have bars of one standard deviation and a dot a seed.
`--at best` takes the test accuracy after the best validated round instead of the last.
"""

import hashlib
import json
import math
import re

import numpy as np

from common.cli import UsageError, run_main
from common.curves import GREY, break_lines, new_figure, number, set_title
from plots.deltas import draw_layers
from plots.runs import Study, base_name, describe, like_with_like, order_of, text
from plots.seeds import along, curves_of, usual_variants
from plots.style import (
    POINTS,
    Figure,
    caption,
    count_maps,
    draw_figures,
    figure_parser,
    legend_below,
    looks_of,
    of_group,
    points_figure,
    reference_lines,
    rounds_figure,
    seed_spread,
    seeds_text,
)
from plots.tables import MINUTES, ROUNDS, SEEDS, Column, Table, difference, over_rounds, result, sent

# ---- the study

FEDERATION = ("num_clients", "participation_rate", "shards", "local_steps", "num_rounds")
KEYS = ("dataset", "classes", "data", "val_split", "model", "weights", "image_size", "init_from")
KEYS += (*FEDERATION, "sparsity")
CALIBRATION = "calibration calibration_rounds calibrate_on calibration_clients fisher_samples mask_merge"


def kind_of(command, args):
    if command == "train_centralized":
        return "central"
    if args.get("upload") == "topk":
        return "topk"
    if command == "train_federated":
        return "dense"
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
    if "classes" in run.facts:
        values["classes"] = text(run.facts["classes"])
    sums = {key: value for key, value in run.data.items() if key.startswith("sha256")}
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
    ends = re.findall(r"\d+", str(value))
    return f"classes {ends[0]} to {int(ends[1]) - 1}" if len(ends) == 2 else f"classes {value}"


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
    words={
        "shards": "{}",
        "local_steps": "J {}",
        "num_rounds": "{} rounds",
        "sparsity": "sparsity {}",
        "calibration": "{} calibration",
        "calibration_rounds": "{} calibration rounds",
        "calibrate_on": "calibrated on {}",
        "fisher_samples": "{} Fisher samples",
        "mask_scope": "{} threshold",
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
    yes_no={"freeze_head": ("head frozen", "head trained"), "pretrained": ("pretrained", "from scratch")},
    order=order,
    budgets=("rounds", "images"),
)
# ---- curves over rounds

ACCURACY = [("val_accuracy", "Validation accuracy (%)", 100), ("val_loss", "Validation loss (nats)", 1)]
# With d_k the update of client k in a round, theta the server's weights; of a masked run, those that it keeps.
INTERFERENCE = [
    ("update_cosine", "Cosine between updates", 1),  # mean over pairs; 1: all pull the same way
    ("gradient_diversity", "Gradient diversity", 1),  # sum |d_k|^2 / |sum d_k|^2 (Yin et al. 2018)
    ("sign_conflict", "Sign conflict (%)", 100),  # mean of 1 - |n+ - n-| / (n+ + n-) over weights
    ("drift", "Drift |d| / |theta| (%)", 100),
    ("drift_to_mean", "Drift to mean |d - mean| / |mean|", 1),
]


def by_factor(*free):
    """A select of groups of dense runs that differ in `free`, first of all in its first key."""

    def select(runs, notes):
        dense = [run for run in runs if run.kind == "dense"]
        groups = like_with_like(dense, free)
        several = [(s, m) for s, m in groups if len({str(run.setting.get(free[0])) for run in m}) > 1]
        return [(setting, curves_of(members, free, notes=notes)) for setting, members in several]

    return select


def by_strategy(runs, notes):
    """Groups with two or more of dense, masked and top-k runs at one sparsity, the usual variant of each."""
    chosen = []
    for setting, members in like_with_like([run for run in runs if run.kind != "central"]):
        left_out = []
        curves = usual_variants(curves_of(members, notes=notes), left_out)
        if len(curves) > 1:
            notes += of_group(setting, left_out)
            chosen.append((setting, curves))
    return chosen


def central(runs, notes):
    groups = like_with_like([run for run in runs if run.kind == "central"])
    return [(setting, curves_of(members, notes=notes)) for setting, members in groups]


def measured(select):
    """`select`, restricted to runs whose metrics.jsonl holds measures of interference."""

    def has_measures(run):
        return any(not math.isnan(number(row.get(field))) for row in run.rows for field, *_ in INTERFERENCE)

    return lambda runs, notes: select([run for run in runs if has_measures(run)], notes)


# ---- accuracy against a factor

FREE = ("shards", "local_steps", "num_rounds", "sparsity")


def sparsity_lines(runs, notes):
    sparse = [run for run in runs if "sparsity" in run.setting]
    dense = [run for run in runs if run.kind in ("central", "dense")]
    chosen = []
    for setting, (lines, _) in along(sparse, ("sparsity",), ("sparsity",), notes):
        agree = [members for group, members in like_with_like([*sparse, *dense], ("sparsity",)) if group == setting]
        references = [run for members in agree for run in members if run in dense]
        chosen.append((setting, (lines, curves_of(references, notes=notes))))
    return chosen


def by_shards(curves):
    there = sorted({curve.place["shards"] for curve in curves}, key=shards_order)
    return there, there, lambda curve: curve.place["shards"]


def by_steps(curves):
    def place(curve):
        return curve.place["local_steps"], curve.place["num_rounds"]

    there = sorted({place(curve) for curve in curves})
    return there, [f"{steps}\n({rounds} rounds)" for steps, rounds in there], place


def by_sparsity(curves):
    there = sorted({curve.place["sparsity"] for curve in curves})
    ticks = [f"{value:g}\n({100 * (1 - value):.3g} % kept)" for value in there]
    return there, ticks, lambda curve: curve.place["sparsity"]


def points(title, factor, x_label):
    """A draw of the test accuracy against a factor, Dirichlet's shards apart."""

    def draw(setting, what, args):
        lines, references = what
        names = {curve.place.get("shards") for line in lines for curve in line} - {None}
        apart = [name for name in names if name.startswith("Dirichlet")]
        at = f"test_accuracy_{args.at}", accuracy_label(args)
        return points_figure(title, lines, *at, factor, x_label, setting, references, apart)

    return draw


def accuracy_label(args):
    return f"Test accuracy (%), {'last round' if args.at == 'last' else 'best validated round'}"


def strategies(runs, notes):
    groups = [(setting, curves_of(members, notes=notes)) for setting, members in like_with_like(runs)]
    return [(setting, curves) for setting, curves in groups if sum(not curve.central for curve in curves) > 1]


def draw_strategies(setting, curves, args):
    """A row per method: every seed a dot, the mean with a bar, and the number."""
    field = f"test_accuracy_{args.at}"
    rows = [curve for curve in curves if not curve.central]
    figure, axes = new_figure(width=7.2, height=1.9 + 0.42 * len(rows))
    axis, looks = axes[0, 0], looks_of(rows)
    references = [curve for curve in curves if curve.kind in ("central", "dense")]
    reference_lines(axis, references, field, 100, "{}: {:.1f} %", vertical=True)
    for i, curve in enumerate(rows):
        values = 100 * curve.results(field)
        mean, spread, look = values.mean(), seed_spread(values), looks[curve.label] | {"linestyle": "-"}
        axis.errorbar([mean], [i], xerr=[spread] if spread else None, capsize=4, markersize=7, **look)
        if len(values) > 1:
            axis.plot(values, np.full(len(values), i + 0.22), ".", color=look["color"], markersize=5)
        words = f"{mean:.1f}" + (f" +- {spread:.1f}" if spread else "")
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axis.annotate(words, (1.01, i), size=8.5, **place)
    axis.axhline(len([c for c in rows if c.kind == "dense"]) - 0.5, color=GREY, linewidth=0.5)
    axis.set_yticks(range(len(rows)), [break_lines(curve.label, 34) for curve in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(False, axis="y")
    axis.set_xlabel(accuracy_label(args))
    legend_below(figure, [axis], 2)
    caption(figure, f"Mask strategies: {seeds_text(rows, POINTS)}", setting, rows)
    return figure


# ---- what the run folders hold besides: masks and shards


def with_masks(runs, notes):
    masked = [r for r in runs if r.kind != "topk" and r.folder and (r.folder / "mask.safetensors").is_file()]
    chosen = []
    for setting, members in like_with_like(masked):
        left_out = []
        chosen.append((setting, usual_variants(curves_of(members, notes=notes), left_out)))
        notes += of_group(setting, left_out)
    return chosen


def with_shards(runs, notes):
    """{sharding: (seed, counts [clients, classes])}: what the shards do not depend on is free."""
    free = tuple(key for key in KEYS if key not in ("dataset", "classes", "data", "val_split", "num_clients"))
    chosen = []
    for setting, members in like_with_like([run for run in runs if run.kind != "central"], free):
        maps = {}
        for run in sorted(members, key=lambda run: (str(run.seed).zfill(20), str(run.folder))):
            path, name = run.folder and run.folder / "shards.json", run.setting.get("shards")
            if path and path.is_file() and name not in maps:
                maps[name] = (run.seed, read_counts(path))
        if maps:
            chosen.append((setting, dict(sorted(maps.items(), key=lambda item: shards_order(item[0]), reverse=True))))
    return chosen


def read_counts(path):
    """int array [clients, classes] of shards.json. Raises UsageError for a damaged one."""
    try:
        counts = np.array(json.loads(path.read_text(encoding="utf-8"))["counts"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}): delete it or run again") from error
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or not counts.any():
        raise UsageError(f"{path} is damaged: counts must be whole numbers, clients x classes: delete it or run again")
    return counts


def draw_shards(setting, maps, args):
    titles = []
    for name, (seed, counts) in maps.items():
        held = (counts > 0).sum(axis=1)
        per_client = f"{held.min()}" if held.min() == held.max() else f"{held.min()} to {held.max()}"
        titles.append(f"{name} (seed {seed})\n{per_client} {'class' if per_client == '1' else 'classes'} a client")
    figure = count_maps(titles, [counts for _, counts in maps.values()], "Class", "Images (white: none)")
    set_title(figure, f"Images of each class at each client\n{describe(STUDY, setting)}")
    return figure


# ---- all of them

SHARDINGS = "runs of train_federated.py with two shardings, such as --nc 1 and --nc 5"
STEPS = "runs of train_federated.py with two values of --local-steps, such as 4 and 8"
SPARSE = "runs of train_federated_sparse.py with"
MASKS = f"{SPARSE} two strategies, or one and a run of train_federated.py"
NAMES = ", ".join(list(STUDY.kinds)[2:7])
MEASURED = ", with update_cosine in metrics.jsonl"
# what runs differ in -> (select, title over rounds, title of the interference, what it needs)
VARIED = {
    "heterogeneity": (by_factor("shards"), "Classes per client (Nc)", "by classes per client (Nc)", SHARDINGS),
    "local_steps": (by_factor("local_steps", "num_rounds"), "Local steps (J) per round", "by local steps (J)", STEPS),
    "strategies": (by_strategy, "Dense and sparse fine-tuning", "dense and sparse", MASKS),
}


def over(axis):
    return lambda runs, notes: along(runs, FREE, axis, notes)


def between(title):
    return rounds_figure(f"Interference between clients, {title}", INTERFERENCE, columns=3)


BY_SHARDS = points("Heterogeneity", by_shards, "Shards (Nc: classes per client)")
BY_STEPS = points("Local steps", by_steps, "Local steps J (rounds of the run)")
BY_SPARSITY = points("Sparsity", by_sparsity, "Sparsity (weights that are trained)")
EPOCHS = rounds_figure("Central training", ACCURACY, "Epoch")
FIGURES = {
    "curves": [
        *(Figure(f"{a}_curves", select, rounds_figure(t, ACCURACY), n) for a, (select, t, _, n) in VARIED.items()),
        Figure("central_curves", central, EPOCHS, "runs of train_centralized.py"),
    ],
    "heterogeneity": [Figure("heterogeneity", over(("shards",)), BY_SHARDS, SHARDINGS)],
    "local_steps": [Figure("local_steps", over(("local_steps", "num_rounds")), BY_STEPS, STEPS)],
    "strategies": [
        Figure("strategy_comparison", strategies, draw_strategies, f"{SPARSE} two of --mask-strategy {NAMES}")
    ],
    "sparsity": [
        Figure("sparsity", sparsity_lines, BY_SPARSITY, f"{SPARSE} two of --sparsity-ratio, such as 0.5 and 0.9")
    ],
    "layers": [Figure("mask_layers", with_masks, draw_layers, f"{SPARSE} mask.safetensors in their folder")],
    "interference": [
        Figure(f"{a}_interference", measured(select), between(title), needs + MEASURED)
        for a, (select, _, title, needs) in VARIED.items()
    ],
    "shards": [Figure("shards", with_shards, draw_shards, "federated runs with shards.json in their folder")],
}


def dense_of(curve, curves):
    """The dense curve in the federation of `curve` that shares most arguments with it, or None."""
    if curve.kind in ("central", "dense"):
        return None

    def federation(other):
        return {key: other.args.get(key) for key in FREE if key in FEDERATION}

    there = [other for other in curves if other.kind == "dense" and federation(other) == federation(curve)]
    return max(there, key=lambda other: sum(curve.args.get(k) == v for k, v in other.args.items()), default=None)


TABLE = Table(
    study=STUDY,
    free=FREE,
    columns=(
        result("test % (last)", "test_accuracy_last", 100, 2),
        result("test % (best)", "test_accuracy_best", 100, 2),
        result("val % (best)", "val_accuracy_best", 100, 2),
        Column("vs dense", lambda c, all_: difference(c, dense_of(c, all_), "test_accuracy_last", 100)),
        Column("MB up", lambda curve, _: sent(curve, "bytes_up")),
        over_rounds("cosine", "update_cosine", 1, 3),
        over_rounds("diversity", "gradient_diversity", 1, 3),
        over_rounds("sign conflict %", "sign_conflict", 100, 1),
        over_rounds("drift %", "drift", 100, 3),
        over_rounds("drift to mean", "drift_to_mean", 1, 2),
        ROUNDS,
        MINUTES,
        SEEDS,
    ),
)


def add_at(parser):
    at = "test accuracy after the last or best validated round"
    parser.add_argument("--at", choices=["last", "best"], default="last", help=at)


def build_parser():
    return figure_parser(STUDY, FIGURES, add_at)


if __name__ == "__main__":
    run_main(lambda args: draw_figures(STUDY, FIGURES, args), build_parser().parse_args())
