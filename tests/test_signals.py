"""What ends a run from outside or in one of its processes: signals, kill -9, a failure, a wait that is too long."""

import os
import signal

import harness
import pytest

from common import cli
from common.checkpoint import read_json


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


# ---------------------------------------------------------------------------------------------- several processes


KILLED = "was ended by SIGKILL, perhaps for its memory: the same command with --resume goes on"
ADVICE = "run the same command with --resume to go on"
CASES = {  # what each process does in round 2 -> the exit code, the last line
    "0:sleep 1:kill": (1, f"failed: process 1 {KILLED}"),
    "0: 1:kill": (1, f"failed: process 1 {KILLED}"),
    "0: 1:raise": (1, "process 1: failed: no room"),
    "0: 1:bug": (1, "process 1: failed: ValueError: a bug"),
    "0: 1:refuse": (2, "process 1: error: no data here"),
    "0:refuse 1:": (2, "error: no data here"),
    "0:refuse 1:refuse": (2, "error: no data here"),
    "0:kill 1:": (1, f"failed: process 0 {KILLED}"),
    "0: 1:sleep SIGINT": (130, f"interrupted: {ADVICE}"),
    "0:sleep 1: SIGTERM": (143, f"terminated: {ADVICE}"),
    "0: 1:sleep SIGKILL": (-9, ""),  # of the starter
    "0: 1:": (0, ""),
}


def there(folder):
    """The processes of a run that have come to round 2, and those of them that are alive."""
    pids = [path.name.removeprefix("pid_") for path in folder.glob("pid_*")]
    return pids, [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """{case: (its folder, how it ended)}, all at a time: they sleep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        folders = {case: tmp_path_factory.mktemp("case") for case in CASES}
        started = {}
        for case, folder in folders.items():
            words = [word for word in case.split() if ":" in word]
            started[case] = harness.Started(["tests/small_run.py", folder, 2, *words])
    for case, one in started.items():
        number = getattr(signal, case.split()[-1], None)
        if number and harness.until(lambda folder=folders[case]: len(there(folder)[0]) == 2, 60):
            os.kill(one.process.pid, number)
    return {case: (folders[case], one.ended(50)) for case, one in started.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_ends_one_process_ends_all_with_one_line(case, cases):
    (code, line), (folder, ended) = CASES[case], cases[case]
    assert ended.code == code, ended
    lines = [text for text in ended.err.splitlines() if not text.startswith(("round ", "run: "))]
    assert not line or lines[-1] == line and (len(lines) == 1 or "bug" in case), ended.err
    assert harness.until(lambda: not there(folder)[1], 15)
    how = ("finished",) if code == 0 else ("interrupted", "failed")
    # where the main process was killed nobody could say it in run.json
    assert read_json(folder / "r" / "run.json")["status"] in (("running",) if "0:kill" in case else how)


def test_what_was_ended_by_a_process_that_was_killed_goes_on(cases):
    whole = cases["0: 1:"][0] / "r"
    for case in ("0: 1:kill", "0:kill 1:"):
        assert harness.run(["tests/small_run.py", cases[case][0], "--resume"]).code == 0
        harness.same_run(cases[case][0] / "r", whole)


def test_under_torchrun_each_process_says_what_it_knows(tmp_path):
    """torchrun itself ends the others, and gives the exit code."""
    alone = harness.Started(["tests/small_run.py", tmp_path, 2], env={"WORLD_SIZE": "2", "RANK": "1"})
    ended = harness.run_ranks(["tests/small_run.py", tmp_path, 2, "1:raise"], 2)
    assert [one.code for one in ended] == [1, 1]
    assert ended[0].err.splitlines()[-1].endswith("another process has ended, see its output")
    assert ended[1].err == "process 1: failed: no room\n"
    ended = alone.ended()  # which cannot meet the others
    assert ended.code == 2 and "error: WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT is" in ended.err
