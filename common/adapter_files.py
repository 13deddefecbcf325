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
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from common.cache import one_line
from common.checkpoint import read_json, saving, swap, write_json
from common.cli import RunFailed, UsageError
from common.hub import reading
from common.products import scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = {CONFIG, WEIGHTS, "fuse_manifest.json", "README.md"}  # README.md: peft's model card
_PREFIX = "base_model.model."


def _is_names(value):
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


_TRUE_OR_FALSE = (lambda value: value in (None, False, True), "true or false")
# Options of peft that are read here: whether a value is good, and what it must be.
_READ = {
    "peft_type": (lambda value: value == "LORA", "LORA, the only adapters that are read"),
    "r": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "lora_alpha": (lambda value: type(value) in (int, float) and 0 < value < 1e300, "a number above 0"),
    "use_rslora": _TRUE_OR_FALSE,
    "fan_in_fan_out": _TRUE_OR_FALSE,
    "head_pooling": (lambda value: value in (None, "mean"), "mean, or not there"),  # ours, see `write_adapter`
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "a name, a folder or null"),
    "target_modules": (lambda value: isinstance(value, str) or _is_names(value or []), "a list of names"),
    "modules_to_save": (lambda value: _is_names(value or []), "a list of names"),
    # pissa and others change the base model; peft's path_initial_model_for_weight_conversion undoes that
    "init_lora_weights": (
        lambda value: value in (None, True, False, "gaussian", "orthogonal"),
        "a start that leaves the base model as it is (save with path_initial_model_for_weight_conversion)",
    ),
}
# Options that change no number of a trained adapter. Any other must be off.
_HARMLESS = {"inference_mode", "layers_pattern", "layers_to_transform", "exclude_modules", "lora_dropout"}
_HARMLESS |= {"peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"}
_OFF = {"bias": "none", "megatron_core": "megatron.core"}  # else None, False, {} or []


@dataclass
class AdapterFile:
    """An adapter, read and checked.

    factors: {layer: (A [r, k], B [d, r])}, head: {parameter name in the transformers model: tensor}, fp32 on the CPU;
    base: {layer: weight that replaces the base model's}, empty but for stack and residual; scale: s = alpha / r
    (rsLoRA: alpha / sqrt r); target_modules: sorted names, the layers' full names where the file has a pattern or
    chooses among layers; sha256: of adapter_model.safetensors; config: all of adapter_config.json.
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
    sha256: str
    config: dict
    path: Path

    @property
    def head_pooling(self):
        """What its head reads: "cls" or "mean"."""
        return self.config.get("head_pooling") or "cls"


# ------------------------------------------------------------------------------------------------ writing


def write_adapter(folder, factors, head, *, alpha, base_model, base=None, more=None, head_pooling="cls", **options):
    """Writes an adapter folder, whole or not at all; an older adapter in its place is replaced.

    Args:
        factors: {layer: (A [r, k], B [d, r])}, one r; head: {parameter name in the transformers model: tensor}, {} for
            none. Written as fp32.
        alpha: peft's lora_alpha. Whole ones are written as integers.
        base_model: name or folder of the base model, None where there is none.
        base: {layer: weight}, what differs from that model under the adapter.
        more: {file name: value}, further JSON files for the folder.
        head_pooling: "mean" where the head reads the mean over tokens. It stands in adapter_config.json; peft, whose
            model would read the first token, says that it does not know it.
        options: of peft.LoraConfig: target_modules, such as ["query", "value"], modules_to_save, such as ["classifier"]
            (of the head), fan_in_fan_out, lora_dropout, task_type ("SEQ_CLS").
    Raises: RunFailed for numbers that are not finite and for a folder that cannot be written; UsageError for a folder
        with other files in it, which are left alone.
    """
    import peft  # only here: it takes seconds to import

    folder = Path(folder)
    tensors = dict(head)
    tensors |= {f"{layer}.base_layer.weight": weight for layer, weight in (base or {}).items()}
    for layer, (A, B) in factors.items():
        tensors |= {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
    tensors = {name: t.detach().to("cpu", torch.float32, copy=True).contiguous() for name, t in tensors.items()}
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
        tensors = {_PREFIX + name: tensor for name, tensor in tensors.items()}
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


# ------------------------------------------------------------------------------------------------ reading


def read_adapter(folder, task_type="SEQ_CLS"):
    """The adapter in `folder`, an `AdapterFile`. A file that names no task type is taken for any.

    Raises: UsageError, with the file's name, for a folder or file that is missing or damaged, pickled weights, an
        adapter that is not LoRA or of another task type, an option that names code to import or that changes what
        a layer computes (dora, rank_pattern, bias, ...), factors that are missing, do not fit r or are not finite, and
        tensors that are neither factors nor in modules_to_save nor the base's weight under a factor, or that do not
        fit it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise UsageError(f"adapter {folder} {what}: give a folder with {CONFIG} and {WEIGHTS}")
    config = _read_config(folder / CONFIG, task_type)
    r, alpha = config["r"], config["lora_alpha"]
    stored, sha256 = read_tensors(folder / WEIGHTS)
    modules_to_save = sorted(set(config.get("modules_to_save") or []))
    factors, head, base = _sort_tensors(stored, modules_to_save, r, folder / WEIGHTS)
    return AdapterFile(
        factors=factors,
        head=head,
        base=base,
        r=r,
        alpha=alpha,
        scale=scaling(alpha, r, config.get("use_rslora") or False),
        target_modules=_targets(config, factors, folder / CONFIG),
        modules_to_save=modules_to_save,
        base_model=config.get("base_model_name_or_path"),
        fan_in_fan_out=config.get("fan_in_fan_out") or False,
        sha256=sha256,
        config=config,
        path=folder,
    )


def _read_config(path, task_type):
    """adapter_config.json, its options checked."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no {path.name}: give the folder of a peft adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({one_line(error)}): save the adapter again") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is no adapter's configuration: save the adapter again")
    if config.get("auto_mapping"):
        raise UsageError(
            f"{path} has auto_mapping, which names code to import: make the adapter with task_type {task_type}, or "
            "set auto_mapping to null there"
        )
    if config.get("task_type") not in (task_type, None):
        raise UsageError(f"{path} has task_type {_short(config['task_type'])}: only adapters for {task_type} are read")
    for name, value in config.items():
        if name in _READ or name in _HARMLESS or value in (None, False, _OFF.get(name)) or value in ({}, []):
            continue
        code = ", which names code to import," if name == "megatron_core" else ""
        raise UsageError(f"{path} has {name} {_short(value)}{code} and only plain LoRA is read: train without it")
    for name, (good, what) in _READ.items():
        if not good(config.get(name)):
            raise UsageError(f"{path} has {name} {_short(config.get(name))}: it must be {what}")
    return config


def read_tensors(path):
    """{key: tensor} and the file's SHA-256, from one reading, so that the hash is that of these tensors.

    Raises: UsageError for a file that is missing or damaged.
    """
    folder = path.parent
    try:
        data = path.read_bytes()
        return safetensors.torch.load(data), hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        if (folder / "adapter_model.bin").exists():
            raise UsageError(
                f"{folder} has its weights in adapter_model.bin, a pickle, which can run code and is not read: save "
                "the adapter with safe_serialization=True"
            ) from None
        raise UsageError(f"{folder} has no {path.name}: give the folder of a peft adapter") from None
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): copy or save the adapter again") from error


def _sort_tensors(stored, modules_to_save, r, path):
    """({layer: (A [r, k], B [d, r])}, head, {layer: the base's weight}), fp32."""
    pairs, head, base = {}, {}, {}
    for key in sorted(stored):
        tensor, name = stored[key], key.removeprefix(_PREFIX)
        lora = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        under = re.fullmatch(r"(.+)\.base_layer\.weight", name)
        if not key.startswith(_PREFIX) or not (lora or under or set(name.split(".")[:-1]) & set(modules_to_save)):
            raise UsageError(
                f"{path} has {_short(key, 160)}, which is neither a LoRA factor of a linear layer nor in "
                f"modules_to_save {modules_to_save}: save the adapter again"
            )
        if not tensor.is_floating_point():
            raise UsageError(f"{path}: {name} has numbers of type {tensor.dtype}: only floating types are read")
        tensor = tensor.to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise UsageError(f"{path}: {name} is not finite: leave this adapter out")
        if lora:
            pairs.setdefault(lora[1], {})[lora[2]] = tensor
        elif under:
            base[under[1]] = tensor
        else:
            head[name] = tensor
    if not pairs:
        raise UsageError(f"{path} has no LoRA factors: save the adapter again")
    if modules_to_save and not head:
        # peft would load it, with a random head
        raise UsageError(f"{path} has no weights of {' or '.join(modules_to_save)}: save the adapter again")
    for layer, pair in pairs.items():
        for missing in {"A", "B"} - pair.keys():
            raise UsageError(f"{path} has no lora_{missing} of {layer}: save the adapter again")
        A, B = list(pair["A"].shape), list(pair["B"].shape)
        if len(A) != 2 or len(B) != 2 or A[0] != r or B[1] != r:
            raise UsageError(
                f"{path}: {layer} has A {A} and B {B}, which do not fit r {r} of {CONFIG}: they must be "
                "[r, inputs] and [outputs, r]"
            )
    factors = {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}
    for layer, weight in base.items():
        sizes = {len(factors[layer][1]), factors[layer][0].shape[1]} if layer in factors else None
        if weight.ndim != 2 or set(weight.shape) != sizes:
            shown = f"base weight {list(weight.shape)} of {layer}, which fits no factor"
            raise UsageError(f"{path} has a {shown}: save the adapter again")
    if base and (lacking := sorted(factors.keys() - base.keys())):  # `write_adapter` has all of them or none
        raise UsageError(f"{path} has base weights, but none of {lacking[0]}: save the adapter again")
    return factors, head, base


def _targets(config, factors, path):
    """Sorted target_modules: as the configuration names them, full names where it chooses among layers."""
    names = config.get("target_modules") or []
    if isinstance(names, str) and names != "all-linear":
        with reading(f"{path} has target_modules {_short(names)}", "save the adapter again"):
            odd = [layer for layer in factors if not re.fullmatch(names, layer)]
        if odd:
            raise UsageError(f"{path} has target_modules {_short(names)}, but the weights have {odd[0]}: save it again")
    if isinstance(names, str) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return sorted(factors)
    hit = {layer: {name for name in names if layer == name or layer.endswith("." + name)} for layer in factors}
    for layer in factors:
        if not hit[layer]:
            raise UsageError(f"{path} has target_modules {names}, but the weights have {layer}: save the adapter again")
    for name in set(names).difference(*hit.values()):
        raise UsageError(f"{path} has target module {name}, but the weights have none: save the adapter again")
    return sorted(set(names))


def _short(value, most=60):
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())  # one line
    return text if len(text) <= most else text[: most - 3] + "..."
