"""vit_sparse_fl: masks and heads that a run takes from another, and the yaml file of --config."""

import harness
import pytest
import torch
from safetensors.torch import load_file
from test_vit_scripts import TINY, call, small

from common.checkpoint import read_json
from vit_sparse_fl import train_centralized, train_federated, train_federated_sparse
from vit_sparse_fl.flags import parse
from vit_sparse_fl.vit import make_model

CONFIG = "vit_sparse_fl/configs/default.yaml"


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


def test_a_random_head_is_random_after_init_from_too(tmp_path):
    whole = harness.whole("vit_sparse_fl/centralized")
    words = ("--init-from", whole, "--output-dir", tmp_path, "--num-rounds", 1, "--lr", 0, "--seed", 5)
    heads = {}
    for head in ("keep", "random"):
        assert small("train_federated", *words, "--head", head, "--run-name", head) == 0
        heads[head] = load_file(tmp_path / head / "final" / "model.safetensors")["classifier.weight"]
    before = load_file(whole / "final" / "model.safetensors")["classifier.weight"]
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


def test_a_config_s_values_are_in_the_run(tmp_path):
    (tmp_path / "own.yaml").write_text("federated:\n  num_rounds: 2\n  eval_every: 1\nmodel:\n  pretrained: false\n")
    words = TINY["train_federated"].replace("--num-rounds 4 --eval-every 2", "").split()
    words += ["--config", tmp_path / "own.yaml", "--output-dir", tmp_path, "--run-name", "own"]
    assert call("train_federated", words) == 0
    run = read_json(tmp_path / "own" / "run.json")
    assert run["results"]["rounds"] == 2 and run["args"]["eval_every"] == 1


def test_random_weights_need_no_download():
    model = make_model("dino_vits16", image_size=64, n_classes=100, pretrained=False)
    assert sum(p.numel() for p in model.classifier.parameters()) == 38_500
