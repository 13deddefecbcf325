"""Tables and figures of lora_glue_fl.

python plots/tables.py lora_glue_fl --against naive --data-dir lora_glue_fl/results/trajectories.jsonl
python plots/tables.py lora_glue_fl --replay --data-dir lora_glue_fl/results/replay.jsonl
python plots/glue.py --data-dir out_fedavg --out-dir results/plots          # all that the runs allow

losses    losses.png: validation loss after the last round minus naive's, seed by seed: mean, 95 % interval of a
          paired t test, a dot a seed; a panel per federation
replay    replay_error.png, of runs with --replay: validation loss of what a rule serves minus that of the exact
          mean product, of the same clients, against the rule's aggregation error as a share of the exact mean's
          step; a panel per number of local epochs, a point per setting: mean over its seeds with 95 % interval.
          The grey band is what rounding does: the largest difference between two ways to serve the exact mean
"""

import json
import re
from collections import defaultdict

import numpy as np

from common.cli import UsageError, run_main
from common.curves import GREY, new_figure, number, set_title
from plots import style
from plots.pairs import difference, interval, paired, pairs_cell, spread
from plots.read import Study, order_of
from plots.rows import base_name, describe, groups, kind_order, rows_of, words_for
from plots.style import legend_below, look, looks_of, numbered, panel_axes, seeds_range
from plots.tables import Table, over_rounds, result, seeds, sent, whole

# ---- the study

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
MODEL = ("dataset", "model", "pooling", "rank", "lora_alpha")  # what the panels of one figure have in common
FEDERATION = ("clients", "participation", "shards", "rounds", "local_epochs")
SERVED = ("svd_rank", "served_scale")  # of svd, where they are not the clients'
KEYS = (*MODEL, "task", *FEDERATION, "examples", "data", "learning_rate", *SERVED)


def kind_of(command, flags):
    if command != "fedavg_rounds":
        return "full" if command == "baseline_run" else "central"
    return "naive" if flags.get("skip_svd") else str(flags.get("aggregate") or "svd")


def setting_of(run):
    facts, central = run["data"], run["kind"] in STUDY.central
    model = run.get("--model") or facts.get("model") or f"roberta-{run.get('--model_size')}"
    ranks, alpha = run.get("--client_ranks") or facts.get("ranks") or [], run.get("--lora_alpha")
    examples = facts.get("examples")
    values = {
        "dataset": facts.get("dataset") or run.get("--dataset"),
        "model": base_name(str(model), inner=("final", "model")),
        "task": str(facts.get("task") or run.get("--task_name")).lower(),
        "pooling": run.get("--pooling") or "cls",
        "rank": " ".join(map(str, ranks)) if len(set(ranks)) > 1 else run.get("--lora_r"),
        # a flag that takes fractions holds a float, whatever was written: 8 for 8.0
        "lora_alpha": int(alpha) if isinstance(alpha, float) and alpha.is_integer() else alpha,
        "examples": sum(examples) if isinstance(examples, list) else examples,
    }
    if isinstance(facts.get("sha256"), dict):
        values["data"] = json.dumps({split: str(value)[:8] for split, value in sorted(facts["sha256"].items())})
    if not central:
        values |= {"clients": facts.get("clients"), "shards": shards_name(facts)}
        values |= {key: run.get(f"--{key}") for key in ("rounds", "local_epochs")}
        values["participation"] = "" if run.get("--participation") in (None, 1) else run["--participation"]
        if not facts.get("held_out"):  # on which each rule's own rate was chosen
            values["learning_rate"] = run.get("--learning_rate")
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


def headline(row):
    """The metric that a task is judged by: `val_matthews`."""
    return {"cola": "val_matthews", "stsb": "val_pearson"}.get(row.first["setting"]["task"], "val_accuracy")


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
    kind=kind_of,
    setting=setting_of,
    keys=KEYS,
    # learning_rate, of the setting of a federation only, tells central runs apart
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
        "svd_split": "{} split",
        "mu": lambda value: f"FedProx {value:g}" if value else None,
        "learning_rate": "lr {:g}",
        "batch_size": "batch {}",
        "num_train_epochs": "{:g} epochs",
        "init_adapter": "from {}",
    },
    order=order,
    central=frozenset({"central", "full"}),
)


# ---- the tables


def federations(runs, notes):
    """[(setting, central rows, federated rows)], the model with most federations first; central runs alone last."""
    found, alone = [], []
    for setting, members in groups(runs, STUDY, SERVED):
        central = members["kind"].isin(STUDY.central)
        federated = rows_of(members[~central], STUDY, SERVED, notes=notes)
        kinds = [members[members["kind"] == kind] for kind in STUDY.kinds if kind in STUDY.central]
        references = [row for some in kinds for row in rows_of(some, STUDY, notes=notes)]
        (found if federated else alone).append((setting, references, federated))
    models = [model_of(setting) for setting, *_ in found]
    found.sort(key=lambda one: (-models.count(model_of(one[0])), model_of(one[0]), panel_order(one[0])))
    return found + alone


def model_of(setting):
    return json.dumps({key: setting[key] for key in MODEL if key in setting}, sort_keys=True)


def panel_order(setting):
    return [order(key, setting[key]) if key in setting else () for key in KEYS if key not in MODEL]


def titles_of(settings):
    """What tells federations of one model apart: task, clients, shards, the rest where two would be called alike."""
    keys = ["task", "clients", "participation", "shards"]
    for key in ("rounds", "local_epochs", "examples", "learning_rate"):
        alike = defaultdict(set)
        for setting in settings:
            alike[describe(STUDY, setting, keys)].add(setting.get(key))
        keys += [key] if any(len(values) > 1 for values in alike.values()) else []
    return [describe(STUDY, setting, keys) for setting in settings]


def groups_of(runs, args, notes):
    """A table a task and federation; none for --wide and --replay, which have their own."""
    keys = ("task", *MODEL, *FEDERATION, "learning_rate", "examples")
    return [
        (describe(STUDY, setting, keys if federated else ("task",)), [*references, *federated])
        for setting, references, federated in federations(runs, notes)
    ]


def columns(rows, args):
    field, against = headline(rows[0]), args.against
    # a headline is before the others of its task in METRICS
    there = [name for name in METRICS if any(np.isfinite(row.results(name)).any() for row in rows)]

    def against_base(cell):
        """A column of `cell(row, base)`, "-" for the base itself."""

        def text(row, all_rows):
            base = base_of(all_rows, against)
            return "-" if base in (None, row) else cell(row, base)

        return text

    def loss(row, base):
        return pairs_cell(paired(row.results("val_loss"), base.results("val_loss")), 4)

    def metric(row, base):
        return difference(100 * row.results(field), 100 * base.results(field))

    return {
        **{METRICS[name]: result(name, 100, 2) for name in there},
        "best": result(f"best_{field}", 100, 2),
        f"vs {against}": against_base(metric),
        "val loss": result("val_loss", 1, 4),
        f"val loss vs {against}": against_base(loss),
        "error %": small("aggregation_error"),
        "discarded %": small("discarded_energy"),
        "MB up": sent("bytes_up"),
        "MB down": sent("bytes_down"),
        "rounds": whole("rounds"),
        "minutes": result("seconds", 1 / 60, 1),
        "seeds": seeds,
    }


def base_of(rows, kind):
    """The first row of `kind`; None without one."""
    return next((row for row in rows if row.kind == kind), None)


def small(name):
    """A cell of a mean over rounds in percent; `<0.01` for what rounds to nothing, such as an exact rule's error."""
    cell = over_rounds(name, 100, 2)

    def text(row, rows):
        values = 100 * row.mean_over_rounds(name)
        rounds_off = len(values) and np.isfinite(values).all() and 0 < values.max() < 0.01
        return "<0.01" if rounds_off else cell(row, rows)

    return text


def wide(runs, notes):
    """The tables of --wide: a row a task and federation, a column a rule."""
    by_model = defaultdict(list)
    for setting, references, federated in federations(runs, notes):
        by_model[model_of(setting) if federated else ""].append((setting, [*references, *federated]))
    for every in by_model.values():
        labels = {row.label: kind_order(row) for _, rows in every for row in rows}
        cells = [["setting", "metric", *sorted(labels, key=labels.get), "seeds"]]
        for (_, rows), title in zip(every, titles_of([setting for setting, _ in every]), strict=True):
            field, named = headline(rows[0]), {row.label: row for row in rows}
            values = [spread(100 * named[n].results(field), 1) if n in named else "-" for n in cells[0][2:-1]]
            cells.append([title, METRICS[field], *values, seeds_range(rows)])
        about = "validation metric of the last round, mean ± standard deviation over seeds"
        yield f"{describe(STUDY, every[0][0], MODEL)}; {about}", "", cells


def special(runs, args, notes):
    """The tables of --wide and --replay, None without these flags."""
    return list(wide(runs, notes)) if args.wide else replay_tables(runs) if args.replay else None


def of_tasks(runs, args):
    """The runs of --tasks (of all without). Raises UsageError where there are none of them."""
    tasks = [setting_of(run)["task"] for _, run in runs.iterrows()]
    if args.tasks and not set(args.tasks) & set(tasks):
        raise UsageError(f"no run of --tasks {' '.join(args.tasks)}: there are {', '.join(sorted(set(tasks)))}")
    return runs[[not args.tasks or task in args.tasks for task in tasks]]


def add_flags(parser):
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="TASK", help="only these (default: all)")
    rules = [kind for kind in STUDY.kinds if kind not in STUDY.central]
    parser.add_argument("--replay", action="store_true", help="what the averaging error cost in runs with --replay")
    parser.add_argument("--wide", action="store_true", help="headline metrics only, a row per task and federation")
    parser.add_argument("--against", choices=["central", *rules], default="central", help="of the differences")


WORDS = """One table per task and federation. Metrics are those of the last round on the validation examples, times 100;
`best` is the headline metric's best round, chosen on those same examples. `vs central` is in points, `val loss vs
central` in nats with the 95 % interval of a paired t test and the number of seeds; --against takes another row. Rules
whose rate was chosen on held-out examples are compared each at its own. `error %`: ||served - mean(BA)|| over
||mean(BA)||, and `discarded %`, the share of the energy that svd cut off, are means over the rounds. --wide prints
headline metrics, a row per task and federation, --replay what the averaging error cost the same clients, trained once.
"""
TABLE = Table(STUDY, columns, WORDS, flags=add_flags, select=of_tasks, groups=groups_of, special=special, first="rule")


# ---- --replay: what every rule would serve of the same clients

VARIED = ("clients", "shards", "local_epochs", "rank", "lora_alpha", "svd_rank", "served_scale", "learning_rate")
VARIED += ("rounds", "examples")
RULES = {"naive": ("Naive", look(0)), "svd": ("SVD", look(1)), "rotate": ("Rotate", look(2))}  # label and look
PAIRS = {  # column of the table -> rules whose losses' difference it is
    "naive - start": ("naive", "start"),
    "naive - exact": ("naive", "exact"),
    "svd - exact": ("svd", "exact"),
    "noise - exact": ("noise", "exact"),
    "naive - exact as far": ("naive", "exact_as_far"),
    "naive - exact, half a step": ("naive_half", "exact_half"),
}
SPLITS = {
    "train_loss": "clients' training examples",
    "val_loss": "validation examples",
    "val_loss_refit": "validation examples, refit",
}


def replays(runs):
    """[(setting, {cell: its seeds' `replay`})] of groups of runs; cell: what sets it apart, ((key, value), ...)."""
    found = []
    there = runs[[any(row.get("replay") for row in rows) for rows in runs["curve"]]]
    for setting, members in groups(there, STUDY, VARIED) if len(there) else ():
        cells = defaultdict(dict)
        for _, run in members.sort_values("written", kind="stable").iterrows():
            place = {key: run["setting"].get(key, "") for key in VARIED} | {"rule": run["kind"], **run["variant"]}
            for row in run["curve"]:
                if row.get("replay"):
                    cells[tuple((place | {"round": row["round"]}).items())][run["seed"]] = row["replay"]
        keys = {cell: [order(key, value) for key, value in cell if key in VARIED] for cell in cells}
        found.append((setting, {cell: list(cells[cell].values()) for cell in sorted(cells, key=keys.get)}))
    return found


def losses(every, name, split, base="exact"):
    """[S] loss of a rule minus that of `base`, seed by seed; nan for what is not finite or not there."""
    return np.subtract(*np.array([[number(one.get(rule, {}).get(split)) for rule in (name, base)] for one in every]).T)


def errors(every, name):
    """[S] aggregation error of a rule, in percent of the exact mean's step: start's is 100 %."""
    values = [[number(one.get(rule, {}).get("error")) for rule in (name, "start")] for one in every]
    return 100 * np.divide(*np.array(values).T)


def cell_names(found):
    """{cell: what sets it apart from the others, but for local epochs}; what follows from the rank is not said."""
    every = [dict(cell) for cell in found]
    keys = dict.fromkeys(
        key for cell in every for key in cell if key not in ("local_epochs", "lora_alpha", "init_adapter")
    )
    keys = [key for key in keys if len({str(cell.get(key)) for cell in every}) > 1]
    words = {cell: [w for key in keys for w in words_for(STUDY, key, dict(cell).get(key))] for cell in found}
    return {cell: ", ".join(some) or "mean over seeds" for cell, some in words.items()}


def replay_tables(runs):
    """A table for each group of runs that may be compared: a row a setting and split, differences seed by seed."""
    tables = []
    for setting, found in replays(runs):
        names, rows = cell_names(found), [["setting", "loss over", "exact", "error % (naive)", *PAIRS]]
        for cell, every in found.items():
            epochs = "".join(words_for(STUDY, "local_epochs", dict(cell)["local_epochs"]))
            for split, words in SPLITS.items():
                exact = np.array([number(one.get("exact", {}).get(split)) for one in every])
                if np.isfinite(exact).any():  # of regression there is no refit
                    about = [f"{names[cell]}, {epochs}", words, spread(exact, 3), spread(errors(every, "naive"), 1)]
                    rows.append([*about, *(pairs_cell(losses(every, a, split, b), 4) for a, b in PAIRS.values())])
        about = "losses in nats; differences: mean over seeds [95 % interval of a paired t test], seeds"
        tables.append((f"{describe(STUDY, setting)}; {about}", "", rows))
    if not tables:
        raise UsageError("--replay: there are no runs of fedavg_rounds.py with --replay")
    return tables


# ---- figures


def half(values):
    """Half of the interval of values [S]; 0 for one seed."""
    return float(np.subtract(*interval(values)) / -2) if len(values) > 1 else 0.0


def replay_error(runs, args, notes):
    drawn, split = [], "val_loss"
    for setting, found in replays(runs):
        columns = defaultdict(list)
        for cell, every in found.items():
            columns[dict(cell)["local_epochs"]].append(every)
        figure, axes = new_figure(1, len(columns), width=2.8 * len(columns) + 0.6, height=3.5)
        for axis, epochs in zip(axes[0], sorted(columns), strict=True):
            axis.axhline(0, color=GREY, linewidth=1, zorder=1)
            rounding = np.concatenate([np.abs(losses(every, "residual_1", split)) for every in columns[epochs]])
            noise, means = np.nanmax(rounding, initial=0.0), [0.0]
            axis.axhspan(-noise, noise, color=GREY, alpha=0.3, linewidth=0, zorder=0, label="rounding")
            for name, (label, own) in RULES.items():
                points = [(errors(every, name), losses(every, name, split)) for every in columns[epochs]]
                points = [(x.mean(), y) for x, y in points if np.isfinite([*x, *y]).all()]
                if points:
                    x, y = [x for x, _ in points], [y.mean() for _, y in points]
                    bars = {"linestyle": "", "markersize": 5.5, "elinewidth": 0.8}
                    axis.errorbar(x, y, [half(y) for _, y in points], label=label, **own | bars)
                    means += y
            room = 0.3 * np.ptp(means) or 1.0
            axis.set_ylim(min(means) - room, max(means) + room)  # intervals of few seeds would hide the means
            axis.set_xlim(left=0)
            axis.set_title("".join(words_for(STUDY, "local_epochs", epochs)), fontsize=9.5)
            axis.set_xlabel("Averaging error (% of the step)")
        axes[0, 0].set_ylabel("Validation examples\nLoss - exact mean's (nats)", fontsize=9)
        legend_below(figure, axes[0])
        set_title(figure, f"What the averaging error costs: mean and 95 % interval\n{describe(STUDY, setting)}")
        drawn.append(figure)
    yield from numbered("replay_error", drawn)


def apart_of_naive(rows):
    """{rule's row: [S] validation loss minus naive's} of the last round, where two seeds or more have both."""
    naive = base_of(rows, "naive")
    if naive is None:
        return {}
    every = {row: paired(row.results("val_loss"), naive.results("val_loss")) for row in rows if row is not naive}
    return {row: apart for row, apart in every.items() if len(apart) > 1 and np.isfinite(apart).all()}


def losses_against_naive(runs, args, notes):
    by_model = defaultdict(list)
    for setting, _, rows in federations(runs, notes):
        if apart := apart_of_naive(rows):
            by_model[model_of(setting)].append((setting, apart))
    drawn = []
    for every in by_model.values():
        figure, axes = panel_axes(len(every), height=3.2, extra=1.6)
        looks = looks_of([row for _, rows in every for row in rows])
        titles = titles_of([setting for setting, _ in every])
        for axis, (_, rows), title in zip(axes, every, titles, strict=True):
            for i, (row, apart) in enumerate(rows.items()):
                axis.plot(apart, np.full(len(apart), i), ".", color=GREY, markersize=4, zorder=2, label="a seed")
                own = looks[row.label] | {"linestyle": "", "capsize": 3, "markersize": 6, "zorder": 3}
                axis.errorbar(apart.mean(), i, xerr=half(apart), **own)
            names = [re.sub(r" \(.*?\)", "", row.label) for row in rows]
            axis.axvline(0, color=GREY, linewidth=1, zorder=1)
            axis.set_yticks(range(len(names)), names, fontsize=8)
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.locator_params(axis="x", nbins=5)
            axis.set_xlabel("Validation loss minus naive's (nats)")
            axis.set_title(style.folded(f"{title} ({seeds_range([*rows])} seeds)"), fontsize=9.5)
        legend_below(figure, axes)
        setting = {key: value for key, value in every[0][0].items() if key in MODEL}
        title = "Validation loss against naive's, last round: mean over seeds, bars: 95 % interval of a paired t test"
        set_title(figure, f"{title}\n{describe(STUDY, setting)}")
        drawn.append(figure)
    yield from numbered("losses", drawn)


FIGURES = {
    "losses": (losses_against_naive, "runs of fedavg_rounds.py --aggregate naive and another rule, two seeds of both"),
    "replay": (replay_error, "runs of fedavg_rounds.py with --replay"),
}


def build_parser():
    return style.figure_parser(STUDY, FIGURES)


if __name__ == "__main__":
    run_main(lambda args: style.draw_figures(STUDY, FIGURES, args), build_parser().parse_args())
