"""vit_sparse_fl's scripts as a user runs them: what a run leaves, the documented commands."""

import importlib
import json
import shlex
import time

import harness
import pytest
import torch
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.cli import run_main
from common.curves import read_metrics
from vit_sparse_fl.masks import load_mask
from vit_sparse_fl.vit import make_model

SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 8 --threads 1 --seed 0"
FEDERATED = f"{SMALL} --num-clients 12 --participation-rate 0.25 --num-rounds 4 --eval-every 2 --save-every 2 --lr 0.05"
TINY = {
    "train_centralized": f"{SMALL} --epochs 3 --save-every 1 --warmup-epochs 1 --lr 0.05",
    "train_federated": f"{FEDERATED} --sharding non_iid --nc 3",
    "train_federated_sparse": f"{FEDERATED} --fisher-samples 16 --calibrate-on clients --calibration-clients 3",
}
SCRIPTS = list(TINY)


def command(script, *more):
    return [str(harness.ROOT / "vit_sparse_fl" / f"{script}.py"), *shlex.split(TINY[script]), *map(str, more)]


def call(script, words):
    """A script in this process. Returns its exit code."""
    module = importlib.import_module(f"vit_sparse_fl.{script}")
    flags = importlib.import_module("vit_sparse_fl.flags")
    with pytest.raises(SystemExit) as stop:
        if script == "run_all_experiments":
            run_main(module.main, module.build_parser().parse_args([str(w) for w in words]))
        run_main(lambda parser: module.main(flags.parse(parser, [str(w) for w in words])), module.build_parser())
    return stop.value.code


def whole(script):
    """The finished run of tests/harness.py."""
    return harness.whole(f"vit_sparse_fl/{script.split('_')[-1]}")


def small(script, *more):
    return call(script, command(script, *more)[1:])


def test_final_loads_in_transformers_and_gives_the_logged_accuracy():
    from transformers import AutoModelForImageClassification

    from vit_sparse_fl.data import load_images, prepare

    folder = whole("train_federated")
    model = AutoModelForImageClassification.from_pretrained(folder / "final").eval()
    data = load_images("demo", 0, classes=(0, 10))
    with torch.no_grad():
        logits = model(prepare(data.test, 32)).logits
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(read_json(folder / "run.json")["results"]["test_accuracy_last"], abs=1e-9)


def test_a_masked_weight_keeps_its_bits_for_the_whole_run():
    folder = whole("train_federated_sparse")
    before = make_model("tiny", image_size=32, n_classes=10, seed=0).state_dict()
    after = load_file(folder / "checkpoint" / "theta.safetensors")
    shapes = read_json(folder / "run.json")["parameters"]["maskable"]
    masks, about = load_mask(folder / "mask.safetensors", shapes)
    kept = sum(int(m.sum()) for m in masks.values())
    assert kept == round(0.1 * sum(m.numel() for m in masks.values()))
    assert about["strategy"] == "least_sensitive" and about["calibrated_on"] == "clients"
    for name, old in before.items():
        out = ~masks[name] if name in masks else torch.ones(old.shape, dtype=torch.bool)
        assert torch.equal(old.view(torch.int32)[out], after[name].view(torch.int32)[out]), name
    moved = sum(int((before[n] != after[n])[m].sum()) for n, m in masks.items())
    assert moved > 0.5 * kept


def test_sparse_uploads_cost_what_is_sent():
    lines = read_metrics(whole("train_federated_sparse"))
    folder = whole("train_federated_sparse")
    shapes = read_json(folder / "run.json")["parameters"]["maskable"]
    kept = sum(int(m.sum()) for m in load_mask(folder / "mask.safetensors", shapes)[0].values())
    total = sum(torch.Size(s).numel() for s in shapes.values())
    clients = {k for line in lines for k in line["clients"]}
    assert len(clients) <= 12
    values = 6 * 3 * 4 * kept  # rounds, clients a round, bytes
    scores = 3 * 4 * 4 * total  # clients that calibrate, rounds, bytes
    indices = lines[-1]["bytes_up"] - values - scores
    per_client = -(-total // 8)
    joined = indices // per_client
    assert indices % per_client == 0 and len(clients) <= joined <= 12

    whole_model = sum(t.numel() for t in load_file(folder / "checkpoint" / "theta.safetensors").values())
    # calibration: the weights under the mask to 3 clients in each of 4 rounds; then the model and the mask to those
    # that join, the kept weights to the others
    calibration, others = 3 * 4 * 4 * total, 6 * 3 - joined
    assert lines[-1]["bytes_down"] == calibration + joined * (4 * whole_model + per_client) + others * 4 * kept

    assert read_metrics(whole("topk"))[-1]["bytes_up"] == 6 * 3 * 8 * (kept // 2)


def test_one_client_is_central_training_bitwise(tmp_path):
    same = shlex.split(f"{SMALL} --scheduler none --lr 0.05 --dropout 0.1") + ["--output-dir", tmp_path]
    federated = ["--num-clients", 1, "--participation-rate", 1, "--num-rounds", 1, "--local-steps", 90]
    assert call("train_federated", [*same, *federated, "--run-name", "fed"]) == 0
    assert call("train_centralized", [*same, "--epochs", 1, "--warmup-epochs", 0, "--run-name", "central"]) == 0
    fed, central = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("fed", "central"))
    assert all(torch.equal(fed[name], central[name]) for name in central)


@pytest.mark.parametrize("every, rounds", [(1, [1, 2, 3]), (4, [4, 8])])
def test_early_stopping_ends_a_run_after_an_evaluation(every, rounds, tmp_path):
    words = ["--lr", 0, "--early-stopping-patience", 2, "--num-rounds", 50, "--eval-every", every]
    assert small("train_federated", *words, "--output-dir", tmp_path, "--run-name", "stopped") == 0
    assert [line["round"] for line in read_metrics(tmp_path / "stopped")] == rounds
    assert read_json(tmp_path / "stopped" / "run.json")["results"]["best_round"] == rounds[0]


def test_the_best_checkpoints_are_kept_and_others_pruned(tmp_path):
    words = ["--keep-best", 2, "--num-rounds", 5, "--eval-every", 1, "--output-dir", tmp_path, "--run-name", "best"]
    assert small("train_federated", *words) == 0
    lines = read_metrics(tmp_path / "best")
    best = sorted(lines, key=lambda line: (-line["val_accuracy"], line["round"]))[:2]
    names = sorted(f"round_{line['round']:06d}.safetensors" for line in best)
    assert sorted(f.name for f in (tmp_path / "best" / "best").iterdir()) == names


@pytest.mark.slow
@pytest.mark.parametrize(
    "documented, shorter, runs",
    [
        ("train_centralized.py --epochs 50 --lr 0.001", "--epochs 1 --warmup-epochs 0 --classes 0:10", 1),
        ("train_federated.py --num-clients 100 --participation-rate 0.1 --local-steps 4", "--num-rounds 1", 1),
        ("train_federated.py --sharding non_iid --nc 5", "--num-rounds 1", 1),
        ("train_federated.py --heterogeneity-experiment --nc-values 1 5 10 50", "--num-rounds 1", 5),
        ("train_federated.py --local-steps-experiment --j-values 4 8 16", "--num-rounds 4", 3),
        (
            "train_federated_sparse.py --sparsity-ratio 0.9 --mask-strategy least_sensitive",
            "--num-rounds 1 --fisher-samples 16",
            1,
        ),
        ("train_federated_sparse.py --compare-strategies", "--num-rounds 1 --fisher-samples 16", 5),
    ],
)
def test_the_documented_commands_run(documented, shorter, runs, tmp_path, capsys):
    script, *words = shlex.split(documented)
    small = shlex.split(f"--dataset demo --model tiny {shorter} --seed 1") + ["--output-dir", str(tmp_path)]
    if script != "train_centralized.py":
        small += ["--participation-rate", "0.01", "--val-split", "0.05"]
    assert call(script.removesuffix(".py"), [*words, *small]) == 0
    found = [read_json(file) for file in sorted(tmp_path.glob("*/run.json"))]
    assert len(found) == runs and all(run["status"] == "finished" for run in found)
    if "--local-steps-experiment" in words:
        assert {(r["args"]["local_steps"], r["args"]["num_rounds"]) for r in found} == {(4, 4), (8, 2), (16, 1)}
    if "--compare-strategies" in words:
        said = capsys.readouterr().out
        assert "overlap (Jaccard)" in said and said.count("1.000") >= 5


@pytest.mark.slow
def test_sweeps_share_runs_and_refuse_other_flags_before_they_start(tmp_path, capsys):
    sweep = ["--local-steps-experiment", "--j-values", 4, 8, "--num-rounds", 2, "--output-dir", tmp_path]
    assert small("train_federated", "--num-rounds", 2, "--output-dir", tmp_path) == 0
    assert small("train_federated", *sweep) == 0
    assert "already finished" in capsys.readouterr().out
    assert sorted(f.parent.name for f in tmp_path.glob("*/run.json")) == [
        "fedavg_non_iid_nc3_classes_0_10_J4_seed_0_demo",
        "fedavg_non_iid_nc3_classes_0_10_J8_seed_0_demo",
    ]
    sweep[2:4] = 2, 8  # J 2 is new, J 8 was another length: nothing starts
    assert small("train_federated", *sweep, "--num-rounds", 20) == 2
    assert "--num-rounds 1 -> 5" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*/run.json"))) == 2


@pytest.mark.slow
def test_hp_search_ends_with_a_table(tmp_path, capsys):
    words = ["--hp-search", "--hp-epochs", 1, "--hp-lrs", 0.01, 0.05, "--hp-weight-decays", 0, "--warmup-epochs", 0]
    assert "0 is not" in _usage_error(small, "train_centralized", *words, "--output-dir", tmp_path, capsys=capsys)
    words[words.index("--hp-weight-decays") + 1] = 1e-3
    assert small("train_centralized", *words, "--output-dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "lr0.01_wd0.001" in said and "lr0.05_wd0.001" in said and "best validation" in said


def _usage_error(run, *words, capsys):
    assert run(*words) == 2
    return capsys.readouterr().err


@pytest.mark.slow
def test_all_experiments_run_skip_and_end_with_a_table(tmp_path, capfd):
    words = shlex.split("--quick --num-runs 2 --only-centralized --dataset demo --model tiny --classes 0:10")
    words += ["--output-dir", str(tmp_path)]
    assert call("run_all_experiments", words) == 0
    first = json.loads((tmp_path / "all_results.json").read_text())
    assert len(first) == 2 and all(0 <= run["results"]["test_accuracy_last"] <= 1 for run in first)
    assert "+-" in capfd.readouterr().out
    assert list((tmp_path / "figures").glob("*.png"))
    started = time.monotonic()
    assert call("run_all_experiments", [*words, "--plan"]) == 0
    assert time.monotonic() - started < 5
    assert capfd.readouterr().out.count("finished, took") == 2


@pytest.mark.parametrize("preset", ["--quick", "--full", "--stand-in", "--stand-in-gpu"])
def test_every_planned_command_is_a_good_command(preset, tmp_path, monkeypatch):
    from vit_sparse_fl.flags import parse
    from vit_sparse_fl.run_all_experiments import build_parser, output_dir, plan

    folder = output_dir(build_parser().parse_args([preset]))
    assert folder.name == "vit_" + preset.removeprefix("--").replace("-", "_")

    args = build_parser().parse_args([preset, "--num-runs", "1", "--output-dir", str(tmp_path)])
    names = []
    for _, name, (script, *words) in plan(args):
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        flags = parse(module.build_parser(), words)
        assert flags.run_name == name and flags.output_dir == str(tmp_path)
        names.append(name)
    assert len(set(names)) == len(names) > 15
