"""Runs of tests/harness.py: killed and resumed, by two processes, resumed when they had finished."""

import os
import signal
import subprocess
import sys

import harness
import pytest

from common.checkpoint import read_json

pytestmark = pytest.mark.slow
# rules that keep nothing of their own from round to round, and share their sums with those that are run
ALIKE = {*(f"lora_glue_fl/{rule}" for rule in ("naive", "ffa", "stack", "rotate", "head")), "llm_noniid/fedavg"}
RESUMED = [name for name, golden in harness.GOLDEN.items() if golden.resumes and name not in ALIKE]
OF_EACH_STUDY = ["mamba_fl/fed_fisher", "vit_sparse_fl/topk", "lora_glue_fl/svd", "llm_noniid/clusters"]

AFTER = {  # its rounds a run says what still runs
    "mamba_fl": "evaluating on all test",
    "vit_sparse_fl": "evaluating the last and the best",
    "lora_glue_fl": "writing ",
    "llm_noniid": "evaluating on the test texts",
}


def status(folder):
    return read_json(folder / "run.json")["status"]


def run_that_dies(name, out, lines, changes, number=signal.SIGKILL):
    """How the run ended, and its folder."""
    folder = out / harness.GOLDEN[name].folder
    return harness.run(harness.command(name, out), die=(str(folder), lines, changes, number)), folder


def resume(name, out, processes=1):
    """How the main process ended."""
    words = harness.command(name, out, "--resume")
    ended = harness.run_ranks(words, processes) if processes > 1 else [harness.run(words)]
    assert all(one.code == 0 for one in ended), ended
    return ended[0]


@pytest.mark.parametrize("name, changes", [(name, i % 13) for i, name in enumerate(RESUMED)])
def test_killed_and_resumed_is_as_if_unbroken(name, changes, tmp_path):
    """kill -9 after the third line of metrics.jsonl, the first is round 0: before, while or after its checkpoint.

    Federated runs go on with two processes, and have the bits of one.
    """
    ended, folder = run_that_dies(name, tmp_path, 3, changes)
    assert ended.code == -signal.SIGKILL and status(folder) == "running", ended.err
    said = resume(name, tmp_path, 2 if harness.GOLDEN[name].federated else 1).err
    assert "\nrun: " in f"\n{said}" and "resumed after round" in said
    assert said.rindex("\nround ") < said.index(AFTER[name.partition("/")[0]]), said
    harness.same_run(folder, harness.whole(name))


@pytest.mark.parametrize(
    "name, part",
    [
        ("mamba_fl/fed_avg", "client_1/deltas"),
        ("vit_sparse_fl/federated", "r/best"),
        ("lora_glue_fl/svd", "round_2"),
        ("llm_noniid/fedavg", "partition.json"),
    ],
)
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(name, part, tmp_path):
    """What a study writes itself; what every run writes: tests/test_runlog.py."""
    ended, folder = run_that_dies(name, tmp_path, 0, part, "full")
    last = ended.err.strip().splitlines()[-1]
    assert ended.code == 1 and last.startswith("failed: cannot save") and "No space left" in last, ended.err
    assert "Traceback" not in ended.err and status(folder) == "failed" and not list(folder.rglob("*.new"))
    resume(name, tmp_path)
    harness.same_run(folder, harness.whole(name))


def test_processes_that_a_user_starts_give_the_same_bits(tmp_path):
    assert harness.run(["tests/small_run.py", tmp_path / "one"]).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"} | {"PYTHONPATH": harness.ROOT}
    line = [*torchrun, "tests/small_run.py", tmp_path / "two"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=harness.ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "two" / "r" / "run.json")["processes"] == 2
    harness.same_run(tmp_path / "two" / "r", tmp_path / "one" / "r")


@pytest.mark.parametrize("name", [*OF_EACH_STUDY, "mamba_fl/central"])
def test_a_finished_run_is_left_as_it_is(name):
    folder, out = harness.whole(name), harness.whole(name)
    for _ in harness.GOLDEN[name].folder.split("/"):
        out = out.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = resume(name, out)
    assert "already finished" in again.out and again.out.splitlines()[-1] == str(folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
