"""vit_sparse_fl's preset `rates`: what its runs start from, that they are compared at equal budgets, matched rows."""

import json

import pytest
import torch

from common import tuning
from common.cli import UsageError
from vit_sparse_fl import rates
from vit_sparse_fl import run_all_experiments as runner
from vit_sparse_fl.masks import maskable
from vit_sparse_fl.vit import make_model


def planned(line):
    args = runner.parse(line.split())
    return args, runner.plan(args)


def flag(run, name):
    words = run.command
    return words[len(words) - 1 - words[::-1].index(name) + 1]


def test_each_seed_starts_from_its_split_and_tuning_from_another():
    args, runs = planned("--preset rates --only dense_nc5_J16 central --output-dir out")
    first = {run.name: flag(run, "--classes") for run in runs if run.setting is None}
    assert first == {f"pretrain_seed_{i}": classes for i, classes in enumerate(rates.SPLITS)}
    rows = [run for run in runs if run.setting]
    assert args.seeds == list(range(6))
    assert [sum(name in run.name for run in rows) for name in ("dense", "central")] == [6, 3]
    for run in rows:
        assert run.needs == f"pretrain_seed_{int(flag(run, '--seed')) % 3}" and flag(run, "--classes") == "rest"
        assert flag(run, "--init-from") == f"out/{run.needs}"
    _, tuned = planned("--preset rates --only dense_nc5_J16 central matched_nc5_J16 --tune --output-dir out")
    assert [run.name for run in tuned] == ["pretrain_seed_3", "central_seed_100", "dense_nc5_J16_seed_100"]
    assert flag(tuned[0], "--classes") not in rates.SPLITS
    # nothing is measured besides while rates are looked for, and it is one setting all the same
    every = {flag(run, "--interference-every") for run in (*rows, *tuned) if "dense" in run.name}
    assert every == {"0", "10"} and flag(tuned[2], "--interference-every") == "0"
    assert {tuning.told(run) for run in rows} == {tuning.told(run) for run in tuned[1:]}


def test_all_rows_see_as_many_images_and_have_three_rates_or_those_of_a_row_that_has():
    every = list(rates.settings())
    names = {one.name: one for one in every}
    assert len(names) == len(every)
    images = set()
    for one in every[1:]:
        words = dict(zip(one.words, one.words[1:], strict=False))
        images.add(int(words["--num-rounds"]) * int(words["--local-steps"]) * 10 * int(words["--batch-size"]))
    assert images == {153_600} and 6 * 22_500 < 153_600 < 7 * 22_500  # central: 7 passes
    for one in every:
        if one.tuned_as or one.name.startswith(("matched_", "lower_", "lowest_dense")):
            assert not one.tune and names[one.tuned_as or one.name.split("_", 1)[1]].tune
        else:
            assert len(one.tune["lr"]) == 3
    runs = {group: sum(one.seeds for one in every if one.group == group) for group in {one.group for one in every}}
    assert runs == {
        "main_nc5_J16": 48,
        "bytes_nc5_J16": 12,
        "matched_nc5_J16": 15,
        "lower_nc5_J16": 9,
        "controls_nc5_J16": 9,
        "main_nc1_J4": 24,
        "lower_nc1_J4": 6,
        "main_iid_J4": 24,
        "lower_iid_J4": 3,
        "main_iid_J16": 9,
        "scopes_nc5_J16": 12,
        "forms_nc5_J16": 6,
    }


def test_on_a_gpu_the_same_grid_has_a_larger_model_and_a_lora_of_as_many_bytes():
    _, small = planned("--preset rates-gpu --only main_nc5_J16 bytes_nc5_J16 --tune --output-dir out")
    _, tiny = planned("--preset rates --only main_nc5_J16 bytes_nc5_J16 --tune --output-dir out")
    assert [run.name for run in small] == [run.name for run in tiny]
    for one, other in zip(small, tiny, strict=True):
        words = " ".join(one.command).replace("--model small", "--model tiny").replace("--lora-r 26", "--lora-r 7")
        assert words == " ".join(other.command)
    model = make_model("small", image_size=64, n_classes=50)
    size = sum(p.numel() for name, p in model.named_parameters() if name in maskable(model))
    layers = [m for layer in model.vit.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    sent = 26 * sum(sum(m.weight.shape) for m in layers)
    assert model.vit.embeddings.position_embeddings.shape == (1, 65, 384) and abs(sent / (0.1 * size) - 1) < 0.02


def test_rates_that_match_a_drift():
    drifts = {0.1: 0.01, 1.0: 0.1, 10.0: 0.4}  # slopes 1 and lg 4
    for target, rate in ((0.01, 0.1), (0.03, 0.3), (0.1, 1.0), (0.2, 10**0.5), (0.001, 0.01), (1.6, 100.0)):
        assert rates.matching_rate(drifts, target) == pytest.approx(rate, rel=1e-12)
    for bad in ({0.1: 0.01}, {0.1: 0.02, 1.0: 0.01}, {}):
        with pytest.raises(ValueError):
            rates.matching_rate(bad, 0.05)


def test_matched_rows_take_their_rate_from_the_runs_of_tune(tmp_path):
    line = f"--preset rates --only matched_topk_nc5_J16 --seeds 0 --output-dir {tmp_path}"
    with pytest.raises(UsageError, match="tuned.json"):
        planned(line)
    tried = {"dense": {0.1: 0.004, 0.3: 0.02, 1.0: 0.05}, "topk": {0.01: 0.002, 0.1: 0.2}}
    rows = {}
    for name, drifts in tried.items():
        for rate, drift in drifts.items():
            folder = tmp_path / "tuning" / f"{name}_nc5_J16_seed_100_lr_{rate:g}"
            folder.mkdir(parents=True)
            lines = [{"round": 0}, {"round": 10, "drift": drift}, {"round": 20, "drift": 9.0}]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        one = {
            "best": 0.3,
            "tried": {f"{rate:g}": 0.5 for rate in drifts} | {"3": "diverged"},
            "seed": 100,
            "words": "x",
        }
        rows[f"{name}_nc5_J16"] = {"lr": one}
    (tmp_path / "tuned.json").write_text(json.dumps(rows))
    _, runs = planned(line)
    assert [run.name for run in runs] == ["pretrain_seed_0", "matched_topk_nc5_J16_seed_0"]
    assert float(flag(runs[1], "--lr")) == pytest.approx(10**-1.5, rel=2e-3)  # drift 0.02, half way from 0.002 to 0.2
    with pytest.raises(UsageError, match="random_nc5_J16 is not tuned"):
        planned(line.replace("topk", "random"))
    (tmp_path / "tuning" / "topk_nc5_J16_seed_100_lr_0.1" / "metrics.jsonl").unlink()
    with pytest.raises(UsageError, match="do not give drifts that grow"):
        planned(line)
