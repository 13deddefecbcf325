"""Two machines that share nothing: each a process with its own folder, data and code; the second can write nowhere.

benchmarks/hosts.py does the same with namespaces of the kernel, a cable between them, and the cable cut.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys

import harness
import pytest

from common.checkpoint import read_json, write_json

pytestmark = pytest.mark.slow
NOWHERE = "/proc/none"  # the second machine's output folder
STATEFUL = (
    "mamba_fl/fed_entropy",
    "mamba_fl/fed_avg",
    "vit_sparse_fl/sparse",
    "lora_glue_fl/svd",
    "llm_noniid/scaffold",
)


def places(size=2):
    """The environment of each of `size` machines with one process."""
    about = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    about["MASTER_PORT"] = str(harness.free_port())
    return [about | {"RANK": str(rank)} for rank in range(size)]


def start(name, out, *more, other=(), strike=None):
    """The run `name` on two machines. Args: more: flags of both; other: the second one's alone; strike: a signal that
    the second one gets when the first has written two lines of metrics.jsonl."""
    words = harness.command(name, out, *more), harness.command(name, NOWHERE, *more, *other)
    (main, there), (first, second) = [[*line, "--processes", 0] for line in words], places()
    there = harness.Started(there, env=second)
    die = strike and (str(out / harness.GOLDEN[name].folder), 2, 0, strike, there.process.pid)
    return harness.Started(main, die, env=first), there


@pytest.mark.parametrize("name", STATEFUL)
def test_only_the_first_machine_writes_and_the_bits_are_those_of_one_process(name, tmp_path):
    for ended in [one.ended() for one in start(name, tmp_path)]:
        assert ended.code == 0, ended.err
    folder = tmp_path / harness.GOLDEN[name].folder
    assert read_json(folder / "run.json")["processes"] == 2
    harness.same_run(folder, harness.whole(name))


def texts(folder, word):
    """A WikiText-2 of a few lines in `folder`."""
    place = folder / word / "wikitext-2"
    place.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        article = f"\n = A title = \n\n The {word} {split} text has some words and then some more . \n" * 200
        (place / f"wiki.{split}.raw").write_text(article)
    return place.parent


def shards(folder):
    """The shards of the runs, one example of two clients exchanged."""
    shutil.copytree(harness.whole("lora_glue_fl/sharding"), folder)
    paths = folder / "client_1.json", folder / "client_2.json"
    one, two = map(read_json, paths)
    one["indices"][-1], two["indices"][-1] = two["indices"][-1], one["indices"][-1]
    for path, shard in zip(paths, (one, two), strict=True):
        write_json(path, shard)
    return folder


def model(folder, seed):
    """A pretrained model of llm_noniid."""
    words = harness.command("llm_noniid/pretrain", folder, "--seed", seed)
    assert harness.run(words).code == 0
    return folder / "r"


@pytest.mark.parametrize("what", ["--lr", "--seed", "data", "clients sha256", "parameters frozen_sha256"])
def test_machines_that_differ_are_refused_before_anything_is_written(what, tmp_path):
    name, both, other = "mamba_fl/fed_avg", [], [what, "5"]
    if what == "data":
        both = ["--dataset", "wikitext2", "--data-root", texts(tmp_path, "first")]
        other = ["--data-root", texts(tmp_path, "second")]
    elif what == "clients sha256":
        name, other = "lora_glue_fl/naive", ["--shard-dir", shards(tmp_path / "shards")]
    elif what == "parameters frozen_sha256":
        name, both = "llm_noniid/fedavg", ["--model", harness.whole("llm_noniid/pretrain")]
        other = ["--model", model(tmp_path / "other", 2)]
    for ended in [one.ended() for one in start(name, tmp_path, *both, other=other)]:
        assert ended.code == 2 and f"on {socket.gethostname()} (process 1) and " in ended.err, ended.err
        assert what in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert not (tmp_path / "r").exists()


def test_a_machine_with_other_code_is_refused(tmp_path):
    copy = tmp_path / "copy"
    for folder in ("common", "mamba_fl"):
        shutil.copytree(harness.ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    with open(copy / "mamba_fl" / "fed_avg.py", "a") as file:
        file.write("# edited\n")
    first, second = places()
    flags = [*harness.command("mamba_fl/fed_avg", tmp_path), "--processes", "0"]
    started = harness.Started(flags, env=first)
    line = [sys.executable, str(copy / flags[0]), *map(str, flags[1:])]
    env = {**os.environ, **second, "PYTHONPATH": str(copy)}
    there = subprocess.run(line, capture_output=True, text=True, cwd=copy, env=env)
    ended = started.ended()
    assert (ended.code, there.returncode) == (2, 2), there.stderr
    assert "error: code is " in ended.err and not (tmp_path / "r").exists()


def test_a_machine_that_dies_or_falls_silent_is_named_and_the_run_goes_on(tmp_path):
    """SIGSTOP: as if its cable were cut, no connection breaks. Rows of clients that change machines, and SCAFFOLD's."""
    cases = {signal.SIGKILL: "mamba_fl/fed_fisher", signal.SIGSTOP: "llm_noniid/scaffold"}
    runs = {number: start(name, tmp_path / name, strike=number) for number, name in cases.items()}
    for number, name in cases.items():
        main, other = runs[number]
        ended = main.ended()
        os.kill(other.process.pid, signal.SIGKILL) if number == signal.SIGSTOP else None
        other.ended()
        last = ended.err.splitlines()[-1]
        assert ended.code == 1 and last.startswith(f"failed: process 1 on {socket.gethostname()} no longer"), ended.err
        log, about = tmp_path / name / "r" / "metrics.jsonl", tmp_path / name / "r" / "run.json"
        assert about.stat().st_mtime - log.stat().st_mtime < 60  # run.json is written last, the log before the signal
        assert read_json(about)["status"] == "failed" and "process 1 on" in read_json(about)["reason"]
        for again in [one.ended() for one in start(name, tmp_path / name, "--resume")]:
            assert again.code == 0, again.err
        harness.same_run(tmp_path / name / "r", harness.whole(name))
