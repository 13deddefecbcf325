"""Runs as the tables and figures see them: read from folders and committed logs, grouped, paired by seed.

A study is declared once, as a `Study`. `read_runs` makes the same `Run` of a run folder (run.json, metrics.jsonl) and
of a line of a committed log (a study's results/*.jsonl). `like_with_like` puts runs into groups that may be compared;
plots/seeds.py joins the seeds of one method to a curve.

Two runs are seeds of one curve if their method (the flags that the run reads) and their data agree but for the seed.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from common.cache import one_line
from common.cli import UsageError
from common.curves import number, read_metrics
from common.records import TUNING

# Flags that say where and how a run was computed, not what: never part of a method.
WHERE = frozenset(
    "output_dir output_root adapter_output_dir results_dir data_dir data_root cache_dir hf_home shard_dir"
    " checkpoint_dir log_dir run_name name experiment_name config resume overwrite track use_wandb wandb_project"
    " threads processes device num_workers pin_memory compile kernel chunk keep keep_best save_clients"
    " save_deltas save_every save_freq save_interval log_interval val_freq eval_every eval_batch_size prompt"
    " num_runs keep_checkpoints patience final held_out_sequences".split()
)


@dataclass(frozen=True)
class Study:
    """What the runs of a study are called, what tells them apart, in which words.

    setting_of(run) -> dict over `keys`: runs in one table or figure agree on these, apart from what it varies. A key
    that a run lacks (or None) agrees with anything: a central run joins every federation on its data; "" is a value.
    """

    name: str  # its folder
    commands: tuple  # `command` in run.json
    kinds: dict  # kind of a run -> its name in figures and tables, in their order
    kind_of: Callable  # (command, args) -> one of kinds, or the name of one that is not among them
    setting_of: Callable
    keys: tuple  # of the setting, in the order of captions
    said: frozenset = frozenset()  # flags that the kind or the setting says, and flags that no curve depends on
    unread: tuple = ()  # old runs: (predicate of args with `command` and `kind`, flags that are then not read)
    paths: tuple = ()  # flags that hold a path: compared by its last part, without its seed
    words: dict = field(default_factory=dict)  # key or flag -> `{}` for its value, function (value, setting), or None
    yes_no: dict = field(default_factory=dict)  # switch -> (words for on, for off)
    order: Callable = lambda key, value: order_of(value)  # (key, value) -> a sort key
    central: frozenset = frozenset({"central"})  # kinds without a federation: compared among themselves
    off: dict = field(default_factory=dict)  # flag that no method has at its off-value -> kinds whose methods always do
    spoken: frozenset = frozenset()  # flags that a label says wherever curves differ in them
    marked: frozenset = frozenset()  # (flag, value) that a label always says
    lengths: frozenset = frozenset()  # flags that only say how long a run is: said where the budgets differ
    budgets: tuple = ("rounds",)  # results that should be alike in one figure, the first is what `lengths` set
    first: dict = field(default_factory=dict)  # key -> value: groups that have it come first
    keeps: Callable = lambda run: False  # runs that did not finish and are results all the same
    prepared: Callable = lambda runs, notes: runs  # (runs, notes) -> those that tables and figures see
    tunes: bool = False  # runs of --tune are read beside others, else only where there are no others


@dataclass(frozen=True, eq=False)
class Run:
    """One run. `args` are those of run.json; `rows` the lines of metrics.jsonl (round 0: before training)."""

    study: Study
    name: str
    folder: Path | None  # None for a run of a log
    command: str
    args: dict
    method: dict  # flag -> value, of the flags that the run reads, the seed included
    data: dict  # identity of the data (of old runs also facts of the shards)
    clients: dict  # facts of the shards
    status: str
    ended: dict  # how (finished, stopped, failed, interrupted, running), by (alarm, left_out), round, clients, reason
    results: dict
    rows: list
    commit: str | None
    versions: dict
    resolved: dict  # what flags such as --device auto came to
    written: float  # when its last line was written: of two equal runs the later counts
    tuning: bool = False  # whether it is one of --tune
    log: Path | None = None  # that it is a line of
    diverged: bool = False  # whether its study says that it broke down: it is counted, and part of no mean

    @property
    def seed(self):
        return self.args.get("seed")

    @cached_property
    def kind(self):
        return self.study.kind_of(self.command, self.args)

    @property
    def facts(self):
        """What run.json says of the data and of the clients' shards: in old runs both are in `data`."""
        return self.data | self.clients

    @property
    def central(self):
        return self.kind in self.study.central

    @cached_property
    def setting(self):
        """dict over the study's keys of what this run has."""
        return {key: value for key, value in self.study.setting_of(self).items() if value is not None}

    @cached_property
    def variant(self):
        """What sets the run apart from others of its kind in its setting: sorted pairs (flag, value)."""
        hidden = self.study.said | WHERE | {"seed"}
        args = {key: value for key, value in self.method.items() if key not in hidden}
        for key in self.study.paths:
            if isinstance(args.get(key), str):
                args[key] = base_name(args[key])
        return tuple(sorted((key, text(value)) for key, value in args.items()))

    def result(self, name):
        """A number of run.json's results, or from metrics.jsonl where these lack it (nan where neither has it)."""
        value = number(self.results.get(name))
        if not math.isnan(value) or not self.rows:
            return value
        plain = name.removesuffix("_best").removeprefix("best_").removeprefix("final_")
        if name.startswith("best_val_") or name == "val_accuracy_best":
            better = min if plain.endswith(("_ppl", "_loss")) else max
            return better((v for v in (number(row.get(plain)) for row in self.rows) if v == v), default=math.nan)
        return number(self.rows[-1].get({"rounds": "round"}.get(name, plain)))


@dataclass(frozen=True)
class LeftOut:
    """A run (or curve) that a table or figure does not show, and why.

    setting: of the group whose figure lacks it; None: all figures do.
    """

    name: str
    why: str
    where: str = ""
    setting: dict | None = None

    def __str__(self):
        return f"left out {self.where or self.name}: {self.why}"


def not_finite(run):
    """Whether it ended because clients' updates, or the last evaluation, were not finite: it diverged in that round."""
    return run.ended["how"] == "failed" and run.ended["by"] in ("left_out", "not_finite")


# ---- reading


def read_runs(paths, *studies, unfinished=False):
    """Every run of these studies in folders (and those below them) and logs: (list[Run], list[LeftOut]).

    Args: paths: a path or several, each a folder or a .jsonl file; unfinished: take runs that have not finished too.
    Raises UsageError when a path does not exist or there is no such run.
    """
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    runs, notes = [], []
    for path in paths:
        for name, where, read in _places(path):
            try:
                run = read(studies)
            except (ValueError, TypeError, AttributeError, LookupError, OSError, RecursionError) as error:
                notes.append(LeftOut(name, f"damaged ({one_line(error)[:200]})", str(where)))
                continue
            if run is None:
                continue
            where = str(run.folder or f"{where}: {run.name}")
            if not (run.status == "finished" or unfinished or run.study.keeps(run)):
                notes.append(LeftOut(run.name, f"its status is {run.status}; --unfinished takes it too", where))
            elif not run.rows and not run.study.keeps(run):
                why = "no line in metrics.jsonl, it stopped before its first evaluation"
                notes.append(LeftOut(run.name, why, where))
            else:
                runs.append(run)
    for study in studies:
        others = [run for run in runs if run.study is not study]
        mine = [run for run in runs if run.study is study]
        if not study.tunes and not all(run.tuning for run in mine):
            runs = others + [run for run in mine if not run.tuning]
        runs = others + study.prepared([run for run in runs if run.study is study], notes)
    if not runs:
        where = ", ".join(map(str, paths))
        more = f" ({'; '.join(str(note) for note in notes[:3])})" if notes else ""
        commands = ", ".join(command for study in studies for command in study.commands)
        raise UsageError(f"no finished run of {commands} in {where}{more}: train first, or see --data-dir")
    return runs, notes


def _places(path):
    """[(name, where, function of studies)] of a folder's manifests or a log's lines: the Run, None if not theirs."""
    if path.is_dir():
        files = (file for name in ("run.json", "metrics.jsonl") for file in path.rglob(name))
        folders = sorted({file.parent for file in files if TUNING not in file.relative_to(path).parts})
        return [(folder.name, folder, partial(_of_folder, folder)) for folder in folders]
    if not path.is_file():
        raise UsageError(f"--data-dir {path} is not a folder (or a log): give the --output-dir of the runs")
    lines = path.read_bytes().splitlines()
    return [(f"{path.name}:{i + 1}", path, partial(_of_line, path, i, line)) for i, line in enumerate(lines)]


def _of_folder(folder, studies):
    manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("command"), str):
        raise ValueError("run.json does not say of which command")
    study = next((study for study in studies if manifest.get("command") in study.commands), None)
    if study is None:
        return None
    metrics = folder / "metrics.jsonl"
    rows = read_metrics(folder) if metrics.exists() else []
    written = (metrics if metrics.exists() else folder / "run.json").stat().st_mtime
    manifest["tuning"] = TUNING in folder.resolve().parts
    return _make(study, manifest, folder.name, folder, rows, written)


def _of_line(path, i, line, studies):
    record = json.loads(line) if line.strip() else {}
    if "args" not in record:
        return None
    here = [study for study in studies if study.name in path.resolve().parts] or list(studies)
    if "command" not in record and len(here[0].commands) == 1:  # the logs of before 2026-08
        record["command"] = here[0].commands[0]
    study = next((study for study in studies if record.get("command") in study.commands), None)
    if study is None:
        return None
    if isinstance(record.get("data"), str):
        record["data"] = {"sha256": record["data"]}
    if "failed" in record:  # how the study judged the run, with what the line does not tell
        record["results"] = (record.get("results") or {}) | {"failed": record["failed"]}
    record = {"status": "failed" if record.get("reason") else "finished"} | record
    written = path.stat().st_mtime + 1e-6 * i
    return replace(_make(study, record, record.get("name"), None, record.get("curve") or [], written), log=path)


def _make(study, manifest, name, folder, rows, written):
    parts = {key: manifest.get(key) for key in ("args", "data", "clients", "results", "versions", "resolved")}
    method, ended = manifest.get("method"), manifest.get("ended")
    for key, value in {**parts, "method": method, "ended": ended}.items():
        if not isinstance(value, dict) and (value is not None or key == "args"):
            raise ValueError(f"{key} is no JSON object")
    parts = {key: value or {} for key, value in parts.items()}
    if not isinstance(method, dict):
        method = _method_of_old(study, manifest["command"], parts["args"])
    if not isinstance(ended, dict):
        ended = _end_of_old(manifest, parts["results"].get("stopped"), rows[-1].get("round") if rows else 0)
    facts = {
        "tuning": bool(manifest.get("tuning")),
        "status": manifest.get("status"),
        "commit": manifest.get("git_commit"),
        "method": method,
        "ended": ended,
    }
    return Run(study, name, folder, manifest["command"], rows=rows, written=written, **facts, **parts)


def _method_of_old(study, command, args):
    """`method` of a run from before run.json had it: the flags that runs of its kind read."""
    known = {**args, "command": command, "kind": study.kind_of(command, args)}
    unread = {flag for applies, flags in study.unread if applies(known) for flag in flags}
    return {flag: value for flag, value in args.items() if flag not in WHERE | unread}


def _end_of_old(manifest, stopped, t):
    """`ended` of a run from before run.json had it: what its status, reason and last round `t` say."""
    how, reason = manifest.get("status"), manifest.get("reason")
    ended = {"how": how, "by": None, "round": t, "clients": None, "reason": reason}
    if how == "finished" and isinstance(stopped, dict):
        ended |= {"how": "stopped", "by": stopped.get("detector"), "round": stopped.get("round", t)}
    if how == "failed" and reason and "not finite" in reason:
        at = re.match(r"round (\d+)", reason)
        ended |= {"by": "left_out", "round": int(at[1]) if at else t}
    return ended


def text(value):
    """`value` as something that can be compared and sorted: lists and dicts as JSON."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value, sort_keys=True)


def base_name(path, inner=("final", "adapter", "model")):
    """Last part of a path, without its seed: each seed may start from the run of its own seed; not one of `inner`."""
    path = Path(path)
    name = path.parent.name if path.name in inner and path.parent.name else path.name
    return re.sub(r"_?seed_?\d+", "", name) or path.name


def order_of(value):
    """A sort key for values of one setting or flag: numbers first."""
    return (0, value, 0, "") if isinstance(value, (int, float)) else (1, 0, 0, str(value))


# ---- groups


def like_with_like(runs, free=()):
    """Groups of runs that share every setting they have, keys in `free` apart.

    A run that has fewer keys than a group's (a central one: no federation) joins each group that it agrees with.
    Returns list[(setting dict, list[Run])]: those with the study's `first` values first, then those with most runs.
    """

    settings = [{key: value for key, value in run.setting.items() if key not in free} for run in runs]
    groups = []
    for mine, run in sorted(zip(settings, runs, strict=True), key=lambda pair: -len(pair[0])):
        agree = [members for group, members in groups if mine.items() <= group.items()]
        for members in agree:
            members.append(run)
        if not agree:
            groups.append((mine, [run]))

    def rank(group):
        missed = sum(group[0].get(key) != value for key, value in group[1][0].study.first.items())
        return missed, -len(group[1]), json.dumps(group[0], sort_keys=True)

    return sorted(groups, key=rank)


def suffixes(settings, keys):
    """File-name suffix of each setting: none for the first, for the others the values of `keys` that not all share."""
    keys = [key for key in keys if len({str(setting.get(key)) for setting in settings}) > 1]
    names = []
    for i, setting in enumerate(settings):
        words = "_".join(f"{key}_{setting[key]}" for key in keys if setting.get(key) not in (None, ""))
        name = "_" + (re.sub(r"[^A-Za-z0-9.]+", "_", words).strip("_") or f"group_{i + 1}") if i else ""
        names.append(name + f"_{i + 1}" if i and name in names else name)
    return names


def shared_setting(setting, curves):
    """The group's setting with what else all federated curves agree on, for the caption of their figure."""
    several = [curve.runs[0].setting for curve in curves if not curve.central]
    values = {key: [one[key] for one in several if key in one] for one in several for key in one}
    return setting | {key: given[0] for key, given in values.items() if all(value == given[0] for value in given)}


def describe(study, setting, keys=None):
    """A setting in words, in the order of `keys`: `cifar100, classes 50 to 99, tiny, 100 clients, IID, J 4`."""
    return ", ".join(word for key in keys or study.keys for word in words_for(study, key, setting.get(key), setting))


def words_for(study, name, value, setting=None):
    """[`J 4`], [`sparsity 0.9`], ... in the study's words; [] for a value that says nothing."""
    if value is None or value == "":
        return []
    plain = name.replace("_", " ")
    if isinstance(value, bool):
        return [word for word in [study.yes_no.get(name, (plain, f"no {plain}"))[not value]] if word]
    form = study.words.get(name, plain + " {}")
    if not isinstance(form, str):
        return [word for word in [form and form(value, setting or {})] if word]
    words = form.format(value)
    return [words[:-1] if value == 1 and words.endswith("s") and form != "{}" else words]
