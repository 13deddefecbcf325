"""run.json: what a run is, how it ended, and which command line may go on with it."""

import json
import math
import sys
from pathlib import Path

from common.checkpoint import read_json
from common.cli import UsageError, method_of, say
from common.parallel import is_main, world
from common.provenance import git_commit, versions

# Flags that say how to run, not what to compute: --resume may change them. What --config says is in the other flags.
NOT_COMPARED = {"resume", "overwrite", "data_root", "output_dir", "run_name", "track", "log_dir", "num_workers"}
NOT_COMPARED |= {"use_wandb", "wandb_project", "cache_dir", "processes", "config"}


def of_run(command, args, resolved, data, clients, parameters):
    """The manifest of a run that begins. Args: as of `common.runlog.Run.begin`."""
    return _plain(
        {
            "command": command,
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "args": vars(args),
            "method": method_of(args, NOT_COMPARED),
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


def ended(how, t, by=None, clients=None, reason=None):
    """How a run ended after t rounds: finished, stopped (by an alarm), interrupted, failed (clients: left out)."""
    return {"how": how, "by": by, "round": t, "clients": clients, "reason": reason}


def compared(args):
    """The flags that decide what is computed, as JSON values."""
    return {key: value for key, value in _plain(vars(args)).items() if key not in NOT_COMPARED}


def check_folder(folder, command, args):
    """The manifest of the run that --resume finds in `folder`, None where a new run begins.

    Raises UsageError where the folder holds another run or no run, or this one and neither --resume nor --overwrite.
    """
    file = folder / "run.json"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()) and not (folder / "run.json.new").exists():
            raise UsageError(f"{folder} is not a run folder: choose another --run-name or --output-dir")
        return None
    if args.overwrite and not args.resume:
        return None
    try:
        before = read_json(file)
    except ValueError:
        raise UsageError(f"{file} is not JSON: use --overwrite or another --run-name") from None
    if before["command"] != command:
        raise UsageError(f"{folder} is a run of {before['command']}, not of {command}: choose another --run-name")
    if not args.resume:
        raise UsageError(
            f"{folder} exists ({before['status']}): --resume goes on with it, --overwrite deletes it, "
            "--run-name gives another"
        )
    flags = compared(args)
    spelled = {key: f"--{key.replace('_', '-')}" for key in flags}
    changed = _changes(*({name: of.get(key) for key, name in spelled.items()} for of in (before["args"], flags)))
    if changed:
        raise UsageError(f"{folder} was started with other flags: {changed}; choose another --run-name")
    return before


def check_same(folder, before, now):
    """Raises UsageError where a run that goes on has other data or choices than when it was started.

    Other versions are a warning. Args: before, now: the two manifests.
    """
    # where the files lie may change between sessions; what is in them may not
    data = [{key: value for key, value in of["data"].items() if key != "source"} for of in (before, now)]
    if data[0] != data[1] or before.get("clients") != now["clients"]:
        raise UsageError(f"{folder} was started on other data (see its run.json): choose another --run-name")
    if changed := _changes(before["resolved"], now["resolved"]):
        raise UsageError(f"{folder} was started with {changed}: name these flags as they were then")
    if (changed := _changes(before["versions"], now["versions"])) and is_main():
        say(f"warning: other versions than at the start, bits may differ: {changed}")


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
