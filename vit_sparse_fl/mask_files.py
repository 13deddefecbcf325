"""Files of masks: packed bits by the parameters' names, how the mask was made, and checks when it is read."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common.checkpoint import saving
from common.cli import UsageError
from common.hub import reading
from vit_sparse_fl.masks import kept_apart, kept_per_layer


def save_mask(path, masks, provenance):
    """Writes masks as packed bits (8 weights a byte, first weight in the highest bit) into a safetensors file.

    Args: masks: {name: bool tensor}, the mask by the parameters' names. Metadata `mask`, one JSON object (safetensors
    does not fix the order of several entries): what is in `provenance` (strategy, sparsity, scope, calibration, rounds,
    samples, seed, ...), `shapes` (in order), `kept` (a count per tensor), `kept_per_layer` and `kept_apart` (fractions,
    of modules and of all weights and biases), `sha256` of the bits. The file is replaced atomically, and the same masks
    give the same bytes. Raises RunFailed if the disk is full.
    """
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in masks.items()}
    about = {
        **provenance,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "kept": {name: int(mask.sum()) for name, mask in masks.items()},
        "kept_per_layer": kept_per_layer(masks),
        "kept_apart": kept_apart(masks),
        "sha256": _digest(packed),
    }
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    with saving(path, fresh):
        save_file(packed, fresh, metadata={"mask": json.dumps(about)})
        fresh.replace(path)


def load_mask(path, shapes):
    """Reads what `save_mask` wrote: (mask, provenance), the mask a bool vector in the order of `shapes`.

    Args: shapes: {name: shape} of the model's maskable parameters.
    Raises: UsageError when there is no such file, it is damaged, or the mask is another model's (its first
        differing tensors are named).
    """
    packed, about = _read(path)
    stored, wanted, none = _sizes(about["shapes"]), _sizes(shapes), "missing"
    odd = list(dict.fromkeys(name for name in (*wanted, *stored) if stored.get(name) != wanted.get(name)))
    if odd:
        said = [f"{n} is {stored.get(n, none)} in the mask, {wanted.get(n, none)} in the model" for n in odd[:3]]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise UsageError(f"the mask {path} is for another model: {'; '.join(said)}{more}")
    if packed.keys() != stored.keys() or _digest({name: packed[name] for name in stored}) != about["sha256"]:
        raise UsageError(f"the mask {path} is damaged (its bits do not have the SHA-256 it names): make it anew")
    bits = [np.unpackbits(packed[name].numpy(), count=math.prod(shape)) for name, shape in shapes.items()]
    return torch.from_numpy(np.concatenate(bits).astype(bool)), about


def sparsity_of(path):
    """The share of the weights that the mask in a file freezes, to four digits. Raises UsageError as `load_mask`."""
    about = _read(path)[1]
    whole = sum(math.prod(shape) for shape in about["shapes"].values())
    return round(1 - sum(about["kept"].values()) / max(1, whole), 4)


def _read(path):
    """({name: packed bits}, what is said of them)."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no mask at {path}: give the mask.safetensors of a sparse run")
    with reading(f"the mask {path} is damaged", "make it anew"):
        with safe_open(path, "pt") as file:
            packed = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads((file.metadata() or {}).get("mask", "{}"))
    if not _describes_mask(about) or any(bits.dtype != torch.uint8 for bits in packed.values()):
        raise UsageError(f"{path} is a safetensors file but no mask: give the mask.safetensors of a sparse run")
    return packed, about


def _describes_mask(about):
    if not isinstance(about, dict) or not all(isinstance(about.get(name), dict) for name in ("shapes", "kept")):
        return False
    numbers = [*about["kept"].values(), *(n for shape in about["shapes"].values() for n in _listed(shape))]
    return isinstance(about.get("sha256"), str) and all(type(n) is int and n >= 0 for n in numbers)


def _listed(shape):
    return shape if isinstance(shape, list) else [None]


def _sizes(shapes):
    return {name: "x".join(map(str, shape)) for name, shape in shapes.items()}


def _digest(packed):
    sha = hashlib.sha256()
    for name, bits in packed.items():
        sha.update(f"{name}:{bits.numel()}:".encode())
        sha.update(bits.numpy().tobytes())
    return sha.hexdigest()
