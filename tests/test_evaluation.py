"""Figures of merit, devices, precision, memory that is used again."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from common import evaluation
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


NONE, WRONG = "sees no CUDA device: use --device cpu", "is not auto, cpu, cuda"


@pytest.mark.parametrize("gpus, local_rank, expected", [
    (0, 0, {"auto": "cpu", "cpu": "cpu", "cuda": NONE, "cuda:0": NONE}),
    (2, 0, {"auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1", "cpu": "cpu", "cuda:2": "use cuda:0 to cuda:1"}),
    (2, 3, {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "gpu": WRONG, "cuda:x": WRONG, "cpu:0": WRONG}),
])  # fmt: skip
def test_devices(gpus, local_rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(evaluation, "world", lambda: World(local_rank, 4, local_rank))
    for name, answer in expected.items():
        if " " in answer:
            with pytest.raises(UsageError, match=answer):
                pick_device(name)
        else:
            assert pick_device(name) == torch.device(answer)


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


PROGRAM = """
import resource
from common.evaluation import reuse_large_memory
took_effect = reuse_large_memory()
import torch
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.full((12_000_000,), 1.0)  # 46 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(took_effect, [faults() for _ in range(5)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_further_large_tensor_causes_no_page_faults():
    """In a fresh process: what was allocated before counts."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    took_effect, faults = done.stdout.split()
    # 46 MiB are 23 pages of 2 MiB, and 11,719 of 4 KiB; another C library has no mallopt
    assert took_effect == "False" or int(faults) <= 10
