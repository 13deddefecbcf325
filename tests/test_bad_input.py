"""Bad input and bad luck: one line, the exit code that was promised, nothing half-written."""

import resource

import pytest
import torch
from running import SCRIPTS, call, final_weights, run

from common.checkpoint import read_json, write_json
from common.runlog import read_metrics


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line(tmp_path):
    def small_files():  # the kernel refuses longer files, as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    run("fed_avg", "--output-dir", tmp_path, "--run-name", "filled_the_cache")
    done = run("fed_avg", "--output-dir", tmp_path, "--run-name", "full", preexec_fn=small_files)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("failed: cannot save")
    assert "Traceback" not in done.stderr
    assert read_json(tmp_path / "full" / "run.json")["status"] == "failed"
    assert not list((tmp_path / "full").glob("*.new"))


def test_a_folder_of_another_run_is_refused(tmp_path, capsys):
    same = ("--output-dir", tmp_path, "--run-name", "r", "--rounds", 2)
    assert call("fed_avg", *same) == 0
    before = (tmp_path / "r" / "run.json").read_bytes()
    assert call("fed_avg", *same) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("fed_entropy", *same, "--resume") == 2
    assert "is a run of fed_avg" in capsys.readouterr().err
    assert call("fed_avg", *same, "--resume", "--lr", "0.1", "--tokenizer", "bpe:300") == 2
    error = capsys.readouterr().err
    assert "--lr 0.0005 -> 0.1" in error and "bpe:400 -> bpe:300" in error
    assert (tmp_path / "r" / "run.json").read_bytes() == before
    assert call("fed_avg", *same, "--resume") == 0
    assert "already finished" in capsys.readouterr().out
    (tmp_path / "r" / "final" / "model.safetensors").write_bytes(b"half")
    assert call("fed_avg", *same, "--overwrite") == 0  # and nothing of the old run is left
    assert len(final_weights(tmp_path / "r")) > 5 and not list(tmp_path.glob(".r*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    assert call("fed_avg", *same[:2], "--run-name", "other", "--overwrite") == 2
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_a_tokenizer_that_does_not_fit_the_checkpoint(tmp_path, capsys):
    """The same path, with another tokenizer in it."""
    from common.corpora import load_corpus
    from common.text import load_tokenizer

    corpus = load_corpus("demo")
    load_tokenizer("bpe:300", corpus).save_pretrained(tmp_path / "tokenizer")
    same = ("--output-dir", tmp_path / "out", "--run-name", "r", "--tokenizer", tmp_path / "tokenizer")
    assert call("fed_avg", *same) == 0
    manifest = read_json(tmp_path / "out" / "r" / "run.json")
    write_json(tmp_path / "out" / "r" / "run.json", {**manifest, "status": "failed"})
    load_tokenizer("bpe:310", corpus).save_pretrained(tmp_path / "tokenizer")
    assert call("fed_avg", *same, "--resume") == 2
    assert "other data" in capsys.readouterr().err


def test_what_auto_came_to_is_compared_on_resume(tmp_path, capsys):
    same = ("--output-dir", tmp_path, "--run-name", "r", "--amp", "auto")
    assert call("fed_avg", *same) == 0
    manifest = read_json(tmp_path / "r" / "run.json")
    assert set(manifest["resolved"]) == {"device", "amp", "kernel", "threads"}
    manifest["resolved"]["amp"], manifest["versions"]["torch"] = "float16", "0.1"
    write_json(tmp_path / "r" / "run.json", {**manifest, "status": "failed"})
    assert call("fed_avg", *same, "--resume") == 2
    assert "amp float16 -> " in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    same = ("--output-dir", tmp_path, "--run-name", "r")
    assert call("fed_avg", *same) == 0
    write_json(tmp_path / "r" / "run.json", {**read_json(tmp_path / "r" / "run.json"), "status": "failed"})
    theta = tmp_path / "r" / "checkpoint" / "theta.safetensors"
    theta.write_bytes(theta.read_bytes()[:5000])
    assert call("fed_avg", *same, "--resume") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "theta.safetensors is damaged" in error and "--overwrite" in error


@pytest.mark.parametrize("what", ["metrics.jsonl", "final", "training_history.json", "server"])
def test_a_full_disk_anywhere_is_one_line(what, tmp_path, monkeypatch, capsys):
    import numpy

    from common import runlog
    from mamba_fl import fed_core

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    if what == "metrics.jsonl":
        monkeypatch.setattr(runlog, "_json_safe", full)
    elif what == "final":
        monkeypatch.setattr(fed_core, "save_pretrained", full)
    elif what == "training_history.json":
        monkeypatch.setattr(fed_core, "write_json", full)
    else:
        monkeypatch.setattr(numpy, "savez", full)
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "r", "--save-deltas") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("failed: cannot save") and "No space left" in error
    assert not list((tmp_path / "r").glob("*.new"))


def test_a_client_that_is_not_finite_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    from mamba_fl.fed_core import Study

    good = Study.local_update

    def local_update(self, theta, k, round):
        theta_k, n_k = good(self, theta, k, round)
        if k in broken and round == 1:
            next(iter(theta_k.values())).view(-1)[0] = float("nan")
        return theta_k, n_k

    monkeypatch.setattr(Study, "local_update", local_update)
    broken = {1}
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "one") == 0
    lines = read_metrics(tmp_path / "one")
    assert lines[0]["left_out"] == [[2, 1]] and "left_out" not in lines[1]
    assert lines[-1]["left_out_updates"] == 1
    assert lines[0]["client_train_loss"][1] is None and lines[0]["train_loss"] < 7
    assert all(torch.isfinite(w).all() for w in final_weights(tmp_path / "one").values())
    assert "client 1" in capsys.readouterr().out
    broken = {0, 1}
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "two") == 1
    assert "2 of 3 clients" in capsys.readouterr().err
    manifest = read_json(tmp_path / "two" / "run.json")
    assert manifest["status"] == "failed" and "2 of 3 clients" in manifest["reason"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_that_is_not_finite_stops_the_run(script, tmp_path, capsys):
    assert call(script, "--output-dir", tmp_path, "--run-name", "r", "--lr", "1e30") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("failed: ") and "lower --lr (1e+30)" in error
    assert read_json(tmp_path / "r" / "run.json")["status"] == "failed"
