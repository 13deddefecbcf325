"""Tiny runs of the studies' own scripts, broken on purpose; with --resume each ends with the bits of an unbroken one.

    python tests/test_faults.py --kills 70        # the long form: so many of each kind and study; prints what struck

A fault comes at the n-th change of a file in the run folder, or at a random moment. A run is lost where --resume does
not go on with it, where its log, results or published weights then differ from those of an unbroken run, where it
ended without one line that says why, with a traceback, by hanging, or left a process behind.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import harness
import pytest

STUDIES = {  # their runs of tests/harness.py
    "mamba_fl": "mamba_fl/fed_fisher",
    "vit_sparse_fl": "vit_sparse_fl/sparse",
    "lora_glue_fl": "lora_glue_fl/svd",
    "llm_noniid": "llm_noniid/scaffold",
}
LINES = ("failed: ", "error: ", "terminated", "interrupted")


def start(run, folder, processes, *more, die=None):
    words = harness.command(run, folder, "--processes", processes, *more)
    return harness.Started(words, die and (str(folder / "r"), *die), without=("WORLD_SIZE",))


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


def strike(run, folder, kind, draw):
    """A run with one fault. Returns (how it ended, its exit codes that are right, the processes that it had)."""
    lines, changes = draw.randrange(3), draw.randrange(14)
    if kind in ("killed", "disk full"):
        what = signal.SIGKILL if kind == "killed" else "full"
        script = start(run, folder, 1, die=(lines, changes, what))
        return script.ended(), (-9,) if kind == "killed" else (1, 2), []
    processes = 1 + (kind != "SIGTERM" or draw.random() < 0.5)
    script = start(run, folder, processes)
    log = folder / "r" / "metrics.jsonl"
    harness.until(lambda: not script.process.is_alive() or log.exists() and log.read_bytes().count(b"\n") >= lines, 120)
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
    return script.ended(), right, members


KINDS = ("killed", "one of two", "all", "SIGTERM", "disk full")


def tried(run, place, kind, seed):
    """Breaks a run in `place`. Returns (whether it was not over by then, why it is lost or "")."""
    draw = random.Random(f"{run} {kind} {seed}")
    folder = place / f"{kind.replace(' ', '_')}_{draw.random()}"
    ended, right, members = strike(run, folder, kind, draw)
    last = next(iter(ended.err.splitlines()[-1:]), "")
    if ended.code not in (0, *right):
        return True, f"exit code {ended.code}: {last}"
    if "Traceback" in ended.err or ended.code > 0 and not last.startswith(LINES):
        return True, f"no line: {ended.err[-500:]}"
    if kind == "disk full" and ended.code and "No space left on device" not in last:
        return True, f"does not say why: {last}"
    if not harness.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in members), 30):
        return True, "leaves a process"
    again = start(run, folder, 1, "--resume").ended()
    if again.code:
        return True, f"--resume: {again.code}: {again.err[-500:]}"
    try:
        harness.same_run(folder / "r", harness.whole(run))
    except AssertionError as error:
        return True, f"differs: {str(error)[:300]}"
    shutil.rmtree(folder)
    return ended.code != 0, ""


@pytest.mark.slow
@pytest.mark.parametrize("run, kind", [*zip(STUDIES.values(), KINDS[1:], strict=True)])  # killed: test_whole_runs.py
def test_a_run_that_was_broken_goes_on_to_the_same_bits(run, kind, tmp_path):
    assert tried(run, tmp_path, kind, 0)[1] == ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="faults of each kind and study")
    parser.add_argument("--study", choices=STUDIES, nargs="+", default=list(STUDIES))
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, metavar="KIND")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    args = parser.parse_args()
    struck, gone = Counter(), Counter()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"FEDQUARTET_TEST_RUNS": f"{place}/runs", "FEDQUARTET_CACHE": f"{place}/cache"}
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for name in args.study:
            for kind, i in itertools.product(args.only, range(args.kills)):
                hit, why = tried(STUDIES[name], Path(place), kind, f"{args.seed} {i}")
                struck[kind] += hit
                gone[kind] += bool(why)
                if why:
                    print(f"lost: {name}, {kind}, {i}: {why}", file=sys.stderr, flush=True)
    print("| fault | tried | lost |\n|---|---|---|")
    for kind in args.only:
        print(f"| {kind} | {struck[kind]} | {gone[kind]} |")
    return 1 if gone.total() else 0


if __name__ == "__main__":
    sys.exit(main())
