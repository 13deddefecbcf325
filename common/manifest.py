"""run.json: what a run is, how it ended, and which command line may go on with it."""

import contextlib
import hashlib
import json
import math
import os
import sys
from pathlib import Path

from common.checkpoint import file_sha256, read_json
from common.cli import UsageError, method_of, say
from common.lock import LOCK
from common.parallel import is_main, world
from common.provenance import git_commit, versions

# Flags that say how to run, not what to compute: --resume may change them. What --config says is in the other flags.
NOT_COMPARED = {"resume", "overwrite", "data_root", "output_dir", "run_name", "track", "log_dir", "num_workers"}
NOT_COMPARED |= {"use_wandb", "wandb_project", "cache_dir", "processes", "config", "keep_checkpoints", "patience"}
# What every run.json has of its run, and as what.
KEYS = {"command": str, "args": dict, "status": str, "data": dict, "resolved": dict, "versions": dict}
LATER = {"paths": {}, "sessions": []}  # what older ones lack
KEYS |= {key: type(value) for key, value in LATER.items()}
NAME_BYTES = 200  # of a run's name: file systems take 255, and files beside the folder have longer names
# Flags that may name a file or a folder: what is in it decides, not where it lies.
PATHS = ("model", "tokenizer", "init_from", "init_adapter", "weights", "mask", "shard_dir", "shard")
# Flags that --resume may raise where no round depends on how many there are.
LENGTHS = ("rounds", "num_rounds", "epochs", "num_train_epochs", "n_epochs")
CONSTANT = {"scheduler": "none", "lr_scheduler": "constant"}  # flags of a rate over all rounds, and where it is one
OF_A_FIT = ("fedavg_rounds",)  # commands whose --lr-scheduler and --warmup-ratio are of a client's steps in one round


def of_run(command, args, resolved, data, clients, parameters):
    """The manifest of a run that begins. Args: as of `common.runlog.Run.begin`."""
    return _plain(
        {
            "command": command,
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "args": vars(args),
            "method": method_of(args, NOT_COMPARED),
            "paths": {key: contents(path) for key, path in _paths(args).items()} if is_main() else {},
            "status": "running",
            "reason": None,
            "ended": None,
            "results": None,
            "git_commit": git_commit(),
            "processes": world().size,
            "resolved": resolved,
            "versions": versions(),
            "data": data,
            "clients": clients,
            "parameters": parameters,
        }
    )


def add_session(now, before, t):
    """Notes in the manifest `now` who works at the run from round t on, after those of the manifest `before`."""
    names, earlier = ("git_commit", "argv"), []
    if before is not None:
        start = {"from_round": 0, **{name: before.get(name) for name in names}}
        earlier = [one for one in before.get("sessions") or [start] if one["from_round"] < t]
    now["sessions"] = [*earlier, {"from_round": t, **{name: now[name] for name in names}}]


def ended(how, t, by=None, clients=None, reason=None):
    """How a run ended after t rounds: finished, stopped (by an alarm), interrupted, failed (clients: left out).

    by, of failed: "left_out", "not_finite" (the last evaluation) or None.
    """
    return {"how": how, "by": by, "round": t, "clients": clients, "reason": reason}


def compared(args):
    """The flags that decide what is computed, as JSON values."""
    return {key: value for key, value in _plain(vars(args)).items() if key not in NOT_COMPARED}


def read(file):
    """A run.json, a dict. Raises UsageError where the file has no JSON object, OSError where it cannot be read."""
    try:
        value = read_json(file)
    except (ValueError, RecursionError):
        raise UsageError(f"{file} is not JSON: use --overwrite or another --run-name") from None
    if not isinstance(value, dict):
        raise UsageError(f"{file} is no JSON object: use --overwrite or another --run-name")
    return value


def check_place(folder):
    """Raises UsageError where there can be no run folder: its name is too long, or a file is in its way."""
    size = len(os.fsencode(folder.name))
    if size > NAME_BYTES:
        raise UsageError(f"the run's name has {size} bytes: at most {NAME_BYTES}: give a shorter --run-name")
    try:
        (folder / "checkpoint.new" / ("x" * NAME_BYTES)).exists()  # as long as what a run writes
        nearest = next(place for place in (folder, *folder.parents) if place.exists())
    except OSError as error:
        raise UsageError(f"cannot use {folder}: {error.strerror}: choose another --output-dir") from None
    if outer := next((place for place in folder.parents if (place / "run.json").is_file()), None):
        raise UsageError(f"{folder} would lie in {outer}, which is a run's folder: choose another --output-dir")
    if not nearest.is_dir():
        raise UsageError(f"{nearest} is a file, not a folder: choose another --run-name or --output-dir")


def contents(path):
    """SHA-256 of a file, or of a folder's files and their names; of a run's folder: of what it ended with, its adapter.

    Raises UsageError for what cannot be read.
    """
    for part in ("final", "adapter"):
        path = path / part if (path / part).is_dir() else path
    hashed = hashlib.sha256()
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("."):
                hashed.update(f"{file.name if path.is_dir() else ''}\0".encode())
                hashed.update(bytes.fromhex(file_sha256(file)))
    except OSError as error:
        raise UsageError(f"cannot read {error.filename}: {error.strerror}") from None
    return hashed.hexdigest()


def _paths(args):
    """{flag: path} of the `PATHS` that are there."""
    there = {}
    for key in PATHS:
        with contextlib.suppress(OSError, ValueError, RuntimeError, TypeError):  # no path at all, or too long for one
            path = Path(getattr(args, key, None)).expanduser()
            there |= {key: path} if path.exists() else {}
    return there


def _changed(folder, before, args):
    """The flags that differ from those of the run `before`, as text.

    Raises UsageError where they cannot differ in this way: another content of a folder, another number of rounds.
    """
    flags = compared(args)
    spelled = {key: f"--{key.replace('_', '-')}" for key in flags}
    there = _paths(args)
    for key in before.get("paths", {}):
        if key not in there and flags.get(key) == before["args"].get(key):
            raise UsageError(f"{spelled[key]} {flags[key]} is not there any more: the run needs it to go on")
    for key, path in there.items():
        if sha256 := before.get("paths", {}).get(key):
            if is_main() and contents(path) != sha256:
                raise UsageError(
                    f"{folder} was started with another content of {spelled[key]} {before['args'][key]} than is now in "
                    f"{path}: choose another --run-name"
                )
            del spelled[key]
    if longer := _longer(before["args"], flags, before["command"]):
        del spelled[longer]
        before["status"] = "running"  # what was finished is not any more
    given = getattr(args, "given", flags)  # what run.json lacks is a flag newer than the run: only then it counts
    spelled = {key: name for key, name in spelled.items() if key in before["args"] or key in given}
    return _changes(*({name: of.get(key) for key, name in spelled.items()} for of in (before["args"], flags)))


def _longer(before, flags, command):
    """The flag of `LENGTHS` that is higher than before, None where none is. Raises UsageError where that may not be.

    Args: before, flags: {flag: value}; command: whose they are.
    """
    for key in LENGTHS:
        old, new = before.get(key), flags.get(key)
        if old == new:
            continue
        change = f"--{key.replace('_', '-')} {old} -> {new}"
        if old is None:
            raise UsageError(
                f"{change}: another flag gave the run its length: raise that one, or choose another --run-name"
            )
        if not isinstance(old, (int, float)) or new is None or new < old:
            raise UsageError(f"{change}: --resume can only raise it: choose another --run-name")
        if reason := command not in OF_A_FIT and _depends_on_length(key, old, flags):
            raise UsageError(f"{change}: {reason}: choose another --run-name")
        return key
    return None


def _depends_on_length(key, length, flags):
    """Why a round depends on how many there are, "" where none does. Args: key, length: the flag before."""
    for name, constant in CONSTANT.items():
        if (schedule := flags.get(name, constant)) != constant:
            flag = f"--{name.replace('_', '-')}"
            return f"with {flag} {schedule} a round's rate depends on how many there are (with {constant} it does not)"
    if flags.get("warmup_ratio"):
        return f"the warm-up is a share of all steps, --warmup-ratio {flags['warmup_ratio']:g}"
    if flags.get("warmup_epochs", 0) >= length:
        return f"the warm-up, --warmup-epochs {flags['warmup_epochs']}, was cut to {length - 1}"
    if key == "num_train_epochs" and length % 1:
        return "the last epoch was cut short"
    return ""


def check_folder(folder, command, args):
    """The manifest of the run that --resume finds in `folder`, None where a new run begins.

    Raises UsageError where the folder holds another run or no run, or this one and neither --resume nor --overwrite.
    """
    file = folder / "run.json"
    if not file.exists():
        # a process may have died before it wrote run.json
        if folder.exists() and {path.name for path in folder.iterdir()} - {LOCK, "run.json.new"}:
            raise UsageError(f"{folder} is not a run folder: choose another --run-name or --output-dir")
        return None
    if args.overwrite and not args.resume:
        _check_start(folder, args)
        return None
    before = read(file)
    if lacking := [key for key, kind in KEYS.items() if not isinstance(before.get(key, LATER.get(key)), kind)]:
        raise UsageError(f"{file} lacks {', '.join(lacking)}: use --overwrite or another --run-name")
    if before["command"] != command:
        raise UsageError(f"{folder} is a run of {before['command']}, not of {command}: choose another --run-name")
    if not args.resume:
        raise UsageError(
            f"{folder} exists ({before['status']}): --resume goes on with it, --overwrite deletes it, "
            "--run-name gives another"
        )
    changed = _changed(folder, before, args)
    if changed:
        raise UsageError(f"{folder} was started with other flags: {changed}; choose another --run-name")
    return before


def _check_start(folder, args):
    """Raises UsageError where --overwrite would delete what the run starts from."""
    for key, path in _paths(args).items():
        if path.resolve().is_relative_to(folder.resolve()):
            flag = f"--{key.replace('_', '-')} {path}"
            raise UsageError(f"--overwrite would delete {flag}, from which the run starts: choose another --run-name")


def check_finished(args):
    """Raises UsageError where --init-from is the folder of a run that is not finished."""
    for key, path in _paths(args).items():
        if key in ("init_from", "init_adapter") and (path / "run.json").is_file():
            if (status := read(path / "run.json").get("status")) in ("running", "interrupted", "failed"):
                raise UsageError(
                    f"--init-from {path} is a run that is not finished ({status}): --resume it first, or give a "
                    "folder in it"
                )


def check_same(folder, before, now):
    """Raises UsageError where a run that goes on has other data or choices than when it was started.

    Other versions or another processor are one warning. Args: before, now: the two manifests.
    """
    # where the files lie may change between sessions; what is in them may not
    places = ("source", "model", "tokenizer")  # the last two are compared by `check_folder`
    data = {key: value for key, value in before["data"].items() if key not in places}
    shards, clients = before.get("clients") or {}, now["clients"] or {}
    # what run.json lacks is newer than the run
    if data != {key: now["data"].get(key) for key in data} or shards != {key: clients.get(key) for key in shards}:
        raise UsageError(f"{folder} was started on other data (see its run.json): choose another --run-name")
    if changed := _changes(before["resolved"], now["resolved"]):
        raise UsageError(f"{folder} was started with {changed}: name these flags as they were then")
    commits = [{"git commit": of.get("git_commit")} for of in (before, now)]
    if before.get("git_commit") and (changed := _changes(*commits)) and is_main():
        say(f"warning: another version of this code than at the start, bits may differ: {changed}")
    if (changed := _changes(before["versions"], now["versions"])) and is_main():
        say(f"warning: other versions or another processor than at the start, bits may differ: {changed}")


def json_safe(value):
    """A value whose nan and inf, which JSON does not have, are text, which every reader understands."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    return value


def _plain(value):
    """`value` as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _changes(before, now):
    return ", ".join(f"{key} {value} -> {now.get(key)}" for key, value in before.items() if now.get(key) != value)
