"""Randomness by key: every draw comes from a generator made for its purpose, round and client.

No generator is carried from one round to the next: a resumed run needs no generator state, and neither the
order of the clients nor the number of processes can change a draw.
"""

import hashlib
import json
import operator
import os
import random

import numpy as np


def key(seed, purpose, round=0, client=0):
    """A whole number of 63 bits, made from the SHA-256 of (seed, purpose, round, client).

    The four are written as a JSON list, so that no two different quadruples have the same text. (numpy's
    SeedSequence does not tell [0, 5] from [0, 5, 0], and small related seeds give related streams elsewhere.)

    Args: seed, round, client: whole numbers; purpose: a string, such as "batches". Raises: TypeError for anything else.
    """
    numbers = [operator.index(number) for number in (seed, round, client)]
    text = json.dumps([numbers[0], purpose, numbers[1], numbers[2]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed, purpose, round=0, client=0):
    """A fresh `numpy.random.Generator` for this purpose, round and client."""
    return np.random.Generator(np.random.PCG64(key(seed, purpose, round, client)))


def torch_stream(seed, purpose, round=0, client=0, device="cpu"):
    """A fresh `torch.Generator` on `device` for this purpose, round and client."""
    import torch

    return torch.Generator(device=device).manual_seed(key(seed, purpose, round, client))


def seed_torch(seed, purpose, round=0, client=0):
    """Sets torch's own generators (CPU and every CUDA device), which dropout and initialisation draw from."""
    import torch

    torch.manual_seed(key(seed, purpose, round, client))


def seed_everything(seed):
    """Seeds Python, numpy and torch, and asks torch for deterministic algorithms.

    On a machine with CUDA an operation without a deterministic form warns instead of failing.
    Call it before the first CUDA operation: cuBLAS reads its workspace setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    random.seed(key(seed, "python"))
    np.random.seed(key(seed, "numpy") % 2**32)
    seed_torch(seed, "torch")
    # What use_deterministic_algorithms does, without its import of torch._inductor, which takes seconds.
    torch.set_deterministic_debug_mode("warn" if torch.cuda.is_available() else "error")
    # It would write NaN into every torch.empty: a debugging aid that costs a pass over memory.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
