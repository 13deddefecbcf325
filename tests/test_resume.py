"""What may happen to a run's folder: a second process, damage, a disk that gives out. No result is a wrong one.

On the small run of small_run.py; test_faults.py does the same to the studies' scripts.
"""

import errno
import os
import shutil

import harness
import pytest
import torch
from small_run import arguments, fail, train

from common import checkpoint
from common.cli import RunFailed, UsageError
from common.participation import participants
from common.runlog import start_run


@pytest.fixture(autouse=True, scope="module")
def no_git():
    """Asking git for the commit is most of what a run costs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.manifest.git_commit", lambda: None)
        yield


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of 6 rounds that ended before the sixth, its checkpoints after every second one: its folder."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(RuntimeError):
        train(arguments(folder), 6, {5: lambda: fail(RuntimeError("the lights went out"))})
    return folder / "r"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(arguments(folder), 6)
    return folder / "r"


def resumed(tmp_path):
    return train(arguments(tmp_path, resume=True), 6)


def refusal(tmp_path, folder):
    """The line that refuses to resume the run in `folder`, which is left as it is."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as refused:
        resumed(tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- one process at a time


def test_a_run_that_is_alive_takes_no_second_process(tmp_path, monkeypatch):
    monkeypatch.setattr("common.runlog.LEAVING", 0.1)
    first, second, third = (start_run("train", arguments(tmp_path, lr=lr), "r") for lr in (0.1, 0.2, 0.3))
    with first:
        first.begin({}, {})
        manifest = (tmp_path / "r" / "run.json").read_bytes()
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="r is in use, another process works in it: wait"):
                start_run("train", arguments(tmp_path, **more), "r")
        with second, pytest.raises(UsageError, match="is in use"):
            second.begin({}, {})
    with third, pytest.raises(UsageError, match="made by another process meanwhile"):
        third.begin({}, {})
    assert (tmp_path / "r" / "run.json").read_bytes() == manifest and os.listdir(tmp_path) == ["r"]
    train(arguments(tmp_path, overwrite=True), 2)
    assert os.listdir(tmp_path) == ["r"]


# ---- a checkpoint and the log up to it are whole or refused


def test_state_json_lists_what_a_checkpoint_holds(half):
    facts = checkpoint.read_json(half / "run.json")
    ended = {"how": "failed", "by": None, "round": 5, "clients": None, "reason": "the lights went out"}
    assert (facts["status"], facts["ended"]) == ("failed", ended)
    saved = half / "checkpoint"
    state = checkpoint.read_json(saved / "state.json")
    files = state["files"] | {f"rows_{int(k):06d}.safetensors": sha256 for k, sha256 in state["rows"]["rows"].items()}
    assert files == {path.name: checkpoint.seal(path) for path in saved.glob("*.safetensors")}
    assert set(files) == {path.name for path in saved.iterdir()} - {"state.json"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file, damage",
    [
        ("counter.safetensors", os.remove),
        ("theta.safetensors", flip),
        ("rows_000001.safetensors", lambda path: path.write_bytes(b"")),
        ("state.json", os.remove),
        ("state.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(file, damage, half, whole, tmp_path, capsys):
    folder = shutil.copytree(half, tmp_path / "r")
    damage(folder / "checkpoint" / file)
    line = refusal(tmp_path, folder)
    assert f"checkpoint/{file} " in line and f"goes on from {folder}/checkpoint.1" in line
    shutil.rmtree(folder / "checkpoint")
    resumed(tmp_path)
    assert "resumed after round 2" in capsys.readouterr().err
    harness.same_run(folder, whole)


def test_rows_that_did_not_change_are_links_to_the_last_checkpoint(tmp_path):
    train(arguments(tmp_path), 5, save_every=1)
    files = sorted((tmp_path / "r" / "checkpoint").glob("rows_*"))
    linked = [int(path.name[5:11]) for path in files if path.samefile(tmp_path / "r" / "checkpoint.1" / path.name)]
    assert linked == sorted({0, 1, 2, 3}.difference(participants(3, 4, 0.5, 4)))


def test_a_log_that_is_not_that_of_its_checkpoint_is_refused(half, tmp_path):
    folder = shutil.copytree(half, tmp_path / "r")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    wrong = "has not one line a round up to the checkpoint's (4)"
    for kept, words in (
        ([*lines[:2], *lines[3:]], wrong),
        ([*lines[:3], lines[2], *lines[3:]], wrong),
        ([lines[0], "\0" * 40 + "\n", *lines[1:]], "line 2 is not a JSON object with a round"),
    ):
        (folder / "metrics.jsonl").write_text("".join(kept), errors="surrogateescape")
        assert words in refusal(tmp_path, folder)
    os.remove(folder / "metrics.jsonl")
    assert wrong in refusal(tmp_path, folder)


# ---- the folder


def test_a_run_json_that_is_none_is_refused_in_one_line(tmp_path):
    (tmp_path / "r").mkdir()
    for content in ("[]", "", '{"command": "train", "status": "failed"}'):
        (tmp_path / "r" / "run.json").write_text(content)
        assert "run.json is not a run's: use --overwrite" in refusal(tmp_path, tmp_path / "r")
    train(arguments(tmp_path, overwrite=True), 1)


def test_where_there_can_be_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    for name in ("file", "mine"):
        with pytest.raises(UsageError, match=f"{name} is not a run folder"):
            start_run("train", arguments(tmp_path, run_name=name, overwrite=True), "r")
    with pytest.raises(UsageError, match="cannot write .*Not a directory"):
        train(arguments(tmp_path, output_dir=f"{tmp_path}/file/deep"), 1)


# ---- how a run ends


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_whose_last_evaluation_is_not_finite_has_failed(value, tmp_path):
    def last(t):
        return value if t == 5 else 1.0

    for _ in range(2):  # going on with it ends the same way
        with pytest.raises(RunFailed, match=rf"round 6: val_loss is {value}, not finite: lower --lr \(0.1\)"):
            train(arguments(tmp_path, resume=True), 6, val_loss=last)
    facts = checkpoint.read_json(tmp_path / "r" / "run.json")
    assert (facts["status"], facts["results"]) == ("failed", None)
    assert (facts["ended"]["by"], facts["ended"]["round"]) == ("not_finite", 6)
    assert not (tmp_path / "r" / "final").exists()
    train(arguments(tmp_path, run_name="s"), 6, val_loss=lambda t: value if t == 4 else 1.0)  # it came back
    with start_run("train", arguments(tmp_path, run_name="eval"), "eval") as run, pytest.raises(RunFailed):
        run.begin({}, {})
        run.report(0, torch.zeros(1), lambda *_: {"val_loss": value})
        run.finish({})


def test_what_a_study_writes_itself_ends_in_one_line_too(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "r" / "deltas.npz"))
    with pytest.raises(RunFailed, match=r"cannot save .*deltas.npz: No space left on device.*make room"):
        train(arguments(tmp_path), 6, {3: lambda: fail(full)})
    assert checkpoint.read_json(tmp_path / "r" / "run.json")["status"] == "failed"
    resumed(tmp_path)


# ---- what may go on


def begun(folder, rounds=3, **flags):
    """A run of small_run.train that was asked for so many rounds."""
    return train(arguments(folder, rounds=rounds, **flags), rounds, save_every=1)[0]


def test_a_run_goes_on_for_more_rounds_where_none_depends_on_how_many_there_are(tmp_path):
    begun(tmp_path, scheduler="none")
    assert torch.equal(begun(tmp_path, 6, scheduler="none", resume=True), begun(tmp_path / "whole", 6))
    harness.same_run(tmp_path / "r", tmp_path / "whole" / "r")
    with pytest.raises(UsageError, match="other flags: --rounds 6 -> 3;"):
        begun(tmp_path, 3, scheduler="none", resume=True)
    begun(tmp_path / "cosine", scheduler="cosine")
    with pytest.raises(UsageError, match="other flags: --rounds 3 -> 6;"):
        begun(tmp_path / "cosine", 6, scheduler="cosine", resume=True)
    assert checkpoint.read_json(tmp_path / "cosine" / "r" / "run.json")["status"] == "finished"
