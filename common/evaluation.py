"""Figures of merit from sums, the best of several rounds, and where and in which precision to compute."""

import contextlib
import ctypes
import math
import os
from pathlib import Path

import torch

from common.cli import UsageError
from common.curves import number
from common.parallel import world


def perplexity(nll_sum, tokens):
    """exp(nll_sum / tokens), nll_sum in nats over `tokens` predicted tokens; inf where that is too large.

    Sums, not means of batch means: those weight a short last batch like a full one.
    Raises: ValueError for no tokens.
    """
    if tokens < 1:
        raise ValueError(f"perplexity of {tokens} tokens is undefined")
    mean = float(nll_sum) / int(tokens)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def bits_per_byte(nll_sum, n_bytes):
    """nll_sum / (ln 2 * n_bytes): nll_sum in nats, over the UTF-8 bytes of the scored tokens.

    It compares across tokenizers, which perplexity does not. Raises: ValueError for no bytes.
    """
    if n_bytes < 1:
        raise ValueError(f"bits per byte of {n_bytes} bytes are undefined")
    return float(nll_sum) / (math.log(2) * int(n_bytes))


def pick_device(name="auto"):
    """The torch.device for "auto" (CUDA when there is one), "cpu", "cuda" or "cuda:N".

    With several processes "auto" and "cuda" give each process the GPU of its local rank.
    Raises: UsageError for another name, or a GPU that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and not (kind == "cuda" and (name == "cuda" or index.isdecimal())):
        raise UsageError(f"--device {name} is not auto, cpu, cuda or cuda:N")
    if kind == "cuda" and count == 0:
        raise UsageError(f"--device {name}: this torch sees no CUDA device: use --device cpu")
    if index and int(index) >= count:
        raise UsageError(f"--device {name}: there are {count} CUDA devices: use cuda:0 to cuda:{count - 1}")
    return world().device(name)


def resolve_amp(amp, device):
    """The dtype of automatic mixed precision: None for "off", else torch.bfloat16 or torch.float16.

    Args: amp: "off", "bf16", "fp16", or "auto": bf16 where the device multiplies it natively (CPUs with AMX or
        AVX512-BF16 or Arm's BF16, GPUs from Ampere on), else off.
    Raises: UsageError for fp16 on a CPU.
    """
    device = torch.device(device)
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU: use --amp bf16 or --amp off on a CPU")
    if amp == "auto":
        amp = "bf16" if _native_bf16(device) else "off"
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def amp_context(dtype, device):
    """The context to run a forward pass in. Args: dtype: of `resolve_amp`; device: a torch.device."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def _native_bf16(device):
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.exists():
        return False
    for line in cpuinfo.read_text(errors="replace").splitlines():
        name, _, words = line.partition(":")
        if name.strip().lower() in ("flags", "features"):  # x86, Arm
            return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(words.split())
    return False


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def reuse_large_memory():
    """Lets large CPU tensors reuse memory that earlier ones freed, for the rest of the process. True if it took effect.

    glibc hands every block above 32 MiB back to the system when it is freed, and asks for fresh, zeroed pages the
    next time: a step with a 50,264-word head (100 MiB each of logits, of the head's gradient, of temporaries) spends
    6 to 30 % of its bf16 time on page faults, depending on how readily the system has pages. The bits are the same.
    The price: the process keeps its peak memory until it ends (12 % more at the peak of such a step). Call it before
    the first large tensor. Where the C library is not glibc it does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator when it first serves a request
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def lower(loss, than):
    """Whether a loss is lower than another one, as every loss is than nan."""
    return loss < than or math.isnan(than) and not math.isnan(loss)


def best_line(lines, field, highest=False):
    """The best round's line of metrics.jsonl, by a field; of a run that was not trained its only line."""

    def rank(line):
        value = number(line[field])
        return math.isnan(value), -value if highest else value

    return min([line for line in lines if line["round"]] or lines, key=rank)


class Best:
    """The weights with the lowest validation loss so far: `theta` [n], `loss` (nats a token), `round` (after how many
    rounds; 0 until there was one). A `lasting` object."""

    def __init__(self):
        self.theta, self.loss, self.round = None, math.inf, 0

    def offer(self, t, loss, theta):
        """Takes a copy of theta if its loss is the lowest so far, or it is the first that was trained."""
        if not self.round or lower(loss, self.loss):
            self.theta, self.loss, self.round = theta.clone(), loss, t

    def state_dict(self):
        loss, t = torch.tensor(self.loss, dtype=torch.float64), torch.tensor(self.round)
        return {"theta": self.theta, "loss": loss, "round": t}

    def load_state_dict(self, state):
        self.theta, self.loss, self.round = state["theta"], state["loss"].item(), state["round"].item()
