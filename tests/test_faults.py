"""Tiny runs of the studies' own scripts, broken on purpose; with --resume each ends with the bits of an unbroken one.

    python tests/test_faults.py --kills 70        # the long form: so many of each kind and study; prints what struck

A fault comes at the n-th change of a file in the run folder, or at a random moment. A run is lost where --resume does
not go on with it, where its log, results or published weights then differ from those of an unbroken run, where it
ended without one line that says why, with a traceback, by hanging, or left a process behind.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import harness
import pytest

COMMANDS = {
    "mamba_fl": "mamba_fl/fed_fisher.py --dataset demo --tokenizer bpe:400 --d-model 32 --d-state 16 --headdim 16 "
    "--sequence-length 32 --batch-size 2 --num-clients 3 --participation 0.67 --val-sequences 6 "
    "--client-val-sequences 2 --val-freq 1 --rounds 3 --lr 0.01 --save-deltas",
    "vit_sparse_fl": "vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --classes 0:10 "
    "--num-clients 8 --num-rounds 3 --participation-rate 0.5 --local-steps 2 --batch-size 8 --eval-every 1 "
    "--save-every 1 --lr 0.1 --fisher-samples 8",
    "lora_glue_fl": "lora_glue_fl/fedavg_rounds.py --model tiny --dataset demo --task-name sst2 --max-length 32 "
    "--shard-dir {shards} --rounds 3 --local-epochs 0.25 --batch-size 8 --learning-rate 5e-3 --lora-r 4 "
    "--eval-each-round --aggregate svd --svd-rank 4",
    "llm_noniid": "llm_noniid/train.py --dataset demo --model tiny --tokenizer bpe:800 --max-length 96 --lora-r 4 "
    "--algorithm scaffold --num-rounds 3 --eval-every 1 --max-samples 160 --num-clients 4 --min-samples 6 "
    "--participation-rate 0.5 --local-steps 2 --batch-size 4 --eval-samples 12 --probe-samples 4",
}
LINES = ("failed: ", "error: ", "terminated", "interrupted")


class Study:
    """Its command, and the folder of its unbroken run."""

    def __init__(self, name, place):
        self.name, self.place = name, place
        self.words = shlex.split(COMMANDS[name].replace("{shards}", str(harness.whole("lora_glue_fl/sharding"))))
        self.whole = place / "whole" / "r"
        assert self.start("whole", 1).ended().code == 0

    def start(self, folder, processes, *more, die=None):
        place = self.place / folder
        words = [*self.words, "--processes", processes, "--output-dir", place, "--run-name", "r", *more]
        return harness.Started(words, die and (str(place / "r"), *die), without=("WORLD_SIZE",))


def children(pid):
    """The processes that `pid` has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


def strike(study, kind, draw):
    """A run with one fault. Returns (how it ended, its exit codes that are right, the processes that it had)."""
    folder, lines, changes = f"{kind.replace(' ', '_')}_{draw.random()}", draw.randrange(3), draw.randrange(14)
    if kind in ("killed", "disk full"):
        what = signal.SIGKILL if kind == "killed" else "full"
        script = study.start(folder, 1, die=(lines, changes, what))
        return folder, script.ended(), (-9,) if kind == "killed" else (1, 2), []
    processes = 1 + (kind != "SIGTERM" or draw.random() < 0.5)
    script = study.start(folder, processes)
    log = study.place / folder / "r" / "metrics.jsonl"
    until(lambda: log.exists() and log.read_bytes().count(b"\n") >= lines or script.process.exitcode is not None, 120)
    time.sleep(0.4 * draw.random())
    members = children(script.process.pid) if processes == 2 else []
    if kind == "one of two" and members:
        targets, number, right = [draw.choice(members)], signal.SIGKILL, (1,)
    elif kind == "SIGTERM":
        targets, number, right = [script.process.pid], signal.SIGTERM, (143,)
    else:
        targets, number, right = [script.process.pid, *members], signal.SIGKILL, (-9,)
    for pid in targets:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return folder, script.ended(), right, members


KINDS = ("killed", "one of two", "all", "SIGTERM", "disk full")


def tried(study, kind, seed):
    """Breaks a run. Returns (whether it was not over by then, why it is lost or "")."""
    folder, ended, right, members = strike(study, kind, random.Random(f"{study.name} {kind} {seed}"))
    last = next(iter(ended.err.splitlines()[-1:]), "")
    if ended.code not in (0, *right):
        return True, f"exit code {ended.code}: {last}"
    if "Traceback" in ended.err or ended.code > 0 and not last.startswith(LINES):
        return True, f"no line: {ended.err[-500:]}"
    if kind == "disk full" and ended.code and "No space left on device" not in last:
        return True, f"does not say why: {last}"
    if not until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in members), 30):
        return True, "leaves a process"
    again = study.start(folder, 1, "--resume").ended()
    if again.code:
        return True, f"--resume: {again.code}: {again.err[-500:]}"
    try:
        harness.same_run(study.place / folder / "r", study.whole)
    except AssertionError as error:
        return True, f"differs: {str(error)[:300]}"
    shutil.rmtree(study.place / folder)
    return ended.code != 0, ""


@pytest.mark.slow
@pytest.mark.parametrize("name, kinds", [*zip(COMMANDS, (KINDS[:1], KINDS[1:3], KINDS[3:4], KINDS[4:]), strict=True)])
def test_a_run_that_was_broken_goes_on_to_the_same_bits(name, kinds, tmp_path):
    study = Study(name, tmp_path)
    assert [why for kind in kinds if (why := tried(study, kind, 0)[1])] == []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="faults of each kind and study")
    parser.add_argument("--study", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, metavar="KIND")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    args = parser.parse_args()
    struck, gone = Counter(), Counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"FEDQUARTET_TEST_RUNS": f"{place}/runs", "FEDQUARTET_CACHE": f"{place}/cache"}
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for name in args.study:
            (Path(place) / name).mkdir()
            study = Study(name, Path(place) / name)
            cases = [(kind, f"{args.seed} {i}") for kind in args.only for i in range(args.kills)]
            for kind, seed in cases:
                hit, why = tried(study, kind, seed)
                struck[kind] += hit
                gone[kind] += bool(why)
                if why:
                    print(f"lost: {name}, {kind}, {seed}: {why}", file=sys.stderr, flush=True)
    print("| fault | tried | lost |\n|---|---|---|")
    for kind in args.only:
        print(f"| {kind} | {struck[kind]} | {gone[kind]} |")
    return 1 if gone.total() else 0


if __name__ == "__main__":
    sys.exit(main())
