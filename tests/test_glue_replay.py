"""--replay: the run does not change, each row is what a run of that rule serves, doses lie on a line."""

import numpy as np
import pytest
import torch
from comparing import same_bits
from safetensors.torch import load_file
from test_glue_rounds import call, shards, validation, words  # noqa: F401
from torch.nn import functional as F

from common.checkpoint import read_json
from common.runlog import read_metrics
from lora_glue_fl import replay, run_study
from lora_glue_fl.demo_glue import demo_task

ROWS = {"svd", "naive", "rotate", "florana", "exact", "residual_0.5", "residual_1", "residual_2", "exact_as_far"}
ROWS |= {"start", "exact_half", "naive_half", "noise"}
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
    methods = [read_json(folder / "run.json")["method"] for folder in (plain, replayed)]
    assert "replay" not in methods[0] and methods[1]["replay"] is True


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):  # noqa: F811
    """The folders of one round of every rule, from one start; the naive one has the replay."""
    folder = tmp_path_factory.mktemp("first")
    rules = {"naive": "--replay", "svd": "", "rotate": "", "residual": "", "stack": ""}
    soft = ["--rotate-lambda", 0.4]
    for rule, more in rules.items():
        words = [*more.split(), *(soft if rule in ("naive", "rotate") else ())]
        run(shards, folder, rule, "--aggregate", rule, "--rounds", 1, "--learning-rate", 3e-2, *words)
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
    assert 0.01 < errors["svd"] < errors["florana"] < errors["naive"] < 1
    assert errors["rotate"] != pytest.approx(errors["naive"], rel=1e-4)
    for dose in (0.5, 2):
        assert errors[f"residual_{dose:g}"] == pytest.approx(abs(1 - dose) * errors["naive"])
    assert errors["noise"] == pytest.approx(errors["naive"]) and errors["exact_half"] > errors["exact_as_far"] > 0
    losses = {row: values["val_loss"] for row, values in replay.items()}
    assert losses["noise"] not in (losses["exact"], losses["naive"])
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


def test_a_dose_lies_on_the_line_from_naive_to_exact_and_losses_are_of_all_clients_examples(first, shards):  # noqa: F811
    replay = read_metrics(first / "naive")[-1]["replay"]
    naive, tokenizer = merged(first, "naive")
    exact, _ = merged(first, "stack")
    train = demo_task("sst2")["train"]
    dealt = sorted(i for k in (1, 2, 3) for i in read_json(shards / f"client_{k}.json")["indices"])
    texts, labels = [train.texts["sentence"][i] for i in dealt], torch.tensor(np.array(train.labels)[dealt])
    ends = [{name: t.clone() for name, t in model.state_dict().items()} for model in (naive, exact)]
    for row, dose in {"naive": 0.0, "residual_0.5": 0.5, "residual_2": 2.0, "exact": 1.0}.items():
        naive.load_state_dict({name: (1 - dose) * t + dose * ends[1][name] if t.is_floating_point() else t
                               for name, t in ends[0].items()})  # fmt: skip
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
    assert replay["exact_as_far"]["moved"] == pytest.approx(replay["naive"]["moved"], rel=1e-12)
    assert replay["exact"]["moved"] == pytest.approx(1) == replay["residual_1"]["moved"]
    between = {name: begun[name] + share * (ends[1][name] - begun[name]) for name in adapted}
    naive.load_state_dict(ends[1] | between)
    assert replay["exact_as_far"]["val_loss"] == pytest.approx(validation(naive, tokenizer)[1], rel=1e-4)
    for row, end in {"naive_half": ends[0], "exact_half": ends[1]}.items():  # the head too
        half = {name: (t + end[name]) / 2 if t.is_floating_point() else t for name, t in begun.items()}
        naive.load_state_dict(half)
        assert replay[row]["val_loss"] == pytest.approx(validation(naive, tokenizer)[1], rel=1e-4)
        assert replay[row]["moved"] == pytest.approx(replay[row.removesuffix("_half")]["moved"] / 2)


def test_a_refit_forgives_sureness_and_a_preferred_class_and_nothing_else():
    """The outputs times 3 and one class preferred: sklearn's own regression, and the loss of the fitted map."""
    generator = np.random.default_rng(0)
    z, labels = generator.normal(size=(4000, 3)), generator.integers(0, 3, 4000)
    z[np.arange(4000), labels] += 2  # the posterior is softmax(2 z)
    best = F.cross_entropy(torch.tensor(2 * z), torch.tensor(labels)).item()
    for outputs in (z, 3 * z, 3 * z + [5, 0, -1]):
        found = replay.refit_loss(outputs[:2000], labels[:2000], outputs[2000:], labels[2000:])
        assert found == pytest.approx(best, abs=0.02)
    assert F.cross_entropy(torch.tensor(3 * z + [5, 0, -1.0]), torch.tensor(labels)).item() > best + 0.5
    mixed = generator.permutation(z)
    assert replay.refit_loss(mixed[:2000], labels[:2000], mixed[2000:], labels[2000:]) > best + 0.3
    assert np.isnan(replay.refit_loss(z, np.zeros(4000), z, labels))


def test_the_replays_begin_with_one_checkpoint_a_seed_and_trajectories_with_one_head():
    runs = run_study.plan(run_study.parse("--preset replay --model FOLDER --seeds 0 1".split()))
    replayed = [run for run in runs if run.needs]
    assert len(runs) == 26 and len(replayed) == 22
    for run in replayed:
        seed, rank = run.name[-1], "_r16" if "r16" in run.name else ""
        assert (
            run.needs == f"sst2_checkpoint{rank}_naive_seed_{seed}"
            and f"results/glue_replay/{run.needs}" in run.command
        )
        assert "--replay" in run.command and "--rounds 1" in " ".join(run.command)
    line = "--preset trajectories --model FOLDER --settings skew_some --only sst2_skew_some_svd --seeds 3".split()
    warm, one = run_study.plan(run_study.parse(line))
    assert (warm.name, one.needs, one.setting.tuned_as) == ("sst2_warm_head_seed_3",) * 2 + ("sst2_skew_svd",)
    every = run_study.plan(run_study.parse("--preset trajectories --model FOLDER --seeds 0".split()))
    tuned = {run.setting.name for run in every if run.setting.tune}
    assert {run.setting.tuned_as for run in every if run.setting.tuned_as} < tuned and len(tuned) == 8
