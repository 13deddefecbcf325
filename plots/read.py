"""Runs as one table, from run folders (run.json, metrics.jsonl) and committed logs (a study's results/*.jsonl).

    from plots.read import read
    runs = read("mamba_fl/results/gap.jsonl")        # a pandas DataFrame, a row a run
    runs[["kind", "--lr", "--local_updates", "seed", "test_ppl_last"]]

Columns: `--FLAG` the flags; the results of run.json by their names (test_ppl_last, ...); `curve` the lines of
metrics.jsonl, a list of dicts (round 0: before training); name, study, command, kind, seed, tuning, status, ended, data
(what run.json says of data and shards), commit, folder; `setting` and `variant`: what tells it from other runs;
`diverged`: whether it broke down, and is counted but part of no mean. None is what a run does not say.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from common.cli import UsageError
from common.curves import number, read_metrics

TUNING = "tuning"  # the folder of the runs of --tune
# folder -> the module that declares its STUDY, TABLE and FIGURES; imported when asked for, as they import this one
STUDIES = {"mamba_fl": "mamba", "vit_sparse_fl": "vit", "lora_glue_fl": "glue", "llm_noniid": "noniid"}
# flags that say where and how a run was computed, not what
WHERE = frozenset(
    "output_dir output_root adapter_output_dir results_dir data_dir data_root cache_dir hf_home shard_dir seed"
    " checkpoint_dir log_dir run_name name experiment_name config resume overwrite track use_wandb wandb_project"
    " threads processes device num_workers compile kernel chunk keep keep_best save_clients final save_deltas"
    " save_every save_freq val_freq eval_every eval_batch_size prompt num_runs held_out_sequences".split()
)


@dataclass(frozen=True)
class Study:
    """What the runs of a study are called and what tells them apart, in which words.

    setting(run) -> dict over `keys`, on which the runs of one table agree, apart from `free`. A key that a run lacks
    (None) agrees with anything: a central run joins every federation on its data.
    """

    name: str
    commands: tuple  # `command` in run.json
    kinds: dict  # kind of a run -> its name in tables and figures, in their order
    kind: Callable  # (command, flags) -> one of kinds
    setting: Callable
    keys: tuple
    free: tuple = ()  # keys in which the rows of one table may differ
    said: frozenset = frozenset()  # flags that the kind or the setting says, and those that change no result
    words: dict = field(default_factory=dict)  # key or flag -> `{}` for its value, function of it, None: says nothing
    order: Callable = lambda key, value: order_of(value)  # a sort key
    central: frozenset = frozenset({"central"})  # kinds without a federation: labelled among themselves
    spoken: frozenset = frozenset()  # flags that a label says wherever rows differ in them
    lengths: tuple = ()  # flags that only say how long a run is, said where the `tokens` of runs differ
    diverged: Callable = lambda run: False
    adjust: Callable = lambda runs: runs  # the last word on the table


def study(name):
    """The declaration of a study, by its folder."""
    return module(name).STUDY


def module(name):
    return import_module(f"plots.{STUDIES[name]}")


def read(paths, *studies, notes=None, tuning=False):
    """The finished runs of these studies (all without any) in folders, and those below them, and logs: a DataFrame.

    notes: a list that gets a line for each run that is left out; tuning: those of --tune too, which else are read only
    where there are no others. Raises UsageError where a path does not exist or there is no run.
    """
    import pandas as pd  # only here: the runner reads no table

    studies, notes = studies or tuple(map(study, STUDIES)), [] if notes is None else notes
    paths = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    records, chosen = [record for path in paths for record in _records(path, notes)], []
    for one in studies:
        every = [_row(one, record) for record in records if record.get("command") in one.commands]
        mine = [run for run in every if not_finite(run) or (run["status"] == "finished" and run["curve"])]
        left_out = [run for run in every if run not in mine]
        notes += [f"left out {run['where']}: {run['status']}, {len(run['curve'])} evaluations" for run in left_out]
        if not tuning and not all(run["tuning"] for run in mine):
            mine = [run for run in mine if not run["tuning"]]
        if mine:
            runs = pd.DataFrame(mine, dtype=object)
            runs = one.adjust(runs.where(runs.notna(), None))
            every = [run for _, run in runs.iterrows()]
            runs["diverged"] = [bool(one.diverged(run)) for run in every]
            runs["setting"] = [{k: v for k, v in one.setting(run).items() if v is not None} for run in every]
            runs["variant"] = [variant(one, run) for run in every]
            chosen.append(runs)
    if not chosen:
        where, more = ", ".join(map(str, paths)), f" ({'; '.join(notes[:3])})" if notes else ""
        raise UsageError(f"no finished run in {where}{more}: train first, or see --data-dir")
    return pd.concat(chosen, ignore_index=True)


def _records(path, notes):
    """The records of a folder's runs or a log's lines, each like a line of a log with a few words of its place."""
    if path.is_file():
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield json.loads(line) | {"where": f"{path}:{i}", "written": i}
        return
    if not path.is_dir():
        raise UsageError(f"--data-dir {path} is not a folder (or a log): give the --output-dir of the runs")
    for file in sorted(path.rglob("run.json")):
        folder = file.parent
        if TUNING in folder.relative_to(path).parts[:-1]:
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            lines = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        except ValueError as error:
            notes.append(f"left out {folder}: damaged ({error})")
            continue
        place = {"name": folder.name, "folder": folder, "where": folder, "tuning": TUNING in folder.resolve().parts}
        yield record | place | {"curve": lines, "written": file.stat().st_mtime}


def _row(one, record):
    flags, status = record["args"], record.get("status")
    about = {"study": one.name, "kind": one.kind(record["command"], flags), "seed": flags.get("seed")}
    about |= {key: record.get(key) for key in ("name", "command", "status", "folder", "where", "written")}
    about |= {"ended": {"how": status} | (record.get("ended") or {}), "tuning": bool(record.get("tuning"))}
    about |= {"data": (record.get("data") or {}) | (record.get("clients") or {}), "curve": record.get("curve") or []}
    about |= {"commit": record.get("git_commit")}
    results = {key: value for key, value in (record.get("results") or {}).items() if key not in about}
    return about | results | {f"--{flag}": value for flag, value in flags.items()}


def not_finite(run):
    """Whether it ended because clients' updates, or an evaluation, were not finite: it diverged in that round."""
    how, by, reason = (run["ended"].get(key) for key in ("how", "by", "reason"))
    return how == "failed" and (by in ("left_out", "not_finite") or "not finite" in (reason or ""))


def result(run, name):
    """A number of run.json's results, or where these lack it of its last evaluation; nan where neither has it."""
    value = number(run.get(name))
    return number(run["curve"][-1].get(name)) if math.isnan(value) and run["curve"] else value


# ---- what tells runs apart


def variant(study, run):
    """{flag: value} of the flags that set a run apart from its kind."""
    flags = {key[2:]: value for key, value in sorted(run.items()) if key.startswith("--") and value is not None}
    return {flag: plain(value) for flag, value in flags.items() if flag not in study.said | WHERE}


def plain(value):
    """A flag's value as it is compared: of a path the last part, without a seed, as each seed may start elsewhere."""
    if isinstance(value, str) and ("/" in value or "seed_" in value):
        return base_name(value)
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, sort_keys=True)


def base_name(path):
    """`last_part` without its seed."""
    name = last_part(path)
    return re.sub(r"_?seed_?\d+", "", name) or name


def last_part(path):
    """A path's last part that is a name: of `m/final`, `m/adapter` and `m/model` it is m."""
    path = Path(path)
    return path.parent.name if path.name in ("final", "adapter", "model") and path.parent.name else path.name


def order_of(value):
    """A sort key for values of one setting or flag: numbers first."""
    return (0, value, 0, "") if isinstance(value, (int, float)) else (1, 0, 0, str(value))
