"""Run folders, checkpoints and the command line."""

import json
import os
from argparse import Namespace

import pytest
import torch

from common.cli import Parser, RunFailed, UsageError, fraction, non_negative_int, positive_float, run_main
from common.runlog import read_metrics, start_run


def arguments(folder, **more):
    base = {"output_dir": str(folder), "run_name": None, "resume": False, "overwrite": False, "track": "off", "lr": 0.1}
    return Namespace(**{**base, **more})


class Counter:
    """A lasting object with one number."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = int(state["value"])


class PerClient:
    """A lasting object with a tensor per client."""

    def __init__(self):
        self.states = {}

    def client_states(self):
        return self.states

    def load_client(self, k, load):
        self.states[k] = load(k)


def train(args, rounds, stop_after=None, error=None):
    """Ten lines of a script: theta counts the rounds."""
    with start_run("train", args, "r") as run:
        run.begin({"dataset": "none", "source": "here"}, {"total": 1})
        lasting = {"counter": Counter(), "clients": PerClient()}
        theta = run.restore({"w": torch.zeros(1)}, lasting)
        for round in run.rounds(rounds):
            if round == stop_after:
                raise error
            theta = {"w": theta["w"] + 1}
            lasting["counter"].value += 10
            lasting["clients"].states[round % 3] = {"m": torch.full((2,), float(round))}
            run.count(tokens=5)
            run.log(round, {"val_loss": float(round)})
            if round % 2 == 1:
                run.save(round, theta, lasting)
        run.finish({"w": theta["w"].item(), "count": lasting["counter"].value})
    return theta, lasting


def test_another_model_is_refused(tmp_path):
    train(arguments(tmp_path), 2)
    with start_run("train", arguments(tmp_path, run_name="r2"), "r") as run:
        run.begin({}, {})
        os.rename(tmp_path / "r" / "checkpoint", tmp_path / "r2" / "checkpoint")
        with pytest.raises(UsageError, match="another model"):
            run.restore({"w": torch.zeros(2)}, {})


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "val')
    assert read_metrics(tmp_path) == [{"round": 1}]


def test_not_finite_numbers_are_valid_json(tmp_path):
    with start_run("train", arguments(tmp_path), "r") as run:
        run.begin({}, {})
        for round in run.rounds(1):
            run.log(round, {"val_ppl": float("inf"), "client_val_ppl": [float("nan")]})
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["val_ppl"] == "inf" and line["client_val_ppl"] == ["nan"]


def test_hyphens_and_underscores_are_one_flag(capsys):
    parser = Parser("test")
    parser.add_argument("--num-clients", type=non_negative_int, default=4, help="clients")
    parser.add_argument("--lr", type=positive_float, default=0.1, help="step")
    parser.add_argument("--share", type=fraction, help="share")
    for spelling in ("--num_clients", "--num-clients"):
        assert parser.parse_args([spelling, "7"]).num_clients == 7
        assert parser.parse_args([spelling + "=7"]).num_clients == 7
    for bad in (["--num-cli", "7"], ["--lr", "0"], ["--lr", "inf"], ["--share", "1.1"], ["--num-clients", "1.5"]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(bad)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert "(default: 4)" in parser.format_help()


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UsageError("7 clients"), 2, "error: 7 clients"),
        (RunFailed("no room"), 1, "failed: no room"),
        (KeyboardInterrupt(), 130, "--resume"),
        (None, 0, ""),
    ],
)
def test_exit_codes(error, code, line, capsys):
    def main(args):
        if error:
            raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main, None)
    assert stop.value.code == code and line in capsys.readouterr().err
