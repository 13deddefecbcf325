"""What may happen to a run's folder: a second process, damage, a disk that gives out. No result is a wrong one.

On the small run of small_run.py; test_faults.py does the same to the studies' scripts.
"""

import contextlib
import errno
import json
import os
import shutil
import signal

import harness
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import arguments, train

from common import checkpoint
from common.cli import RunFailed, UsageError
from common.curves import read_metrics
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

    def stop():
        raise RuntimeError("the lights went out")

    folder = tmp_path_factory.mktemp("half")
    with pytest.raises(RuntimeError):
        train(arguments(folder), 6, {5: stop})
    return folder / "r"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(arguments(folder), 6)
    return folder / "r"


def resumed(tmp_path):
    return train(arguments(tmp_path, resume=True), 6)


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
    assert "is in use, another process works in it" in ended.err
    ended = harness.run(words)
    assert ended.code == 0 and "resumed after round 4" in ended.err, ended.err


# ---- a checkpoint and the log up to it are whole or refused


def test_state_json_lists_what_a_checkpoint_holds(half):
    saved = half / "checkpoint"
    state = checkpoint.read_json(saved / "state.json")
    files = state["files"] | {f"rows_{int(k):06d}.safetensors": sha256 for k, sha256 in state["rows"]["rows"].items()}
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


@pytest.mark.parametrize(
    "file, damage",
    [
        ("counter.safetensors", os.remove),
        ("theta.safetensors", flip),
        ("theta.safetensors", as_int32),
        ("rows_000001.safetensors", lambda path: path.write_bytes(b"")),
        ("state.json", os.remove),
        ("state.json", edit(round=5)),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(file, damage, half, whole, tmp_path, capsys):
    folder = copied(half, tmp_path)
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
    folder = copied(half, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    wrong = "lacks a line that is in the checkpoint of round 4, or has one twice"
    for kept, words in (
        (lines[:3], wrong),
        ([*lines[:2], *lines[3:]], wrong),
        ([*lines[:3], lines[2], *lines[3:]], wrong),
        (lines[::-1], wrong),
        ([lines[0], "\0" * 40 + "\n", *lines[1:]], "line 2 is not a JSON object with a round"),
        (["{}\n", *lines], "line 1 is not a JSON object with a round"),
    ):
        (folder / "metrics.jsonl").write_text("".join(kept), errors="surrogateescape")
        assert words in refusal(tmp_path, folder)
    os.remove(folder / "metrics.jsonl")
    assert wrong in refusal(tmp_path, folder)


def test_other_versions_are_a_warning(half, tmp_path, capsys):
    folder = copied(half, tmp_path)
    facts = json.loads((folder / "run.json").read_text())
    facts["versions"]["torch"] = "0.1"
    (folder / "run.json").write_text(json.dumps(facts | {"git_commit": "one"}))
    resumed(tmp_path)
    said = (
        "other versions or another processor than at the start, bits may differ: git commit one -> None, torch 0.1 -> "
    )
    assert said in capsys.readouterr().err


# ---- the folder


@pytest.mark.parametrize(
    "content", ["[]", "", "[" * 5000, "{}", '{"command": "train", "status": "failed", "args": []}']
)
def test_a_run_json_that_is_none_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text(content)
    line = refusal(tmp_path, tmp_path / "r")
    assert "run.json is no JSON object" in line or "run.json lacks " in line
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


def test_a_run_in_a_linked_folder_is_overwritten_there(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "real")
    train(arguments(tmp_path), 2)
    train(arguments(tmp_path, overwrite=True), 3)
    assert (tmp_path / "r").is_symlink() and len(read_metrics(tmp_path / "real")) == 4
    assert sorted(os.listdir(tmp_path)) == ["r", "real"]


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


@contextlib.contextmanager
def read_only(folder, monkeypatch):
    """Nothing in `folder` can be changed, as on a disk that turned read-only."""
    import builtins
    import io

    def guarded(plain, writes=lambda *args: True):
        def call(path, *args, **more):
            if str(path).startswith(str(folder)) and writes(*args, *more.values()):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return plain(path, *args, **more)

        return call

    def writing(mode="r", *_):
        return set(mode) & set("wax+") if isinstance(mode, str) else mode & (os.O_WRONLY | os.O_RDWR)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", guarded(open, writing))
        patch.setattr(io, "open", guarded(io.open, writing))
        patch.setattr(os, "open", guarded(os.open, writing))
        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "link"):
            patch.setattr(os, name, guarded(getattr(os, name)))
        yield


def test_a_disk_that_turns_read_only_is_one_line_and_the_run_goes_on_when_it_can(whole, tmp_path, monkeypatch):
    for t in (0, 3):
        with contextlib.ExitStack() as stack:
            turn = {t: lambda stack=stack: stack.enter_context(read_only(tmp_path, monkeypatch))}
            with pytest.raises(RunFailed, match="cannot save .*Read-only file system.*make it writable, then --resume"):
                train(arguments(tmp_path, overwrite=True), 6, turn)
            with pytest.raises(UsageError, match="cannot write .*Read-only file system"):
                resumed(tmp_path)
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


def test_a_figure_that_was_cut_off_leaves_nothing_when_it_is_made_again(tmp_path):
    (tmp_path / "figure.py").write_text(
        "import sys\nfrom matplotlib.figure import Figure\nfrom common.curves import save_figure\n"
        "save_figure(Figure(), sys.argv[1])\n"
    )
    words, folder = [tmp_path / "figure.py", tmp_path / "plots" / "a.png"], tmp_path / "plots"
    ended = harness.run(words, die=(folder, 0, 2, signal.SIGKILL))
    assert ended.code == -signal.SIGKILL and len(os.listdir(folder)) == 1, ended
    assert harness.run(words).code == 0 and os.listdir(folder) == ["a.png"]
