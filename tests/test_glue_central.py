"""main_glue_lora.py, baseline_run.py and adapters_eval.py: epochs, zero-shot, subsets, what is logged."""

import harness
import numpy as np
import pytest
import torch
from encoders import save_encoder
from safetensors.torch import load_file
from test_glue_rounds import call, evaluated, ever_worse, same_metrics, validation

from common.checkpoint import read_json
from lora_glue_fl import central as central_module
from lora_glue_fl.glue_data import load_task
from lora_glue_fl.shards import subset

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
    assert results["best_val_accuracy"] == max(line["val_accuracy"] for line in harness.read_lines(folder))
    assert f"val_accuracy: {values['val_accuracy']}" in (folder / "manifest.txt").read_text().splitlines()


def test_an_encoder_in_a_folder_is_trained_and_evaluated(tmp_path, capsys):
    model = save_encoder(tmp_path / "little", "bert")
    words = (*TRAIN, "--num-train-epochs", 1)
    assert run("main_glue_lora", tmp_path / "out", *words, model=model, task="stsb") == 0
    said = capsys.readouterr().err
    assert f"not in {model}, begins at random: bert.pooler.dense, classifier" in said
    folder = folder_of("main_glue_lora", tmp_path / "out", "little", "stsb")
    logged = {name: v for name, v in harness.read_lines(folder)[-1].items() if name.startswith("val_")}
    assert set(logged) == {"val_loss", "val_pearson", "val_spearman"} and not (folder / "base").exists()
    assert read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"] == str(model)
    words = ("--model", model, "--task-name", "stsb", *DEMO, "--adapter-path", folder / "adapter", "--seed", 1)
    assert call(*words, "--output-dir", tmp_path / "eval", script="adapters_eval") == 0
    found = read_json(tmp_path / "eval" / "stsb_little" / "metrics.json")
    assert {name: found[name] for name in logged} == pytest.approx(logged, rel=1e-5)


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


def test_without_do_eval_nothing_is_evaluated(tmp_path):
    assert run("main_glue_lora", tmp_path, "--do-train", "--max-examples", 32, "--num-train-epochs", 1) == 0
    folder = folder_of("main_glue_lora", tmp_path)
    assert not any(name.startswith("val_") for line in harness.read_lines(folder) for name in line)
    assert (folder / "adapter").is_dir()


def test_accumulated_epochs_are_whole(tmp_path):
    # 100 examples in batches of 16: 7 a pass, of which 3 make a step
    words = (*TRAIN, "--gradient-accumulation-steps", 3, "--num-train-epochs", 1.5)
    assert run("main_glue_lora", tmp_path, *words) == 0
    seen = [line["examples"] for line in harness.read_lines(folder_of("main_glue_lora", tmp_path))][1:]
    assert seen[0] == 100 and len(seen) == 2 and 100 + 3 * 16 + 4 <= seen[1] <= 100 + 4 * 16


def test_a_shard_and_max_examples_are_the_same_subset(tmp_path):
    words = ("--task-name", "sst2", "--dataset", "demo", "--k", 1, "--max-examples", 90, "--seed", 7)
    assert call(*words, "--out-dir", tmp_path / "shards", script="sharding") == 0
    shard = tmp_path / "shards" / "client_1.json"
    rows = read_json(shard)["indices"]
    data = load_task("sst2", "demo", splits=["train"])
    assert rows == subset(data, 90, 7).tolist() != subset(data, 90, 8).tolist() and len(set(rows)) == 90
    labels = data.splits["train"].labels
    assert abs(np.bincount(labels[rows]) - 90 * np.bincount(labels) / len(labels)).max() < 1
    few = ("--do-train", "--do-eval", "--num-train-epochs", 1, "--learning-rate", 5e-3)
    assert run("main_glue_lora", tmp_path / "a", *few, "--shard", shard) == 0
    assert run("main_glue_lora", tmp_path / "b", *few, "--max-examples", 90) == 0
    a, b = (folder_of("main_glue_lora", tmp_path / name) for name in "ab")
    harness.same_run(a, b)
    assert harness.read_lines(a)[1]["examples"] == 90 == read_json(a / "run.json")["clients"]["examples"]


def test_only_the_adapter_and_the_head_are_trained():
    folder = central("main_glue_lora")
    numbers = read_json(folder / "run.json")["parameters"]
    head = 64 * 64 + 64 + 2 * 64 + 2
    assert numbers["trainable"] == 4 * 4 * (64 + 64) + head and numbers["head"] == head
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == numbers["trainable"]
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)  # they were trained
    begun = load_file(folder / "base" / "model.safetensors")
    other = load_file(central("baseline_run") / "final" / "model.safetensors")
    assert begun.keys() == other.keys()
    assert not any(torch.equal(begun[name], other[name]) for name in begun if name.startswith("classifier."))


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_saved_is_the_best_epochs_where_asked(script, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ever_worse(monkeypatch, central_module, 2)
    words = (*TRAIN, "--num-train-epochs", 2, "--final", "best")
    assert run(script, tmp_path, *words) == 130 and run(script, tmp_path, *words, "--resume") == 0
    folder = folder_of(script, tmp_path)
    _, best, last = (row["val_loss"] for row in harness.read_lines(folder))
    results = read_json(folder / "run.json")["results"]
    assert results["best_round"] == results["final_round"] == 1 < results["rounds"]
    if script == "baseline_run":
        model = AutoModelForSequenceClassification.from_pretrained(folder / "final")
        _, loss = validation(model, AutoTokenizer.from_pretrained(folder / "final"))
    else:
        _, loss = evaluated(folder / "adapter", tmp_path / "eval")
    assert loss == pytest.approx(best, rel=1e-4) != pytest.approx(last, rel=1e-3)
