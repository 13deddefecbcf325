"""llm_noniid/train.py: identities of algorithms, how runs end, what its flags decide."""

import math

import pytest
from comparing import same_bits
from noniid_script import call, done, failing, served, words

from common.checkpoint import read_json
from common.runlog import read_metrics
from llm_noniid import fed_core
from llm_noniid.detectors import alarms_of
from plots import read

pytestmark = pytest.mark.slow


# ------------------------------------------------------------------------------------------------ identities


def test_fedprox_of_mu_zero_and_momentum_of_zero_are_fedavg(tmp_path):
    two = "--num-rounds 2 --local-steps 2 --probe-samples 0 --eval-every 2"
    plain = served(done(tmp_path, "plain", two))
    for name, more in (("prox", "--algorithm fedprox --mu 0"), ("m", "--algorithm fedavgm --server-momentum 0")):
        assert same_bits(served(done(tmp_path, name, f"{two} {more}")), plain)


def test_one_client_is_central_training_and_local_training(tmp_path):
    alone = (
        "--num-clients 1 --num-rounds 2 --probe-samples 0 --client-optimizer sgd --learning-rate 0.1"  # nothing to keep
    )
    folders = [done(tmp_path, a, f"{alone} --algorithm {a}") for a in ("fedavg", "central", "local")]
    lines = [read_metrics(folder)[1:] for folder in folders]
    for folder, other in zip(folders[1:], lines[1:], strict=True):
        assert same_bits(served(folders[0]), served(folder))
        for x, y in zip(lines[0], other, strict=True):
            assert all(x[name] == y[name] for name in ("train_loss", "val_loss", "client_val_loss", "tokens"))


# ----------------------------------------------------------------------------------------------- how runs end


def test_clients_that_are_left_out_are_logged_and_more_than_half_of_a_round_end_the_run(tmp_path, monkeypatch):
    failing(monkeypatch, {(0, 2), (1, 2), (3, 0), (3, 1), (3, 3)})
    assert call(*words(tmp_path, "a", "--eval-every 3 --num-rounds 9 --local-steps 1")) == 1
    first, line = read_metrics(tmp_path / "a")
    assert first["round"] == 0 and line["left_out"] == [[1, 2], [2, 2]] and line["left_out_updates"] == 2
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

    def quality(model, thetas, weights, split, rows, name):
        figures = real(model, thetas, weights, split, rows, name)
        if name == "val":
            figures["val_loss"] *= 1 + max(0, len(seen) - 2) / 2
            seen.append(1)
        return figures

    monkeypatch.setattr(fed_core.text_model, "quality", quality)


def test_an_alarm_is_logged_once_and_stands_in_the_results(tmp_path, monkeypatch):
    rising(monkeypatch)
    folder = done(tmp_path, "a", "--num-rounds 5 --local-steps 1 --probe-samples 0 --eval-samples 2")
    (alarm,) = read_json(folder / "run.json")["results"]["alarms"]
    assert (alarm["detector"], alarm["round"]) == ("diverged", 3)  # of 6 evaluations
    assert [line["alarms"] for line in read_metrics(folder) if "alarms" in line] == [[alarm]]
    assert alarms_of(read_metrics(folder), 6) == [alarm]


# ------------------------------------------------------------------------------------------------- its flags
