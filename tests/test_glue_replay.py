"""--replay: the run does not change, each row is what a run of that rule serves, half steps lie half way."""

import pytest
from comparing import same_bits
from safetensors.torch import load_file
from test_glue_rounds import call, shards, validation, words  # noqa: F401

from common.runlog import read_metrics

ROWS = {"start", "svd", "naive", "exact", "exact_half", "naive_half"}
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


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):  # noqa: F811
    """The folders of one round of every rule, from one start; the naive one has the replay."""
    folder = tmp_path_factory.mktemp("first")
    rules = {"naive": "--replay", "svd": "", "stack": ""}
    for rule, more in rules.items():
        run(shards, folder, rule, "--aggregate", rule, "--rounds", 1, "--learning-rate", 3e-2, *more.split())
    return folder


def test_every_row_is_what_a_run_of_that_rule_serves(first):
    replay = read_metrics(first / "naive")[-1]["replay"]
    for row, rule in {"svd": "svd", "naive": "naive", "exact": "stack"}.items():
        last = read_metrics(first / rule)[-1]
        assert replay[row]["error"] == pytest.approx(last["aggregation_error"], rel=1e-9, abs=1e-6)
        assert replay[row]["val_loss"] == pytest.approx(last["val_loss"], rel=1e-5), row
    assert 0.01 < replay["svd"]["error"] < replay["naive"]["error"] < 1
    assert replay["exact_half"]["error"] == pytest.approx(replay["start"]["error"] / 2)
    losses = {row: values["val_loss"] for row, values in replay.items()}
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


def test_half_steps_lie_half_way(first):
    replay = read_metrics(first / "naive")[-1]["replay"]
    start, tokenizer = merged(first, "base")
    assert replay["start"]["val_loss"] == pytest.approx(validation(start, tokenizer)[1], rel=1e-4)
    begun = {name: t.clone() for name, t in start.state_dict().items()}
    for row, rule in {"naive_half": "naive", "exact_half": "stack"}.items():  # the head too
        end = merged(first, rule)[0].state_dict()
        half = {name: (t + end[name]) / 2 if t.is_floating_point() else t for name, t in begun.items()}
        start.load_state_dict(half)
        assert replay[row]["val_loss"] == pytest.approx(validation(start, tokenizer)[1], rel=1e-4)
