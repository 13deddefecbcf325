"""What a run says on stderr while it goes on: what runs, how far it is, the time left."""

import sys
from types import SimpleNamespace

import pytest
from small_run import arguments, train

from common import parallel, progress
from common.curves import read_metrics
from common.progress import Progress

ROUND, EVALUATION = 10.0, 50.0  # seconds


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def rounds(clock, start, total, every, evaluating, said, shown="val_loss 2"):
    """Rounds of one pace and evaluations of another. Yields (t, seconds left, truly left)."""
    meter = Progress(start, total, every, evaluating, said.append)
    is_due = [t == total or t % every == 0 for t in range(total + 1)]
    for t in range(start + 1, total + 1):
        clock.seconds += ROUND
        if is_due[t]:
            clock.seconds += EVALUATION
            evaluating += EVALUATION
            said.append(f"evaluated {t}" + meter.in_line(t, evaluating))
        yield t, meter.left(t, evaluating), ROUND * (total - t) + EVALUATION * sum(is_due[t + 1 :])
        meter.after_round(t, evaluating, shown)


@pytest.mark.parametrize(("start", "evaluations"), [(0, 1), (10, 3), (12, 3)])
def test_the_time_left_has_no_jumps_from_the_first_round_on(start, evaluations, clock):
    """evaluations: those before the first round of this session."""
    for t, left, truly in rounds(clock, start, 33, 5, EVALUATION * evaluations, []):
        assert left == pytest.approx(truly), t


def test_without_a_terminal_there_is_a_line_a_minute_at_most(clock):
    said = []
    list(rounds(clock, 0, 20, 12, EVALUATION, said))
    assert said == [
        "round 6/20  30 %  4 min left  val_loss 2",
        "evaluated 12  2 min left",
        "round 18/20  90 %  70 s left  val_loss 2",
        "evaluated 20",
    ]


def test_in_a_terminal_the_time_left_is_in_the_bar_only(clock, monkeypatch):
    written, said = [], []
    terminal = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None, encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", terminal)
    list(rounds(clock, 2, 8, 3, EVALUATION, said))
    assert said == ["evaluated 3", "evaluated 6", "evaluated 8"]
    assert "2/8 rounds [" in written[0] and "0 s left, val_loss 2" in "".join(written)


def test_a_run_says_what_runs_and_what_still_runs_after_its_rounds(tmp_path, capsys):
    train(arguments(tmp_path, participation=0.5), 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "run: 4 clients, 2 a round; 2 of 2 parameters trained; cpu, 1 processes, float32; 2 rounds"
    assert [line.split()[:2] for line in lines[1:]] == [["round", f"{t}/2"] for t in range(3)] + [["writing", "final/"]]
    assert "0 s left" in lines[2] and "left" not in lines[1] + lines[3]


def test_a_line_of_metrics_has_the_peak_memory_of_the_process_that_takes_most(tmp_path, monkeypatch):
    train(arguments(tmp_path), 2)
    peaks = [row["peak_memory"] for row in read_metrics(tmp_path / "r")]
    assert peaks == sorted(peaks) and 2**26 < peaks[0] and peaks[-1] < 2**36  # bytes, of a process with torch
    monkeypatch.setattr(parallel, "all_gather", lambda one: [one, 2**40] if isinstance(one, int) else [one])
    train(arguments(tmp_path, overwrite=True), 2)
    assert read_metrics(tmp_path / "r")[-1]["peak_memory"] == 2**40
