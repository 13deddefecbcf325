"""Run folders, checkpoints, run.json's facts, what a run says."""

import errno
import importlib.util
import itertools
import json
import os
import shutil
import signal
import sys
import types

import harness
import pytest
import torch
from filelock import FileLock, Timeout
from small_run import arguments, fail, train

from common import checkpoint, parallel
from common.cli import RunFailed, UsageError
from common.participation import Turns, participants
from common.runlog import read_metrics, start_run


@pytest.fixture(autouse=True, scope="module")
def no_git():
    """Asking git for the commit is most of what a run costs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.manifest.git_commit", lambda: None)
        yield


def manifest(folder):
    return checkpoint.read_json(folder / "r" / "run.json")


def test_a_round_is_counted_logged_and_saved(tmp_path):
    theta, _ = train(arguments(tmp_path), 4)
    assert theta.tolist() == [4.0, 4.0]
    rows = read_metrics(tmp_path / "r")
    assert [row["round"] for row in rows] == [0, 1, 2, 3, 4] and "clients" not in rows[0]
    for t, row in enumerate(rows[1:]):
        ids = sorted(participants(3, 4, 0.5, t))
        assert row["clients"] == row["client_tag"] == row["client_train_loss"] == ids
        assert row["train_loss"] == pytest.approx(sum(k * (k + 1) for k in ids) / sum(k + 1 for k in ids))
    last = rows[-1]
    assert (last["tokens"], last["bytes_up"], last["bytes_down"]) == (
        40,
        64,
        sum(k for row in rows[1:] for k in row["clients"]),
    )
    facts = manifest(tmp_path)
    assert facts["ended"] == {"how": "finished", "by": None, "round": 4, "clients": None, "reason": None}
    assert facts["clients"] == {"examples": [1, 2, 3, 4]} and facts["results"]["count"] == 40


def test_participation_draws_other_clients_every_round_and_is_counted():
    draws = [participants(3, 10, 0.3, t) for t in range(20)]
    assert all(len(set(ids)) == 3 for ids in draws) and len({tuple(sorted(ids)) for ids in draws}) > 10
    assert participants(3, 10, 1.0, 5) == list(range(10)) and len(participants(3, 10, 0.01, 0)) == 1
    turns = Turns(3, 10, 0.3)
    for t in (7, 3, 20):
        assert turns.before(t).tolist() == [sum(k in ids for ids in draws[:t]) for k in range(10)]


def test_a_client_left_out_is_null_in_the_log_and_loses_what_it_trained_in_place(tmp_path):
    k = sorted(participants(3, 4, 0.5, 1))[0]
    theta, rows = train(arguments(tmp_path), 2, bad={(1, k)})
    assert theta.tolist() == [2.0, 2.0]
    row = read_metrics(tmp_path / "r")[-1]
    assert row["left_out"] == [[2, k]] and row["left_out_updates"] == 1
    assert row["client_train_loss"][0] is None and row["train_loss"] == row["client_train_loss"][1]
    both = participants(3, 4, 0.5, 1)
    with pytest.raises(RunFailed, match=r"round 2: updates of 2 of 2 clients are not finite.*lower --lr \(0.1\)"):
        train(arguments(tmp_path, run_name="all"), 2, bad={(1, k) for k in both})
    ended = checkpoint.read_json(tmp_path / "all" / "run.json")["ended"]
    assert (ended["how"], ended["by"], ended["round"], ended["clients"]) == ("failed", "left_out", 2, sorted(both))


def test_a_run_that_stops_early_says_by_what_and_is_finished(tmp_path):
    train(arguments(tmp_path), 6, stop=3)
    facts = manifest(tmp_path)
    assert facts["status"] == "finished" and facts["ended"]["how"] == "stopped"
    assert (facts["ended"]["by"], facts["ended"]["round"]) == ("plateau", 4)
    assert [line["round"] for line in read_metrics(tmp_path / "r")] == [0, 1, 2, 3, 4]


def test_overwrite_does_not_delete_what_the_run_starts_from(tmp_path):
    train(arguments(tmp_path), 2)
    with pytest.raises(UsageError, match="--overwrite would delete .*r/final, from which the run starts"):
        start_run("train", arguments(tmp_path, overwrite=True, init_from=str(tmp_path / "r" / "final")), "r")
    assert (tmp_path / "r" / "final").is_dir()
    with start_run("train", arguments(tmp_path, overwrite=True, init_from=str(tmp_path / "other"), model="tiny"), "r"):
        pass


def test_changed_flags_data_and_model_are_named(tmp_path):
    with pytest.raises(RuntimeError):
        train(arguments(tmp_path), 6, {3: lambda: fail(RuntimeError("x"))})
    with pytest.raises(UsageError, match="--lr 0.1 -> 0.2"):
        start_run("train", arguments(tmp_path, resume=True, lr=0.2), "r")
    with start_run("train", arguments(tmp_path, resume=True), "r") as run:
        with pytest.raises(UsageError, match="other data"):
            run.begin({"dataset": "another"}, {"total": 2}, clients={"examples": [1, 2, 3, 4]})
    for parameters, examples in (({"total": 2}, [4, 3, 2, 1]), ({"total": 2, "frozen_sha256": "x"}, [1, 2, 3, 4])):
        with start_run("train", arguments(tmp_path, resume=True), "r") as run:
            with pytest.raises(UsageError, match="other data or frozen weights"):  # other shards, another base model
                run.begin({"dataset": "none", "source": "here"}, parameters, clients={"examples": examples})
    with start_run("train", arguments(tmp_path, resume=True), "r") as run:
        run.begin({"dataset": "none", "source": "elsewhere"}, {"total": 2}, clients={"examples": [1, 2, 3, 4]})
        with pytest.raises(UsageError, match="another model"):
            run.restore(torch.zeros(3), lambda v: {"a": v[:1], "b": v[1:]})


def test_another_kind_of_processor_or_version_is_one_warning(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt) as stop:
        train(arguments(tmp_path), 2, {1: lambda: fail(KeyboardInterrupt())})
    facts = manifest(tmp_path)
    assert facts["ended"]["how"] == "interrupted" and "--resume to go on" in stop.value.__notes__[0]
    here = facts["versions"]["cpu"]
    assert here.removesuffix(" AMX") == torch.backends.cpu.get_cpu_capability()
    facts["versions"] |= {"cpu": "VSX", "torch": "0.1"}
    checkpoint.write_json(tmp_path / "r" / "run.json", facts)
    capsys.readouterr()
    train(arguments(tmp_path, resume=True), 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "torch 0.1 -> " in line and line.endswith(f", cpu VSX -> {here}")


@pytest.mark.parametrize("what", [signal.SIGKILL, "full"])
def test_ended_at_any_change_of_a_file_and_resumed_is_as_if_unbroken(what, tmp_path):
    """kill -9, and a disk that is full at once, at every file or folder that is made, opened, renamed or removed."""
    assert harness.run(["tests/small_run.py", tmp_path / "whole"]).code == 0
    for changes in itertools.count():
        folder = tmp_path / str(changes) / "r"
        ended = harness.run(["tests/small_run.py", folder.parent], die=(folder, 0, changes, what))
        if ended.code == 0:
            break
        if what == "full":
            assert ended.code in (1, 2) and "Traceback" not in ended.err and not list(folder.rglob("*.new"))
            last = ended.err.strip().splitlines()[-1]
            assert last.startswith(("error: cannot write", "failed: cannot save")) and "No space left" in last, last
            assert ended.code == 2 or manifest(folder.parent)["status"] == "failed"
        assert harness.run(["tests/small_run.py", folder.parent, "--resume"]).code == 0
        harness.same_run(folder, tmp_path / "whole" / "r")
    assert changes > (30 if what == signal.SIGKILL else 18)


def test_not_finite_numbers_are_valid_json(tmp_path):
    with start_run("train", arguments(tmp_path), "r") as run:
        run.begin({}, {})
        run.restore({"w": torch.zeros(1)})
        run.report(0, torch.zeros(1), lambda *_: {"val_ppl": float("inf"), "client_val_ppl": [float("nan")]})
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["val_ppl"] == "inf" and line["client_val_ppl"] == ["nan"]


def test_a_run_says_what_runs_and_what_still_runs_after_its_rounds(tmp_path, capsys):
    train(arguments(tmp_path, participation=0.5), 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run: 4 clients, 2 a round; 2 of 2 parameters trained; cpu, 1 processes, float32; 2 rounds"
    assert [line.split()[:2] for line in lines[1:]] == [["round", f"{t}/2"] for t in range(3)] + [["writing", "final/"]]
    assert lines[2].endswith("s left") and "0 s left" in lines[3] and "left" not in lines[1]


def test_a_line_of_metrics_has_the_peak_memory_of_the_process_that_takes_most(tmp_path, monkeypatch):
    train(arguments(tmp_path), 2)
    peaks = [row["peak_memory"] for row in read_metrics(tmp_path / "r")]
    assert peaks == sorted(peaks) and 2**26 < peaks[0] and peaks[-1] < 2**36  # bytes, of a process with torch
    monkeypatch.setattr(parallel, "all_gather", lambda one: [one, 2**40] if isinstance(one, int) else [one])
    train(arguments(tmp_path, overwrite=True), 2)
    assert read_metrics(tmp_path / "r")[-1]["peak_memory"] == 2**40


def test_metrics_go_to_a_tracker(tmp_path, monkeypatch):
    seen, plain = [], importlib.util.find_spec
    writer = types.SimpleNamespace(add_scalar=lambda *what: seen.append(what), flush=lambda: None)
    board = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: name == "tensorboard" or plain(name, *at))
    train(arguments(tmp_path, track="tensorboard"), 2)
    assert [value for name, value, _ in seen if name == "train/val_loss"] == [9.0, 0.0, 1.0]


# ---- what may happen to a run's folder: a second process, damage, a disk that gives out


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
        for more in ({"resume": True}, {"overwrite": True}):
            other = start_run("train", arguments(tmp_path, **more), "r")
            with other, pytest.raises(UsageError, match="r is in use, another process works in it: wait"):
                other.begin({}, {})
                other.restore({"a": torch.zeros(2)})
        with second, pytest.raises(UsageError, match="is in use"):
            second.begin({}, {})
    with third, pytest.raises(UsageError, match="r exists .*: --resume"):
        third.begin({}, {})
    assert (tmp_path / "r" / "run.json").read_bytes() == manifest and os.listdir(tmp_path) == ["r"]
    train(arguments(tmp_path, overwrite=True), 2)
    assert os.listdir(tmp_path) == ["r"]


def test_a_checkpoint_is_read_under_the_lock(half, tmp_path, monkeypatch):
    """Else a process that is about to die may save another one meanwhile."""
    shutil.copytree(half, tmp_path / "r")
    load, seen = checkpoint.load, []

    def spy(folder, device):
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".r.lock").acquire(timeout=0)
        seen.append(load(folder, device))
        return seen[-1]

    monkeypatch.setattr(checkpoint, "load", spy)
    resumed(tmp_path)
    assert seen[0] is not None


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
    assert manifest(tmp_path)["status"] == "failed"
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
