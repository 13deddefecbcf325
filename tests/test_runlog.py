"""Run folders, checkpoints, run.json's facts and the command line."""

import json
import math
import os
import shutil
from argparse import Namespace

import pytest
import torch

from common import checkpoint
from common.aggregation import WeightedMean
from common.cli import (
    Parser,
    RunFailed,
    UsageError,
    checked,
    fraction,
    method_of,
    non_negative_int,
    positive_float,
    run_main,
)
from common.client_rows import ClientRows
from common.participation import Turns, participants
from common.runlog import read_metrics, start_run


def arguments(folder, **more):
    base = {"output_dir": str(folder), "run_name": None, "resume": False, "overwrite": False, "track": "off", "lr": 0.1}
    machine = {"device": "cpu", "threads": 1, "amp": "off", "seed": 3}
    return Namespace(**{**base, **machine, **more})


class Counter:
    """A lasting object with one number."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = int(state["value"])


def train(args, rounds, at=None, bad=(), every=1, stop=None):
    """Twenty lines of a script: clients add 1 to theta. at: {round: what happens before it}; bad: (round, client)."""
    with start_run("train", args, "r") as run:
        run.begin({"dataset": "none", "source": "here"}, {"total": 2}, clients={"examples": [1, 2, 3, 4]})
        run.plan(rounds, every, 2)
        counter, rows = Counter(), ClientRows(run.folder / "clients" / "rows", in_place=True)
        theta = run.restore(torch.zeros(2), lambda v: {"a": v[:1], "b": v[1:]}, counter=counter, rows=rows)
        run.report(0, theta, lambda: {"val_loss": 9.0})
        for t in run.rounds():
            if at and t in at:
                at[t]()
            clients = run.sample([1.0, 2.0, 3.0, 4.0], 0.5, t, up=8, down=lambda k: k)
            mean = WeightedMean(theta, clients)
            for k in clients:
                row = rows.get(k)
                rows.put(k, {"n": row["n"] + 1 if row else torch.ones(1)})
                clients.note(k, train_loss=torch.tensor(float(k)), tag=k)
                clients.work(5)
                mean.add(theta + (math.nan if (t, k) in bad else 1.0), k + 1.0)
            theta = mean.result()
            counter.value += 10
            run.report(t + 1, theta, lambda: {"val_loss": float(t)})
            if stop == t:
                run.stop("plateau", "no progress")
        run.finish({"w": theta[0].item(), "count": counter.value})
    return theta, {k: rows.get(k) for k in range(4)}


def fail(error):
    def now():
        raise error

    return now


def manifest(folder):
    return checkpoint.read_json(folder / "r" / "run.json")


def drawn(rounds):
    return [k for t in range(rounds) for k in participants(3, 4, 0.5, t)]


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
    assert (last["tokens"], last["bytes_up"], last["bytes_down"]) == (40, 64, sum(drawn(4)))
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


def test_resume_goes_on_from_the_last_checkpoint(tmp_path):
    with pytest.raises(RuntimeError):
        train(arguments(tmp_path), 6, {3: fail(RuntimeError("the lights went out"))})
    ended = {"how": "failed", "by": None, "round": 3, "clients": None, "reason": "the lights went out"}
    assert (manifest(tmp_path)["status"], manifest(tmp_path)["ended"]) == ("failed", ended)
    assert [line["round"] for line in read_metrics(tmp_path / "r")] == [0, 1, 2, 3]
    theta, rows = train(arguments(tmp_path, resume=True), 6)
    whole, expected = train(arguments(tmp_path, run_name="whole"), 6)
    assert torch.equal(theta, whole) and rows == expected
    lines, others = (
        [{k: v for k, v in line.items() if "second" not in k} for line in read_metrics(tmp_path / name)]
        for name in ("r", "whole")
    )
    assert lines == others
    with pytest.raises(KeyboardInterrupt):
        train(arguments(tmp_path, run_name="early"), 6, {1: fail(KeyboardInterrupt())})
    assert checkpoint.read_json(tmp_path / "early" / "run.json")["ended"]["how"] == "interrupted"
    train(arguments(tmp_path, run_name="early", resume=True), 6)  # before the first checkpoint
    assert [line["round"] for line in read_metrics(tmp_path / "early")] == list(range(7))


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


def test_changed_flags_data_and_model_are_named(tmp_path):
    with pytest.raises(RuntimeError):
        train(arguments(tmp_path), 6, {3: fail(RuntimeError("x"))})
    with pytest.raises(UsageError, match="--lr 0.1 -> 0.2"):
        start_run("train", arguments(tmp_path, resume=True, lr=0.2), "r")
    for data, clients in (({"dataset": "another"}, {"examples": [1, 2, 3, 4]}), ({"dataset": "none"}, {})):
        with start_run("train", arguments(tmp_path, resume=True), "r") as run:
            with pytest.raises(UsageError, match="other data"):
                run.begin(data, {"total": 1}, clients=clients)
    with start_run("train", arguments(tmp_path, resume=True), "r") as run:
        run.begin({"dataset": "none"}, {}, clients={"examples": [1, 2, 3, 4]})
        with pytest.raises(UsageError, match="another model"):
            run.restore(torch.zeros(3), lambda v: {"a": v[:1], "b": v[1:]})


# ---- checkpoints


@pytest.mark.parametrize("n", range(7))
def test_a_death_at_any_step_of_a_save_leaves_one_whole_checkpoint(tmp_path, monkeypatch, n):
    """The n-th os.replace or rmtree of the real save raises: what loads is whole, the old or the new one."""
    folder, calls = tmp_path / "checkpoint", []
    checkpoint.save(folder, {"round": 1}, {"theta": {"w": torch.ones(2)}})

    def dying(real):
        def call(*args, **options):
            calls.append(args)
            if len(calls) == n + 1:
                raise SystemExit("killed")
            return real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            checkpoint.save(folder, {"round": 2}, {"theta": {"w": torch.zeros(2)}})
            died = False
        except SystemExit:
            died = True
    assert died == (n < 6)  # as many calls as a save has
    meta, shared = checkpoint.load(folder)
    assert torch.equal(shared["theta"]["w"], torch.ones(2) if meta["round"] == 1 else torch.zeros(2))
    checkpoint.save(folder, {"round": 3}, {"theta": {"w": torch.zeros(2)}})
    assert checkpoint.load(folder)[0]["round"] == 3
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint"]


def test_json_is_replaced_never_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    checkpoint.write_json(path, {"a": 1})
    for broken in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, lambda *_: fail(OSError(28, "No space left on device"))())
            with pytest.raises(OSError):
                checkpoint.write_json(path, {"a": 2})
        assert checkpoint.read_json(path) == {"a": 1}
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"a": object()})
    assert checkpoint.read_json(path) == {"a": 1}


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder, {"round": 1}, {"theta": {"w": torch.ones(2)}})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match="No space left on device.*--resume"):
        checkpoint.save(folder, {"round": 2}, {"theta": {"w": torch.zeros(2)}})
    assert checkpoint.load(folder)[0]["round"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint"]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "val')
    assert read_metrics(tmp_path) == [{"round": 1}]


def test_not_finite_numbers_are_valid_json(tmp_path):
    with start_run("train", arguments(tmp_path), "r") as run:
        run.begin({}, {})
        run.restore({"w": torch.zeros(1)})
        run.report(0, torch.zeros(1), lambda: {"val_ppl": float("inf"), "client_val_ppl": [float("nan")]})
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["val_ppl"] == "inf" and line["client_val_ppl"] == ["nan"]


def test_the_method_is_the_flags_that_a_run_reads():
    parser = Parser("test")
    group = parser.add_argument_group("g")
    group.add_argument("--sharding", default="iid")
    group.add_argument("--alpha", type=float, default=0.5, when=lambda a: a.sharding == "dirichlet")
    parser.add_argument("--output-dir", default="x")
    assert method_of(parser.parse_args([]), {"output_dir"}) == {"sharding": "iid"}
    args = parser.parse_args(["--sharding", "dirichlet"])
    assert method_of(args, {"output_dir"}) == {"sharding": "dirichlet", "alpha": 0.5}
    assert "reads" not in vars(args)


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


def test_a_bad_command_line_ends_with_its_line(capsys):
    assert checked(lambda x: x + 1, 2) == 3
    with pytest.raises(SystemExit) as stop:
        checked(fail(UsageError("no such data")))
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no such data\n"
