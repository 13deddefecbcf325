"""Runs of train.py as processes of their own: started, gone on with, skipped where they are finished."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import launching
from common.checkpoint import read_json
from common.cli import UsageError
from common.runlog import Run
from llm_noniid import flags
from llm_noniid.outcomes import BLOWN_UP, MAP_FILE, START_RATE, failure, read_outcome, start_key

_UNTOLD = ("seconds", "tokens_per_second", "update_cosines", "clients", "client_cka")  # not in results.jsonl


def run_all(commands, output, jobs):
    """Runs [(name, folder, command line after `python`)], `jobs` at a time. Returns the names of those that failed."""
    with ThreadPoolExecutor(jobs) as pool:
        return [name for name, code in pool.map(lambda one: run_one(*one, output), commands) if code]


def run_one(name, folder, command, output):
    """Runs one command (again, if it was broken off), its output in `output`/output. Returns (name, exit code).

    A run that is finished is not started; nor is one that blew up, which would end the same way again: both are 0. A
    run in that folder with other flags is an error: exit code 2.
    """
    if done(folder):
        if other := changed(folder, command):
            print(f"{name}: there with other flags ({', '.join(other)}): choose another --results-dir", flush=True)
            return name, 2
    else:
        log = Path(output) / "output" / f"{name}.txt"
        code = launching.start(command, log)
        if code and not done(folder):
            print(f"{name}: exit code {code}, see {log}", flush=True)
            return name, code
    print(f"{name}: {took(folder)}", flush=True)
    return name, 0


def compared(args, folder):
    """The flags of a run of train.py that decide what is computed, as JSON values."""
    return Run("train", args, Path(folder)).compared_args()


def train_flags(words):
    """train.py's flags as it would take them, --config and all. Raises UsageError; exits with 2 for an unknown flag."""
    return flags.parse(flags.build_parser("Flags of train.py"), words)


def changed(folder, command):
    """What the run in `folder` was started with otherwise than `command` says: ["--mu 0.01 -> 0.1", ...]."""
    before = manifest(folder)["args"]
    now = compared(train_flags(command[1:]), folder)
    return [f"--{k.replace('_', '-')} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]


def refuse(words, names):
    """Raises UsageError where one of these flags is among the words: the script that starts the runs sets it."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in names:
            raise UsageError(f"--{name.replace('_', '-')} is set for each run by this script (see --help): drop it")


def manifest(folder):
    """A folder's run.json, None where there is none."""
    path = Path(folder) / "run.json"
    return read_json(path) if path.exists() else None


def done(folder):
    """Whether the run in `folder` is finished, or blew up (no update was finite)."""
    found = manifest(folder) or {}
    return found.get("status") == "finished" or (
        found.get("status") == "failed" and BLOWN_UP in (found.get("reason") or "")
    )


def took(folder):
    """What --plan says of a run or a failure map: how long it took, or how far it is."""
    path = Path(folder) / MAP_FILE
    if path.exists():
        found = read_json(path)
        return f"{'finished' if found['finished'] else 'goes on'}, {len(found['points'])} runs"
    if manifest(folder) and done(folder) and manifest(folder)["status"] != "finished":
        return "blew up: no update was finite"
    return launching.took(folder)


def collect(output, path):
    """Writes a line of JSON for each run in `output`: flags, commit, versions, data, results, curve."""
    maps = {map_file.parent for map_file in Path(output).rglob(MAP_FILE)}
    folders = [p.parent for p in sorted(Path(output).rglob("run.json")) if not maps & set(p.parents)]
    runs = [(folder, read_outcome(folder)) for folder in folders if done(folder)]
    runs = [(folder, run) for folder, run in runs if run]
    before = [run for _, run in runs if run.method["learning_rate"] <= START_RATE]
    starts = {start_key(run.method): run.last("val_loss") for run in before}
    with open(path, "w", encoding="utf-8") as file:
        for folder, run in runs:
            if run in before:
                continue
            failed = "no update was finite" if run.blown_up else failure(run.rows, starts.get(start_key(run.method)))
            found = manifest(folder)
            keys = ("git_commit", "versions", "resolved", "results", "reason")
            kept = launching.told(found, *keys, places=("model", "tokenizer", "cache_dir"))
            kept["data"] = {key: found["data"].get(key) for key in ("sha256", "clients", "examples")}
            curve = [{k: v for k, v in row.items() if k not in _UNTOLD} for row in run.rows]
            name = str(folder.relative_to(output))
            file.write(json.dumps({"name": name, "failed": failed, **kept, "curve": curve}) + "\n")
