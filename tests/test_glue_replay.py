"""--replay: the run does not change, each row is what a run of that rule serves, half steps lie half way."""

import numpy as np
import pytest
import torch
from comparing import same_bits
from safetensors.torch import load_file
from test_glue_rounds import call, shards, validation, words  # noqa: F401
from torch.nn import functional as F

from common.checkpoint import read_json
from common.runlog import read_metrics
from lora_glue_fl.demo_glue import demo_task

ROWS = {"start", "svd", "naive", "rotate", "exact", "residual_1", "exact_half", "naive_half"}
TIMES = {"seconds", "examples_per_second", "peak_memory", "replay"}


def run(shards, folder, name, *more):  # noqa: F811
    more = ["--output-root", folder, "--run-name", name, "--processes", 1, *more]
    assert call(*words(shards, *more)) == 0
    return folder / name


def without_times(folder):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(folder)]


@pytest.mark.parametrize("rule", ["svd --svd-rank 2 --alpha 3", "residual --participation 0.7 --amp bf16"])
def test_a_replay_changes_no_bit_of_its_run(rule, shards, tmp_path):  # noqa: F811
    more = f"--aggregate {rule} --rounds 2 --lora-dropout 0.1 --seed 3".split()
    plain, replayed = run(shards, tmp_path, "a", *more), run(shards, tmp_path, "b", *more, "--replay")
    assert without_times(plain) == without_times(replayed)
    assert same_bits(*(load_file(folder / "checkpoint" / "theta.safetensors") for folder in (plain, replayed)))
    finals = [sorted((folder / "final").glob("*.safetensors")) for folder in (plain, replayed)]
    assert all(same_bits(load_file(a), load_file(b)) for a, b in zip(*finals, strict=True)) and finals[0]
    assert [set(row.get("replay", ())) for row in read_metrics(replayed)] == [set(), ROWS, ROWS]
    assert not any("replay" in row for row in read_metrics(plain))
    for row in read_metrics(replayed)[1:]:  # in fp32, whatever --amp
        losses = [row["replay"][name]["val_loss"] for name in ("residual_1", "exact")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):  # noqa: F811
    """The folders of one round of every rule, from one start; the naive one has the replay."""
    folder = tmp_path_factory.mktemp("first")
    rules = {"naive": "--replay", "svd": "", "rotate": "", "residual": "", "stack": ""}
    for rule, more in rules.items():
        run(shards, folder, rule, "--aggregate", rule, "--rounds", 1, "--learning-rate", 3e-2, *more.split())
    return folder


def test_every_row_is_what_a_run_of_that_rule_serves(first):
    replay = read_metrics(first / "naive")[-1]["replay"]
    for row, rule in {
        "svd": "svd",
        "naive": "naive",
        "rotate": "rotate",
        "residual_1": "residual",
        "exact": "stack",
    }.items():
        last = read_metrics(first / rule)[-1]
        assert replay[row]["error"] == pytest.approx(last["aggregation_error"], rel=1e-9, abs=1e-6)
        for name in ("val_loss", "val_accuracy"):
            assert replay[row][name] == pytest.approx(last[name], rel=1e-5), row
    errors = {row: values["error"] for row, values in replay.items()}
    assert 0.01 < errors["svd"] < errors["naive"] < 1
    assert errors["rotate"] != pytest.approx(errors["naive"], rel=1e-4)
    losses = {row: values["val_loss"] for row, values in replay.items()}
    assert losses["residual_1"] == pytest.approx(losses["exact"], rel=1e-5)
    assert abs(losses["naive"] - losses["exact"]) > 1e-4 * losses["exact"]


def merged(first, rule):
    """({weight}, model, tokenizer) of a run's end, read without this project."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load = AutoModelForSequenceClassification.from_pretrained
    if rule == "naive":
        model = PeftModel.from_pretrained(load(first / rule / "base"), first / rule / "final").merge_and_unload()
    else:
        model = load(first / "naive" / "base" if rule == "base" else first / rule / "final")
    return model, AutoTokenizer.from_pretrained(first / "naive" / "base")


def test_losses_are_of_all_clients_examples_and_half_steps_lie_half_way(first, shards):  # noqa: F811
    replay = read_metrics(first / "naive")[-1]["replay"]
    naive, tokenizer = merged(first, "naive")
    exact, _ = merged(first, "stack")
    train = demo_task("sst2")["train"]
    dealt = sorted(i for k in (1, 2, 3) for i in read_json(shards / f"client_{k}.json")["indices"])
    texts, labels = [train.texts["sentence"][i] for i in dealt], torch.tensor(np.array(train.labels)[dealt])
    ends = [{name: t.clone() for name, t in model.state_dict().items()} for model in (naive, exact)]
    for row, end in {"naive": ends[0], "exact": ends[1]}.items():
        naive.load_state_dict(end)
        accuracy, loss = validation(naive, tokenizer)
        assert replay[row]["val_loss"] == pytest.approx(loss, rel=1e-4)
        assert replay[row]["val_accuracy"] == pytest.approx(accuracy)
        batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=32)
        with torch.no_grad():
            loss = F.cross_entropy(naive.eval()(**batch).logits.double(), labels).item()
        assert replay[row]["train_loss"] == pytest.approx(loss, rel=1e-4)
    start, _ = merged(first, "base")
    accuracy, loss = validation(start, tokenizer)
    assert replay["start"]["val_loss"] == pytest.approx(loss, rel=1e-4) and replay["start"]["moved"] == 0
    assert replay["start"]["val_accuracy"] == pytest.approx(accuracy)
    assert replay["exact_half"]["error"] == pytest.approx(replay["start"]["error"] / 2)
    begun, adapted = start.state_dict(), [name for name in ends[0] if "attention.self" in name]
    moved = [sum((end[name] - begun[name]).double().square().sum() for name in adapted).sqrt() for end in ends]
    share = (moved[0] / moved[1]).item()
    assert replay["naive"]["moved"] == pytest.approx(share, rel=1e-4) != 1
    assert replay["exact"]["moved"] == pytest.approx(1) == replay["residual_1"]["moved"]
    for row, end in {"naive_half": ends[0], "exact_half": ends[1]}.items():  # the head too
        half = {name: (t + end[name]) / 2 if t.is_floating_point() else t for name, t in begun.items()}
        naive.load_state_dict(half)
        assert replay[row]["val_loss"] == pytest.approx(validation(naive, tokenizer)[1], rel=1e-4)
        assert replay[row]["moved"] == pytest.approx(replay[row.removesuffix("_half")]["moved"] / 2)
