"""What the runs of a study have become: a run's record read, and results.jsonl written, the log of all that ended.

A `run` is a `common.grid.Run`, its record the run.json (or another file of its name) in its folder below `output`.
"""

import json
import os
from pathlib import Path

from common.curves import read_metrics
from common.progress import duration

RESULTS = "results.jsonl"
TUNING = "tuning"  # the folder of the runs of --tune, see common/tuning.py
WHOLE = ("command", "args", "data")  # of a run.json, without which it says too little
FACTS = ("method", "clients", "git_commit", "versions", "processes", "resolved", "parameters", "results")
PLACES = ("model", "tokenizer", "init_from", "init_adapter", "weights", "mask", "shard_dir", "cache_dir")


def read_record(path):
    """A run's record. Its status, where it has none: finished; without the file: not run yet; no record: damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"status": "not run yet"}
    except (OSError, ValueError, RecursionError):
        record = None
    return {"status": "finished"} | record if isinstance(record, dict) else {"status": "damaged"}


def ending(record):
    """A run.json's `ended`; made up from what older ones say."""
    if record.get("ended"):
        return record["ended"]
    from common.manifest import ended  # torch, which --plan must not wait for

    return ended(record["status"], None, reason=record.get("reason"))


def broke_down(record):
    """Whether a run's training broke down: the updates of its clients were not finite."""
    if record["status"] != "failed":
        return False
    ended = ending(record)
    return ended["how"] == "failed" and (ended["by"] == "left_out" or "not finite" in (ended["reason"] or ""))


def over(run, output):
    """Whether the very command of `run` has ended with a result."""
    record = read_record(output / run.name / run.record)
    words, now = ([w for w in line[1:] if w != "--resume"] for line in (record.get("argv", run.command), run.command))
    return words == now and (record["status"] == "finished" or broke_down(record))


def state(run, output):
    """What is said of a run that may have ended."""
    record = read_record(output / run.name / run.record)
    if broke_down(record):
        return ending(record)["reason"]
    if record["status"] != "finished":
        return record["status"] + (", goes on" if record["status"] != "not run yet" else "")
    seconds = (record.get("results") or {}).get("seconds")
    return "finished" if seconds is None else f"finished, took {duration(seconds)}"


def told(args):
    """The flags of a run.json that decide what is computed; of those that name a place, only the last name."""
    from common.manifest import NOT_COMPARED

    return placeless({key: value for key, value in args.items() if key not in NOT_COMPARED})


def placeless(values):
    """Values with the last part of the path only where one says where something is on a machine."""
    return values | {key: Path(values[key]).name for key in PLACES if isinstance(values.get(key), str)}


def collect(output):
    """Writes results.jsonl: a line of JSON for each run below `output` that finished or failed, by name.

    That is the log behind a study's table, small enough for the repository. A folder that has a results.jsonl of its
    own is another grid's.
    """
    others = {path.parent for path in output.rglob(RESULTS)} - {output}
    lines = []
    for path in sorted(output.rglob("run.json")):
        folder, record = path.parent, read_record(path)
        name = folder.relative_to(output).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or record["status"] not in ("finished", "failed") or not {*WHOLE} <= record.keys():
            continue
        if others & {folder, *folder.parents}:
            continue
        rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        line = {"name": name, "command": record["command"], "args": told(record["args"]), "status": record["status"]}
        line |= {"tuning": True} if output.name == TUNING else {}
        line |= {"ended": ending(record)} | {key: record.get(key) for key in FACTS}
        line["method"] = told(record.get("method") or {})
        line["data"] = placeless({key: value for key, value in record["data"].items() if key != "source"})
        line["curve"] = [{key: value for key, value in row.items() if "second" not in key} for row in rows]
        lines.append(line)
    output.mkdir(parents=True, exist_ok=True)
    fresh = output / f"{RESULTS}.new"
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(fresh, output / RESULTS)
