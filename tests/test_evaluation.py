import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from common import evaluation, parallel
from common.cli import UsageError
from common.evaluation import amp_context, bits_per_byte, perplexity, pick_device, resolve_amp
from common.parallel import World


def test_perplexity():
    nll = F.cross_entropy(torch.zeros(12, 50), torch.arange(12), reduction="sum")  # uniform: the vocabulary
    assert perplexity(nll, 12) == pytest.approx(50, rel=1e-6)
    # batches of 4 and 1 tokens: exp((4 * 1 + 1 * 6) / 5), not exp((1 + 6) / 2)
    assert perplexity(4 * 1.0 + 1 * 6.0, 5) == pytest.approx(math.exp(2.0))
    assert perplexity(1e6, 10) == math.inf and math.isnan(perplexity(math.nan, 10))
    with pytest.raises(ValueError):
        perplexity(1.0, 0)


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0, rel=1e-15)
    # the same text with the same probability, in 3 tokens or in 5: perplexities differ, bits per byte do not
    assert perplexity(30.0, 3) != perplexity(30.0, 5)
    # a uniform guess of bytes costs 8 bits each
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)
    with pytest.raises(ValueError):
        bits_per_byte(1.0, 0)


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_devices_without_a_gpu(no_gpu):
    assert pick_device() == pick_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match="--device cpu"):
            pick_device(name)


def test_devices_with_two_gpus(two_gpus, monkeypatch):
    assert pick_device() == pick_device("cuda") == pick_device("cuda:0") == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="cuda:0 to cuda:1"):
        pick_device("cuda:2")
    monkeypatch.setattr(parallel, "_world", World(3, 4, local_rank=3))
    assert pick_device() == pick_device("cuda") == torch.device("cuda:1")
    assert pick_device("cuda:0") == torch.device("cuda:0")


def test_unknown_devices(two_gpus):
    for name in ("gpu", "cuda:x", "cpu:0"):
        with pytest.raises(UsageError, match="is not auto, cpu, cuda"):
            pick_device(name)


def test_precision_by_name():
    assert resolve_amp("off", "cpu") is None
    assert resolve_amp("bf16", "cpu") == resolve_amp("bf16", "cuda") == torch.bfloat16
    assert resolve_amp("fp16", "cuda") == torch.float16
    with pytest.raises(UsageError, match="--amp bf16 or --amp off"):
        resolve_amp("fp16", "cpu")


@pytest.mark.parametrize(
    "cpuinfo, expected",
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\nmodel name : avx512_bf16\n", None),
        ("flags\t\t: fpu avx512f avx512_bf16\n", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", torch.bfloat16),
        ("Features\t: fp asimd bf16 i8mm\n", torch.bfloat16),
        (None, None),
    ],
)
def test_auto_is_bf16_where_the_processor_has_it(monkeypatch, tmp_path, cpuinfo, expected):
    path = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        path.write_text(cpuinfo)
    monkeypatch.setattr(evaluation, "Path", lambda name: path if name == "/proc/cpuinfo" else Path(name))
    assert resolve_amp("auto", "cpu") == expected


def test_the_context_changes_products_only_inside():
    a = torch.randn(4, 4)
    for dtype in (torch.bfloat16, None):
        with amp_context(dtype, torch.device("cpu")):
            assert (a @ a).dtype == (dtype or torch.float32)
