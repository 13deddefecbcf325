"""The scripts as a user runs them: what they leave, identities between them, the study's runner."""

import importlib
import math
import sys
import types
from pathlib import Path

import harness
import pytest
import torch
from running import call, final_weights

from common.runlog import read_metrics


@pytest.mark.slow
def test_final_loads_in_transformers_and_gives_the_logged_loss():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mamba_fl.data import build_data, inputs_and_labels

    folder = harness.whole("mamba_fl/fed_fisher")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == 400
    data, lines, results = build_data("demo", "bpe:400", 32, 4), read_metrics(folder), harness.read_results(folder)

    def loss(blocks):
        inputs, labels = inputs_and_labels(blocks)
        with torch.no_grad():
            logits = model(inputs).logits[..., :400].double()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()

    last = lines[-1]
    assert loss(data.validation[:6]) == pytest.approx(last["val_loss"], abs=2e-5)
    size = data.token_bytes[data.validation[:6, 1:]].sum().item()
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] * 6 * 32 / size / math.log(2))
    assert last["val_ppl"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["train_ppl"] == pytest.approx(math.exp(last["train_loss"]))
    assert math.log(results["test_ppl_last"]) == pytest.approx(loss(data.test), abs=2e-5)
    assert math.log(results["final_val_ppl"]) == pytest.approx(loss(data.validation), abs=2e-5)
    best = min(lines, key=lambda line: line["val_loss"])
    assert (results["best_round"], results["best_val_ppl"]) == (best["round"], best["val_ppl"])


def test_one_client_is_central_training_bitwise(tmp_path):
    same = ("--num-clients", 1, "--batch-size", 4, "--output-dir", tmp_path)
    assert call("fed_avg", *same, "--run-name", "fed") == 0
    assert call("central", *same, "--run-name", "central") == 0
    fed, central = final_weights(tmp_path / "fed"), final_weights(tmp_path / "central")
    assert all(torch.equal(fed[name], central[name]) for name in central)


def test_server_momentum_zero_is_fedavg_bitwise(tmp_path):
    same = ("--seed", 0, "--output-dir", tmp_path)
    assert call("fed_avg", *same, "--run-name", "avg") == 0
    assert call("fed_momentum", *same, "--run-name", "momentum", "--server-momentum", 0) == 0
    avg, momentum = final_weights(tmp_path / "avg"), final_weights(tmp_path / "momentum")
    assert all(torch.equal(avg[name], momentum[name]) for name in avg)


def test_equal_budget_gives_central_and_clients_the_same_tokens(tmp_path):
    from mamba_fl import central, fed_avg
    from mamba_fl.fed_core import plan_rounds
    from mamba_fl.flags import complete_flags

    def tokens(module, *more):
        words = ["--dataset", "demo", "--batch-size", 2, "--n-epochs", 1.5, *more]
        args = complete_flags(module.build_parser().parse_args(list(map(str, words))))
        examples = [31, 30, 29] if module is fed_avg else [90]
        rounds, steps = plan_rounds(args, examples)
        assert (rounds - 1) * args.local_updates < steps <= rounds * args.local_updates
        return steps * max(1, int(args.participation * len(examples) + 0.5)) * args.batch_size

    wanted = tokens(central, "--batch-size", 6)
    assert tokens(fed_avg) == tokens(fed_avg, "--local-updates", 8) == wanted
    assert abs(tokens(fed_avg, "--participation", 0.67) - wanted) < 4


@pytest.mark.parametrize(
    "script, more",
    [
        ("fed_avg", "--participation 0.5 --local-updates 2 --client-state reset --amp bf16"),
        ("fed_momentum", "--server-optimizer nesterov --server-lr 0.7"),
        ("fed_momentum", "--server-optimizer adam --server-lr 1e-3"),
        ("fed_momentum", "--server-optimizer adam --server-lr 1e-3 --server-bias-correction"),
        ("fed_entropy", "--client-state pooled --beta1 0 --beta2 0.99"),
        ("fed_fisher", "--fisher-samples 2 --client-state pooled"),
    ],
)
def test_flags_that_no_other_test_gives_run(script, more, tmp_path):
    assert call(script, *more.split(), "--output-dir", tmp_path, "--run-name", "r") == 0
    lines = read_metrics(tmp_path / "r")
    assert all(isinstance(line["val_loss"], float) for line in lines)


def test_the_sources_command_line_runs(tmp_path):
    words = "--num_clients 3 --local_updates 2 --config pure_ssm_1_layer --n_epochs 0.2 --lr 5e-4 --batch_size 2 "
    words += f"--sequence_length 32 --seed 1 --val_freq 30 --data_dir {tmp_path} --cache_dir {tmp_path} "
    words += "--server_momentum 0.9 --server_lr 1.0 --dataset demo --tokenizer bpe:400 --d-model 32 --headdim 16"
    assert call("fed_momentum", *words.split(), bare=True) == 0
    assert (tmp_path / "fed_momentum_config_pure_ssm_1_layer_lu_2_seed_1_demo" / "run.json").exists()


def test_metrics_go_to_a_tracker(tmp_path, monkeypatch):
    seen = []
    writer = types.SimpleNamespace(add_scalar=lambda *what: seen.append(what), flush=lambda: None)

    def open_writer(folder):
        Path(folder).mkdir(parents=True)
        return writer

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=open_writer))
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: name == "tensorboard" or plain(name, *at))
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "r", "--track", "tensorboard") == 0
    losses = [line["val_loss"] for line in read_metrics(tmp_path / "r")]
    assert [value for name, value, _ in seen if name == "fed_avg/val_loss"] == losses
    assert (tmp_path / "r" / "tensorboard").is_dir()
