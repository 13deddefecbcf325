"""Every script's run of tests/harness.py: killed and resumed, by two processes, resumed when it had finished."""

import json
import os
import shutil
import signal
import subprocess
import sys

import harness
import pytest

from common.checkpoint import read_json

pytestmark = pytest.mark.slow
RESUMED = [name for name, golden in harness.GOLDEN.items() if golden.resumes]
OF_EACH_SCRIPT = list({harness.GOLDEN[name].script: name for name in RESUMED}.values())
# rules that keep nothing of their own from round to round, and share their sums with those that are run
ALIKE = (
    "mamba_fl/momentum_ema",
    "lora_glue_fl/ffa",
    "lora_glue_fl/stack",
    "llm_noniid/fedprox",
    "llm_noniid/fedavgm",
    "llm_noniid/central",
)
TWO = [name for name, golden in harness.GOLDEN.items() if golden.federated]
TWO = [name for name in TWO if name not in (*ALIKE, "lora_glue_fl/naive", "lora_glue_fl/rolora", "llm_noniid/fedavg")]


def status(folder):
    return json.loads((folder / "run.json").read_text())["status"]


def run_that_dies(name, out, lines, changes, number=signal.SIGKILL):
    """How the run ended, and its folder."""
    folder = out / harness.GOLDEN[name].folder
    return harness.run(harness.command(name, out), die=(str(folder), lines, changes, number)), folder


def resume(name, out):
    ended = harness.run(harness.command(name, out, "--resume"))
    assert ended.code == 0, ended.err
    return ended


@pytest.mark.parametrize("name, changes", [(name, i % 13) for i, name in enumerate(RESUMED) if name not in ALIKE])
def test_killed_and_resumed_is_as_if_unbroken(name, changes, tmp_path):
    """kill -9 after the third line of metrics.jsonl, the first is round 0: before, while or after its checkpoint."""
    ended, folder = run_that_dies(name, tmp_path, 3, changes)
    assert ended.code == -signal.SIGKILL and status(folder) == "running", ended.err
    assert "resumed after round" in resume(name, tmp_path).err
    harness.same_run(folder, harness.whole(name))


@pytest.mark.parametrize("lines, changes", [(0, 2), (0, 7), (1, 5), (1, 10), *((2, n) for n in range(7, 14))])
def test_killed_at_any_change_of_a_file(lines, changes, tmp_path):
    """Before there is a checkpoint; while one takes the place of another; the server's and the clients' moments."""
    ended, folder = run_that_dies("mamba_fl/fed_momentum", tmp_path, lines, changes)
    assert ended.code == -signal.SIGKILL
    resume("mamba_fl/fed_momentum", tmp_path)
    harness.same_run(folder, harness.whole("mamba_fl/fed_momentum"))


@pytest.mark.parametrize("lines, changes", [(1, 0), (1, 4), (1, 7), (1, 9), (3, 4), (3, 8), (3, 10), (3, 12)])
def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(lines, changes, tmp_path):
    """In turn: the checkpoint, the stored updates, final/, the history, run.json."""
    ended, folder = run_that_dies("mamba_fl/fed_avg", tmp_path, lines, changes, "full")
    if ended.code != 0:  # 0: a folder that was there already could not be made
        last = ended.err.strip().splitlines()[-1]
        assert ended.code == 1 and last.startswith("failed: cannot save") and "No space left" in last, ended.err
        assert "Traceback" not in ended.err and status(folder) == "failed" and not list(folder.rglob("*.new"))
        resume("mamba_fl/fed_avg", tmp_path)
    harness.same_run(folder, harness.whole("mamba_fl/fed_avg"))


def test_a_file_that_the_kernel_refuses_ends_the_run_in_one_line(tmp_path):
    """Written by safetensors, which is not Python: the longest file that may be written is 60 kB."""
    ended = harness.run(harness.command("mamba_fl/fed_avg", tmp_path), die=(str(tmp_path), 0, 60_000, "limit"))
    last = ended.err.strip().splitlines()[-1]
    assert ended.code == 1 and last.startswith("failed: cannot save") and "Traceback" not in ended.err, ended.err
    assert status(tmp_path / "r") == "failed" and not list((tmp_path / "r").glob("*.new"))


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path):
    shutil.copytree(harness.whole("mamba_fl/fed_avg"), tmp_path / "r")
    (tmp_path / "r" / "final" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "r" / "final" / "other.safetensors").write_bytes(b"other")
    assert harness.run(harness.command("mamba_fl/fed_avg", tmp_path, "--overwrite")).code == 0
    harness.same_run(tmp_path / "r", harness.whole("mamba_fl/fed_avg"))
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


@pytest.mark.parametrize("name", ["mamba_fl/fed_avg", "llm_noniid/scaffold"])
def test_interrupted_and_resumed_is_as_if_unbroken(name, tmp_path):
    ended, folder = run_that_dies(name, tmp_path, 1, 2, signal.SIGINT)
    assert ended.code == 130 and "--resume" in ended.err and "Traceback" not in ended.err, ended.err
    assert status(folder) == "interrupted"
    resume(name, tmp_path)
    harness.same_run(folder, harness.whole(name))


@pytest.mark.parametrize("name", TWO)
def test_two_processes_give_the_same_bits(name, tmp_path):
    for ended in harness.run_ranks(harness.command(name, tmp_path), 2):
        assert ended.code == 0, ended.err
    folder = tmp_path / harness.GOLDEN[name].folder
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    harness.same_run(folder, harness.whole(name))


@pytest.mark.parametrize("launcher", ["torchrun", "--processes"])
def test_processes_that_a_user_starts_give_the_same_bits(launcher, tmp_path):
    script, *words = harness.command("mamba_fl/fed_fisher", tmp_path)
    line = [sys.executable, str(harness.ROOT / script), *words, "--processes", "2"]
    if launcher == "torchrun":
        line[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(line, capture_output=True, text=True, cwd="/", env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "r" / "run.json")["processes"] == 2
    harness.same_run(tmp_path / "r", harness.whole("mamba_fl/fed_fisher"))


@pytest.mark.parametrize("name", OF_EACH_SCRIPT)
def test_a_finished_run_is_left_as_it_is(name):
    folder, out = harness.whole(name), harness.whole(name)
    for _ in harness.GOLDEN[name].folder.split("/"):
        out = out.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = resume(name, out)
    assert "already finished" in again.out and again.out.splitlines()[-1] == str(folder)
    other = harness.run(harness.command(name, out, "--resume", "--seed", 99))
    assert other.code == 2 and other.err.count("\n") == 1 and "--seed" in other.err and "-> 99" in other.err, other.err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
