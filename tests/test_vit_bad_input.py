"""vit_sparse_fl: bad input ends with exit code 2, one line, and nothing written; and the yaml file of --config."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vit_scripts import TINY, call, small

from common.checkpoint import read_json
from common.cli import UsageError
from vit_sparse_fl import train_centralized, train_federated, train_federated_sparse
from vit_sparse_fl.flags import parse
from vit_sparse_fl.mask_files import save_mask
from vit_sparse_fl.vit import make_model

CONFIG = "vit_sparse_fl/configs/default.yaml"


@pytest.mark.parametrize(
    "script, more, words",
    [
        ("train_federated", "--nc 11", ["11", "10"]),
        ("train_federated", "--nc 1 --num-clients 4", ["1, 2, 3, 4, 5, 9", "--num-clients"]),
        ("train_federated", "--num-clients 120", ["--batch-size 8", "--num-clients"]),
        ("train_federated", "--image-size 36", ["36", "32 or 40"]),
        ("train_federated", "--classes 0:101", ["101"]),
        ("train_federated", "--classes 5", ["FROM:TO"]),
        ("train_federated", "--freeze-layers 9", ["9", "4"]),
        ("train_federated", "--head keep", ["--init-from"]),
        ("train_federated", "--init-from /no/such/run", ["/no/such/run"]),
        ("train_federated", "--weights /no/such/file.pth --model dino_vits16", ["/no/such/file.pth"]),
        ("train_federated", "--config /no/such.yaml", ["/no/such.yaml"]),
        ("train_federated", "--use-wandb", ["wandb", "pip install"]),
        ("train_federated_sparse", "--sparsity-ratio 0", ["train_federated.py"]),
        ("train_federated_sparse", "--sparsity-ratio 1", ["0.99"]),
        ("train_federated_sparse", "--sparsity-ratio 1.5", ["1.5"]),
        ("train_federated_sparse", "--sparsity-ratio 0.9999999", ["keeps 0"]),
        ("train_federated_sparse", "--sparsity-experiment --sparsity-values 0.5 1", ["0.99"]),
        ("train_federated_sparse", "--mask /no/such/mask", ["/no/such/mask"]),
        ("train_federated_sparse", "--mask-merge union --calibrate-on server", ["--calibrate-on clients"]),
        ("train_federated_sparse", "--freeze-backbone", ["--freeze-backbone"]),
        ("train_federated", "--heterogeneity-experiment --nc-values 3 11", ["11", "10"]),
        ("train_federated_sparse", "--sparsity-ratio 0 --sparsity-experiment", ["train_federated.py"]),
        ("train_federated_sparse", "--mask-scope layer --sparsity-ratio 0.99999", ["keeps 0"]),
        ("train_federated_sparse", "--calibration seed --calibration-rounds 100", ["100", "lower the rounds"]),
        ("train_federated_sparse", "--mask x --compare-strategies", ["--mask x", "drop"]),
        ("train_federated_sparse", "--upload topk --compare-strategies", ["topk", "drop"]),
        ("train_federated_sparse", "--mask-merge union --mask-strategy random", ["random", "drop"]),
        ("train_federated", "--log-dir /proc/no/logs", ["--log-dir"]),
        ("train_centralized", "--batch-size 1000", ["1000", "720"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(script, more, words, tmp_path, capsys):
    assert small(script, *more.split(), "--output-dir", tmp_path) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and all(word in said[0] for word in words), said
    assert not list(tmp_path.iterdir())


def test_num_classes_is_checked(tmp_path, capsys):
    words = TINY["train_federated"].replace("--classes 0:10", "--num-classes 99").replace("--batch-size 8", "").split()
    assert call("train_federated", [*words, "--output-dir", tmp_path / "out"]) == 2
    assert "99" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_mask_of_another_model_is_refused(tmp_path, capsys):
    save_mask(tmp_path / "other.safetensors", {"vit.layers.0.x": torch.ones(3, dtype=torch.bool)}, {})
    words = ("--mask", tmp_path / "other.safetensors", "--output-dir", tmp_path / "out")
    assert small("train_federated_sparse", *words) == 2
    assert "another model" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_with_missing_or_extra_weights_is_refused(tmp_path, capsys):
    assert small("train_centralized", "--epochs", 1, "--output-dir", tmp_path, "--run-name", "whole") == 0
    file = tmp_path / "whole" / "final" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if "key" in name and name.endswith("weight"))
    save_file({("strange" if n == gone else n): t for n, t in tensors.items()}, file)
    capsys.readouterr()
    assert small("train_federated", "--init-from", tmp_path / "whole", "--output-dir", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "strange" in said and "missing" in said and not (tmp_path / "out").exists()


def test_a_truncated_npz_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "cifar100.npz", train_images=np.zeros((100, 3, 32, 32), np.uint8))
    whole = (tmp_path / "cifar100.npz").read_bytes()
    (tmp_path / "cifar100.npz").write_bytes(whole[: len(whole) // 2])
    words = TINY["train_federated"].replace("--dataset demo", "--dataset cifar100").split()
    assert call("train_federated", [*words, "--data-root", tmp_path, "--output-dir", tmp_path / "out"]) == 2
    said = capsys.readouterr().err
    assert "cifar100.npz" in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_mask_of_a_run_can_be_used_again(tmp_path):
    words = ("--mask-strategy", "random", "--output-dir", tmp_path, "--num-rounds", 2)
    assert small("train_federated_sparse", *words, "--run-name", "first") == 0
    mask = tmp_path / "first" / "mask.safetensors"
    words = (*words, "--mask", mask, "--mask-strategy", "least_sensitive")
    assert small("train_federated_sparse", *words, "--run-name", "second") == 0
    first, second = (load_file(tmp_path / name / "mask.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_head_of_other_classes_is_not_kept(tmp_path, capsys):
    assert small("train_centralized", "--epochs", 1, "--output-dir", tmp_path, "--run-name", "whole") == 0
    words = ("--init-from", tmp_path / "whole", "--head", "keep", "--output-dir", tmp_path / "out")
    assert small("train_federated", *words, "--classes", "10:30") == 2
    said = capsys.readouterr().err
    assert "10 classes" in said and "20" in said and "--head ridge" in said and not (tmp_path / "out").exists()


def test_a_random_head_is_random_after_init_from_too(tmp_path):
    assert small("train_centralized", "--epochs", 1, "--output-dir", tmp_path, "--run-name", "whole") == 0
    words = ("--init-from", tmp_path / "whole", "--output-dir", tmp_path, "--num-rounds", 1, "--lr", 0, "--seed", 5)
    heads = {}
    for head in ("keep", "random"):
        assert small("train_federated", *words, "--head", head, "--run-name", head) == 0
        heads[head] = load_file(tmp_path / head / "final" / "model.safetensors")["classifier.weight"]
    before = load_file(tmp_path / "whole" / "final" / "model.safetensors")["classifier.weight"]
    assert torch.equal(heads["keep"], before)
    assert torch.equal(heads["random"], make_model("tiny", image_size=32, n_classes=10, seed=5).classifier.weight)


@pytest.mark.parametrize("how", ["union", "intersection"])
def test_clients_masks_are_merged(how, tmp_path):
    # two clients of sparsity 0.5 each: the union keeps at least half of the weights, the intersection at most half
    words = ("--sparsity-ratio", 0.5, "--mask-merge", how, "--calibration-clients", 2, "--num-rounds", 1)
    assert small("train_federated_sparse", *words, "--output-dir", tmp_path, "--run-name", how) == 0
    log = (tmp_path / "logs" / f"{how}.log").read_text()
    assert "overlap of 2 clients' masks (Jaccard)" in log
    fraction = float(log.split("weights are trained, ")[1].split(" %")[0])
    assert 50 < fraction < 100 if how == "union" else 0 < fraction < 50


def test_the_default_config_is_taken_and_the_command_line_wins():
    args = parse(train_federated.build_parser(), ["--config", CONFIG])
    assert (args.lr, args.num_rounds, args.amp, args.early_stopping_patience) == (1e-3, 500, "auto", 100)
    args = parse(train_federated.build_parser(), ["--config", CONFIG, "--lr", "0.5", "--num-rounds", "3"])
    assert (args.lr, args.num_rounds) == (0.5, 3)
    assert parse(train_federated.build_parser(), ["--config", CONFIG, "--amp", "off"]).amp == "off"
    args = parse(train_federated_sparse.build_parser(), ["--config", CONFIG])
    assert (args.calibration_rounds, args.sparsity_ratio, args.fisher_samples) == (5, 0.9, 512)
    args = parse(train_centralized.build_parser(), ["--config", CONFIG])
    assert (args.epochs, args.lr, args.early_stopping_patience, args.warmup_epochs) == (50, 1e-3, 10, 5)


@pytest.mark.parametrize(
    "text, words",
    [
        ("federated:\n  num_round: 3\n", ["federated.num_round", "federated.num_rounds"]),
        ("sed: 3\n", ["sed", "seed"]),
        ("federated:\n  num_rounds: many\n", ["federated.num_rounds", "many"]),
        ("sharding:\n  strategy: odd\n", ["sharding.strategy", "non_iid"]),
        ("model:\n  freeze_backbone: 3\n", ["true or false"]),
        ("heterogeneity_experiment:\n  nc_values: 5\n", ["a list"]),
        ("a: [\n", ["not yaml"]),
        ("- 3\n", ["keys and values"]),
    ],
)
def test_a_bad_config_is_named(text, words, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        parse(train_federated.build_parser(), ["--config", str(tmp_path / "bad.yaml")])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_config_s_values_are_in_the_run(tmp_path):
    (tmp_path / "own.yaml").write_text("federated:\n  num_rounds: 2\n  eval_every: 1\nmodel:\n  pretrained: false\n")
    words = TINY["train_federated"].replace("--num-rounds 4 --eval-every 2", "").split()
    words += ["--config", tmp_path / "own.yaml", "--output-dir", tmp_path, "--run-name", "own"]
    assert call("train_federated", words) == 0
    run = read_json(tmp_path / "own" / "run.json")
    assert run["results"]["rounds"] == 2 and run["args"]["eval_every"] == 1


def test_a_config_that_is_not_text_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not yaml"):
        parse(train_federated.build_parser(), ["--config", str(tmp_path / "bad.yaml")])


def test_random_weights_need_no_download():
    model = make_model("dino_vits16", image_size=64, n_classes=100, pretrained=False)
    assert sum(p.numel() for p in model.classifier.parameters()) == 38_500
