"""Run folders of llm_noniid as the plots see them: read, grouped so that only like is compared with like.

A run is selected by what its run.json says (command, args, data), never by its folder's name.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import UsageError
from plots import alike
from plots.alike import Panel, base_name, curves_of, like_with_like, lines_of, text, words_for
from plots.reading import read_runs

COMMANDS = ("train",)
# kind of a run -> its name in figures and tables, in their order
KINDS = {
    "central": "Central",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "scaffold": "SCAFFOLD",
    "fednova": "FedNova",
    "fedavgm": "FedAvgM",
    "fedadam": "FedAdam",
    "clusters_updates": "Clusters by updates",
    "clusters_labels": "Clusters by topics",
    "local": "Local only",
}
FEDERATED = tuple(KINDS)[1:]

# A panel or table holds only runs that agree on these, apart from what it varies. A key that a run does not have
# agrees with anything: a central run joins every partition of its texts.
SETTING = (
    "dataset",
    "texts",
    "evaluated",
    "model",
    "lora_r",
    "lora_alpha",
    "clients",
    "partition",
    "alpha",
    "participation",
    "local",
    "learning_rate",
    "rounds",
)
PLACE = ("partition", "alpha")  # in what the panels of one figure differ
NO_TRAINING = 1e-20  # a run with a lower learning rate only says what the loss is before training
FACTORS = ("alpha", "participation", "learning_rate", "local")
FACTOR_NAMES = {
    "alpha": "Dirichlet's alpha",
    "participation": "participation",
    "learning_rate": "learning rate",
    "local": "local work",
}

# Where and how a run was computed: runs that differ only here are seeds of one curve. The rest is in the setting.
_NOT_THE_METHOD = frozenset(
    "seed output_dir results_dir run_name name cache_dir data_root resume overwrite track config device threads compile"
    " eval_every eval_samples probe_samples stop_on algorithm cluster style_criterion skew_type max_samples"
    " num_clients participation_rate local_epochs local_steps num_rounds".split()
) | frozenset(SETTING)
# arg -> the kinds that read it
_ONLY = {
    "mu": ("fedprox",),
    "scaffold_option": ("scaffold",),
    "server_lr": ("fedavgm", "fedadam"),
    "server_momentum": ("fedavgm",),
    "num_clusters": ("clusters_updates", "clusters_labels"),
    "cluster_round": ("clusters_updates",),
}
_SHORT = {
    "texts": "{:,} texts",
    "lora_r": "r {}",
    "lora_alpha": "LoRA's alpha {:g}",
    "clients": "{} clients",
    "partition": "{}",
    "alpha": "alpha {:g}",
    "participation": "participation {:g}",
    "local": "{}",
    "learning_rate": "lr {:g}",
    "rounds": "{} rounds",
    "mu": "mu {:g}",
    "num_clusters": "{} clusters",
    "cluster_round": "grouped after round {}",
    "client_optimizer": "client {}",
    "scaffold_option": "option {}",
    "batch_size": "batch {}",
    "max_length": "{} tokens at most",
}


@dataclass(frozen=True, eq=False)
class Run(alike.Run):
    kinds, keys, short = KINDS, SETTING, _SHORT

    @staticmethod
    def order(key, value):
        """From the least skew and the least work on: partitions as the study names them, alpha downwards."""
        if key == "partition":
            names = ("IID", "topic", "style", "token")
            return names.index(value.split()[0]) if value.split()[0] in names else 9, 0, 0, value
        if key == "local":
            return 0, value.endswith("steps") or value.endswith("step"), float(value.split()[0]), ""
        if key in ("alpha", "participation") and isinstance(value, (int, float)):
            return 0, -value, 0, ""
        return alike.Run.order(key, value)

    @property
    def kind(self):
        """One of KINDS, or the name of an algorithm that is not among them."""
        cluster = self.args.get("cluster") or "none"
        return str(self.args.get("algorithm")) if cluster == "none" else f"clusters_{cluster}"

    def setting(self):
        """dict over SETTING of what this run has."""
        args, data = self.args, self.data
        counts = data.get("counts") or {}
        values = {
            "dataset": data.get("dataset") or args.get("dataset"),
            "texts": counts.get("train"),
            # what losses are means over: not to be compared between other numbers of texts
            "evaluated": text({name: counts.get(name) for name in ("validation", "test")})
            + f", {args.get('eval_samples')} of each",
            "model": base_name(str(args.get("model"))),
            "clients": data.get("clients") or args.get("num_clients"),
            "participation": args.get("participation_rate"),
            "local": local_work(args),
            "rounds": args.get("num_rounds"),
        }
        values |= {key: args.get(key) for key in ("lora_r", "lora_alpha", "learning_rate")}
        if not self.central:
            values["partition"] = partition_name(args)
            if args.get("partition") == "topic_skew":
                values["alpha"] = args.get("alpha")
        return {key: value for key, value in values.items() if value is not None}

    def method(self):
        """(kind, its method-defining args as sorted pairs): equal for the seeds of one curve."""
        args = dict(self.args)
        unread = set(_NOT_THE_METHOD) | {key for key, kinds in _ONLY.items() if self.kind not in kinds}
        if args.get("partition") != "topic_skew":
            unread.add("min_samples")
        if self.central:
            unread |= {"min_samples", "client_weights"}
        if isinstance(args.get("tokenizer"), str):
            args["tokenizer"] = base_name(args["tokenizer"])
        return self.kind, tuple(sorted((k, text(v)) for k, v in args.items() if k not in unread))


def local_work(args):
    """`5 local steps`, `1 local epoch`: what a client does in a round."""
    if args.get("local_steps"):
        return f"{args['local_steps']} local step{'s' * (args['local_steps'] != 1)}"
    epochs = args.get("local_epochs")
    return None if epochs is None else f"{epochs:g} local epoch{'s' * (epochs != 1)}"


def partition_name(args):
    """`IID`, `topic skew`, `style skew (length)`, `token skew (frequency)`; alpha is a setting of its own."""
    name = str(args.get("partition"))
    more = {"style_skew": args.get("style_criterion"), "token_skew": args.get("skew_type")}.get(name)
    return "IID" if name == "iid" else name.replace("_", " ") + (f" ({more})" if more else "")


def find_runs(data_dir, unfinished=False):
    """All readable runs of llm_noniid in `data_dir` and the folders below it, and notes: see `read_runs`.

    A run that ended because no client's update was finite is one, too: it diverged in that round. Runs of a failure map
    are not among them (its figure has them), nor those that only say what the loss is before training.
    """
    found, notes = read_runs(data_dir, COMMANDS, Run, unfinished=True)
    at_once = collapsed_at_once(data_dir)
    notes = [note for note in notes if not any(note.startswith(f"left out {run.folder}: ") for run in at_once)]
    mapped = runs_of_maps(data_dir)
    runs, hidden = [], 0
    for run in [*found, *at_once]:
        if run.folder.resolve() in mapped:
            hidden += 1
        elif run.args.get("learning_rate", 1) <= NO_TRAINING:
            continue
        elif run.status == "failed" and (line := collapse(read_manifest(run.folder))):
            runs.append(replace(run, rows=[*run.rows, line], results={}))
        elif run.status == "finished" or unfinished:
            runs.append(run)
        else:
            notes.append(f"left out {run.folder}: its status is {run.status}; --unfinished takes it too")
    if hidden:
        notes.append(f"left out {hidden} run{'s' * (hidden > 1)} of failure maps: see noniid_failure_map.py")
    if not runs:
        more = f" ({'; '.join(notes[:3])})" if notes else ""
        raise UsageError(f"no finished run of train in {data_dir}{more}: train first, or see --data-dir")
    return runs, notes


def read_manifest(folder):
    """run.json of a folder as a dict; empty where it is not JSON."""
    try:
        found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def collapse(manifest):
    """The line of the round in which no update was finite, as `Study.close_round` says it; None for other endings."""
    reason = str(manifest.get("reason"))
    found = re.match(r"round (\d+): the updates of all .* not finite", reason)
    if not found or manifest.get("status") != "failed":
        return None
    t = int(found.group(1))
    alarm = {"detector": "diverged", "round": t, "value": None, "threshold": None, "message": reason}
    return {"round": t, "val_loss": "nan", "worst_client_val_loss": "nan", "alarms": [alarm]}


def collapsed_at_once(data_dir):
    """The runs that ended so before their first evaluation, without a line."""
    runs = []
    for path in sorted(Path(data_dir).rglob("run.json")):
        if (path.parent / "metrics.jsonl").exists():
            continue
        manifest = read_manifest(path.parent)
        if manifest.get("command") in COMMANDS and collapse(manifest):
            parts = {name: manifest.get(name) or {} for name in ("args", "data")}
            runs.append(Run(path.parent, manifest["command"], rows=[], results={}, status="failed", **parts))
    return runs


def map_files(data_dir):
    """The failure maps in a folder and those below it: sorted list of paths."""
    return sorted(Path(data_dir).rglob("failure_map*.json"))


def runs_of_maps(data_dir):
    """The folders of runs that belong to a failure map: those that it names and that lie beside or below it."""
    found = set()
    for path in map_files(data_dir):
        try:
            points = json.loads(path.read_text(encoding="utf-8")).get("points", [])
        except (ValueError, AttributeError):
            continue  # its own figure says what is wrong with it
        names = {Path(str(point.get("run"))).name for point in points}
        found |= {p.parent.resolve() for p in path.parent.rglob("run.json") if p.parent.name in names}
    return found


def suffixes(settings):
    """File-name suffix of each figure's setting: see `alike.suffixes`."""
    return alike.suffixes(settings, SETTING)


def describe(setting, keys=SETTING):
    """A setting in words: `ag_news, 2,000 texts, small_gpt2, 10 clients, participation 1, 5 local steps, lr 0.001`."""
    words = []
    for key in keys:
        value = setting.get(key)
        if key in ("dataset", "model"):
            words += [] if value is None else [str(value)]
        elif key not in ("evaluated", "lora_r", "lora_alpha"):  # these are in file names where they tell figures apart
            words += words_for(key, value, _SHORT, {})
    return ", ".join(words)


def central_of(panel):
    """The central curves of the panel's own partition: those whose args name it.

    Elsewhere only their validation loss can be compared: other clients hold other texts.
    """
    found = []
    for curve in panel.references:
        names = {partition_name(run.args) for run in curve.runs}
        alphas = {run.args.get("alpha") for run in curve.runs}
        if names == {panel.setting.get("partition")} and alphas <= {panel.setting.get("alpha", *alphas)}:
            found.append(curve)
    return found


def place_name(setting):
    """`topic skew, alpha 0.1`"""
    return describe(setting, PLACE)


def figures_of(runs, notes, single=True):
    """A panel per partition: list[(what a figure's panels have in common, list[Panel])], most panels first.

    single: also panels of one curve whose runs are all in a figure of `factor_figures`.
    """
    elsewhere = set() if single else {run.folder for factor in FACTORS for run in factor_runs(runs, factor)}
    figures = []
    for shared, members in like_with_like(runs, PLACE):
        panels = []
        for setting, same in like_with_like(members):
            curves = curves_of([run for run in same if not run.central], notes=notes)
            references = curves_of([run for run in same if run.central], notes=notes)
            if len(curves) > 1 or any(run.folder not in elsewhere for curve in curves for run in curve.runs):
                panels.append(Panel(setting, curves, references, place_name(setting)))
        panels.sort(key=lambda panel: [Run.order(key, panel.setting.get(key)) for key in PLACE if key in panel.setting])
        if panels:
            figures.append((shared, panels))
    return sorted(figures, key=lambda figure: (-len(figure[1]), -sum(len(p.curves) for p in figure[1])))


def factor_figures(runs, notes, factor):
    """A panel per method, in it a curve for each value of `factor`: list[(setting, list[Panel])].

    Only methods with two values or more. Each curve's label is its value.
    """
    figures = []
    having = [run for run in runs if not run.central and factor in run.setting()]
    for setting, members in like_with_like(having, (factor,)):
        curves = curves_of(members, (factor,), (factor,), notes)
        panels = []
        for line in lines_of(curves):
            if len(line) < 2:
                continue
            line = sorted(line, key=lambda curve: Run.order(factor, curve.place[factor]))
            panels.append(Panel(setting, line, [], line[0].label))
            for curve in line:
                curve.label = ", ".join(words_for(factor, curve.place[factor], _SHORT, {}))
        if panels:
            figures.append((setting, panels))
    return sorted(figures, key=lambda figure: -sum(len(panel.curves) for panel in figure[1]))


def factor_runs(runs, factor):
    """The runs that the figures of a factor show."""
    return [
        run
        for _, panels in factor_figures(runs, [], factor)
        for panel in panels
        for curve in panel.curves
        for run in curve.runs
    ]


def first_alarms(curve):
    """{detector: [round of each seed's first alarm]} of the seeds that have one, in the order of rounds."""
    found = {}
    for run in curve.runs:
        own = {}
        for row in run.rows:
            for alarm in row.get("alarms") or []:
                own.setdefault(str(alarm.get("detector")), int(alarm.get("round", row["round"])))
        for detector, t in own.items():
            found.setdefault(detector, []).append(t)
    return dict(sorted(found.items(), key=lambda item: sorted(item[1])))
