"""Runs of a study as processes of their own: started, gone on with, and what to tell of them."""

import subprocess
import sys
from pathlib import Path

from common.checkpoint import read_json
from common.runlog import NOT_COMPARED

ROOT = Path(__file__).resolve().parents[1]


def took(folder):
    """What --plan says of a run: how long it took, or how far it is."""
    if not (Path(folder) / "run.json").exists():
        return "not run yet"
    manifest = read_json(Path(folder) / "run.json")
    if manifest["status"] != "finished":
        return f"{manifest['status']}, goes on"
    return f"finished, took {manifest['results']['seconds']:.0f} s"


def start(command, log):
    """Runs a command line (a script's path in the repository, then its flags) with its output appended to the file
    `log`. Returns the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        line = [sys.executable, str(ROOT / command[0]), *command[1:]]
        return subprocess.run(line, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def one_run(name, folder, command, output):
    """Runs one command (again, if it was broken off), its output in `output`/output. Returns (name, exit code)."""
    log = Path(output) / "output" / f"{name}.txt"
    code = start([*command, "--resume"], log)
    print(f"{name}: {took(folder) if code == 0 else f'exit code {code}, see {log}'}", flush=True)
    return name, code


def told(manifest, *keys, places=()):
    """What a study's log tells of a run.json: these keys, and the flags that decide what is computed.

    places: flags of which only the last name is told: where a folder lay does not matter.
    """
    args = {key: value for key, value in manifest["args"].items() if key not in NOT_COMPARED}
    for key in places:
        if args.get(key):
            args[key] = Path(args[key]).name
    return {key: manifest.get(key) for key in keys} | {"args": args}
