"""Runs of lora_glue_fl as tables and figures see them, and its table.

python plots/tables.py lora_glue_fl --data-dir out_fedavg --against svd
"""

from dataclasses import replace

import numpy as np

from common.cli import UsageError
from common.curves import number
from plots import glue_replay
from plots.runs import Study, base_name, describe, like_with_like, order_of, text
from plots.seeds import curves_of, kind_order
from plots.style import Panel, seeds_range
from plots.tables import (
    MINUTES,
    ROUNDS,
    SEEDS,
    Column,
    Table,
    difference,
    layout,
    one_table,
    paired_cell,
    result,
    sent,
    spread,
)

TASKS = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP"}
TASKS |= {"mnli": "MNLI", "wnli": "WNLI"}
METRICS = {
    "val_accuracy": "Accuracy (%)",
    "val_mismatched_accuracy": "Accuracy, mismatched (%)",
    "val_f1": "F1 (%)",
    "val_matthews": "Matthews correlation (x 100)",
    "val_pearson": "Pearson correlation (x 100)",
    "val_spearman": "Spearman correlation (x 100)",
}
FIGURE = ("dataset", "model", "pooling", "rank", "lora_alpha")  # what the panels of one figure have in common
FEDERATION = ("clients", "participation", "shards", "rounds", "local_epochs")
SERVED = ("svd_rank", "served_scale")  # of svd, where they are not the clients'
VALIDATION = ("validation", "validation_matched")  # the split of the headline metric
KEYS = (*FIGURE, "task", *FEDERATION, "examples", "data", "learning_rate", *SERVED)
ERROR = "aggregation_error"
EXACT = 1e-3
# what `prepared` adds to the lines of metrics.jsonl: the global headline metric minus the mean of the clients'; bytes
GAIN, SENT_UP, SENT_BOTH = "global_minus_clients", "sent_up", "sent_both"


# ---- the declaration


def kind_of(command, args):
    if command != "fedavg_rounds":
        return "full" if command == "baseline_run" else "central"
    return "naive" if args.get("skip_svd") else str(args.get("aggregate") or "svd")


def setting_of(run):
    args, facts = run.args, run.facts
    model = args.get("model") or facts.get("model") or f"roberta-{args.get('model_size')}"
    ranks, examples = facts.get("ranks") or args.get("client_ranks") or [], facts.get("examples")
    # a flag that takes fractions holds a float, whatever was written: 8 for 8.0
    mixed, alpha = len(set(ranks)) > 1, args.get("lora_alpha")
    values = {
        "dataset": facts.get("dataset") or args.get("dataset"),
        "model": base_name(str(model), inner=("final", "model")),
        "task": str(facts.get("task") or args.get("task_name")).lower(),
        "pooling": args.get("pooling") or "cls",
        "rank": " ".join(map(str, args.get("client_ranks") or ranks)) if mixed else args.get("lora_r"),
        "lora_alpha": int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha,
        "examples": sum(examples) if isinstance(examples, list) else examples,
    }
    if isinstance(facts.get("sha256"), dict):
        values["data"] = text({split: str(value)[:8] for split, value in facts["sha256"].items()})
    if not run.central:
        values |= {"clients": facts.get("clients"), "shards": shards_name(facts)}
        values |= {key: args.get(key) for key in ("rounds", "local_epochs")}
        values["participation"] = "" if args.get("participation") in (None, 1) else args["participation"]
        if not facts.get("held_out"):  # on which each rule's own rate was chosen
            values["learning_rate"] = args.get("learning_rate")
    if run.kind == "svd":
        rank = args.get("svd_rank")
        alpha = args.get("alpha") or rank
        values["svd_rank"] = rank if rank != args.get("lora_r") else ""
        values["served_scale"] = alpha / rank if rank and alpha != rank else ""
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
    if value == "" or (key, value) == ("server_optimizer", "none"):
        return -1, 0, 0, ""
    if key == "task":
        return 0, list(TASKS).index(value) if value in TASKS else len(TASKS), 0, value
    if key == "shards":
        kind, _, alpha = value.partition(",")[0].partition(" ")
        return {"IID": 0, "Dirichlet": 1}.get(kind, 2), -float(alpha or 0) if kind == "Dirichlet" else 0, 0, value
    return order_of(value)


def headline(setting):
    """The field of metrics.jsonl that figures show of a task: `val_matthews`."""
    return {"cola": "val_matthews", "stsb": "val_pearson"}.get(setting["task"], "val_accuracy")


def prepared(runs, notes):
    """The runs with what figures need and a line of metrics.jsonl does not say itself."""
    return [replace(run, rows=[row | derived(row, headline(run.setting)) for row in run.rows]) for run in runs]


def derived(row, field):
    """GAIN; bytes by the clients and both ways, without a value before round 1, when nothing was sent."""
    values, clients = {}, row.get(f"client_{field}")
    if field in row and isinstance(clients, list) and clients:
        values[GAIN] = number(row[field]) - float(np.mean([number(value) for value in clients]))
    if row.get("round") and "bytes_up" in row:
        up = number(row["bytes_up"])
        values |= {SENT_UP: up, SENT_BOTH: up + number(row.get("bytes_down"))}
    return values


STUDY = Study(
    name="lora_glue_fl",
    commands=("fedavg_rounds", "main_glue_lora", "baseline_run"),
    kinds={
        "central": "Central LoRA",
        "full": "Central, all weights",
        "svd": "SVD (FlexLoRA)",
        "naive": "Naive (FedIT)",
        "ffa": "FFA-LoRA",
        "stack": "Stack (FLoRA)",
        "residual": "Residual (FedEx-LoRA)",
        "rolora": "RoLoRA",
        "rotate": "Rotate (FedRot-LoRA)",
        "head": "Head only",
    },
    kind_of=kind_of,
    setting_of=setting_of,
    keys=KEYS,
    # learning_rate, of the setting of a federation only, tells central runs apart
    said=frozenset(KEYS) - {"learning_rate"}
    | frozenset(
        "eval_each_round eval_clients replay do_train do_eval model_size task_name aggregate skip_svd lora_r"
        " client_ranks shard max_examples alpha".split()
    ),
    unread=(
        (lambda a: a["kind"] != "svd", {"svd_split"}),
        (lambda a: a["kind"] != "rotate", {"rotate_lambda"}),
        (
            lambda a: a["kind"] in ("central", "full"),
            {"server_optimizer", "server_lr", "server_beta", "mu", "client_weights", "init_adapter"},
        ),
        (lambda a: a["kind"] == "full", {"lora_dropout", "target_modules"}),
        (lambda a: a.get("server_optimizer") in (None, "none"), {"server_lr"}),
        (lambda a: a.get("server_optimizer") != "momentum", {"server_beta"}),
    ),
    paths=("init_adapter", "tokenizer"),
    off={"server_lr": ()},
    words={
        "dataset": "{}",
        "model": "{}",
        "pooling": lambda value, _: None if value in ("", "cls") else f"{value} pooling",
        "task": lambda value, _: TASKS.get(value, value),
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
        "svd_split": "{} split",
        "rotate_lambda": "lambda {:g}",
        "server_optimizer": lambda value, _: None if value == "none" else f"server {value}",
        "server_lr": "server lr {:g}",
        "mu": lambda value, _: f"FedProx {value:g}" if value else None,
        "learning_rate": "lr {:g}",
        "batch_size": "batch {}",
        "num_train_epochs": "{:g} epochs",
        "init_adapter": "from {}",
    },
    order=order,
    central=frozenset({"central", "full"}),
    prepared=prepared,
)


def of_tasks(runs, tasks):
    """The runs of these tasks (of all for None). Raises UsageError where there are none of them."""
    chosen = [run for run in runs if not tasks or run.setting["task"] in tasks]
    if runs and not chosen:
        there = sorted({run.setting["task"] for run in runs}, key=lambda task: order("task", task))
        raise UsageError(f"no run of --tasks {' '.join(tasks)}: there are {', '.join(there)}")
    return chosen


def add_tasks(parser):
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="only these (default: all)")


# ---- panels


def figures_of(runs, notes, axis=()):
    """The runs as figures, the one with most panels first: list[(what its panels have in common, list[Panel])].

    axis: settings that lie on the panels' axis.
    """
    figures = {}
    for setting, members in like_with_like(runs, (*SERVED, *axis)):
        curves = curves_of([run for run in members if not run.central], (*SERVED, *axis), axis, notes)
        if curves:
            shared = {key: setting[key] for key in FIGURE if key in setting}
            panel = Panel(setting, curves, central_curves(members, notes))
            figures.setdefault(text(shared), (shared, []))[1].append(panel)
    for _, panels in figures.values():
        panels.sort(key=lambda panel: panel_order(panel.setting))
        set_titles(panels)
    return sorted(figures.values(), key=lambda figure: (-len(figure[1]), text(figure[0])))


def central_curves(runs, notes):
    """Curves of the central runs; a kind's labels do not say how it differs from the other kind."""
    kinds = [[run for run in runs if run.kind == kind] for kind in STUDY.kinds if kind in STUDY.central]
    return [curve for members in kinds for curve in curves_of(members, notes=notes)]


def panel_order(setting):
    return [order(key, setting[key]) if key in setting else () for key in KEYS if key not in FIGURE]


def set_titles(panels):
    """Titles of a figure's panels: task, clients, shards, and the rest where two panels would be called the same."""
    keys = ["task", "clients", "participation", "shards"]
    for key in ("rounds", "local_epochs", "examples", "learning_rate"):
        alike = {}
        for panel in panels:
            alike.setdefault(describe(STUDY, panel.setting, keys), set()).add(panel.setting.get(key))
        if any(len(values) > 1 for values in alike.values()):
            keys.append(key)
    for panel in panels:
        panel.title = describe(STUDY, panel.setting, keys)


# ---- the table


def columns(curves, args):
    field = headline(curves[0].runs[0].setting)
    # a headline is before the others of its task in METRICS
    there = [name for name in METRICS if any(np.isfinite(curve.results(name)).any() for curve in curves)]
    return (
        *(result(METRICS[name], name, 100, 2) for name in there),
        result("best", f"best_{field}", 100, 2),
        Column(f"vs {args.against}", lambda c, all_: difference(c, base_of(all_, args.against), field, 100)),
        result("val loss", "val_loss", 1, 4),
        Column(f"val loss vs {args.against}", losses_against(args.against)),
        small("error %", ERROR),
        small("discarded %", "discarded_energy"),
        Column("MB up", lambda curve, _: sent(curve, "bytes_up")),
        Column("MB down", lambda curve, _: sent(curve, "bytes_down")),
        ROUNDS,
        MINUTES,
        SEEDS,
    )


def base_of(curves, kind):
    """The first row of `kind`; None without one."""
    return next((curve for curve in curves if curve.kind == kind), None)


def losses_against(kind):
    """A cell: the paired difference in validation loss to the row of `kind`."""
    return lambda curve, curves: paired_cell(curve, base_of(curves, kind), "val_loss", 1, 4)


def small(head, name):
    """A Column of a mean over rounds in percent; `<0.01` for what rounds to nothing, such as an exact rule's error."""

    def cell(curve, _):
        values = 100 * curve.mean_over_rounds(name)
        rounds_off = np.isfinite(values).all() and 0 < values.max(initial=0.0) < 0.01
        return "<0.01" if rounds_off else spread(values, 2)

    return Column(head, cell)


def tables(runs, notes, args):
    """The tables, those of central runs whose data no federated run has last."""
    if args.replay:
        return glue_replay.tables(runs, notes)
    figures = figures_of(runs, notes)
    for setting, members in like_with_like(runs, SERVED):
        if all(run.central for run in members):
            panel = Panel(setting, [], central_curves(members, notes), describe(STUDY, setting, ("task",)))
            figures.append((setting, [panel]))
    parts = []
    for setting, panels in figures:
        if args.wide:
            about = "validation metric of the last round, mean ± standard deviation over seeds"
            parts += [f"### {describe(STUDY, setting, FIGURE)}; {about}", layout(wide(panels))]
            continue
        for panel in panels:
            about = describe(STUDY, panel.setting, ("task", *FIGURE, *FEDERATION, "learning_rate", "examples"))
            parts += one_table(TABLE, about, [*panel.references, *panel.curves], args)
    return parts


def wide(panels):
    """Rows of cells, the head first: a row per panel, a column per rule."""
    rows_of = [{curve.label: curve for curve in (*panel.references, *panel.curves)} for panel in panels]
    kinds = {name: kind_order(curve) for curves in rows_of for name, curve in curves.items()}
    labels = sorted(kinds, key=kinds.get)
    rows = [["setting", "metric", *labels, "seeds"]]
    for panel, curves in zip(panels, rows_of, strict=True):
        field = headline(panel.setting)
        cells = [spread(100 * curves[name].results(field), 1) if name in curves else "-" for name in labels]
        rows.append([panel.title, METRICS[field], *cells, seeds_range(curves.values())])
    return rows


def add_table_flags(parser):
    add_tasks(parser)
    rules = [kind for kind in STUDY.kinds if kind not in STUDY.central]
    parser.add_argument("--replay", action="store_true", help="what the averaging error cost in runs with --replay")
    parser.add_argument("--wide", action="store_true", help="headline metrics only, a row per task and federation")
    parser.add_argument("--against", choices=["central", *rules], default="central", help="of the differences")


TABLE = Table(
    study=STUDY,
    words="""One table per task and federation. Metrics are those of the last round on the validation examples, times
100; `best` is the headline metric's best round, chosen on those same examples. `vs central` is in points, `val loss vs
central` in nats with the 95 % interval of a paired t test and the number of seeds; --against takes another row. Rules
whose rate was chosen on held-out examples are compared each at its own. `error %` (plots/glue.py) and `discarded %`,
the share of the energy that svd cut off, are means over the rounds. --wide prints one table of headline metrics, a row
per task and federation, --replay that of plots/glue_replay.py.
""",
    columns=columns,
    free=SERVED,
    first="rule",
    flags=add_table_flags,
    select=lambda runs, args: of_tasks(runs, args.tasks),
    text=tables,
)
