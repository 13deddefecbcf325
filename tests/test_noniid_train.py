"""llm_noniid/train.py: identities of algorithms, how runs end, what its flags decide."""

import math

import numpy as np
import pytest
import torch
from comparing import same_bits
from harness import read_lines, whole
from noniid_script import call, done, failing, served, spied, words

from common.checkpoint import read_json
from common.runlog import Run, read_metrics
from llm_noniid import detectors, fed_core, flags, train
from plots import read

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------------ identities


def test_fedprox_of_mu_zero_and_momentum_of_zero_are_fedavg(tmp_path):
    plain = served(done(tmp_path, "plain", "--num-rounds 2"))
    for name, more in (("prox", "--algorithm fedprox --mu 0"), ("m", "--algorithm fedavgm --server-momentum 0")):
        assert same_bits(served(done(tmp_path, name, f"--num-rounds 2 {more}")), plain)


def test_one_client_is_central_training_and_local_training(tmp_path):
    alone = "--num-clients 1 --num-rounds 2 --client-optimizer sgd --learning-rate 0.1"  # nothing to keep
    folders = [done(tmp_path, a, f"{alone} --algorithm {a}") for a in ("fedavg", "central", "local")]
    lines = [read_metrics(folder)[1:] for folder in folders]
    for folder, other in zip(folders[1:], lines[1:], strict=True):
        assert same_bits(served(folders[0]), served(folder))
        for x, y in zip(lines[0], other, strict=True):
            assert all(x[name] == y[name] for name in ("train_loss", "val_loss", "client_val_loss", "tokens"))


def test_each_client_holds_out_a_tenth_of_its_texts(tmp_path, monkeypatch):
    studies = spied(monkeypatch)
    done(tmp_path, "a", "--num-rounds 1 --local-steps 1")
    (study,) = studies
    for mine, held in zip(study.rows, study.held, strict=True):
        assert len(held) == max(1, (len(mine) + len(held)) // 10) and not set(mine) & set(held)
    assert np.array_equal(np.sort(np.concatenate([*study.rows, *study.held])), np.arange(160))
    partition = read_json(tmp_path / "a" / "partition.json")
    assert sum(partition["counts"]) == 160 and len(partition["vocabulary_overlap"]) == 4


# ----------------------------------------------------------------------------------------------- how runs end


def test_clients_that_are_left_out_raise_an_alarm_once_and_more_than_half_of_a_round_end_the_run(tmp_path, monkeypatch):
    failing(monkeypatch, {(0, 2), (1, 2), (3, 0), (3, 1), (3, 3)})
    assert call(*words(tmp_path, "a", "--eval-every 3 --num-rounds 9 --local-steps 1")) == 1
    first, line = read_metrics(tmp_path / "a")
    assert first["round"] == 0 and line["left_out"] == [[1, 2], [2, 2]] and line["left_out_updates"] == 2
    assert [(alarm["detector"], alarm["round"]) for alarm in line["alarms"]] == [("left_out", 1)]
    manifest = read_json(tmp_path / "a" / "run.json")
    assert manifest["status"] == "failed" and "--learning-rate (0.005)" in manifest["reason"]
    expected = {"how": "failed", "by": "left_out", "round": 4, "clients": [0, 1, 3], "reason": manifest["reason"]}
    assert manifest["ended"] == expected


def test_a_run_whose_loss_is_not_finite_has_failed_and_is_a_result_all_the_same(tmp_path):
    """The weights are finite, the loss under them is not."""
    assert call(*words(tmp_path, "a", "--learning-rate 1e20 --local-steps 1 --num-rounds 1")) == 1
    line, manifest = read_metrics(tmp_path / "a")[-1], read_json(tmp_path / "a" / "run.json")
    assert not math.isfinite(float(line["val_loss"])) and not math.isfinite(float(line["mean_client_val_loss"]))
    assert (manifest["status"], manifest["ended"]["by"], manifest["results"]) == ("failed", "not_finite", None)
    assert [alarm["detector"] for alarm in line["alarms"]] == ["diverged"]
    assert not (tmp_path / "a" / "final").exists()
    runs = read.read(tmp_path)
    assert runs["curve"][0] == read_metrics(tmp_path / "a") and read.not_finite(manifest)


def rising(monkeypatch):
    """Makes the logged loss rise from the third round on, by a half of itself a round."""
    real = fed_core.text_model.quality
    seen = []

    def quality(model, texts, thetas, weights, split, rows, name):
        figures = real(model, texts, thetas, weights, split, rows, name)
        if name == "val":
            figures["val_loss"] *= 1 + max(0, len(seen) - 2) / 2
            seen.append(1)
        return figures

    monkeypatch.setattr(fed_core.text_model, "quality", quality)


@pytest.mark.parametrize("stop_on, rounds", [("never", 7), ("divergence", 3)])
def test_stop_on_ends_the_run_at_the_alarm(stop_on, rounds, tmp_path, monkeypatch):
    rising(monkeypatch)
    more = f"--num-rounds 7 --local-steps 1 --probe-samples 0 --stop-on {stop_on}"
    folder, manifest = done(tmp_path, "a", more), read_json(tmp_path / "a" / "run.json")
    assert manifest["results"]["rounds"] == rounds == read_metrics(folder)[-1]["round"]
    (alarm,) = (alarm for alarm in manifest["results"]["alarms"] if alarm["detector"] == "diverged")
    assert alarm["round"] == 3 and "nats in 3 rounds" in alarm["message"]  # of 8 evaluations
    stopped = {"how": "stopped", "by": "diverged", "round": 3, "clients": None, "reason": alarm["message"]}
    finished = {"how": "finished", "by": None, "round": 7, "clients": None, "reason": None}
    assert manifest["ended"] == (finished if stop_on == "never" else stopped)
    after = detectors.run_detectors(detectors.curves_of(read_metrics(folder)))
    assert sorted(a["message"] for a in manifest["results"]["alarms"]) == sorted(a.message for a in after)


def test_a_run_that_was_cut_off_after_its_last_alarm_does_not_go_on(tmp_path, monkeypatch):
    more = "--num-rounds 7 --local-steps 1 --probe-samples 0 --stop-on divergence"
    rising(monkeypatch)
    folder = done(tmp_path, "whole", more)
    monkeypatch.undo()
    rising(monkeypatch)

    def broken(self, write):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "write_final", broken)
    assert call(*words(tmp_path, "a", more)) == 130
    monkeypatch.undo()
    assert call(*words(tmp_path, "a", more), "--resume") == 0
    assert read_json(tmp_path / "a" / "run.json")["ended"] == read_json(folder / "run.json")["ended"]
    assert read_lines(folder) == read_lines(tmp_path / "a")


# ------------------------------------------------------------------------------------------------- its flags


def test_the_data_are_the_same_whatever_the_seed(tmp_path):
    data = [read_json(whole(f"llm_noniid/{way}") / "run.json")["data"] for way in ("fedprox", "fedavg")]
    other = read_json(done(tmp_path, "a", "--seed 1 --num-rounds 1 --local-steps 1") / "run.json")
    assert data[0] == data[1] == other["data"]


def test_central_takes_all_cores_unless_told():
    for threads, expected in ((0, torch.get_num_threads()), (3, 3)):
        line = ["--algorithm", "central", "--threads", str(threads)]
        assert flags.parse(train.build_parser(), line).threads == expected
