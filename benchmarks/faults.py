"""Runs that are killed at random and gone on with: how many end as if they had never been, and how many are lost.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 50 --study mamba_fl

A run of each study on its demo data, by two processes. It is run whole once; then again and again: at a random moment
all of its processes, or one of them, are killed (SIGKILL) or the run is asked to end (SIGTERM); then --resume. A run is
lost where it does not finish then, or where its log (without timings) or its final weights are not those of the whole.
tests/test_faults.py and tests/test_runlog.py do it at every change of a file, and damage each file.
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "mamba_fl": "mamba_fl/fed_fisher.py --dataset demo --tokenizer bpe:400 --d-model 32 --d-state 16 --headdim 16 "
    "--sequence-length 32 --batch-size 2 --num-clients 4 --val-sequences 6 --val-freq 2 --rounds 12 --lr 0.01",
    "vit_sparse_fl": "vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --num-clients 12 "
    "--num-rounds 6 --participation-rate 0.25 --local-steps 2 --eval-every 2 --save-every 2 --lr 0.01 "
    "--fisher-samples 16",
    "llm_noniid": "llm_noniid/train.py --dataset demo --model tiny --tokenizer bpe:800 --algorithm scaffold "
    "--num-rounds 6 --max-samples 160 --num-clients 4 --min-samples 6 --participation-rate 0.5 --local-steps 3 "
    "--eval-samples 24",
}
FAULTS = {
    "all killed": (signal.SIGKILL, True),
    "one killed": (signal.SIGKILL, False),
    "SIGTERM": (signal.SIGTERM, True),
}


def start(study, folder, *more):
    """The study's run in `folder`, a group of processes of its own."""
    line = [*shlex.split(COMMANDS[study]), "--processes", "2", "--output-dir", folder, "--run-name", "r", *more]
    place = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *map(str, line)], cwd=ROOT, env=place, start_new_session=True, **quiet)


def processes(parent):
    """The process ids of `parent` and of those that it started."""
    try:
        return [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]
    except FileNotFoundError:
        return [parent]


def strike(process, fault, draw):
    """Does it to a running process and waits for the end of all that it started."""
    number, everyone = FAULTS[fault]
    ids = processes(process.pid)
    for pid in (ids if number == signal.SIGKILL else ids[:1]) if everyone else [draw.choice(ids)]:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in ids):
        time.sleep(0.05)


def left(folder):
    """What a run leaves: its status, its log without timings, the bits of its final weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if "second" not in k and k != "peak_memory"} for line in lines]
    files = sorted((folder / "final").rglob("*.safetensors"))
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    return json.loads((folder / "run.json").read_text())["status"], lines, sums


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each study")
    parser.add_argument("--study", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    print("| study | " + " | ".join(FAULTS) + " | lost |\n" + "|---" * (len(FAULTS) + 2) + "|")
    for study in args.study:
        tried, lost = dict.fromkeys(FAULTS, 0), []
        with tempfile.TemporaryDirectory() as place:
            began = time.monotonic()
            if start(study, f"{place}/whole").wait():
                sys.exit(f"{study}: the whole run failed")
            whole, seconds = left(Path(place, "whole", "r")), time.monotonic() - began
            for i in range(args.kills):
                folder, fault = Path(place, str(i)), list(FAULTS)[i % len(FAULTS)]
                process, moment = (
                    start(study, folder),
                    draw.uniform(seconds / 3, seconds),
                )  # most of the first third are imports
                time.sleep(moment)
                strike(process, fault, draw)
                tried[fault] += 1
                if start(study, folder, "--resume").wait() or left(folder / "r") != whole:
                    lost.append(f"{fault} after {moment:.1f} of {seconds:.1f} s")
        print(f"| {study} | " + " | ".join(map(str, tried.values())) + f" | {len(lost)} |", flush=True)
        for line in lost:
            print(f"lost: {line}", file=sys.stderr)


if __name__ == "__main__":
    main()
