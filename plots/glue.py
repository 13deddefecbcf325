"""Figures and table of lora_glue_fl.

    python plots/glue.py --data-dir out_fedavg --out-dir results/plots          # all that the runs allow
    python plots/glue.py metric error --data-dir lora_glue_fl/results/small.jsonl --tasks rte
    python plots/tables.py lora_glue_fl --data-dir out_fedavg --against svd

    metric     metric.png: each task's headline metric on its validation examples against rounds, from before training
               on (round 0, where it is logged); lines at the share of the most frequent label, where the metric is
               accuracy and run.json says it, and at the last metric of runs that train the head only
    error      aggregation error of what is served against rounds (error_rounds.png), clients (error_clients.png), rank
               (error_rank.png), the latter two means over a run's rounds:

                   ||served - mean(BA)|| / ||mean(BA)||, mean(BA) = sum_k p_k s_k B_k A_k, in percent, over all layers

               Rules whose error stays below 0.1 % everywhere (what rounding leaves) share one line; a panel of them
               alone is not drawn.
    bytes      the metric against what has been sent, all clients and rounds so far, in 10^6 bytes: by the clients
               (bytes_up.png); both ways (bytes_both.png): stack and residual send the base model's update down
    clients    clients.png, after the last round: every client of every seed as a dot, their mean as a bar, the global
               model as a marker; clients_rounds.png: the global model minus the mean of its clients, in points
    replay     loss against the error of runs with --replay (plots/glue_replay.py)

A panel per task and federation (clients and how the examples were dealt to them), a line per aggregation rule: the mean
over seeds, its band or bar one standard deviation each way; central training is a horizontal line at its last metric.
Correlations are shown times 100. Figures of one model and adapter size: a further group has a figure of its own.
"""

from dataclasses import replace
from itertools import cycle

import numpy as np

from common.cli import UsageError, run_main
from common.curves import GREY, number, plain_ticks
from plots import glue_replay
from plots.runs import LeftOut, Study, base_name, describe, like_with_like, order_of, shared_setting, text
from plots.seeds import curves_of, kind_order, label, lines_of
from plots.style import (
    Figure,
    Panel,
    all_curves,
    axes_of,
    bars,
    draw_along,
    draw_figures,
    draw_rounds,
    figure_parser,
    finish,
    looks_of,
    name_places,
    reference_lines,
    seeds_range,
    sideways,
)
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
FIGURE = ("dataset", "model", "rank", "lora_alpha")  # what the panels of one figure have in common
FEDERATION = ("clients", "shards", "rounds", "local_epochs")
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
        "rank": " ".join(map(str, args.get("client_ranks") or ranks)) if mixed else args.get("lora_r"),
        "lora_alpha": int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha,
        "examples": sum(examples) if isinstance(examples, list) else examples,
    }
    if isinstance(facts.get("sha256"), dict):
        values["data"] = text({split: str(value)[:8] for split, value in facts["sha256"].items()})
    if not run.central:
        values |= {"clients": facts.get("clients"), "shards": shards_name(facts)}
        values |= {key: args.get(key) for key in ("rounds", "local_epochs")}
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
    off={"server_lr": (), "participation": (), "pooling": ()},
    words={
        "dataset": "{}",
        "model": "{}",
        "task": lambda value, _: TASKS.get(value, value),
        "data": None,
        "rank": "r {}",
        "lora_alpha": "alpha {:g}",
        "clients": "{} clients",
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
        "pooling": "{} pooling",
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
    keys = ["task", "clients", "shards"]
    for key in ("rounds", "local_epochs", "examples", "learning_rate"):
        alike = {}
        for panel in panels:
            alike.setdefault(describe(STUDY, panel.setting, keys), set()).add(panel.setting.get(key))
        if any(len(values) > 1 for values in alike.values()):
            keys.append(key)
    for panel in panels:
        panel.title = describe(STUDY, panel.setting, keys)


def having(field=None, lines=1, over_rounds=False, axis=(), control=False):
    """A select of the runs with a field in so many lines of metrics.jsonl (None: of all) and of the central ones.

    over_rounds: of panels in which a curve has the headline metric after two rounds or more; axis: settings on the
    panels' axis, of the rules at two places of it or more; control: runs that train the head only are references.
    """

    def rounds(panel):
        evaluated = [curve.evaluated(headline(panel.setting)) for curve in panel.curves]
        return max(np.isfinite(values.mean(axis=0)[at > 0]).sum() for at, values in evaluated)

    def select(runs, notes):
        there = [run for run in runs if run.central or not field or sum(field in row for row in run.rows) >= lines]
        figures = figures_of(there, notes, axis)
        for panel in (panel for _, panels in figures for panel in panels if axis):
            panel.curves = [curve for line in lines_of(panel.curves) if len(line) > 1 for curve in line]
            label(panel.curves)
        if control:
            figures = [(setting, list(map(with_control, panels))) for setting, panels in figures]
        if field == ERROR:
            figures = [(setting, inexact(setting, panels, notes)) for setting, panels in figures]
        figures = [(s, [p for p in panels if (rounds(p) > 1 if over_rounds else p.curves)]) for s, panels in figures]
        return [(setting, panels) for setting, panels in figures if panels]

    return select


def panelled(title, draw_panel, spread="bands", height=2.9, note=lambda panels: "", **more):
    """A draw with draw_panel(axis, panel, looks, panels, **more) for each panel; note: a line of the caption."""

    def draw(setting, panels, args):
        figure, axes = axes_of(panels, height, 1.6, [(p.setting["task"], p.title.partition(", ")[2]) for p in panels])
        looks = looks_of(all_curves(panels))
        for axis, panel in zip(axes, panels, strict=True):
            draw_panel(axis, panel, looks, panels, **more)
        about, keys = shared_setting(setting, all_curves(panels)), (*setting, "rounds", "local_epochs", "learning_rate")
        return finish(figure, axes, title, about, keys, panels, spread, [note(panels)])

    return draw


# ---- metric against rounds and bytes


def with_control(panel):
    """The panel with its runs that train the head only among its references, where other rules are in it."""
    rules, heads = ([curve for curve in panel.curves if (curve.kind == "head") == head] for head in (False, True))
    return replace(panel, curves=rules, references=[*panel.references, *heads]) if rules else panel


def last_lines(axis, panel):
    """A horizontal line at the last metric of each reference; that of all weights is black, the head's dashes short."""
    dashes = {
        "central": cycle([(8, 2), (8, 2, 2, 2), (8, 2, 2, 2, 2, 2)]),
        "full": cycle([(1, 3), (1, 1)]),
        "head": cycle([(3, 2), (3, 4)]),
    }
    looks = {}
    for curve in panel.references:
        color = "black" if curve.kind == "full" else GREY
        looks[curve.label] = {"color": color, "linestyle": (0, next(dashes[curve.kind]))}
    reference_lines(axis, panel.references, headline(panel.setting), 100, looks=looks)


def majority_line(axis, panel):
    """A thin line at the accuracy of the most frequent label, where a run of the panel says how frequent labels are."""
    facts = [run.facts.get("label_counts") or {} for curve in (*panel.references, *panel.curves) for run in curve.runs]
    counts = next((some[split] for some in facts for split in VALIDATION if split in some), None)
    if counts and headline(panel.setting) == "val_accuracy":
        share, task = 100 * max(counts) / sum(counts), panel.setting["task"]
        words = f"Majority label, {TASKS.get(task, task)} ({share:.1f} %)"
        axis.axhline(share, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1, label=words)


def draw_metric(axis, panel, looks, _, x="round", x_factor=1.0):
    last_lines(axis, panel)
    majority_line(axis, panel)
    draw_rounds(axis, panel.curves, looks, headline(panel.setting), 100, x, x_factor)
    axis.set_ylabel(METRICS[headline(panel.setting)])


def draw_bytes(axis, panel, looks, panels, field, x_label):
    """Against these bytes; logarithmic where two rules' totals differ by more than a factor of five."""
    draw_metric(axis, panel, looks, panels, field, 1e-6)
    totals = [total for curve in panel.curves for total in curve.results(field)]
    if max(totals) > 5 * min(totals) > 0:
        axis.autoscale(axis="x")
        axis.set_xscale("log")
        plain_ticks(axis.xaxis, *axis.get_xlim(), most=6)
    axis.set_xlabel(x_label)


# ---- the error of what is served


def exact_rules(panels):
    """{label: largest error} of the rules whose error is below EXACT in every panel, round and seed."""
    largest = {}
    for curve in all_curves(panels):
        # a value that is not finite is not exact
        errors = np.nan_to_num(curve.evaluated(ERROR)[1], nan=np.inf)
        largest[curve.label] = max(largest.get(curve.label, 0.0), errors.max(initial=0.0))
    return {name: error for name, error in largest.items() if error < EXACT}


def inexact(setting, panels, notes):
    """The panels with a rule that is not exact in it; a note names the others."""
    chosen = [panel for panel in panels if {curve.label for curve in panel.curves} - exact_rules([panel]).keys()]
    why = f"the error of its rules is below {100 * EXACT:g} %"
    notes += [LeftOut(panel.title, why, setting=setting) for panel in panels if panel not in chosen and panel.curves]
    return chosen


def exact_note(panels):
    exact = exact_rules(panels)
    return f"exact (error at most {100 * max(exact.values()):.1g} %): {', '.join(exact)}" if exact else ""


def zero_line(axis, panel, exact):
    """A line at 0 that stands for the exact rules; the axis begins a little below it."""
    if any(curve.label in exact for curve in panel.curves):
        axis.axhline(0, color=GREY, linewidth=2.2, label="Exact rules, see above", zorder=1)
    axis.autoscale_view()
    top = max(axis.get_ylim()[1], 100 * EXACT)
    axis.set_ylim(-0.04 * top, top)


def draw_error(axis, panel, looks, panels):
    exact = exact_rules(panels)
    draw_rounds(axis, [curve for curve in panel.curves if curve.label not in exact], looks, ERROR, 100)
    zero_line(axis, panel, exact)
    axis.set_ylabel("Aggregation error (%)")


def draw_error_along(axis, panel, _, panels, x_label):
    """The mean error of a run's rounds against a setting."""
    exact = exact_rules(panels)
    draw_along(
        axis,
        panel.curves,
        lambda curve: 100 * curve.mean_over_rounds(ERROR),
        lambda curve: place_name(curve.place, panels),
        lambda curve: [order(*item) for item in curve.place.items()],
        exact,
    )
    zero_line(axis, panel, exact)
    axis.set_xlabel(x_label)
    axis.set_ylabel("Aggregation error (%), mean of rounds")


def place_name(place, panels):
    """`4`, or `4 (alpha 8)` on two lines where alpha differs too."""
    first, *rest = place
    several = [key for key in rest if len({curve.place[key] for curve in all_curves(panels)}) > 1]
    more = describe(STUDY, place, several) if several else ""
    return f"{place[first]}\n({more})" if more else str(place[first])


# ---- the clients' own models


def draw_clients(axis, panel, looks, _):
    """At each place the clients of all seeds to the left, the global model to the right."""
    last_lines(axis, panel)
    field = headline(panel.setting)
    for i, curve in enumerate(panel.curves):
        lines = [[row for row in run.rows if GAIN in row][-1] for run in curve.runs]
        clients = 100 * np.array([number(value) for line in lines for value in line[f"client_{field}"]])
        x = i - 0.2 + 0.22 * sideways(len(clients))
        axis.plot(x, clients, ".", color=GREY, markersize=4, zorder=2, label="a client's own model")
        mean = {"color": "black", "linewidth": 1.6, "zorder": 3, "label": "mean of the clients"}
        axis.hlines(clients.mean(), i - 0.36, i - 0.04, **mean)
        look = looks[curve.label] | {"linestyle": "", "capsize": 3, "markersize": 7, "zorder": 4}
        served = 100 * np.array([number(line[field]) for line in lines])
        bars(axis, [i + 0.2], [served], always=False, label=f"{curve.label}, global", **look)
    # a star for a variant, whose marker the legend names
    name_places(axis, [c.name.partition(" (")[0] + "*" * (c.label != c.name) for c in panel.curves])
    axis.set_ylabel(METRICS[field])


def draw_gains(axis, panel, looks, _):
    axis.axhline(0, color=GREY, linewidth=1, zorder=1)
    draw_rounds(axis, panel.curves, looks, GAIN, 100)
    axis.set_ylabel(f"Global - clients (points)\n{METRICS[headline(panel.setting)].partition(' (')[0]}")


# ---- the table


def columns(curves, args):
    field = headline(curves[0].runs[0].setting)
    base = next((curve for curve in curves if curve.kind == args.against), None)
    # a headline is before the others of its task in METRICS
    there = [name for name in METRICS if any(np.isfinite(curve.results(name)).any() for curve in curves)]
    return (
        *(result(METRICS[name], name, 100, 2) for name in there),
        result("best", f"best_{field}", 100, 2),
        Column(f"vs {args.against}", lambda curve, _: difference(curve, base, field, 100)),
        result("val loss", "val_loss", 1, 4),
        Column(f"val loss vs {args.against}", lambda curve, _: paired_cell(curve, base, "val_loss", 1, 4)),
        small("error %", ERROR),
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


# ---- the figures

LOGGED = "runs of fedavg_rounds.py with"
EACH = f"{LOGGED} --eval-each-round"
SENT = f"{EACH}, with bytes_up and bytes_down in metrics.jsonl"
WITH_ERROR = f"{LOGGED} {ERROR} above {100 * EXACT:g} % in metrics.jsonl"
ERRORS, METRICS_SENT = "Error of what is served", "Validation metric against bytes sent, all clients"
BY_CLIENTS = panelled(ERRORS, draw_error_along, "bars", note=exact_note, x_label="Clients")
BY_RANK = panelled(ERRORS, draw_error_along, "bars", note=exact_note, x_label="Rank r of the adapters")
UP = panelled(METRICS_SENT, draw_bytes, field=SENT_UP, x_label="Sent by clients (MB)")
BOTH = panelled(METRICS_SENT, draw_bytes, field=SENT_BOTH, x_label="Sent up and down (MB)")
LAST = panelled("Clients' own models and the global one, last round", draw_clients, "bars", 3.0)
GAINS = panelled("Global model minus the mean of its clients", draw_gains)
NUMBERS, RANKS = having(ERROR, axis=("clients",)), having(ERROR, axis=("rank", "lora_alpha"))
FIGURES = {
    "metric": [
        Figure("metric", having(over_rounds=True, control=True), panelled("Validation metric", draw_metric), EACH)
    ],
    "error": [
        Figure("error_rounds", having(ERROR), panelled(ERRORS, draw_error, note=exact_note), WITH_ERROR),
        Figure("error_clients", NUMBERS, BY_CLIENTS, f"{WITH_ERROR} and two numbers of clients"),
        Figure("error_rank", RANKS, BY_RANK, f"{WITH_ERROR} and two values of --lora-r"),
    ],
    "bytes": [
        Figure("bytes_up", having(SENT_UP, over_rounds=True, control=True), UP, SENT),
        Figure("bytes_both", having(SENT_BOTH, over_rounds=True, control=True), BOTH, SENT),
    ],
    "clients": [
        Figure("clients", having(GAIN), LAST, f"{LOGGED} --eval-clients"),
        Figure("clients_rounds", having(GAIN, 2, over_rounds=True), GAINS, f"{EACH} and --eval-clients"),
    ],
    "replay": glue_replay.FIGURES,
}


def build_parser():
    return figure_parser(STUDY, FIGURES, add_tasks)


def main(args):
    study = replace(STUDY, prepared=lambda runs, notes: of_tasks(prepared(runs, notes), args.tasks))
    draw_figures(study, FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
