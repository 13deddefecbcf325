"""fedavg_rounds.py: what it serves, and one round against a plain loop."""

import importlib
import json

import harness
import numpy as np
import pytest
import torch
from comparing import same_bits
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.cli import run_main
from common.lowrank import RULES
from common.runlog import read_metrics

TINY = "--model tiny --dataset demo --task-name sst2 --lora-r 4 --svd-rank 4 --learning-rate 5e-3 --threads 1".split()
TINY += "--rounds 3 --local-epochs 0.5 --eval-each-round --max-length 32 --batch-size 8".split()


def words(shards, *more):
    return [*TINY, "--shard-dir", str(shards), *map(str, more)]


def call(*line, script="fedavg_rounds"):
    module = importlib.import_module(f"lora_glue_fl.{script}")
    with pytest.raises(SystemExit) as stop:
        run_main(module.main, module.build_parser().parse_args([str(word) for word in line]))
    return stop.value.code


@pytest.fixture(scope="session")
def shards():
    return harness.whole("lora_glue_fl/sharding")


def runs(rule):
    """The finished run of tests/harness.py."""
    return harness.whole(f"lora_glue_fl/{rule}")


def validation(model, tokenizer):
    """(accuracy, mean loss) of a transformers model on the demo's validation examples, one by one."""
    from lora_glue_fl.demo_glue import demo_task

    split = demo_task("sst2")["validation"]
    model.eval()
    right, loss = [], []
    with torch.no_grad():
        for text, label in zip(split.texts["sentence"], split.labels, strict=True):
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).logits[0].double()
            right.append(int(logits.argmax()) == label)
            loss.append(-torch.log_softmax(logits, 0)[int(label)].item())
    return np.mean(right), np.mean(loss)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_serves_gives_the_logged_metric_without_this_project(rule):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = runs(rule)
    last = read_metrics(folder)[-1]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    if rule in ("stack", "residual"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
        model = PeftModel.from_pretrained(base, folder / "final")
    accuracy, loss = validation(model, tokenizer)
    assert accuracy == pytest.approx(last["val_accuracy"], abs=1e-12)
    assert loss == pytest.approx(last["val_loss"], rel=1e-4)
    assert read_json(folder / "run.json")["results"]["val_accuracy"] == last["val_accuracy"]

    # the round's own folder serves the same: the adapter, over the changed base weights where there are any
    fused = next((folder / "round_3").glob("fused_*"))
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    if (fused / "base.safetensors").exists():
        changed = load_file(fused / "base.safetensors")
        assert base.load_state_dict(changed, strict=False).unexpected_keys == []
    accuracy, loss = validation(PeftModel.from_pretrained(base, fused / "adapter"), tokenizer)
    assert accuracy == pytest.approx(last["val_accuracy"], abs=1e-12)
    assert loss == pytest.approx(last["val_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_clients_adapter_gives_its_logged_metric():
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = runs("svd")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, folder / "round_3" / "client_2" / "adapter")
    accuracy, loss = validation(model, AutoTokenizer.from_pretrained(folder / "base"))
    line = read_metrics(folder)[-1]
    assert accuracy == pytest.approx(line["client_val_accuracy"][1], abs=1e-12)
    assert loss == pytest.approx(line["client_val_loss"][1], rel=1e-4)


@pytest.mark.slow
def test_one_round_is_the_plain_loop(shards, tmp_path):
    """A round of naive averaging against torch, peft and transformers used directly, and transformers' schedule."""
    from peft import PeftModel
    from torch.nn import functional as F
    from transformers import AutoModelForSequenceClassification, get_scheduler

    from lora_glue_fl.data_prep import encode, load_task, load_tokenizer, training_batches

    line = words(shards, "--aggregate", "naive", "--output-root", tmp_path, "--run-name", "a", "--rounds", 1)
    line += ["--warmup-ratio", "0.3", "--mu", "0.1", "--weight-decay", "0.1", "--keep", "all"]
    # the base model's own dropout would draw from another generator here
    from lora_glue_fl import models

    real = models.tiny_encoder

    def without_dropout(task, tokenizer):
        model = real(task, tokenizer)
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            if hasattr(part, "dropout_prob"):
                part.dropout_prob = 0.0
        return model

    models.tiny_encoder = without_dropout
    try:
        assert call(*line) == 0
        # a client that trains nothing: its adapter is what the round began with
        start = [*line, "--run-name", "start", "--learning-rate", "1e-30"]
        assert call(*start) == 0
    finally:
        models.tiny_encoder = real
    begun = tmp_path / "start" / "round_1" / "client_1" / "adapter"
    data = load_task("sst2", "demo")
    encoded = encode(data, load_tokenizer("demo"), 32)["train"]
    sums, total = {}, 0
    for k in range(3):
        rows = np.array(read_json(shards / f"client_{k + 1}.json")["indices"])
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "base")
        model = PeftModel.from_pretrained(base, begun, is_trainable=True)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        anchors = {name: p.detach().clone() for name, p in trained.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0.1, fused=False)
        batches = training_batches(encoded.lengths()[rows], 8, 0.5, 42, 0, k)
        schedule = get_scheduler("linear", optimizer, int(np.ceil(0.3 * len(batches))), len(batches))
        model.eval()
        for batch_rows in batches:
            batch = encoded.batch(rows[batch_rows])
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            pull = sum(((p - anchors[name]) ** 2).sum() for name, p in trained.items())
            optimizer.zero_grad()
            (F.cross_entropy(logits, batch["labels"]) + 0.05 * pull).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            schedule.step()
        for name, p in trained.items():
            key = name.replace(".default", "").replace(".modules_to_save", "")
            sums[key] = sums.get(key, 0) + len(rows) * p.detach().double()
        total += len(rows)
    served = load_file(tmp_path / "a" / "final" / "adapter_model.safetensors")
    before = load_file(begun / "adapter_model.safetensors")
    assert served.keys() == sums.keys()
    for name, tensor in served.items():
        moved = (sums[name] / total - before[name]).norm()
        assert moved > 0
        assert (tensor - sums[name] / total).norm() <= 2e-3 * moved, name


def test_a_step_is_that_of_its_examples_whatever_the_micro_batches(tmp_path):
    from types import SimpleNamespace

    from lora_glue_fl.fitting import fit

    class Rows:
        def batch(self, rows):
            return {"x": torch.arange(12.0).reshape(6, 2)[rows]}

    def after(steps, lr_scale=1.0):
        torch.manual_seed(0)
        p = {"w": torch.nn.Parameter(torch.ones(2))}
        args = SimpleNamespace(mu=0.0, max_grad_norm=0.0)
        optimizer = torch.optim.SGD(p.values(), lr=0.01)
        loss = fit(lambda b: ((b["x"] @ p["w"]) ** 2).mean(), Rows(), steps, p, optimizer, [0.01], args, None, "cpu")
        return p["w"].detach(), loss

    whole, a = after([[np.arange(6)]])
    parts, b = after([[np.arange(4), np.arange(4, 6)]])
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(a, b)
    assert not torch.equal(whole, torch.ones(2))


def test_the_learning_rate_is_transformers_schedule():
    from transformers import get_scheduler

    from lora_glue_fl.fitting import lr_at

    for name in ("linear", "constant"):
        for warmup in (0, 1, 4):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
            kind = "constant_with_warmup" if name == "constant" else name
            schedule = get_scheduler(kind, optimizer, warmup, 10)
            for step in range(10):
                assert lr_at(step, 10, 0.3, warmup, name) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
                optimizer.step()
                schedule.step()


@pytest.mark.slow
def test_keep_decides_which_rounds_stay(shards, tmp_path):
    line = words(shards, "--output-root", tmp_path, "--run-name", "last_and_best", "--aggregate", "naive")
    assert call(*line) == 0
    folder = tmp_path / "last_and_best"
    best = read_json(folder / "run.json")["results"]["best_round"]
    assert {f.name for f in folder.glob("round_*")} == {f"round_{best}", "round_3"}
    assert (folder / "round_3" / "fused_r4_nosvd" / "fuse_manifest.json").exists()
    assert {f.name for f in runs("svd").glob("round_*")} == {"round_1", "round_2", "round_3"}
    manifest = json.loads((runs("svd") / "round_2" / "fused_r4" / "fuse_manifest.json").read_text())
    assert manifest["aggregate"] == "svd" and sum(manifest["weights"]) == pytest.approx(1)


def test_pruning_leaves_the_round_that_another_process_may_be_writing(tmp_path):
    from lora_glue_fl.round_folders import RoundFolders

    def names():
        return sorted(f.name for f in tmp_path.iterdir())

    folders = RoundFolders(tmp_path, ["last", "best"], "fused_r4", {})
    for number in range(1, 6):
        (tmp_path / f"round_{number}").mkdir()
    folders.offer(1, 0.9)
    folders.offer(2, 0.9)  # not better: the first stays the best
    folders.prune(3)
    assert names() == ["round_2", "round_4", "round_5"]
    folders.clean(3)  # at the start of a session nobody writes
    assert names() == ["round_2", "round_4"]
    RoundFolders(tmp_path, ["all"], "fused_r4", {}).clean(-1)
    assert names() == []


@pytest.mark.slow
def test_a_server_optimiser_of_momentum_zero_is_plain_averaging(shards, tmp_path):
    line = words(
        shards, "--aggregate", "naive", "--output-root", tmp_path, "--run-name", "m", "--eval-clients", "--seed", 7
    )
    assert call(*line, "--server-optimizer", "momentum", "--server-beta", 0) == 0
    same = [load_file(folder / "final" / "adapter_model.safetensors") for folder in (tmp_path / "m", runs("naive"))]
    assert same_bits(*same)
    assert call(*line, "--server-optimizer", "adam", "--overwrite") == 0
    rows = [read_metrics(folder)[0] for folder in (tmp_path / "m", runs("naive"))]
    # the error is the rule's, whatever step the server takes; the first round's clients are the same
    assert rows[0]["aggregation_error"] == rows[1]["aggregation_error"]


@pytest.mark.slow
def test_bytes_are_those_of_the_factors_that_are_sent():
    import math

    head, r, d, layers = 64 * 64 + 64 + 2 * 64 + 2, 4, 64, 4  # the tiny model: queries and values of two layers
    both, b = 2 * r * d * layers, r * d * layers
    stacked = {3 * r: layers * min(3 * r * 2 * d, d * d) for r in (3, 4)}  # stack's clients have ranks 2, 4 and 3
    up = {"svd": both, "naive": both, "ffa": b, "stack": both * 3 / 4, "residual": both, "rolora": b}
    down = {"svd": both, "naive": both, "ffa": b, "stack": stacked[9], "residual": stacked[12], "rolora": b}
    for rule in RULES:
        first = (both * 3 / 4 if rule == "stack" else both) + head  # to each client before the first round
        for line in read_metrics(runs(rule)):
            n = line["round"]
            assert line["bytes_up"] == 4 * 3 * n * (up[rule] + head)
            assert line["bytes_down"] == 4 * 3 * (n * (down[rule] + head) + first)
            assert math.isfinite(line["aggregation_error"])
