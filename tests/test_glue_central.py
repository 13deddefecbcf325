"""main_glue_lora.py, baseline_run.py and adapters_eval.py: epochs, zero-shot, subsets, what is logged."""

import harness
import pytest
from test_glue_rounds import call, evaluated, ever_worse, same_metrics, validation

from common.checkpoint import read_json
from lora_glue_fl import baseline_run

pytestmark = pytest.mark.slow
DEMO = "--dataset demo --threads 1 --max-length 32 --seed 7".split()
TRAIN = "--do-train --do-eval --learning-rate 5e-3 --max-examples 100 --num-train-epochs 3 --batch-size 16".split()
SCRIPTS = {"main_glue_lora": ["--lora-r", "4", "--lora-dropout", "0.1"], "baseline_run": []}


def run(script, out, *more, model="tiny", task="sst2"):
    """The script's exit code. A later flag wins over an earlier one."""
    words = ["--model", model, "--task-name", task, *DEMO, *SCRIPTS.get(script, []), "--output-dir", out, *more]
    return call(*words, script=script)


def folder_of(script, out, size="tiny", task="sst2"):
    return out / f"{task}_{size}" / "r4" if script == "main_glue_lora" else out / f"{task}_{size}"


def central(script):
    """The finished run of tests/harness.py: three epochs of 100 examples."""
    return harness.whole(f"lora_glue_fl/{'central_lora' if script == 'main_glue_lora' else 'baseline'}")


def test_the_adapter_is_evaluated_to_what_was_logged(tmp_path):
    folder = central("main_glue_lora")
    words = ("--adapter-path", folder / "adapter", "--output-dir", tmp_path)
    # another seed, and so other weights of the tiny model, were they not taken from beside the adapter
    assert call("--model", "tiny", "--task-name", "sst2", *DEMO, "--seed", 8, *words, script="adapters_eval") == 0
    found, logged = read_json(tmp_path / "sst2_tiny" / "metrics.json"), harness.read_lines(folder)[-1]
    values = {name: v for name, v in logged.items() if name.startswith("val_")}
    assert {name: v for name, v in found.items() if name.startswith("val_")} == pytest.approx(values, rel=1e-6)
    assert set(values) == {"val_loss", "val_accuracy"}
    results = read_json(folder / "run.json")["results"]
    assert {name: results[name] for name in values} == values
    assert f"val_accuracy: {values['val_accuracy']}" in (folder / "manifest.txt").read_text().splitlines()


def test_the_baselines_model_gives_the_logged_metric():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = central("baseline_run")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    last = harness.read_lines(folder)[-1]
    measured = validation(model, AutoTokenizer.from_pretrained(folder / "final"))
    same_metrics(measured, last["val_accuracy"], last["val_loss"])


def test_zero_shot_is_the_model_as_it_begins(tmp_path):
    found = {}
    for script in SCRIPTS:
        assert run(script, tmp_path / script, "--do-eval") == 0
        folder = folder_of(script, tmp_path / script)
        (line,) = harness.read_lines(folder)
        assert line["round"] == 0 and "train_loss" not in line and line["examples"] == 0
        assert not list(folder.rglob("adapter*")) and not (folder / "final").exists()
        assert read_json(folder / "run.json")["results"]["val_loss"] == line["val_loss"]
        found[script] = {name: v for name, v in line.items() if name.startswith("val_")}
    # B is 0: with and without an adapter it is the same model
    assert found["main_glue_lora"] == pytest.approx(found["baseline_run"], rel=1e-6)
    before, after, *_ = harness.read_lines(central("main_glue_lora"))
    assert found["main_glue_lora"]["val_loss"] == before["val_loss"] != after["val_loss"]


def test_what_is_saved_is_the_best_epochs_where_asked(tmp_path, monkeypatch):
    ever_worse(monkeypatch, baseline_run, 2)
    words = (*TRAIN, "--num-train-epochs", 2, "--final", "best")
    script = "main_glue_lora"
    assert run(script, tmp_path, *words) == 130 and run(script, tmp_path, *words, "--resume") == 0
    folder = folder_of(script, tmp_path)
    _, best, last = (row["val_loss"] for row in harness.read_lines(folder))
    _, loss = evaluated(folder / "adapter", tmp_path / "eval")
    assert loss == pytest.approx(best, rel=1e-4) != pytest.approx(last, rel=1e-3)
