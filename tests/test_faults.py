"""What may happen to a run and its files: a second process, damage, a disk that gives out. No result is a wrong one.

On the small run of small_run.py; benchmarks/faults.py does the same to the studies' scripts, at random.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from pathlib import Path

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import arguments, train

from common import checkpoint
from common.cli import Parser, RunFailed, UsageError, add_run_flags
from common.curves import read_metrics
from common.participation import participants
from common.runlog import start_run


@pytest.fixture(autouse=True, scope="module")
def no_git():
    """Asking git for the commit is most of what a run costs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.manifest.git_commit", lambda: None)
        yield


def broken_off(tmp_path, rounds=5):
    """A run of 6 rounds that ended before round `rounds`, its checkpoints after every second one: its folder."""

    def stop():
        raise RuntimeError("the lights went out")

    with pytest.raises(RuntimeError):
        train(arguments(tmp_path), 6, {rounds: stop})
    return tmp_path / "r"


def resumed(tmp_path):
    return train(arguments(tmp_path, resume=True), 6)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return broken_off(tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    train(arguments(tmp_path_factory.mktemp("whole")), 6)
    return tmp_path_factory.getbasetemp() / "whole0" / "r"


def copied(half, tmp_path):
    return shutil.copytree(half, tmp_path / "r")


def refusal(tmp_path, folder):
    """The line that refuses to resume the run in `folder`, which is left as it is."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as refused:
        resumed(tmp_path)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- one run, one process


def test_a_run_that_is_alive_takes_no_second_process(tmp_path):
    with start_run("train", arguments(tmp_path), "r") as run:
        run.begin({}, {})
        manifest = (tmp_path / "r" / "run.json").read_bytes()
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match=f"r is in use: process {os.getpid()} on .* works in it: wait"):
                start_run("train", arguments(tmp_path, **more), "r")
        assert (tmp_path / "r" / "run.json").read_bytes() == manifest
    assert not (tmp_path / "r" / ".lock").exists()
    train(arguments(tmp_path, overwrite=True), 2)
    assert sorted(os.listdir(tmp_path)) == ["r"] and not (tmp_path / "r" / ".lock").exists()


def test_of_two_that_start_at_once_the_second_is_refused(tmp_path):
    first, second, third = (start_run("train", arguments(tmp_path, lr=lr), "r") for lr in (0.1, 0.2, 0.3))
    with first:
        first.begin({}, {})
        manifest = (tmp_path / "r" / "run.json").read_bytes()
        with second, pytest.raises(UsageError, match="is in use"):
            second.begin({}, {})
    with third, pytest.raises(UsageError, match="made by another process meanwhile"):
        third.begin({}, {})
    assert (tmp_path / "r" / "run.json").read_bytes() == manifest and not (tmp_path / "r" / ".lock").exists()


def test_a_killed_process_that_has_not_closed_its_files_yet_is_waited_for(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    with start_run("train", arguments(tmp_path), "r") as run:
        run.begin({}, {})
    with open(tmp_path / "r" / ".lock", "w") as file:
        file.write(f"process {gone.pid} on {socket.gethostname()}\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        train(arguments(tmp_path, overwrite=True), 2)


SEVERAL = """
import os, sys
del os.environ["WORLD_SIZE"]
sys.path.insert(0, sys.argv[2])
from small_run import arguments, main
from common.processes import run_federated
run_federated(main, arguments(sys.argv[1], resume=True, processes=2), clients=2)
"""


def test_several_processes_are_refused_in_one_line(tmp_path, half):
    (tmp_path / "script.py").write_text(SEVERAL)
    words = [tmp_path / "script.py", copied(half, tmp_path).parent, harness.ROOT / "tests"]
    with start_run("train", arguments(tmp_path, resume=True), "r"):
        ended = harness.run(words)
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert f"in use: process {os.getpid()}" in ended.err
    ended = harness.run(words)
    assert ended.code == 0 and "resumed after round 4" in ended.err, ended.err


def test_a_killed_process_holds_no_lock_and_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "r"
    ended = harness.run(["tests/small_run.py", tmp_path], die=(folder, 2, "metrics.jsonl", signal.SIGKILL))
    assert ended.code == -signal.SIGKILL and (folder / ".lock").read_text().startswith("process ")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(arguments(tmp_path, resume=True), 2, save_every=1)
    assert "cannot be locked (No locks available): start no second run in it" in capsys.readouterr().err
    assert checkpoint.read_json(folder / "run.json")["status"] == "finished" and not (folder / ".lock").exists()


# ---- a checkpoint is whole or refused


def test_state_json_lists_what_a_checkpoint_holds(half):
    saved = half / "checkpoint"
    state = checkpoint.read_json(saved / "state.json")
    assert state["files"]["theta.safetensors"]["tensors"] == {"a": "float32 [1]", "b": "float32 [1]"}
    files = {file: about["sha256"] for file, about in state["files"].items()}
    files |= {f"rows_{int(k):06d}.safetensors": sha256 for k, sha256 in state["rows"]["rows"].items()}
    assert files == {path.name: checkpoint.seal(path) for path in saved.glob("*.safetensors")}
    assert set(files) == {path.name for path in saved.iterdir()} - {"state.json"}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def as_int32(path):
    save_file({name: t.to(torch.int32) for name, t in load_file(path).items()}, path)


def edit(**more):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


DAMAGE = [
    ("counter.safetensors", os.remove),
    ("counter.safetensors", flip),
    ("theta.safetensors", flip),
    ("theta.safetensors", as_int32),
    ("rows_000001.safetensors", os.remove),
    ("rows_000001.safetensors", lambda path: path.write_bytes(b"")),
    ("rows_000002.safetensors", flip),
    ("state.json", os.remove),
    ("state.json", edit(round=5)),
    ("state.json", edit(files={})),
    ("state.json", lambda path: path.write_text("[]")),
    ("state.json", lambda path: path.write_text("[" * 5000)),
    ("state.json", lambda path: path.write_bytes(b"\xff\xfe")),
]


@pytest.mark.parametrize("file, damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(file, damage, half, whole, tmp_path, capsys):
    folder = copied(half, tmp_path)
    damage(folder / "checkpoint" / file)
    line = refusal(tmp_path, folder)
    assert f"checkpoint/{file} " in line and f"goes on from {folder}/checkpoint.1, after round 2" in line
    shutil.rmtree(folder / "checkpoint")
    resumed(tmp_path)
    assert "resumed after round 2" in capsys.readouterr().err
    harness.same_run(folder, whole)


def test_a_run_without_the_checkpoints_that_it_had_is_not_begun_anew(half, whole, tmp_path):
    folder = copied(half, tmp_path)
    for name in ("checkpoint", "checkpoint.1"):
        shutil.rmtree(folder / name)
    assert "has rounds up to 5 in metrics.jsonl but no checkpoint to go on from: put it back" in refusal(
        tmp_path, folder
    )
    finished = shutil.copytree(whole, tmp_path / "s")
    for name in ("checkpoint", "checkpoint.1"):
        shutil.rmtree(finished / name)
    facts = json.loads((finished / "run.json").read_text())
    (finished / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    with pytest.raises(UsageError, match="has rounds up to 6 in metrics.jsonl but no checkpoint"):
        train(arguments(tmp_path, resume=True, run_name="s"), 6)


def test_a_log_that_was_edited_is_refused(half, tmp_path):
    folder = copied(half, tmp_path)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"val_loss": 1.0', '"val_loss": 0.5'))
    assert "metrics.jsonl was edited: its lines are not those at the checkpoint of round 4" in refusal(tmp_path, folder)


def test_a_run_says_who_worked_at_it_and_warns_of_another_commit(half, tmp_path, capsys, monkeypatch):
    folder = copied(half, tmp_path)
    facts = json.loads((folder / "run.json").read_text())
    assert [one["from_round"] for one in facts["sessions"]] == [0]
    facts["git_commit"] = facts["sessions"][0]["git_commit"] = "one"
    (folder / "run.json").write_text(json.dumps(facts))
    monkeypatch.setattr("common.manifest.git_commit", lambda: "two")
    resumed(tmp_path)
    said = "another version of this code than at the start, bits may differ: git commit one -> two"
    assert said in capsys.readouterr().err
    sessions = checkpoint.read_json(folder / "run.json")["sessions"]
    assert [(one["from_round"], one["git_commit"]) for one in sessions] == [(0, "one"), (4, "two")]


def test_a_run_in_a_linked_folder_is_overwritten_there(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "real")
    train(arguments(tmp_path), 2)
    train(arguments(tmp_path, overwrite=True), 3)
    assert (tmp_path / "r").is_symlink() and len(read_metrics(tmp_path / "real")) == 4
    assert sorted(os.listdir(tmp_path)) == ["r", "real"]


def test_without_a_whole_checkpoint_the_line_says_overwrite(half, tmp_path):
    folder = copied(half, tmp_path)
    for name in ("checkpoint", "checkpoint.1"):
        flip(folder / name / "theta.safetensors")
    assert "--overwrite" in refusal(tmp_path, folder) and "checkpoint.1" not in refusal(tmp_path, folder)


def test_what_a_run_has_published_is_as_it_was_or_refused(whole, tmp_path, capsys):
    """A power cut after a checkpoint may leave a file of before it empty: no best weights are half a file."""
    folder = tmp_path / "r"

    def publish(t):
        (folder / "best").mkdir(exist_ok=True)
        save_file({"a": torch.tensor([float(t)])}, folder / "best" / f"round_{t}.safetensors")

    def stop():
        publish(5)
        raise RuntimeError("the lights went out")

    with pytest.raises(RuntimeError):
        train(arguments(tmp_path), 6, {1: lambda: publish(1), 3: lambda: publish(3), 5: stop})
    assert len(checkpoint.read_json(folder / "checkpoint" / "state.json")["published"]) == 2  # after round 4
    flip(folder / "best" / "round_5.safetensors")  # of a round that is done again
    os.remove(folder / "best" / "round_1.safetensors")  # as --keep-best does
    file = folder / "best" / "round_3.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    line = refusal(tmp_path, folder)
    assert f"{file} is damaged" in line and f"delete {folder}/checkpoint, and --resume goes on from" in line
    shutil.rmtree(folder / "checkpoint")
    resumed(tmp_path)
    assert "resumed after round 2" in capsys.readouterr().err
    shutil.rmtree(folder / "best")
    harness.same_run(folder, whole)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(keep, tmp_path):
    train(arguments(tmp_path, keep_checkpoints=4), 5, save_every=1)
    train(arguments(tmp_path, run_name="s", keep_checkpoints=keep), 5, save_every=1)
    for name, many in (("r", 4), ("s", keep)):
        folders = ["checkpoint", *(f"checkpoint.{i}" for i in range(1, many))]
        assert sorted(path.name for path in (tmp_path / name).glob("checkpoint*")) == folders
        rounds = [checkpoint.read_json(tmp_path / name / folder / "state.json")["round"] for folder in folders]
        assert rounds == [5, 4, 3, 2][:many]


def test_fewer_checkpoints_than_before_and_other_flags_are_no_change(half, tmp_path):
    folder = copied(half, tmp_path)
    train(arguments(tmp_path, resume=True, keep_checkpoints=1), 6)
    assert [path.name for path in folder.glob("checkpoint*")] == ["checkpoint"]
    parser = Parser("test")
    add_run_flags(parser)
    assert parser.parse_args([]).keep_checkpoints == 2


def test_rows_that_did_not_change_are_links_to_the_last_checkpoint(tmp_path):
    train(arguments(tmp_path), 5, save_every=1)
    files = sorted((tmp_path / "r" / "checkpoint").glob("rows_*"))
    linked = [int(path.name[5:11]) for path in files if path.samefile(tmp_path / "r" / "checkpoint.1" / path.name)]
    assert linked == sorted({0, 1, 2, 3}.difference(participants(3, 4, 0.5, 4)))


def test_every_file_of_a_run_cut_at_every_tenth_is_refused_or_goes_on_as_if_whole(half, whole, tmp_path):
    files = [str(p.relative_to(half)) for p in half.rglob("*") if p.is_file() and p.parts[-2] != "checkpoint.1"]
    assert {"run.json", "metrics.jsonl", "checkpoint/state.json", "checkpoint/theta.safetensors"} < set(files)
    refused, folder = 0, copied(half, tmp_path)
    for file, tenth in itertools.product(files, range(10)):
        content = (half / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) * tenth // 10])
        try:
            resumed(tmp_path)
        except UsageError as error:
            refused += 1
            assert Path(file).name in str(error) and "\n" not in str(error), (file, tenth)
            (folder / file).write_bytes(content)
        else:
            harness.same_run(folder, whole)
            shutil.rmtree(folder)
            copied(half, tmp_path)
    assert refused >= 10 * len(files) - 2  # a log that lacks but lines of after the checkpoint is as good


# ---- the log


def test_a_log_shorter_than_its_checkpoint_is_refused_with_the_rounds_that_are_missing(half, tmp_path):
    folder = copied(half, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept, words in (
        (lines[:3], "lacks the lines of rounds 3, 4, which are in the checkpoint of round 4"),
        ([*lines[:2], *lines[3:]], "lacks the lines of rounds 2, "),
        ([], "lacks the lines of rounds 0, 1, 2, 3, 4, "),
        ([*lines[:3], lines[2], *lines[3:]], "has a round twice"),
        ([lines[0], "\0" * 40 + "\n", *lines[1:]], "line 2 is not a JSON object with a round"),
        ([lines[0], "\udcff\n", *lines[1:]], "line 2 is not a JSON object with a round"),
        (lines[::-1], "out of order"),
        (["[1]\n", *lines], "line 1 is not a JSON object with a round"),
        (["{}\n", *lines], "line 1 is not a JSON object with a round"),
    ):
        (folder / "metrics.jsonl").write_text("".join(kept), errors="surrogateescape")
        assert words in refusal(tmp_path, folder)
    os.remove(folder / "metrics.jsonl")
    assert "lacks the lines of rounds 0, 1" in refusal(tmp_path, folder)


def test_the_log_is_on_the_disk_before_the_checkpoint_that_counts_it(tmp_path, monkeypatch):
    log, events = str(tmp_path / "r" / "metrics.jsonl"), []
    plain = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(number):
        if os.readlink(f"/proc/self/fd/{number}") == log:
            events.append(len(read_metrics(tmp_path / "r")) - 1)
        plain["fsync"](number)

    def replace(source, target):
        if str(target).endswith("/checkpoint"):
            events.append("checkpoint")
        plain["replace"](source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    train(arguments(tmp_path), 4)
    assert events == [0, 1, 2, "checkpoint", 3, 4, "checkpoint"]


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
        run.report(0, torch.zeros(1), lambda: {"val_loss": value})
        run.finish({})


# ---- the folder


RUN_JSON = {
    "[]": "is no JSON object",
    "": "is not JSON",
    "[" * 5000: "is not JSON",
    "{}": "lacks command, args, status, data, resolved, versions",
    '{"command": "train", "status": "failed", "args": [1]}': "lacks args, data, resolved, versions",
}


@pytest.mark.parametrize("content", RUN_JSON)
def test_a_run_json_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(content)
    assert RUN_JSON[content] in refusal(tmp_path, tmp_path / "r")
    train(arguments(tmp_path, overwrite=True), 1)


def test_where_there_can_be_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for more, words in (
        ({"run_name": "file"}, f"{tmp_path}/file is a file"),
        ({"output_dir": f"{tmp_path}/file/deep"}, f"{tmp_path}/file is a file"),
        ({"run_name": "x" * 201}, "201 bytes: at most 200: give a shorter --run-name"),
        ({"output_dir": f"{tmp_path}/{'y' * 300}"}, "File name too long: choose another --output-dir"),
        ({"output_dir": "z/" * 2000}, "File name too long: choose another --output-dir"),
    ):
        with pytest.raises(UsageError) as refused:
            start_run("train", arguments(tmp_path, **more), "r")
        assert words in str(refused.value)
    train(arguments(tmp_path, run_name="x" * 200), 1)
    train(arguments(tmp_path, run_name="x" * 200, overwrite=True), 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json.new").write_text("")
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(UsageError, match="not a run folder"):
        start_run("train", arguments(tmp_path, run_name="mine"), "r")


@contextlib.contextmanager
def read_only(folder, monkeypatch):
    """Nothing in `folder` can be changed, as on a disk that turned read-only."""
    import builtins

    def guarded(plain, writes=lambda *args: True):
        def call(path, *args, **more):
            if str(path).startswith(str(folder)) and writes(*args, *more.values()):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return plain(path, *args, **more)

        return call

    def writing(mode="r", *_):
        return isinstance(mode, str) and set(mode) & set("wax+")

    with monkeypatch.context() as patch:
        import io

        patch.setattr(builtins, "open", guarded(open, writing))
        patch.setattr(io, "open", guarded(io.open, writing))
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link"):
            patch.setattr(os, name, guarded(getattr(os, name)))
        yield


def test_a_disk_that_turns_read_only_is_one_line_and_the_run_goes_on_when_it_can(half, whole, tmp_path, monkeypatch):
    for t in (0, 3):
        with contextlib.ExitStack() as stack:
            turn = {t: lambda stack=stack: stack.enter_context(read_only(tmp_path, monkeypatch))}
            with pytest.raises(RunFailed, match="cannot save .*Read-only file system.*make it writable, then --resume"):
                train(arguments(tmp_path, overwrite=True), 6, turn)
            with pytest.raises(UsageError, match="cannot write .*Read-only file system"):
                resumed(tmp_path)
            with pytest.raises(UsageError, match="cannot write .*Read-only file system"):
                train(arguments(tmp_path, overwrite=True), 6)
        resumed(tmp_path)
        harness.same_run(tmp_path / "r", whole)
    with read_only(tmp_path, monkeypatch), pytest.raises(SystemExit) as ended:
        resumed(tmp_path)  # finished
    assert ended.value.code == 0


def test_what_a_study_writes_itself_ends_in_one_line_too(tmp_path):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "r" / "deltas.npz"))

    with pytest.raises(RunFailed, match=r"cannot save .*deltas.npz: No space left on device.*make room"):
        train(arguments(tmp_path), 6, {3: full})
    assert checkpoint.read_json(tmp_path / "r" / "run.json")["status"] == "failed"
    resumed(tmp_path)


def test_the_process_that_sees_the_full_disk_first_leaves_the_folder_to_the_main_one(tmp_path, monkeypatch):
    """Else the main process fails because the folder is gone, and that is the line."""

    class Rows:
        def save(self, *_):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("common.parallel.is_main", lambda: False)
    (tmp_path / "checkpoint.new").mkdir()
    with pytest.raises(RunFailed, match="No space left on device"):
        checkpoint.save(tmp_path / "checkpoint", {}, {}, {"rows": Rows()})
    assert (tmp_path / "checkpoint.new").exists()


def test_a_figure_that_was_cut_off_leaves_nothing_when_it_is_made_again(tmp_path):
    (tmp_path / "figure.py").write_text(
        "import sys\nfrom matplotlib.figure import Figure\nfrom common.curves import save_figure\n"
        "save_figure(Figure(), sys.argv[1])\n"
    )
    words, folder = [tmp_path / "figure.py", tmp_path / "plots" / "a.png"], tmp_path / "plots"
    ended = harness.run(words, die=(folder, 0, 2, signal.SIGKILL))
    assert ended.code == -signal.SIGKILL and len(os.listdir(folder)) == 1, ended
    assert harness.run(words).code == 0 and os.listdir(folder) == ["a.png"]
