"""Adapters on disk, in peft's own format, read without unpickling anything and without importing what a file names.

    adapter_config.json         peft.LoraConfig
    adapter_model.safetensors   base_model.model.LAYER.lora_A.weight [r, k], .lora_B.weight [d, r], and the head as
                                base_model.model.NAME (peft's modules_to_save)
                                base_model.model.LAYER.base_layer.weight: where the base is no longer the model that
                                the configuration names, its weight there (peft loads it too, over the model's own)

`PeftModel.from_pretrained(model, folder)` loads what `write_adapter` wrote, without this project; `read_adapter` reads
what `PeftModel.save_pretrained` wrote.
"""

import hashlib
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from common.checkpoint import read_json, saving, swap, write_json
from common.cli import RunFailed, UsageError
from common.hub import read_config, reading
from common.products import scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = {CONFIG, WEIGHTS, "fuse_manifest.json", "README.md"}  # README.md: peft's model card
_PREFIX = "base_model.model."
# Options that are read here or change no number of a trained adapter. Any other must be as in a fresh peft.LoraConfig.
_READ = {"r", "lora_alpha", "use_rslora", "fan_in_fan_out", "head_pooling", "base_model_name_or_path", "task_type"}
_READ |= {"target_modules", "modules_to_save", "layers_pattern", "layers_to_transform", "exclude_modules"}
_READ |= {"inference_mode", "lora_dropout", "peft_version", "revision", "runtime_config"}
_STARTS = (None, True, False, "gaussian", "orthogonal")  # values of init_lora_weights that leave the base as it is


@dataclass
class AdapterFile:
    """An adapter, read and checked.

    factors: {layer: (A [r, k], B [d, r])}, head: {parameter name in the transformers model: tensor}, fp32 on the CPU;
    base: {layer: weight that replaces the base model's}, empty but for stack and residual; scale: s = alpha / r
    (rsLoRA: alpha / sqrt r); target_modules: sorted names, the layers' full names where the file has a pattern or
    chooses among layers; head_pooling: what its head reads, "cls" or "mean"; sha256: of adapter_model.safetensors;
    config: all of adapter_config.json.
    """

    factors: dict
    head: dict
    base: dict
    r: int
    alpha: float
    scale: float
    target_modules: list
    modules_to_save: list
    base_model: str | None
    fan_in_fan_out: bool
    head_pooling: str
    sha256: str
    config: dict
    path: Path


def write_adapter(folder, factors, head, *, alpha, base_model, base=None, more=None, head_pooling="cls", **options):
    """Writes an adapter folder, whole or not at all; an older adapter in its place is replaced.

    Args: factors: {layer: (A [r, k], B [d, r])}, one r; head: {parameter name in the transformers model: tensor}, {}
        for none; alpha: peft's lora_alpha; base_model: its name or folder, or None; base: {layer: weight}, what differs
        from that model under the adapter; more: {file name: value}, further JSON files; head_pooling: "mean" where the
        head reads the mean over tokens (ours: peft, whose model reads the first token, says that it does not know it);
        options: of peft.LoraConfig: target_modules, modules_to_save (of the head), fan_in_fan_out, lora_dropout,
        task_type ("SEQ_CLS"). Tensors are written as fp32.
    Raises: RunFailed for numbers that are not finite and for a folder that cannot be written; UsageError for a folder
        with other files in it, which are left alone.
    """
    import peft  # only here: it takes seconds to import

    folder = Path(folder)
    tensors = dict(head)
    tensors |= {f"{layer}.base_layer.weight": weight for layer, weight in (base or {}).items()}
    for layer, (A, B) in factors.items():
        tensors |= {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    tensors = {_PREFIX + n: t.detach().to("cpu", torch.float32, copy=True).contiguous() for n, t in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RunFailed(f"{name} of {folder} is not finite: lower the learning rate")
    refuse_other_files(folder)
    options = {"task_type": "SEQ_CLS", **options, "modules_to_save": options["modules_to_save"] or None}
    config = peft.LoraConfig(
        r=len(next(iter(factors.values()))[0]),
        lora_alpha=int(alpha) if float(alpha).is_integer() else float(alpha),
        base_model_name_or_path=base_model,
        inference_mode=True,
        **options,
    )
    config.target_modules = sorted(config.target_modules)  # peft has a set, with another order in every process
    fresh = folder.with_name(folder.name + ".new")
    with saving(folder, fresh):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        config.save_pretrained(fresh)
        if head_pooling != "cls":
            write_json(fresh / CONFIG, read_json(fresh / CONFIG) | {"head_pooling": head_pooling})
        safetensors.torch.save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        for name, value in (more or {}).items():
            write_json(fresh / name, value)
        swap(fresh, folder)


def refuse_other_files(folder):
    """Raises UsageError where `folder` is a file, or has files that are not an adapter's: writing would delete them."""
    folder = Path(folder)
    if folder.is_file():
        raise UsageError(f"{folder} is a file: give a folder for the adapter")
    others = sorted(path.name for path in folder.iterdir() if path.name not in _OURS) if folder.is_dir() else []
    if others:
        raise UsageError(f"{folder} holds {others[0]}, which is no part of an adapter: give a folder of its own")


def read_adapter(folder, task_type="SEQ_CLS"):
    """The adapter in `folder`, an `AdapterFile`. A file that names no task type is taken for any.

    Raises: UsageError, with the file's name, for a folder or file that is missing or damaged, pickled weights, an
        adapter that is not plain LoRA (dora, rank_pattern, bias, ..., code to import) or of another task type, factors
        that are missing, do not fit r or are not finite, and tensors that belong to none of factors, head and base.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG}: give the folder of a peft adapter")
    again = "save the adapter again"
    with reading(f"{path} cannot be read", again):
        config = read_config(path)
    _check_plain(config, task_type, path)
    names = config.get("target_modules")
    chosen = isinstance(names, str) or config.get("layers_to_transform") or config.get("exclude_modules")
    modules_to_save = sorted(config.get("modules_to_save") or [])
    stored, sha256 = read_tensors(folder / WEIGHTS)
    with reading(f"{path} does not fit {WEIGHTS}", again):
        r, alpha = config["r"], config["lora_alpha"]
        scale = scaling(alpha, r, config.get("use_rslora"))
        if not 0 < scale < math.inf:
            raise ValueError(f"r {r} and lora_alpha {alpha} must be above 0")
        factors, head, base = _sort_tensors(stored, modules_to_save, r)
    return AdapterFile(
        factors=factors,
        head=head,
        base=base,
        r=r,
        alpha=alpha,
        scale=scale,
        target_modules=sorted(factors if chosen else names),
        modules_to_save=modules_to_save,
        base_model=config.get("base_model_name_or_path"),
        fan_in_fan_out=config.get("fan_in_fan_out") or False,
        head_pooling=config.get("head_pooling") or "cls",
        sha256=sha256,
        config=config,
        path=folder,
    )


def _check_plain(config, task_type, path):
    """Raises UsageError for an option that changes what a layer computes, or names code to import."""
    import peft  # only here: it takes seconds to import

    plain = peft.LoraConfig().to_dict()
    if config.get("task_type") not in (task_type, None):
        raise UsageError(f"{path} has task_type {config['task_type']}: only adapters for {task_type} are read")
    for name, value in config.items():
        fits = value in _STARTS if name == "init_lora_weights" else (value or None) == (plain.get(name) or None)
        if name not in _READ and not fits:
            shown = " ".join(str(value).split())[:60]
            raise UsageError(f"{path} has {name} {shown} and only plain LoRA is read: save the adapter without it")


def read_tensors(path):
    """{key: tensor} and the file's SHA-256, from one reading, so that the hash is that of these tensors.

    Raises: UsageError for a file that is missing or damaged.
    """
    if not path.is_file():
        raise UsageError(f"{path.parent} has no {path.name}: give an adapter in safetensors, pickles are not read")
    with reading(f"{path} is damaged", "copy or save the adapter again"):
        data = path.read_bytes()
        return safetensors.torch.load(data), hashlib.sha256(data).hexdigest()


def _sort_tensors(stored, modules_to_save, r):
    """({layer: (A [r, k], B [d, r])}, head, {layer: the base's weight}), fp32. Raises: ValueError for what misfits."""
    pairs, head, base = {}, {}, {}
    for key in sorted(stored):
        name, tensor = key.removeprefix(_PREFIX), stored[key].to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} is not finite")
        if lora := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            pairs.setdefault(lora[1], {})[lora[2]] = tensor
        elif name.endswith(".base_layer.weight"):
            base[name.removesuffix(".base_layer.weight")] = tensor
        elif set(name.split(".")) & set(modules_to_save):
            head[name] = tensor
        else:
            raise ValueError(f"{name} is neither a LoRA factor of a linear layer nor in modules_to_save")
    if not pairs or (modules_to_save and not head):  # peft would load it, with a random head
        raise ValueError(f"no weights of {' or '.join(modules_to_save) if pairs else 'factors'}")
    if base and base.keys() != pairs.keys():  # all layers have one, or none
        raise ValueError(f"{min(base.keys() ^ pairs.keys())} has factors or a base weight, not both")
    for layer, pair in pairs.items():
        shapes = [list(pair[letter].shape) if letter in pair else None for letter in "AB"]
        if None in shapes or [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1]) != (r, r):
            raise ValueError(f"A and B of {layer} are {shapes}, not [r, inputs] and [outputs, r] with r {r}")
        if base and sorted(base[layer].shape) != sorted([shapes[0][1], shapes[1][0]]):
            raise ValueError(f"the base weight of {layer} has another size")
    return {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}, head, base
