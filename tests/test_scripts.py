"""The scripts as a user runs them: what they leave, identities between them, the study's runner."""

import importlib
import sys
import types
from pathlib import Path

import harness
import pytest
import torch
from running import SCRIPTS, call, final_weights, flags

from common.checkpoint import read_json
from common.runlog import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_what_the_readme_says(script):
    folder = harness.whole(f"mamba_fl/{script}")
    manifest = read_json(folder / "run.json")
    assert manifest["status"] == "finished" and manifest["command"] == script
    assert manifest["data"]["variant"] and manifest["versions"]["torch"]
    lines = read_metrics(folder)
    assert [line["round"] for line in lines] == [2, 4, 6]
    wanted = {"val_loss", "val_ppl", "val_bits_per_byte", "train_ppl", "bytes_up", "bytes_down", "seconds", "tokens"}
    wanted |= {"tokens_per_second", "generated"}
    wanted |= {"grad_cosine", "delta_norms"} if script == "central" else {"client_train_loss", "client_val_ppl"}
    assert wanted <= set(lines[-1])
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    assert (folder / "curve.png").stat().st_size > 1000
    history = read_json(folder / "training_history.json")
    field = "step" if script == "central" else "global_step"
    assert history[field] == [2, 4, 6] and len(history["generated"]) == 3
    who = {"server"} if script == "central" else {"server", *(f"client_{k}" for k in range(4))}
    assert {f.parents[1].name for f in folder.rglob("*.npz")} == who


@pytest.mark.slow
def test_final_loads_in_transformers_and_gives_the_logged_loss():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mamba_fl.data import build_data, inputs_and_labels

    folder = harness.whole("mamba_fl/fed_fisher")
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert len(AutoTokenizer.from_pretrained(folder / "final")) == 400
    inputs, labels = inputs_and_labels(build_data("demo", "bpe:400", 32, 4).validation[:6])
    with torch.no_grad():
        logits = model(inputs).logits[..., :400].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert loss == pytest.approx(read_metrics(folder)[-1]["val_loss"], abs=2e-5)


def test_one_client_is_central_training_bitwise(tmp_path):
    same = ("--num-clients", 1, "--batch-size", 4, "--output-dir", tmp_path, "--client-weights", "uniform")
    assert call("fed_avg", *same, "--run-name", "fed") == 0
    assert call("central", *same[:-2], "--run-name", "central") == 0
    fed, central = final_weights(tmp_path / "fed"), final_weights(tmp_path / "central")
    assert all(torch.equal(fed[name], central[name]) for name in central)


def test_server_momentum_zero_is_fedavg_bitwise(tmp_path):
    same = ("--seed", 0, "--output-dir", tmp_path)
    assert call("fed_avg", *same, "--run-name", "avg") == 0
    assert call("fed_momentum", *same, "--run-name", "momentum", "--server-momentum", 0) == 0
    avg, momentum = final_weights(tmp_path / "avg"), final_weights(tmp_path / "momentum")
    assert all(torch.equal(avg[name], momentum[name]) for name in avg)


def test_sync_epoch_averages_independent_runs(tmp_path):
    """The source's schedule: the number of local updates then changes nothing."""
    same = ("--sync", "epoch", "--n-epochs", 1, "--lr", 1e-2, "--output-dir", tmp_path)
    assert call("fed_avg", *same, "--run-name", "lu1") == 0
    assert call("fed_avg", *same, "--run-name", "lu3", "--local-updates", 3, "--rounds", 2) == 0
    assert call("fed_avg", *same[2:], "--run-name", "synced") == 0
    one, three, synced = (final_weights(tmp_path / name) for name in ("lu1", "lu3", "synced"))
    assert all(torch.allclose(one[name], three[name], atol=1e-6) for name in one)
    assert not all(torch.allclose(one[name], synced[name], atol=1e-4) for name in one)
    bytes_down = [read_metrics(tmp_path / name)[-1]["bytes_down"] for name in ("lu1", "synced")]
    assert bytes_down[1] == 6 * bytes_down[0]


def test_equal_budget_gives_central_and_clients_the_same_tokens(tmp_path):
    from mamba_fl import central, fed_avg
    from mamba_fl.fed_core import Study
    from mamba_fl.flags import complete_flags

    class NoRun:
        def begin(self, *_):
            pass

    def tokens(module, *more):
        script = module.__name__.split(".")[1]
        args = module.build_parser().parse_args(flags(script, "--n-epochs", 1.5, *more))
        args.rounds = None
        study = Study(complete_flags(args), NoRun(), federated=module is fed_avg)
        return sum(study.local_steps(r) for r in range(study.rounds)) * study.per_round * args.batch_size

    wanted = tokens(central, "--batch-size", 6)
    assert tokens(fed_avg) == tokens(fed_avg, "--local-updates", 8) == wanted
    assert abs(tokens(fed_avg, "--participation", 0.67) - wanted) < 4


@pytest.mark.parametrize(
    "script, more",
    [
        ("fed_avg", ["--participation", "0.5", "--client-optimizer", "sgd", "--lr", "0.5"]),
        ("fed_avg", ["--participation", "0.5", "--local-updates", "2", "--client-state", "reset", "--amp", "bf16"]),
        ("fed_avg", ["--budget", "source", "--sharding", "iid", "--client-weights", "uniform"]),
        ("fed_momentum", ["--server-optimizer", "nesterov", "--server-lr", "0.7"]),
        ("fed_momentum", ["--server-optimizer", "adam", "--server-lr", "1e-3"]),
        ("fed_momentum", ["--server-optimizer", "yogi", "--server-lr", "1e-3"]),
        ("fed_momentum", ["--server-optimizer", "adagrad", "--server-lr", "1e-3"]),
        ("fed_momentum", ["--momentum-form", "ema"]),
        ("fed_entropy", ["--entropy-prior", "examples", "--temperature", "0.1", "--entropy-samples", "0"]),
        ("fed_fisher", ["--fisher-normalize", "--fisher-labels", "data", "--fisher-samples", "2"]),
    ],
)
def test_every_flag_of_a_method_runs(script, more, tmp_path):
    assert call(script, *more, "--output-dir", tmp_path, "--run-name", "r") == 0
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

    class SummaryWriter:
        def __init__(self, folder):
            Path(folder).mkdir(parents=True)

        def add_scalar(self, *what):
            seen.append(what)

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: name == "tensorboard" or plain(name, *at))
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "r", "--track", "tensorboard") == 0
    losses = [line["val_loss"] for line in read_metrics(tmp_path / "r")]
    assert [value for name, value, _ in seen if name == "fed_avg/val_loss"] == losses
    assert (tmp_path / "r" / "tensorboard").is_dir()


def test_compile_is_checked_against_eager(capsys, monkeypatch):
    from common.compiling import checked_compile

    weight = torch.nn.Parameter(torch.ones(3))
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: f(x) + 0 * weight.sum() - (weight * x).sum())
    loss = checked_compile(lambda x: (weight * x).sum(), {"w": weight})
    assert loss(torch.ones(3)).item() == 3
    assert "the gradient of w differs" in capsys.readouterr().err
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: f(x) * 1)
    same = checked_compile(lambda x: (weight * x).sum(), {"w": weight})
    assert same(torch.ones(3)).item() == 3 and not capsys.readouterr().err


def test_a_client_that_is_not_finite_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    from mamba_fl.fed_core import Study

    good = Study.local_update

    def local_update(self, theta, k, round):
        theta_k, n_k = good(self, theta, k, round)
        if k in broken and round == 1:
            next(iter(theta_k.values())).view(-1)[0] = float("nan")
        return theta_k, n_k

    monkeypatch.setattr(Study, "local_update", local_update)
    broken = {1}
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "one") == 0
    lines = read_metrics(tmp_path / "one")
    assert lines[0]["left_out"] == [[2, 1]] and "left_out" not in lines[1]
    assert lines[-1]["left_out_updates"] == 1
    assert lines[0]["client_train_loss"][1] is None and lines[0]["train_loss"] < 7
    assert all(torch.isfinite(w).all() for w in final_weights(tmp_path / "one").values())
    assert "client 1" in capsys.readouterr().out
    broken = {0, 1}
    assert call("fed_avg", "--output-dir", tmp_path, "--run-name", "two") == 1
    assert "2 of 3 clients" in capsys.readouterr().err
    manifest = read_json(tmp_path / "two" / "run.json")
    assert manifest["status"] == "failed" and "2 of 3 clients" in manifest["reason"]
