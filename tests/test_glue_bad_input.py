"""lora_glue_fl: what diverges, all of it or one client."""

import json
import math

import harness
import pytest
import torch
from safetensors.torch import load_file
from test_glue_rounds import call

from common.checkpoint import read_json
from common.runlog import read_metrics
from lora_glue_fl import fed_core

pytestmark = pytest.mark.slow
TINY = "--model tiny --dataset demo --task-name sst2".split()
SMALL = "--threads 1 --max-length 32 --lora-r 4".split()
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def rounds(out, *more):
    shards = harness.whole("lora_glue_fl/sharding")
    line = [*TINY, *SMALL, "--shard-dir", shards, "--output-root", out, "--run-name", "x", "--rounds", 1]
    return call(*line, "--learning-rate", "5e-3", "--keep", "all", *more)


@pytest.mark.parametrize("rule", ["naive", "svd", "stack"])
def test_one_client_that_diverges_is_left_out_and_named(rule, tmp_path, capsys, monkeypatch):
    """Naive: what is served is the mean of the others' adapters."""
    real, calls = fed_core.fit, []

    def fit(loss, encoded, steps, parameters, *rest):
        value = real(loss, encoded, steps, parameters, *rest)
        calls.append(None)
        if len(calls) == 2:
            with torch.no_grad():
                parameters[next(name for name in parameters if name.startswith("B."))][0, 0] = math.nan
        return value

    monkeypatch.setattr(fed_core, "fit", fit)
    assert rounds(tmp_path, "--aggregate", rule, "--svd-rank", 4, "--rounds", 2, "--eval-clients") == 0
    assert len(calls) == 6
    said = capsys.readouterr().err
    assert "round 1: update not finite, left out: client 2" in said and said.count("left out") == 1
    first, second = read_metrics(tmp_path / "x")
    assert first["left_out"] == [[1, 1]] and first["left_out_updates"] == 1 == second["left_out_updates"]
    assert first["clients"] == [0, 2] and second["clients"] == [0, 1, 2] and "left_out" not in second
    assert len(first["client_train_loss"]) == len(first["client_val_accuracy"]) == 2
    folder = tmp_path / "x" / "round_1"
    assert sorted(path.name for path in folder.glob("client_*")) == ["client_1", "client_3"]
    assert len(list((tmp_path / "x" / "round_2").glob("client_*"))) == 3
    fused = next(folder.glob("fused_*"))
    manifest = json.loads((fused / "fuse_manifest.json").read_text())
    sizes = [len(read_json(harness.whole("lora_glue_fl/sharding") / f"client_{k}.json")["indices"]) for k in (1, 3)]
    assert manifest["left_out"] == [2] and manifest["k_adapters"] == 2
    assert manifest["adapters"] == ["../client_1/adapter", "../client_3/adapter"]
    assert manifest["weights"] == pytest.approx([n / sum(sizes) for n in sizes])
    served = load_file(fused / "adapter" / WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in served.values())
    if rule != "naive":
        return
    one, three = (load_file(folder / name / "adapter" / WEIGHTS) for name in ("client_1", "client_3"))
    for name, tensor in served.items():
        mean = (sizes[0] * one[name].double() + sizes[1] * three[name].double()) / sum(sizes)
        assert torch.allclose(tensor.double(), mean, rtol=1e-6, atol=1e-8), name
        assert "lora_A" in name or not torch.equal(one[name], three[name])  # B is 0 in the only step: A stays
