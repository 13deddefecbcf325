"""What ends a run from outside or in one of its processes: signals, kill -9, a failure, a wait that is too long."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import harness
import pytest
import torch
from small_run import arguments, train

from common import checkpoint, cli, grid
from common.checkpoint import read_json
from common.manifest import PATHS
from common.stopping import Terminated, stoppable


@pytest.fixture(autouse=True)
def sigint_is_heard():
    """Here and in the children: it is ignored where pytest was started in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_is_one_line_with_the_advice_that_works(number, line, capsys):
    def main(args):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as error:
            if args:
                error.add_note(args)
            raise

    before = signal.getsignal(number)
    for advice, told in ((None, line), ("the same command goes on", f"{line}: the same command goes on")):
        with pytest.raises(SystemExit) as stop:
            cli.run_main(main, advice)
        assert stop.value.code == 128 + number and capsys.readouterr().err == f"{told}\n"
    assert signal.getsignal(number) is before


def test_an_interruption_that_a_library_swallows_is_one():
    with pytest.raises(Terminated), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ValueError("inside a library") from error


def test_a_second_signal_at_once_is_the_same_one_and_a_later_one_ends_the_process(tmp_path):
    script = tmp_path / "keeps.py"
    script.write_text("""
import os, signal, sys, time
from common.cli import run_main
def main(args):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("kept", flush=True)
        if len(sys.argv) > 1:
            time.sleep(1.1)
            os.kill(os.getpid(), signal.SIGTERM)
            print("more", flush=True)
run_main(main, None)
""")
    runs = [harness.Started([script, *words]) for words in ((), ("later",))]
    both, later = [run.ended() for run in runs]
    assert (both.code, both.out, both.err) == (143, "kept\n", "terminated\n")
    assert (later.code, later.out, later.err) == (143, "kept\n", "")


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_while_a_script_imports_is_one_line(number, line, tmp_path):
    (tmp_path / "torch.py").write_text(f"import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(9)\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{harness.ROOT}"}
    words = [sys.executable, harness.ROOT / "mamba_fl" / "fed_avg.py"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (128 + number, f"{line}\n")


def test_sigterm_keeps_what_can_be_kept_and_the_run_goes_on(tmp_path):
    small = ["tests/small_run.py", tmp_path]
    ended = harness.run(small, die=(str(tmp_path / "r"), 1, 3, signal.SIGTERM))
    assert ended.code == 143 and ended.err.splitlines()[-1] == "terminated: run the same command with --resume to go on"
    facts = read_json(tmp_path / "r" / "run.json")
    assert facts["status"] == "interrupted" and facts["ended"]["how"] == "interrupted"
    assert harness.run([*small, "--resume"]).code == 0
    assert harness.run(["tests/small_run.py", tmp_path / "whole"]).code == 0
    harness.same_run(tmp_path / "r", tmp_path / "whole" / "r")


@pytest.mark.parametrize(("status", "then"), [("running", "interrupted"), ("failed", "failed")])
def test_a_signal_while_run_json_is_written_leaves_no_run_running(status, then, tmp_path, monkeypatch):
    """Another thread is alive, as torch's are: what the main one blocks comes by way of that."""
    write, done = checkpoint.write_json, threading.Event()

    def signalled(path, value):
        if value["status"] == "running":
            write(path, value)
        if value["status"] == status:
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, value)

    def fail():
        raise cli.RunFailed("a reason")

    threading.Thread(target=done.wait).start()
    monkeypatch.setattr(checkpoint, "write_json", signalled)
    with pytest.raises((Terminated, cli.RunFailed)), stoppable():
        train(arguments(tmp_path), 3, {1: fail})
    done.set()
    assert read_json(tmp_path / "r" / "run.json")["status"] == then


def test_a_refusal_under_torchrun_is_the_main_processs(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    for rank, line in (("0", "error: no such data\n"), ("1", "process 1: error: no such data\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            cli.end_with("error: no such data")
        assert stop.value.code == 2 and capsys.readouterr().err == line
    assert waited == [3]  # in which torchrun ends it, because the main process has refused


def test_what_a_grid_has_just_started_ends_with_it(tmp_path, monkeypatch):
    started = []

    def start(*command, **how):
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(grid, "start", start)
    with pytest.raises(Terminated), stoppable():
        grid.run_all([grid.Run("a", ("a.py",)), grid.Run("b", ("b.py",))], tmp_path, jobs=2)
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_a_run_ends_when_its_grid_is_killed(tmp_path):
    (tmp_path / "a.py").write_text("import time; time.sleep(60)")
    start = f"grid.start([{str(tmp_path / 'a.py')!r}], Path({str(tmp_path / 'a.txt')!r}))"
    code = f"import os; from pathlib import Path; from common import grid; print({start}.pid, flush=True)"
    code += "; os.kill(os.getpid(), 9)"
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -signal.SIGKILL
    state = Path(f"/proc/{int(ended.stdout)}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the run goes on")


# ---------------------------------------------------------------------------------------------- several processes


PLACE = "process 1, client 1 of round 2"
KILLED = "it was ended by SIGKILL, perhaps for its memory: the same command with --resume goes on"
ADVICE = "run the same command with --resume to go on"
CASES = {  # what each process does in its first client of round 2 -> the exit code, the last line
    "0:sleep 1:kill": (1, f"failed: {PLACE}: {KILLED}"),
    "0: 1:kill": (1, f"failed: {PLACE}: {KILLED}"),
    "0:sleep 1:raise": (1, f"failed: {PLACE}: no room"),
    "0: 1:raise": (1, f"failed: {PLACE}: no room"),
    "0: 1:bug": (1, f"failed: {PLACE}: ValueError: a bug"),
    "0:sleep 1:refuse": (2, f"error: {PLACE}: no such file"),
    "0:kill 1:": (137, f"failed: process 0, client 0 of round 2: {KILLED}"),
    "0: 1:sleep SIGINT": (130, f"interrupted: {ADVICE}"),
    "0:sleep 1: SIGTERM": (143, f"terminated: {ADVICE}"),
    "0: 1:sleep SIGKILL": (-9, ""),  # of the supervisor
    "1:wait_1.5": (0, ""),
    "0:late_1.5": (0, ""),
}


def there(folder):
    """The processes of a run that have come to round 2, and those of them that are alive."""
    pids = [path.name.removeprefix("pid_") for path in folder.glob("pid_*")]
    return pids, [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{case: (its folder, how it ended)}, all at a time: they sleep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        folders = {case: tmp_path_factory.mktemp("case") for case in CASES}
        started = {}
        for case, folder in folders.items():
            words = [word for word in case.split() if ":" in word]
            started[case] = harness.Started(["tests/stopped_run.py", folder, 2, *words])
    for case, one in started.items():
        number = getattr(signal, case.split()[-1], None)
        if number and until(lambda folder=folders[case]: len(there(folder)[0]) == 2, 60):
            os.kill(one.process.pid, number)
    return {case: (folders[case], one.ended(50)) for case, one in started.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_ends_one_process_ends_all_with_one_line(case, cases):
    (code, line), (folder, ended) = CASES[case], cases[case]
    assert ended.code == code, ended
    lines = [text for text in ended.err.splitlines() if not text.startswith(("round ", "run: "))]
    assert not line or lines[-1] == line and (len(lines) == 1 or "bug" in case), ended.err
    assert until(lambda: not there(folder)[1], 15)
    facts = read_json(folder / "r" / "run.json")
    if code == 0:
        late = "process 0" if "late" in case else "process 1, client 1 of round 2"
        assert f"waiting for {late} for 0.0" in ended.err  # perhaps after one for its start
    elif code in (1, 2):
        assert facts["status"] == "failed" and line.endswith(facts["reason"])
    elif code == -9:  # the processes hear of the supervisor's end by a signal, or by an exchange that fails
        assert facts["status"] in ("interrupted", "failed")
    else:  # where the main process was killed nobody could say it in run.json
        assert facts["status"] == ("running" if code == 137 else "interrupted")


def test_what_was_ended_by_a_process_that_was_killed_goes_on(cases):
    (folder, _), (whole, _) = (cases[case] for case in ("0: 1:kill", "1:wait_1.5"))
    assert harness.run(["tests/stopped_run.py", folder, 1]).code == 0
    harness.same_run(folder / "r", whole / "r")


def test_without_a_supervisor_who_is_left_names_who_is_gone(tmp_path):
    alone = harness.Started(["tests/stopped_run.py", tmp_path, 2], env={"WORLD_SIZE": "2", "RANK": "1"})
    ended = harness.run_ranks(["tests/stopped_run.py", tmp_path, 2, "1:kill"], 2)
    assert [one.code for one in ended] == [1, -9]
    assert ended[0].err.splitlines()[-1] == f"failed: another process is gone ({PLACE}): see its output"
    ended = alone.ended()  # which cannot meet the others
    assert ended.code == 2 and ended.err.startswith("error: process 1: WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is")


@pytest.mark.parametrize(
    ("second", "code", "line"),
    [
        ("kill", 1, f"failed: {PLACE}: it is gone, perhaps it was killed for its memory: the same command with"),
        ("sleep", 143, f"terminated: {ADVICE}"),  # both are asked to end, and the second is first to do so
    ],
)
def test_under_torchrun_who_is_ended_because_another_was_killed_names_that_one(second, code, line, tmp_path):
    first, other = harness.start_ranks(["tests/stopped_run.py", tmp_path, 2, "0:sleep", f"1:{second}"], 2)
    assert until(lambda: len(there(tmp_path)[0]) == 2, 60)
    if second == "sleep":
        os.kill(other.process.pid, signal.SIGTERM)
    assert other.ended().code == (143 if second == "sleep" else -9)
    os.kill(first.process.pid, signal.SIGTERM)  # as torchrun does
    ended = first.ended()
    assert ended.code == code and ended.err.splitlines()[-1].startswith(line), ended.err
    assert read_json(tmp_path / "r" / "run.json")["status"] == ("failed" if code == 1 else "interrupted")


# ---------------------------------------------------------------------------------------------- what may go on


def begun(folder, rounds=3, **flags):
    """A run of small_run.train that was asked for so many rounds."""
    return train(arguments(folder, rounds=rounds, **flags), rounds, save_every=1)[0]


def test_paths_are_compared_by_what_they_hold(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "config.json").write_text("{}")
    (here / "shard.json").write_text("[1]")
    monkeypatch.chdir(here)
    begun(tmp_path, model="model", shard="shard.json", init_from="tiny")
    monkeypatch.chdir(there)
    again = {"shard": "../here/shard.json", "init_from": "tiny", "resume": True}
    for name in ("model", str(here / "model"), "../there/model/"):
        with pytest.raises(SystemExit) as stop:  # it is finished
            begun(tmp_path, model=name, **again)
        assert stop.value.code == 0
    with pytest.raises(cli.UsageError, match="--init-from tiny -> small"):
        begun(tmp_path, model="model", **again | {"init_from": "small"})
    (there / "model" / "config.json").write_text("[]")
    with pytest.raises(cli.UsageError, match="another content of --model model than is now in model"):
        begun(tmp_path, model="model", **again)
    (here / "model" / "weights").write_text("")
    with pytest.raises(cli.UsageError, match="another content of --model"):
        begun(tmp_path, model=str(here / "model"), **again)
    with pytest.raises(cli.UsageError, match="--model model -> none"):
        begun(tmp_path, model="none", **again)


def test_a_run_does_not_delete_what_it_starts_from(tmp_path):
    begun(tmp_path)
    start = tmp_path / "r" / "final" / "theta.safetensors"
    (tmp_path / "link").symlink_to(tmp_path / "r")
    for flag, path in itertools.product(PATHS, (start, start.parent, tmp_path / "link")):
        with pytest.raises(cli.UsageError, match=f"would delete --{flag.replace('_', '-')} {path}, from which"):
            begun(tmp_path, overwrite=True, **{flag: str(path)})
    assert start.exists()
    begun(tmp_path, overwrite=True, run_name="s", mask=str(start))


def test_a_run_goes_on_for_more_rounds_where_none_depends_on_how_many_there_are(tmp_path):
    begun(tmp_path, scheduler="none")
    assert torch.equal(begun(tmp_path, 6, scheduler="none", resume=True), begun(tmp_path / "whole", 6))
    harness.same_run(tmp_path / "r", tmp_path / "whole" / "r")
    with pytest.raises(cli.UsageError, match="--rounds 6 -> 3: --resume can only raise it"):
        begun(tmp_path, 3, scheduler="none", resume=True)
    begun(tmp_path / "cosine", scheduler="cosine")
    with pytest.raises(cli.UsageError, match="--rounds 3 -> 6: with --scheduler cosine a round's rate depends"):
        begun(tmp_path / "cosine", 6, scheduler="cosine", resume=True)
    assert read_json(tmp_path / "cosine" / "r" / "run.json")["status"] == "finished"


@pytest.mark.parametrize(
    ("length", "old", "new", "flags", "line"),
    [
        ("epochs", 3, 6, {"scheduler": "none", "warmup_epochs": 2}, None),
        ("epochs", 3, 6, {"scheduler": "none", "warmup_epochs": 5}, "the warm-up, --warmup-epochs 5, was cut to 2"),
        ("epochs", 3, 6, {"scheduler": "step"}, r"with --scheduler step a round's rate .* \(with none it does not\)"),
        ("num_train_epochs", 2.0, 2.5, {"lr_scheduler": "constant", "warmup_ratio": 0.0}, None),
        ("num_train_epochs", 2.5, 4.0, {"lr_scheduler": "constant"}, "the last epoch was cut short"),
        (
            "num_train_epochs",
            2.0,
            4.0,
            {"warmup_ratio": 0.1},
            "the warm-up is a share of all steps, --warmup-ratio",
        ),
        (
            "n_epochs",
            0.5,
            1.0,
            {"lr_scheduler": "cosine"},
            r"with --lr-scheduler cosine .*with constant it does not",
        ),
        ("n_epochs", 1.0, 0.5, {}, "--resume can only raise it"),
        ("n_epochs", 0.5, 1.0, {"rounds": None}, None),
    ],
)
def test_a_run_goes_on_for_more_epochs_too(length, old, new, flags, line, tmp_path):
    train(arguments(tmp_path, **flags, **{length: old}), 3)
    again = arguments(tmp_path, resume=True, **flags, **{length: new})
    if line is None:
        assert torch.equal(train(again, 5)[0], train(arguments(tmp_path, run_name="whole"), 5)[0])
        return
    spelled = f"--{length.replace('_', '-')}"
    with pytest.raises(cli.UsageError, match=f"^{spelled} {old} -> {new}: {line}.*: choose another --run-name$"):
        train(again, 5)


def test_a_flag_that_is_newer_than_a_run_counts_only_where_it_is_given(tmp_path):
    args = cli.Flags()
    vars(args).update(vars(arguments(tmp_path)))
    train(args, 2)
    args.resume, args.server_lr, args.given = True, 0.5, []
    with pytest.raises(SystemExit) as stop:  # it is finished
        train(args, 2)
    assert stop.value.code == 0
    args.given = ["server_lr"]
    with pytest.raises(cli.UsageError, match="other flags: --server-lr None -> 0.5"):
        train(args, 2)
