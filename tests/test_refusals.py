"""Bad input of every script: exit code 2, one line on stderr that names it, nothing printed and nothing written.

And runs that cannot go on: exit code 1, the reason in the last line and in run.json.
"""

import importlib.util
import json
import runpy
import shutil
import sys
from pathlib import Path

import harness
import pytest
from refusals import CONFIG, FAILED, ROWS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Shards of rte and of sst2 as of other data; adapters of sst2, of another task, other targets, a higher rank."""
    folder = tmp_path_factory.mktemp("made")
    words = f"--task-name rte --dataset demo --k 3 --max-examples 96 --out-dir {folder}/rte".split()
    assert harness.run(["lora_glue_fl/sharding.py", *words]).code == 0
    shutil.copytree(harness.whole("lora_glue_fl/sharding"), folder / "other")
    for path in (folder / "other").glob("client_*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "0123456789abcdef"}))
    for name, client in (("a", 1), ("b", 2)):
        shutil.copytree(harness.whole("lora_glue_fl/svd") / f"round_1/client_{client}/adapter", folder / name)
    base = "--model tiny --dataset demo --do-train --threads 1 --max-examples 32 --num-train-epochs 1".split()
    for name, more in {
        "mnli": "--task-name mnli --lora-r 4",
        "keys": "--task-name sst2 --lora-r 4 --target-modules query key",
        "r8": "--task-name sst2 --lora-r 8",
    }.items():
        where = ["--output-dir", folder / "runs" / name, "--adapter-output-dir", folder / name]
        assert harness.run(["lora_glue_fl/main_glue_lora.py", *base, *more.split(), *where]).code == 0
    for name in ("a", "b", "mnli", "keys", "r8"):
        about = json.loads((folder / name / CONFIG).read_text())
        (folder / name / CONFIG).write_text(json.dumps({**about, "base_model_name_or_path": "tiny"}))
    return folder


def row_words(row, tmp, made):
    """The row's command line and the parts of the line that it is refused with, in `tmp`, which is filled."""
    first, flags, parts, *make = row
    if "/" in first and first.endswith(".py"):
        words = [first]
    else:
        words = harness.command(first, tmp / "out")
    places = {"tmp": tmp, "made": made} if "{made}" in flags else {"tmp": tmp}
    places |= {name: harness.whole(name) for name in harness.GOLDEN if "{" + name + "}" in flags}
    for fill in make:
        fill(tmp)

    def placed(text):
        for name, path in places.items():
            text = text.replace("{" + name + "}", str(path))
        return text

    return [*words, *placed(flags).split()], [placed(part) for part in parts]


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}"[-90:])
def test_bad_input_is_one_line_and_nothing_is_written(row, tmp_path, made, capsys, monkeypatch):
    words, parts = row_words(row, tmp_path, made)
    places = [tmp_path, *([made / "b"] if "--overwrite" in words else [])]
    before = [snapshot(place) for place in places]
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "wandb" else plain(name, *at))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(harness.ROOT / words[0]), *words[1:]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    said = capsys.readouterr()
    assert stop.value.code == 2, said
    assert said.err.count("\n") == 1 and "error: " in said.err and not said.out, said
    assert all(part in said.err for part in parts), said.err
    after = [snapshot(place) for place in places]
    assert after == before
    assert "glue_evil" not in sys.modules


@pytest.mark.parametrize("part", ["--headdim 24", "--classes 0:101", "{tmp}/little", "--max-length 97"])
def test_in_a_process_of_its_own_stderr_is_one_line_too(part, tmp_path, made):
    """What libraries say on the way would be seen only here."""
    row = next(row for row in ROWS if part in row[1])
    words, parts = row_words(row, tmp_path, made)
    ended = harness.run(words)
    assert (ended.code, ended.out) == (2, "") and ended.err.count("\n") == 1, ended
    assert all(part in ended.err for part in parts)


OF_SOME = """
import argparse, os, sys
from common import parallel
from common.cli import UsageError
from common.processes import run_federated

def main(args):
    parallel.init_parallel()
    if os.environ["RANK"] in sys.argv[1]:
        raise UsageError("no data here")
    parallel.barrier()

if os.environ["WORLD_SIZE"] == "1":
    del os.environ["WORLD_SIZE"]
run_federated(main, argparse.Namespace(processes=2, device="cpu", threads=1), 2)
"""


@pytest.mark.parametrize("ranks, who", [("1", "process 1: "), ("0", ""), ("01", "")])
def test_what_some_or_all_processes_refuse_is_one_line(ranks, who, tmp_path):
    (tmp_path / "script.py").write_text(OF_SOME)
    words = [tmp_path / "script.py", ranks]
    ended = harness.run(words)
    assert (ended.code, ended.err) == (2, f"error: {who}no data here\n")
    if ranks == "1":  # as under torchrun, which has no supervisor of ours
        assert [one.err for one in harness.run_ranks(words, 2)] == [ended.err, ""]


@pytest.mark.parametrize("name, flags, parts", FAILED)
def test_a_run_that_cannot_go_on_says_why(name, flags, parts, tmp_path):
    ended = harness.run([*harness.command(name, tmp_path / "out"), *flags.split()])
    last = ended.err.strip().splitlines()[-1]
    assert ended.code == 1 and last.startswith("failed: ") and "Traceback" not in ended.err, ended.err
    assert all(part in last for part in parts), last
    assert not list(tmp_path.rglob(harness.GOLDEN[name].tensors) if harness.GOLDEN[name].tensors != "." else [])
    for path in tmp_path.rglob("run.json"):
        run = json.loads(path.read_text())
        assert (run["status"], run["results"]) == ("failed", None) and run["reason"] == last.removeprefix("failed: ")
    assert list(tmp_path.rglob("run.json")) or not list(tmp_path.iterdir())


GRIDS = ["mamba_fl/run_study.py", "vit_sparse_fl/run_all_experiments.py", "lora_glue_fl/run_study.py"]
GRIDS += ["llm_noniid/run_experiments.py", "plots/vit.py", "plots/tables.py"]


@pytest.mark.parametrize("script", [*harness.SCRIPTS, *GRIDS])
def test_help_is_grouped_and_complete(script):
    ended = harness.run([script, "--help"])
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"usage: {script.split('/')[1]} ") and not lines[3]
    assert all(line.startswith("    python ") for line in lines[1:3]), "two examples"
    assert ended.code == 0 and not ended.err and sum(line.endswith(":") and line[0] != " " for line in lines) >= 1
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -"):
            assert "  " in line.strip() or following.startswith(" " * 20), line
