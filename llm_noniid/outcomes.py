"""Run folders of this study, read for tables, verdicts and the map of failures: what was run, how it ended.

    runs, notes = read_outcomes("results")
    for context in contexts(runs):              # runs that may be compared: one data set, model, number of rounds
        base = context.base                     # the settings that most runs share
        runs = context.find(partition="iid")    # {seed: Outcome}: the base with another partition

A run that ended because no client's update was finite is an outcome: its loss is inf, and it failed.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from common.checkpoint import read_json
from common.curves import read_metrics
from llm_noniid.diagnostics import rounds_to_target

COMMAND = "train"
BLOWN_UP = "are not finite"  # in the reason of a run that had no finite update left
START_RATE = 1e-20  # older runs with a lower learning rate only say what the model's loss is before training
MAP_FILE = "failure_map.json"
BROKEN = ("diverged", "oscillating", "left_out")  # alarms of training that is not stable

# What runs must agree on to be compared at all.
CONTEXT = (
    *("dataset", "model", "tokenizer", "max_samples", "max_length", "eval_samples", "num_clients", "num_rounds"),
    *("eval_every", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "stop_on"),
)
# What the experiments vary, in the order in which a table says it: name -> (words for a value, source's default).
FACTORS = {
    "algorithm": ("{}", "fedavg"),
    "cluster": ("clusters by {}", "none"),
    "num_clusters": ("{} clusters", 2),
    "partition": ("{}", "topic_skew"),
    "alpha": ("alpha {:g}", 0.1),
    "style_criterion": ("{}", "length"),
    "skew_type": ("{}", "frequency"),
    "participation_rate": ("participation {:g}", 1.0),
    "learning_rate": ("lr {:g}", 5e-5),
    "local_steps": ("{} local steps", 0),
    "local_epochs": ("{:g} local epochs", 1.0),
    "batch_size": ("batch {}", 8),
    "mu": ("mu {:g}", 0.01),
    "client_optimizer": ("{}", "adamw"),
    "scaffold_option": ("option {}", "mean_gradient"),
    "server_lr": ("server lr {:g}", 1.0),
    "server_momentum": ("server momentum {:g}", 0.9),
    "client_weights": ("weights {}", "examples"),
    "max_grad_norm": ("clipped at {:g}", 0.0),
    "weight_decay": ("weight decay {:g}", 0.0),
    "min_samples": ("at least {} texts", 10),
    "cluster_round": ("groups after round {}", 1),
}
_ONLY_WHERE = {  # a factor that a run does not read is not compared
    "num_clusters": lambda a: a["cluster"] != "none",
    "cluster_round": lambda a: a["cluster"] == "updates",
    "alpha": lambda a: a["partition"] == "topic_skew",
    "style_criterion": lambda a: a["partition"] == "style_skew",
    "skew_type": lambda a: a["partition"] == "token_skew",
    "mu": lambda a: a["algorithm"] == "fedprox",
    "scaffold_option": lambda a: a["algorithm"] == "scaffold",
    "server_lr": lambda a: a["algorithm"] in ("fedavgm", "fedadam"),
    "server_momentum": lambda a: a["algorithm"] == "fedavgm",
    "local_epochs": lambda a: not a["local_steps"],
}


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run: its folder, run.json's args, results, status and reason, the lines of metrics.jsonl.

    start_loss: the model's validation loss before training (round 0, not among the lines); of older runs, which did
    not log it, what a run of no training beside them says, else None.
    """

    folder: Path
    args: dict
    rows: list
    results: dict
    status: str
    reason: str = ""
    start_loss: float | None = None

    def started_at(self, loss):
        """The same run with this loss before training."""
        return replace(self, start_loss=loss)

    @property
    def seed(self):
        return self.args.get("seed")

    @property
    def blown_up(self):
        """Whether it ended because no client's update was finite."""
        return self.status == "failed" and BLOWN_UP in self.reason

    @cached_property
    def factors(self):
        """{name: value} over `FACTORS`, None for what the run does not read."""
        known = {name: self.args.get(name, default) for name, (_, default) in FACTORS.items()}
        return {name: v if _ONLY_WHERE.get(name, lambda _: True)(known) else None for name, v in known.items()}

    @cached_property
    def context(self):
        """The values over `CONTEXT`, the model by its folder's name."""
        found = {name: self.args.get(name) for name in CONTEXT}
        found["model"] = Path(str(found["model"])).name
        return tuple(str(value) for value in found.values())

    @property
    def alarms(self):
        """Every alarm of the run, as dicts."""
        return [alarm for row in self.rows for alarm in row.get("alarms") or []]

    def curve(self, name):
        """(rounds, values): the evaluations that have a number (inf and nan are numbers) of this name."""
        found = [(row["round"], number(row.get(name))) for row in self.rows]
        return [r for r, v in found if v is not None], [v for _, v in found if v is not None]

    def last(self, name):
        """The last evaluation's value; inf for a loss of a run that blew up, None where there is none."""
        if self.blown_up and name.endswith("_loss"):
            return math.inf
        values = self.curve(name)[1]
        return values[-1] if values else None

    def mean(self, name):
        """The mean over the evaluations, None without any."""
        values = [v for v in self.curve(name)[1] if math.isfinite(v)]
        return math.fsum(values) / len(values) if values else None

    def alarmed(self, *detectors):
        """Whether one of these detectors raised an alarm."""
        return any(alarm["detector"] in detectors for alarm in self.alarms)

    @cached_property
    def failed(self):
        """Why the run counts as failed, in words, or "": see `failure`."""
        return "no update was finite" if self.blown_up else failure(self.rows, self.start_loss)

    @property
    def unstable(self):
        """Whether it failed, diverged, oscillated or left updates out."""
        return bool(self.failed) or self.alarmed(*BROKEN)

    def rounds_to(self, target):
        """The first evaluated round with a validation loss of at most `target`, None without."""
        return rounds_to_target(*self.curve("val_loss"), target)


def number(value):
    """A float of a value of metrics.jsonl ("inf" and "nan" are text there), None for what is no number."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def failure(rows, start_loss=None):
    """Why a run of these lines of metrics.jsonl failed, in words; "" if it did not.

    It failed if it raised the alarm `diverged`, or its last validation loss is not finite, above its first
    evaluation's, or above start_loss, the model's before training (a run that breaks in its first round can fall from
    then on).
    """
    if any(alarm["detector"] == "diverged" for row in rows for alarm in row.get("alarms") or []):
        return "diverged"
    losses = [v for v in (number(row.get("val_loss")) for row in rows) if v is not None]
    if not losses or not math.isfinite(losses[-1]):
        return "the loss is not finite" if losses else "no evaluation"
    if losses[-1] > losses[0]:
        return "ends above its first evaluation"
    return "ends above the model before training" if start_loss is not None and losses[-1] > start_loss else ""


def read_outcomes(folder):
    """(runs, notes) of train.py's run folders in `folder` and all below it, apart from the runs of failure maps.

    Finished runs and those that blew up; a note says of any other why it is left out. Nothing there: two empty lists.
    """
    folder, runs, notes = Path(folder), [], []
    maps = [path.parent for path in folder.rglob(MAP_FILE)]
    for path in sorted(folder.rglob("run.json")):
        if any(parent in maps for parent in path.parents):
            continue
        try:
            run = read_outcome(path.parent)
        except ValueError as error:
            notes.append(f"left out {path.parent.name}: damaged ({error})")
            continue
        if run is None:
            continue
        if run.status == "finished" and run.rows or run.blown_up:
            runs.append(run)
        else:
            notes.append(f"left out {path.parent.name}: {run.status}" + (f" ({run.reason})" if run.reason else ""))
    starts = {
        start_key(run.args): run.last("val_loss") for run in runs if run.args.get("learning_rate", 1) <= START_RATE
    }
    known = [run for run in runs if run.args.get("learning_rate", 1) > START_RATE]
    return [
        run if run.start_loss is not None else run.started_at(starts.get(start_key(run.args))) for run in known
    ], notes


def read_outcome(folder):
    """The `Outcome` of one run folder, finished or not; None for a run of another script. Raises ValueError."""
    manifest = read_json(Path(folder) / "run.json")
    if not isinstance(manifest, dict) or manifest.get("command") != COMMAND:
        return None
    try:
        rows = read_metrics(folder)
    except FileNotFoundError:
        rows = []
    results, reason = manifest.get("results") or {}, manifest.get("reason") or ""
    start = next((number(row.get("val_loss")) for row in rows if row["round"] == 0), None)
    rows = [row for row in rows if row["round"] > 0]
    return Outcome(Path(folder), manifest["args"], rows, results, manifest["status"], reason, start)


def read_maps(folder):
    """(the failure_map.json files in `folder` and below it that hold points, as dicts; notes on those left out)."""
    maps, notes = [], []
    for path in sorted(Path(folder).rglob(MAP_FILE)):
        try:
            one = read_json(path)
            if not isinstance(one["points"], list) or {"algorithm", "axis", "boundary", "setting"} - one.keys():
                raise ValueError("not a failure map")
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"left out {path}: damaged ({error}): run failure_map.py again")
            continue
        if one["points"]:
            maps.append(one)
    return maps, notes


def maps_of(context, maps):
    """The maps whose data, model and rounds are the context's (when their runs are evaluated is their own)."""
    if context is None:
        return []

    def agrees(one):
        setting = one["setting"] | {"model": Path(str(one["setting"].get("model"))).name}
        same = [name for name in context.names if name in setting and name not in ("stop_on", "eval_every")]
        return all(str(setting[name]) == context.names[name] for name in same)

    return [one for one in maps if agrees(one)]


def start_key(args):
    """What decides the loss before training: the model, the texts and their choice."""
    names = ("dataset", "tokenizer", "max_samples", "max_length", "eval_samples", "seed")
    return Path(str(args.get("model"))).name, *(str(args.get(name)) for name in names)


@dataclass
class Context:
    """Runs on one data set and model for equally many rounds. names: {CONTEXT's key: value as text}."""

    names: dict
    runs: list = field(default_factory=list)

    @cached_property
    def base(self):
        """{factor: value}: the most common of FedAvg's runs (of ties the source's default, else the largest)."""
        federated = [run for run in self.runs if run.factors["algorithm"] == "fedavg"] or self.runs
        found = {}
        for name, (_, default) in FACTORS.items():
            counts = Counter(run.factors[name] for run in federated if run.factors[name] is not None)
            most = max(counts.values(), default=0)
            tied = [value for value, n in counts.items() if n == most]
            found[name] = default if default in tied or not tied else max(tied)
        found |= {name: FACTORS[name][1] for name in ("algorithm", "cluster", "partition")}
        mus = Counter(run.factors["mu"] for run in self.runs if run.factors["mu"] is not None)
        return found | ({"mu": mus.most_common(1)[0][0]} if mus else {})

    def find(self, **other):
        """{seed: Outcome} of the runs that have the base's factors but for these."""
        wanted = self.base | other
        wanted = {name: v if _ONLY_WHERE.get(name, lambda _: True)(wanted) else None for name, v in wanted.items()}
        return {run.seed: run for run in self.runs if run.factors == wanted}

    def values(self, name, **other):
        """The values of a factor for which there are runs, the other factors as `find` takes them; ascending."""
        there = {run.factors[name] for run in self.runs if run.factors[name] is not None}
        return sorted(value for value in there if self.find(**{**other, name: value}))

    def groups(self):
        """list of ({factor: value}, {seed: Outcome}), one for each setting, the base's neighbours first."""
        found = {}
        for run in self.runs:
            found.setdefault(tuple(run.factors.items()), {})[run.seed] = run
        order = {"algorithm": {"fedavg": 0, "fedprox": 1, "scaffold": 2}, "partition": {"iid": 0}}

        def key(item):
            factors = dict(item[0])
            away = sum(v is not None and v != self.base[n] for n, v in factors.items() if n not in order)
            texts = [(order.get(n, {}).get(v, 9), v if isinstance(v, int | float) else 0, str(v)) for n, v in item[0]]
            return away > 0, texts

        return [(dict(factors), seeds) for factors, seeds in sorted(found.items(), key=key)]

    def words(self, factors):
        """A setting in words: algorithm, partition, and what differs from the base."""
        said = []
        for name, value in factors.items():
            shown = name in ("algorithm", "partition") or value != self.base[name]
            if value is not None and shown and not (name == "cluster" and value == "none"):
                said.append(FACTORS[name][0].format(value).replace("_", " "))
        return ", ".join(said)

    def title(self):
        """The context in words."""
        n = self.names
        return f"{n['dataset']}, {n['model']}, {n['num_clients']} clients, {n['num_rounds']} rounds"


def contexts(runs):
    """The runs as `Context`s, the one with most runs first."""
    found = {}
    for run in runs:
        names = dict(zip(CONTEXT, run.context, strict=True))
        found.setdefault(run.context, Context(names)).runs.append(run)
    return sorted(found.values(), key=lambda c: (-len(c.runs), c.title()))
