"""Run folders of lora_glue_fl as the plots see them: read, grouped so that only like is compared with like.

A run is selected by what its run.json says (command, args, data), never by its folder's name.
"""

import math
from dataclasses import dataclass

import numpy as np

from common.cli import UsageError
from common.curves import number
from plots import alike
from plots.alike import base_name, curves_of, like_with_like, text, words_for
from plots.reading import read_runs

COMMANDS = ("fedavg_rounds", "main_glue_lora", "baseline_run")
# kind of a run -> its name in figures and tables, in their order
KINDS = {
    "central": "Central LoRA",
    "full": "Central, all weights",
    "svd": "SVD (FlexLoRA)",
    "naive": "Naive (FedIT)",
    "ffa": "FFA-LoRA",
    "stack": "Stack (FLoRA)",
    "residual": "Residual (FedEx-LoRA)",
    "rolora": "RoLoRA",
}
RULES = tuple(KINDS)[2:]

# task -> its name in figures, in their order
TASKS = {
    "rte": "RTE",
    "mrpc": "MRPC",
    "cola": "CoLA",
    "stsb": "STS-B",
    "sst2": "SST-2",
    "qnli": "QNLI",
    "qqp": "QQP",
    "mnli": "MNLI",
    "wnli": "WNLI",
}
# The metric that figures show of a task; accuracy of the others.
HEADLINES = {"cola": "matthews", "stsb": "pearson"}
# metric -> its name with its unit: all are shown times 100, as papers on GLUE do
METRICS = {
    "accuracy": "Accuracy (%)",
    "mismatched_accuracy": "Accuracy, mismatched (%)",
    "f1": "F1 (%)",
    "matthews": "Matthews correlation (x 100)",
    "pearson": "Pearson correlation (x 100)",
    "spearman": "Spearman correlation (x 100)",
}

# A panel or table holds only runs that agree on these, apart from what it varies. A key that a run does not have
# agrees with anything: a central run joins every federation on its data.
SETTING = (
    "dataset",
    "model",
    "rank",
    "lora_alpha",
    "task",
    "clients",
    "shards",
    "rounds",
    "local_epochs",
    "examples",
    "data",
    "learning_rate",
)
# What the panels of one figure have in common; they differ in the rest.
FIGURE = ("dataset", "model", "rank", "lora_alpha")

# Where and how a run was computed, what it printed and kept: runs that differ only here are seeds of one curve. The
# last line is in the setting or the kind.
_NOT_THE_METHOD = frozenset(
    "seed output_dir output_root adapter_output_dir run_name cache_dir data_root hf_home shard_dir resume overwrite"
    " track threads device compile keep save_clients eval_each_round eval_clients eval_batch_size do_train do_eval"
    " model_size task_name aggregate skip_svd lora_r client_ranks shard max_examples alpha svd_rank".split()
) | (frozenset(SETTING) - {"learning_rate"})
_FEDERATED_ONLY = frozenset("svd_split server_optimizer server_lr server_beta mu client_weights init_adapter".split())
_LORA_ONLY = frozenset("lora_dropout target_modules".split())
_SHORT = {
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
    "server_optimizer": "server {}",
    "mu": "FedProx {:g}",
    "learning_rate": "lr {:g}",
    "batch_size": "batch {}",
    "num_train_epochs": "{:g} epochs",
    "init_adapter": "from {}",
}
# Values without words.
_OFF = {"server_optimizer": "none", "mu": 0}


@dataclass(frozen=True, eq=False)
class Run(alike.Run):
    kinds, keys, short = KINDS, SETTING, _SHORT

    @staticmethod
    def order(key, value):
        if value == "":  # off, or the usual
            return -1, 0, 0, ""
        return shards_order(value) if key == "shards" else alike.Run.order(key, value)

    @property
    def kind(self):
        """One of KINDS, or the name of a rule that is not among them."""
        if self.command != "fedavg_rounds":
            return {"main_glue_lora": "central", "baseline_run": "full"}[self.command]
        return "naive" if self.args.get("skip_svd") else str(self.args.get("aggregate") or "svd")

    @property
    def central(self):
        return self.command != "fedavg_rounds"

    @property
    def task(self):
        return str(self.data.get("task") or self.args.get("task_name")).lower()

    def setting(self):
        """dict over SETTING of what this run has; a key that its command does not know is not in it."""
        args, data = self.args, self.data
        model = args.get("model") or data.get("model") or f"roberta-{args.get('model_size')}"
        values = {
            "dataset": data.get("dataset") or args.get("dataset"),
            "model": base_name(str(model), inner=("final", "model")),
            "task": self.task,
        }
        ranks = data.get("ranks") or []
        mixed = len(set(ranks)) > 1
        values["rank"] = " ".join(map(str, args.get("client_ranks") or ranks)) if mixed else args.get("lora_r")
        values["lora_alpha"] = whole(args.get("lora_alpha"))
        examples = data.get("examples")
        values["examples"] = sum(examples) if isinstance(examples, list) else examples
        if isinstance(data.get("sha256"), dict):
            values["data"] = text({split: str(value)[:8] for split, value in data["sha256"].items()})
        if not self.central:
            values["clients"] = data.get("clients")
            values["shards"] = shards_name(data)
            values |= {key: whole(args.get(key)) for key in ("rounds", "local_epochs", "learning_rate")}
        return {key: value for key, value in values.items() if value is not None}

    def method(self):
        """(kind, its method-defining args as sorted pairs): equal for the seeds of one curve."""
        args, kind = dict(self.args), self.kind
        unread = set(_NOT_THE_METHOD)
        if self.central:
            unread |= _FEDERATED_ONLY | (_LORA_ONLY if kind == "full" else set())
        else:
            unread.add("learning_rate")  # in the setting: at each rate all rules are compared
        if kind != "svd":
            unread.add("svd_split")
        optimizer = args.get("server_optimizer")
        if optimizer in (None, "none"):
            unread |= {"server_lr", "server_beta"}
        elif optimizer != "momentum":
            unread.add("server_beta")
        for key in ("init_adapter", "tokenizer"):
            if isinstance(args.get(key), str):
                args[key] = base_name(args[key], inner=("final", "adapter"))
        # off is a value like others, so that a run where it is on says so, but none that needs words
        found = {k: "" if _OFF.get(k) == v else text(v) for k, v in args.items() if k not in unread}
        if kind == "svd":
            found |= self._served()
        return kind, tuple(sorted(found.items()))

    def _served(self):
        # what goes without words: served at the clients' rank, and alpha = r
        rank = self.args.get("svd_rank")
        alpha = self.args.get("alpha") or rank
        return {
            "svd_rank": rank if rank != self.args.get("lora_r") else "",
            "served_scale": alpha / rank if rank and alpha != rank else "",
        }


def whole(value):
    """8 for 8.0: flags that take fractions hold a float, whatever was written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def shards_name(data):
    """`IID`, `Dirichlet 0.5`, `overlap 0.2`, `category genre`: how a run's examples were dealt to its clients."""
    mode = str(data.get("mode"))
    if mode == "iid":
        return "IID"
    if mode == "dirichlet":
        return f"Dirichlet {data.get('dirichlet_alpha')}"
    more = [data.get("category_key") if "category" in mode else None]
    more += [data.get("overlap_ratio") if "overlap" in mode else None]
    return " ".join([mode.replace("_", " "), *(str(value) for value in more if value is not None)])


def shards_order(name):
    """A sort key: IID, Dirichlet with alpha downwards, the others by name."""
    kind, _, value = str(name).partition(" ")
    if kind == "Dirichlet":
        return 1, -float(value) if value.replace(".", "", 1).isdigit() else 0.0, ""
    return (0, 0.0, "") if kind == "IID" else (2, 0.0, str(name))


def find_runs(data_dir, unfinished=False, tasks=None):
    """All readable runs of lora_glue_fl in `data_dir` and the folders below it, and notes: see `read_runs`.

    tasks: only these. Raises UsageError where there are none of them.
    """
    runs, notes = read_runs(data_dir, COMMANDS, Run, unfinished)
    chosen = [run for run in runs if not tasks or run.task in tasks]
    if not chosen:
        there = ", ".join(sorted({run.task for run in runs}, key=task_order))
        raise UsageError(f"no run of --tasks {' '.join(tasks)} in {data_dir}: there are {there}")
    return chosen, notes


def suffixes(settings):
    """File-name suffix of each figure's setting: see `alike.suffixes`."""
    return alike.suffixes(settings, FIGURE)


def task_order(task):
    """A sort key for the names of tasks."""
    return (list(TASKS).index(task) if task in TASKS else len(TASKS)), task


def headline(task):
    """The metric of a task that figures show, without its split: `matthews`."""
    return HEADLINES.get(task, "accuracy")


def describe(setting, keys=FIGURE):
    """A setting in words: `glue, roberta-base, r 4, alpha 8`; with other `keys`: `RTE, 3 clients, IID`."""
    words = []
    for key in keys:
        value = setting.get(key)
        if key in ("dataset", "model", "task"):
            words += [TASKS.get(value, str(value))] if value is not None else []
        else:
            words += words_for(key, value, _SHORT, {})
    return ", ".join(words)


class Panel(alike.Panel):
    """Federated curves in one setting and the central ones on the same data."""

    @property
    def task(self):
        return self.setting["task"]

    @property
    def metric(self):
        """The field of metrics.jsonl that the panel shows: `val_matthews`."""
        return f"val_{headline(self.task)}"


def figures_of(runs, notes, free=(), axis=()):
    """The runs as figures, the one with most panels first: list[(what its panels have in common, list[Panel])].

    free: settings in which the curves of one panel may differ; axis: those of them that lie on the panel's axis.
    """
    figures = {}
    for setting, members in like_with_like(runs, free):
        federated = [run for run in members if not run.central]
        if not federated:
            continue
        curves = curves_of(federated, free, axis, notes)
        references = central_curves(members, notes)
        shared = {key: setting[key] for key in FIGURE if key in setting}
        figures.setdefault(text(shared), (shared, []))[1].append(Panel(setting, curves, references))
    for _, panels in figures.values():
        panels.sort(key=lambda panel: panel_order(panel.setting))
        set_titles(panels)
    return sorted(figures.values(), key=lambda figure: (-len(figure[1]), text(figure[0])))


def central_curves(runs, notes):
    """Curves of the central runs; a kind's labels do not say how it differs from the other kind."""
    kinds = [[run for run in runs if run.central and run.kind == kind] for kind in KINDS]
    return [curve for members in kinds for curve in curves_of(members, notes=notes)]


def panel_order(setting):
    """A sort key for settings: by task, clients, shards, and so on."""
    rest = [Run.order(key, setting[key]) if key in setting else () for key in SETTING if key not in (*FIGURE, "task")]
    return task_order(setting["task"]), rest


def set_titles(panels):
    """Titles of a figure's panels: task, clients, shards, and the rest where two panels would be called the same."""
    keys = ["task", "clients", "shards"]
    for key in ("rounds", "local_epochs", "examples", "learning_rate"):
        names = [describe(panel.setting, keys) for panel in panels]
        same = [[p for p, other in zip(panels, names, strict=True) if other == name] for name in set(names)]
        if any(len({text(panel.setting.get(key)) for panel in group}) > 1 for group in same):
            keys.append(key)
    for panel in panels:
        panel.title = describe(panel.setting, keys)


def evaluated(curve, name):
    """(rounds [E], values [S, E]) of a field: at the rounds where every seed has it; nan where it is not finite."""
    tables = [{row["round"]: row[name] for row in run.rows if "round" in row and name in row} for run in curve.runs]
    rounds = [r for r in tables[0] if all(r in table for table in tables)]
    values = np.array([[number(table[r]) for r in rounds] for table in tables]).reshape(len(tables), len(rounds))
    return np.array(rounds, dtype=float), values


def mean_over_rounds(curve, name):
    """[S] the mean of a field over the rounds that have it, one per seed; nan without any or with one not finite."""
    found = [[number(row[name]) for row in run.rows if name in row] for run in curve.runs]
    return np.array([np.mean(values) if values else math.nan for values in found])
