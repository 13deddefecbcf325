"""What runs of this study came to, and the settings that the questions compare: how a run ended, whether it failed.

    context = Context([outcome_of(run) for run in runs])     # runs as plots/runs.py reads them
    base = context.base                                      # the settings that most runs share
    runs = context.find(partition="iid")                     # {seed: Outcome}: the base with another partition

A run that ended because clients' updates were not finite is an outcome: its loss is inf, and it failed.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from common.curves import failure
from llm_noniid import flags

BLOWN_UP = "not finite"  # in the reason of a run that had no finite update left
MAP_FILE = "failure_map.json"
ALPHAS = (0.1, 100.0, 1.0, 0.01)  # of a failure map, in the order of the search
BROKEN = ("diverged", "oscillating", "left_out")  # alarms of training that is not stable
# what a failure map and runs must agree on to be about the same training
SAME = "dataset model tokenizer max_samples max_length eval_samples num_clients num_rounds".split()
SAME += "lora_r lora_alpha lora_dropout target_modules".split()


@dataclass(frozen=True, eq=False)
class Outcome:
    """A run: its name, the flags that it reads (the seed included), the lines of metrics.jsonl, results, how it ended.

    start_loss: the model's validation loss before training where round 0 does not tell.
    """

    name: str
    method: dict
    rows: list
    results: dict
    status: str
    reason: str = ""
    start_loss: float | None = None

    @property
    def seed(self):
        return self.method.get("seed")

    @property
    def blown_up(self):
        """Whether it ended because clients' updates were not finite."""
        return self.status == "failed" and BLOWN_UP in self.reason

    @property
    def alarms(self):
        """Every alarm of the run, as dicts."""
        return [alarm for row in self.rows for alarm in row.get("alarms") or []]

    def curve(self, name):
        """(rounds, values): the evaluations that have a number (inf and nan are numbers) of this name."""
        pairs = [(row["round"], number(row.get(name))) for row in self.rows]
        return [t for t, v in pairs if v is not None], [v for _, v in pairs if v is not None]

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
        """Why the run counts as failed, in words, or "": see `common.curves.failure`."""
        known = self.results.get("failed")
        return "no update was finite" if self.blown_up else known or failure(self.rows, self.start_loss)

    @property
    def unstable(self):
        """Whether it failed, diverged, oscillated or left updates out."""
        return bool(self.failed) or self.alarmed(*BROKEN)

    def rounds_to(self, target):
        """The first evaluated round with a validation loss of at most `target`, None without."""
        return next((t for t, loss in zip(*self.curve("val_loss"), strict=True) if loss <= target), None)


def number(value):
    """A float of a value of metrics.jsonl ("inf" and "nan" are text there), None for what is no number."""
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def outcome_of(run):
    """The `Outcome` of a run as plots/runs.py reads it."""
    method = run.method | {"seed": run.seed}
    start, rows = from_start(run.rows)
    return Outcome(run.name, method, rows, run.results, run.status, run.ended["reason"] or "", start)


def from_start(rows):
    """(validation loss before training or None, the rows after it): round 0 is a fact of the start, not of a curve."""
    start = next((number(row.get("val_loss")) for row in rows if row["round"] == 0), None)
    return start, [row for row in rows if row["round"] > 0]


class Context:
    """Runs that may be compared with each other."""

    def __init__(self, runs):
        self.runs = runs

    @cached_property
    def base(self):
        """{flag: value}: the most common of FedAvg's runs (of ties train.py's default, else the largest)."""
        federated = [run for run in self.runs if run.method.get("algorithm") == "fedavg"] or self.runs
        default = vars(flags.build_parser("").parse_args([]))
        base = {"mu": self._most(self.runs, "mu", default)}
        for name in dict.fromkeys(name for run in federated for name in run.method if name != "seed"):
            base[name] = self._most(federated, name, default)
        return base | {name: default[name] for name in ("algorithm", "cluster", "partition")}

    @staticmethod
    def _most(runs, name, default):
        counts = Counter(_value(run, name) for run in runs if name in run.method or _value(run, name) is not None)
        tied = [value for value, n in counts.items() if n == max(counts.values())]
        return default.get(name) if default.get(name) in tied or not tied else max(tied, key=str)

    def find(self, **other):
        """{seed: Outcome} of the runs that have the base's flags, as far as they read them, but for these."""
        wanted = self.base | other
        return {run.seed: run for run in self.runs if all(_value(run, n) in (None, wanted[n]) for n in wanted)}

    def values(self, name):
        """The values of a flag for which there are runs, the others as `find` takes them; ascending."""
        there = {_value(run, name) for run in self.runs} - {None}
        return sorted(value for value in there if self.find(**{name: value}))


def _value(run, name):
    """The value of a flag that a run reads: of a folder its name; None for what it does not read, and for its
    algorithm's server learning rate where none is given, which older runs do not name."""
    value = run.method.get(name)
    if name == "sizes" and run.method.get("partition") == "topic_skew":
        return value or "dirichlet"  # no part of the method then
    if name == "server_lr" and value == flags.SERVER_LR.get(run.method.get("algorithm"), 1):
        return None
    if name in ("model", "tokenizer", "init_from") and value is not None:
        return Path(value).name
    return str(value) if isinstance(value, list | dict) else value


def maps_of(context, maps):
    """The maps whose data, model and rounds are the context's (when their runs are evaluated is their own)."""
    if context is None:
        return []

    def agrees(one):
        setting = one["setting"] | {"model": Path(str(one["setting"].get("model"))).name}
        return all(str(setting[n]) == str(context.base[n]) for n in SAME if n in setting and n in context.base)

    return [one for one in maps if agrees(one)]
