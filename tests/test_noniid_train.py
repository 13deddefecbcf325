"""llm_noniid/train.py: an identity of algorithms, how runs end, what --final best leaves."""

import math

import pytest
from comparing import same_bits
from noniid_script import call, done, failing, served, words
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.runlog import Run, read_metrics
from llm_noniid import fed_core
from llm_noniid.diagnostics import alarms_of
from plots import read

pytestmark = pytest.mark.slow


def test_one_client_is_central_training_and_local_training(tmp_path):
    alone = "--num-clients 1 --num-rounds 2 --client-optimizer sgd --learning-rate 0.1"  # an optimiser without state
    folders = [done(tmp_path, a, f"{alone} --algorithm {a}") for a in ("fedavg", "central", "local")]
    lines = [read_metrics(folder)[1:] for folder in folders]
    for folder, other in zip(folders[1:], lines[1:], strict=True):
        assert same_bits(served(folders[0]), served(folder))
        for x, y in zip(lines[0], other, strict=True):
            assert all(x[name] == y[name] for name in ("train_loss", "val_loss", "client_val_loss", "tokens"))


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


def rising(monkeypatch, after, share):
    """Makes the logged validation loss rise after `after` evaluations, by `share` of itself each."""
    real = fed_core.text_model.quality
    seen = []

    def quality(model, thetas, weights, split, rows, name):
        figures = real(model, thetas, weights, split, rows, name)
        if name == "val":
            figures["val_loss"] *= 1 + share * max(0, len(seen) - after)
            seen.append(1)
        return figures

    monkeypatch.setattr(fed_core.text_model, "quality", quality)


def test_an_alarm_is_logged_once_and_stands_in_the_results(tmp_path, monkeypatch):
    rising(monkeypatch, 2, 0.5)
    folder = done(tmp_path, "a", "--num-rounds 5 --local-steps 1 --probe-samples 0 --eval-samples 2")
    (alarm,) = read_json(folder / "run.json")["results"]["alarms"]
    assert (alarm["detector"], alarm["round"]) == ("diverged", 3)  # of 6 evaluations
    assert [line["alarms"] for line in read_metrics(folder) if "alarms" in line] == [[alarm]]
    assert alarms_of(read_metrics(folder), 6) == [alarm]


def test_final_best_is_what_the_best_round_left_over_a_resume_too(tmp_path, monkeypatch):
    def broken(self, write):
        raise KeyboardInterrupt

    line = "--local-steps 1 --probe-samples 0 --eval-samples 4 --cluster labels --num-rounds"
    best, short = 1, done(tmp_path, "short", f"{line} 1")
    line += " 2 --final best"
    rising(monkeypatch, best, 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_final", broken)
        assert call(*words(tmp_path, "a", line)) == 130
    assert call(*words(tmp_path, "a", line), "--resume") == 0
    results, expected = (read_json(folder / "run.json")["results"] for folder in (tmp_path / "a", short))
    assert results["rounds"] == 2 and results["final_round"] == best == results["best_round"] == expected["final_round"]
    assert results["best_val_loss"] == expected["val_loss"] and results["test_loss_best"] == expected["test_loss"]
    last = read_metrics(tmp_path / "a")[-1]  # --final says which weights are written, not what the old names mean
    for name in ("val_loss", "val_ppl", "mean_client_val_loss"):
        assert results[name] == last[name], name
    assert results["test_loss"] != results["test_loss_best"]
    finals = [sorted((folder / "final").rglob("*.safetensors")) for folder in (tmp_path / "a", short)]
    for a, b in zip(*finals, strict=True):
        assert a.parent.name == b.parent.name and same_bits(load_file(a), load_file(b))
    assert (tmp_path / "a" / "checkpoint" / "best.safetensors").exists()
    assert not (short / "checkpoint" / "best.safetensors").exists()
