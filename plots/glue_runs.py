"""Runs of lora_glue_fl as tables and figures see them, and its table.

    python plots/tables.py lora_glue_fl --data-dir out_fedavg --against svd

One table per task and federation. Metrics are those of the last round on the validation examples, times 100; `best` is
the headline metric's best round, chosen on those same examples. `vs central` is in points; --against takes another row.
`error %` (plots/glue.py) and `discarded %`, the share of the energy that svd cut off, are means over the rounds. --wide
prints one table of headline metrics, a row per task and federation.
"""

import numpy as np

from common.cli import UsageError
from plots.runs import Study, base_name, describe, like_with_like, order_of, text
from plots.seeds import curves_of, kind_order
from plots.style import Panel, seeds_range
from plots.tables import MINUTES, ROUNDS, SEEDS, Column, Table, difference, layout, one_table, result, sent, spread

TASKS = {"rte": "RTE", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B", "sst2": "SST-2", "qnli": "QNLI", "qqp": "QQP"}
TASKS |= {"mnli": "MNLI", "wnli": "WNLI"}
HEADLINES = {"cola": "matthews", "stsb": "pearson"}  # accuracy of the others
METRICS = {
    "accuracy": "Accuracy (%)",
    "mismatched_accuracy": "Accuracy, mismatched (%)",
    "f1": "F1 (%)",
    "matthews": "Matthews correlation (x 100)",
    "pearson": "Pearson correlation (x 100)",
    "spearman": "Spearman correlation (x 100)",
}
FIGURE = ("dataset", "model", "rank", "lora_alpha")  # what the panels of one figure have in common
SERVED = ("svd_rank", "served_scale")  # of svd, where they are not the clients'
KEYS = (*FIGURE, "task", "clients", "shards", "rounds", "local_epochs", "examples", "data", "learning_rate", *SERVED)


def kind_of(command, args):
    if command != "fedavg_rounds":
        return "full" if command == "baseline_run" else "central"
    return "naive" if args.get("skip_svd") else str(args.get("aggregate") or "svd")


def setting_of(run):
    args, facts = run.args, run.facts
    model = args.get("model") or facts.get("model") or f"roberta-{args.get('model_size')}"
    ranks, examples = facts.get("ranks") or args.get("client_ranks") or [], facts.get("examples")
    mixed = len(set(ranks)) > 1
    values = {
        "dataset": facts.get("dataset") or args.get("dataset"),
        "model": base_name(str(model), inner=("final", "model")),
        "task": str(facts.get("task") or args.get("task_name")).lower(),
        "rank": " ".join(map(str, args.get("client_ranks") or ranks)) if mixed else args.get("lora_r"),
        "lora_alpha": whole(args.get("lora_alpha")),
        "examples": sum(examples) if isinstance(examples, list) else examples,
    }
    if isinstance(facts.get("sha256"), dict):
        values["data"] = text({split: str(value)[:8] for split, value in facts["sha256"].items()})
    if not run.central:
        values |= {"clients": facts.get("clients"), "shards": shards_name(facts)}
        values |= {key: whole(args.get(key)) for key in ("rounds", "local_epochs", "learning_rate")}
    if run.kind == "svd":
        rank = args.get("svd_rank")
        alpha = args.get("alpha") or rank
        values["svd_rank"] = rank if rank != args.get("lora_r") else ""
        values["served_scale"] = alpha / rank if rank and alpha != rank else ""
    return values


def whole(value):
    """8 for 8.0: flags that take fractions hold a float, whatever was written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shards_name(facts):
    """`IID`, `Dirichlet 0.5`, `overlap 0.2`, `category genre`: how a run's examples were dealt to its clients."""
    mode = str(facts.get("mode"))
    if mode == "iid":
        return "IID"
    more = [facts.get("dirichlet_alpha") if mode == "dirichlet" else None]
    more += [facts.get("category_key") if "category" in mode else None]
    more += [facts.get("overlap_ratio") if "overlap" in mode else None]
    name = "Dirichlet" if mode == "dirichlet" else mode.replace("_", " ")
    return " ".join([name, *(str(value) for value in more if value is not None)])


def order(key, value):
    """From what is off on; IID, Dirichlet with alpha downwards, the others by name."""
    if value == "" or (key, value) == ("server_optimizer", "none"):
        return -1, 0, 0, ""
    if key == "shards":
        kind, _, alpha = str(value).partition(" ")
        if kind == "Dirichlet":
            return 1, -float(alpha) if alpha.replace(".", "", 1).isdigit() else 0.0, 0, ""
        return (0, 0.0, 0, "") if kind == "IID" else (2, 0.0, 0, str(value))
    return order_of(value)


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
    },
    kind_of=kind_of,
    setting_of=setting_of,
    keys=KEYS,
    # learning_rate, of the setting of a federation only, tells central runs apart
    said=frozenset(KEYS) - {"learning_rate"}
    | frozenset(
        "eval_each_round eval_clients do_train do_eval model_size task_name aggregate skip_svd lora_r client_ranks"
        " shard max_examples alpha".split()
    ),
    unread=(
        (lambda a: a["kind"] != "svd", {"svd_split"}),
        (
            lambda a: a["kind"] in ("central", "full"),
            {"server_optimizer", "server_lr", "server_beta", "mu", "client_weights", "init_adapter"},
        ),
        (lambda a: a["kind"] == "full", {"lora_dropout", "target_modules"}),
        (lambda a: a.get("server_optimizer") in (None, "none"), {"server_lr"}),
        (lambda a: a.get("server_optimizer") != "momentum", {"server_beta"}),
    ),
    paths=("init_adapter", "tokenizer"),
    words={
        "dataset": "{}",
        "model": "{}",
        "task": lambda value, _: TASKS.get(value, value),
        "data": None,
        "rank": "r {}",
        "lora_alpha": "alpha {:g}",
        "clients": "{} clients",
        "shards": lambda value, _: value,
        "rounds": "{} rounds",
        "local_epochs": "{:g} local epochs",
        "examples": "{:,} training examples",
        "svd_rank": "served at rank {}",
        "served_scale": "served alpha/r {:g}",
        "svd_split": "{} split",
        "server_optimizer": lambda value, _: None if value == "none" else f"server {value}",
        "mu": lambda value, _: f"FedProx {value:g}" if value else None,
        "learning_rate": "lr {:g}",
        "batch_size": "batch {}",
        "num_train_epochs": "{:g} epochs",
        "init_adapter": "from {}",
    },
    order=order,
    central=frozenset({"central", "full"}),
)
RULES = tuple(STUDY.kinds)[2:]


def of_tasks(runs, tasks):
    """The runs of these tasks (of all for None). Raises UsageError where there are none of them."""
    chosen = [run for run in runs if not tasks or run.setting["task"] in tasks]
    if runs and not chosen:
        there = ", ".join(sorted({run.setting["task"] for run in runs}, key=task_order))
        raise UsageError(f"no run of --tasks {' '.join(tasks)}: there are {there}")
    return chosen


def task_order(task):
    return (list(TASKS).index(task) if task in TASKS else len(TASKS)), task


def headline(setting):
    """The field of metrics.jsonl that figures show of a task: `val_matthews`."""
    return f"val_{HEADLINES.get(setting['task'], 'accuracy')}"


def metric_label(field):
    """`Matthews correlation (x 100)` of `val_matthews`."""
    name = field.removeprefix("val_")
    return METRICS.get(name, f"{name.replace('_', ' ')} (x 100)")


# ---- panels


def figures_of(runs, notes, axis=()):
    """The runs as figures, the one with most panels first: list[(what its panels have in common, list[Panel])].

    axis: settings that lie on the panels' axis.
    """
    figures = {}
    for setting, members in like_with_like(runs, (*SERVED, *axis)):
        federated = [run for run in members if not run.central]
        if federated:
            curves = curves_of(federated, (*SERVED, *axis), axis, notes)
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
    rest = [order(key, setting[key]) if key in setting else () for key in KEYS if key not in (*FIGURE, "task")]
    return task_order(setting["task"]), rest


def set_titles(panels):
    """Titles of a figure's panels: task, clients, shards, and the rest where two panels would be called the same."""
    keys = ["task", "clients", "shards"]
    for key in ("rounds", "local_epochs", "examples", "learning_rate"):
        names = [describe(STUDY, panel.setting, keys) for panel in panels]
        same = [[p for p, other in zip(panels, names, strict=True) if other == name] for name in set(names)]
        if any(len({text(panel.setting.get(key)) for panel in group}) > 1 for group in same):
            keys.append(key)
    for panel in panels:
        panel.title = describe(STUDY, panel.setting, keys)


# ---- the table


def columns(curves, args):
    field = headline(curves[0].runs[0].setting)
    base = next((curve for curve in curves if curve.kind == args.against), None)
    # a headline is before the others of its task in METRICS
    fields = [f"val_{name}" for name in METRICS]
    there = [name for name in fields if any(np.isfinite(curve.results(name)).any() for curve in curves)]
    return (
        *(result(metric_label(name), name, 100, 2) for name in there),
        result("best", f"best_{field}", 100, 2),
        Column(f"vs {args.against}", lambda curve, _: difference(curve, base, field, 100)),
        small("error %", "aggregation_error"),
        small("discarded %", "discarded_energy"),
        Column("MB up", lambda curve, _: sent(curve, "bytes_up")),
        Column("MB down", lambda curve, _: sent(curve, "bytes_down")),
        ROUNDS,
        MINUTES,
        SEEDS,
    )


def small(head, name):
    """A Column of a mean over rounds in percent; `<0.01` for what rounds to nothing, such as an exact rule's error."""

    def cell(curve, _):
        values = 100 * curve.mean_over_rounds(name)
        rounds_off = np.isfinite(values).all() and 0 < values.max(initial=0.0) < 0.01
        return "<0.01" if rounds_off else spread(values, 2)

    return Column(head, cell)


def tables(runs, notes, args):
    """The tables, those of central runs whose data no federated run has last."""
    alone = [group for group in like_with_like(runs, SERVED) if all(run.central for run in group[1])]
    figures = figures_of(runs, notes)
    for setting, members in alone:
        panel = Panel(setting, [], central_curves(members, notes), describe(STUDY, setting, ("task",)))
        figures.append(({key: setting[key] for key in FIGURE if key in setting}, [panel]))
    parts = []
    for setting, panels in figures:
        if args.wide:
            about = "validation metric of the last round, mean ± standard deviation over seeds"
            parts += [f"### {describe(STUDY, setting, FIGURE)}; {about}", layout(wide(panels))]
            continue
        for panel in panels:
            keys = ("task", *FIGURE, "clients", "shards", "rounds", "local_epochs", "learning_rate", "examples")
            curves = [*panel.references, *panel.curves]
            parts += one_table(TABLE, describe(STUDY, panel.setting, keys), curves, args)
    return parts


def wide(panels):
    """Rows of cells, the head first: a row per panel, a column per rule."""
    kinds = {curve.label: kind_order(curve) for panel in panels for curve in (*panel.references, *panel.curves)}
    labels = sorted(kinds, key=kinds.get)
    rows = [["setting", "metric", *labels, "seeds"]]
    for panel in panels:
        there, field = {curve.label: curve for curve in (*panel.references, *panel.curves)}, headline(panel.setting)
        cells = [spread(100 * there[name].results(field), 1) if name in there else "-" for name in labels]
        rows.append([panel.title, metric_label(field), *cells, seeds_range(there.values())])
    return rows


def add_tasks(parser):
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="only these (default: all)")


def add_table_flags(parser):
    add_tasks(parser)
    parser.add_argument("--wide", action="store_true", help="headline metrics only, a row per task and federation")
    parser.add_argument("--against", choices=["central", *RULES], default="central", help="of the differences")


TABLE = Table(
    study=STUDY,
    words=__doc__.split("\n\n", 2)[2],
    columns=columns,
    free=SERVED,
    first="rule",
    flags=add_table_flags,
    select=lambda runs, args: of_tasks(runs, args.tasks),
    text=tables,
)
