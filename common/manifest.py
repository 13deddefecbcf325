"""run.json: what a run is, how it ended, and which command line may go on with it.

--resume goes on with a run where all of this holds; else one line says what differs, and nothing is written:

- the same command and the same flags, but for those of the machine (`NOT_COMPARED`), and but for more rounds where no
  round depends on how many there are;
- the same data, by their fingerprints, and the same choices where a flag says auto;
- a whole checkpoint, by its SHA-256 (common/checkpoint.py), and the lines of metrics.jsonl up to it.

With more rounds the line of the shorter run's last round stays in metrics.jsonl, and may be the best.

Other versions of this code or of a library are a warning.
"""

import contextlib
import hashlib
import json
import math
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from common.checkpoint import read_json
from common.cli import UsageError, say
from common.parallel import all_gather, is_main, world

# Flags that say how to run, not what to compute: --resume may change them. What --config says is in the other flags.
NOT_COMPARED = {"resume", "overwrite", "data_root", "output_dir", "run_name", "track", "log_dir", "num_workers"}
NOT_COMPARED |= {"use_wandb", "wandb_project", "cache_dir", "processes", "config"}
NOT_COMPARED |= {"threads", "device", "amp", "kernel"}  # what they come to is compared, `resolved`
# Flags that may be other paths on another machine: what lies there is compared, by `data`, `clients` and `parameters`
PATHS = {"init_from", "init_adapter", "model", "shard_dir", "tokenizer", "data_dir"}
KEYS = {"command", "args", "status", "data", "resolved", "versions", "clients", "parameters", "git_commit"}
PLACES = ("source", "model", "tokenizer")  # of the data: where they lie may change; the flags compare the last two
LENGTHS = ("rounds", "num_rounds")
# rates and rounds that know no last round
CONSTANT = {"scheduler": "none", "lr_scheduler": "constant", "rounds_by": "steps", "average_every": []}
STARTS = ("init_from", "init_adapter", "model")  # flags that may name what a run starts from
OF_A_FIT = ("fedavg_rounds",)  # commands whose schedule is of a client's steps in one round


def of_run(command, args, resolved, data, clients, parameters):
    """The manifest of a run that begins. Args: as of `common.runlog.Run.begin`."""
    return _plain(
        {
            "command": command,
            "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "args": vars(args),
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
    """How a run ended after t rounds: finished, stopped (by an alarm), interrupted, failed (clients: left out).

    by, of failed: "left_out", "not_finite" (the last evaluation) or None.
    """
    return {"how": how, "by": by, "round": t, "clients": clients, "reason": reason}


def check_folder(folder, command, args):
    """The manifest of the run that --resume finds in `folder`, None where a new run begins.

    Raises UsageError where the folder holds another run or no run, or this one and neither --resume nor --overwrite.
    """
    file = folder / "run.json"
    if not file.exists():
        # a process may have died before it wrote run.json
        if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {"run.json.new"}):
            raise UsageError(f"{folder} is not a run folder: choose another --run-name or --output-dir")
        return None
    if args.overwrite:
        for flag in STARTS:
            if (start := getattr(args, flag, None)) and Path(start).resolve().is_relative_to(folder.resolve()):
                raise UsageError(
                    f"--overwrite would delete {start}, from which the run starts: choose another --run-name"
                )
        return None
    try:
        before = read_json(file)
    except ValueError:
        before = {}
    if not isinstance(before, dict) or not KEYS <= before.keys():
        raise UsageError(f"{file} is not a run's: use --overwrite or another --run-name")
    if before["command"] != command:
        raise UsageError(f"{folder} is a run of {before['command']}, not of {command}: choose another --run-name")
    if not args.resume:
        raise UsageError(
            f"{folder} exists ({before['status']}): --resume goes on with it, --overwrite deletes it, "
            "--run-name gives another"
        )
    if changed := _changes(*_both(before, args)):
        raise UsageError(f"{folder} was started with other flags: {changed}; choose another --run-name")
    return before


def _both(before, args):
    """The flags of a run and those that go on with it, as they are spelled; alike where only its rounds become more."""
    old, new = before["args"], _plain(vars(args))
    constant = before["command"] in OF_A_FIT or all(new.get(k, v) in (v, None) for k, v in CONSTANT.items())
    more = {k: new[k] for k in LENGTHS if constant and old.get(k) and new.get(k) and new[k] > old[k]}
    if more:
        before["status"] = "running"  # what was finished is not any more
    every = (old | more, new)
    return [{f"--{k.replace('_', '-')}": v for k, v in of.items() if k not in NOT_COMPARED} for of in every]


def check_same(folder, before, now):
    """Raises UsageError where a run that goes on has other data or choices than when it was started.

    Other versions or another processor are one warning. Args: before, now: the two manifests.
    """
    facts = [  # clients: of their shards; parameters: of the frozen weights too
        {k: v for k, v in of["data"].items() if k not in PLACES} | {k: of[k] for k in ("clients", "parameters")}
        for of in (before, now)
    ]
    if _changes(*facts):
        raise UsageError(
            f"{folder} was started on other data or frozen weights (see its run.json): choose another --run-name"
        )
    if changed := _changes(before["resolved"], now["resolved"]):
        raise UsageError(f"{folder} was started with {changed}: name these flags as they were then")
    used = [{"git commit": of["git_commit"], **of["versions"]} for of in (before, now)]
    if (changed := _changes(*used)) and is_main():
        say(f"warning: other versions or another processor than at the start, bits may differ: {changed}")


def of_process(command, args):
    """What must be alike in all processes of a run, before anything is read: {name: value}."""
    flags = {f"--{k.replace('_', '-')}": v for k, v in _plain(vars(args)).items() if k not in NOT_COMPARED | PATHS}
    of = versions()
    return {
        "command": command,
        **flags,
        "code": _code(),
        **{k: of.get(k) for k in ("torch", "transformers", "cpu")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def check_alike(facts, device=None):
    """Raises UsageError, on every process, where {name: value} differs from the main process's; another processor is a
    warning. Every process calls it. device: on a GPU the number of threads is not compared."""
    if world().size == 1:
        return
    (main, first), *others = all_gather((socket.gethostname(), dict(_flat(_plain(facts)))))
    for rank, (host, of) in enumerate(others, start=1):
        for name in {**first, **of}:
            if of.get(name) == first.get(name) or name == "resolved threads" and device.type != "cpu":
                continue
            there, here = (str(values.get(name))[:80] for values in (of, first))
            what = f"{name} is {there} on {host} (process {rank}) and {here} on {main}"
            if name not in ("cpu", "gpu"):
                raise UsageError(f"{what}: start every process with the same flags, data and code")
            if is_main():
                say(f"warning: {what}: bits may differ")


def _flat(facts, prefix=""):
    """(name, value) of what is in nested dicts, but for places."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif name not in PLACES:
            yield prefix + name, value


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
    every = {**before, **now}
    return ", ".join(f"{k} {before.get(k)} -> {now.get(k)}" for k in every if before.get(k) != now.get(k))


# ---- where a run comes from


def _code():
    """SHA-256 of this repository's Python files."""
    root, hashed = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for package in root.glob("*/__init__.py") for path in package.parent.glob("*.py")):
        hashed.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return hashed.hexdigest()


def git_commit():
    """The commit of this source tree, with `+changes` where tracked files differ from it; None outside git."""

    def git(*words):
        line = ["git", "-C", Path(__file__).resolve().parent, *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Versions and kinds of what decides the bits of a run."""
    of = {"python": platform.python_version(), "machine": platform.machine()}
    for package in "torch numpy transformers tokenizers safetensors peft torchvision mamba-ssm".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            of[package] = metadata.version(package)
    return {**of, "cpu": processor()}


def processor():
    """The kind of processor that torch computes for, such as "AVX512 AMX": another one adds in another order."""
    about = Path("/proc/cpuinfo")
    amx = about.exists() and "amx_tile" in about.read_text()
    return torch.backends.cpu.get_cpu_capability() + amx * " AMX"
