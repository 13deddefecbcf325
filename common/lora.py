"""A transformers model with a LoRA adapter (peft's) whose tensors can be exchanged, and adapters in peft's files.

    lora = LoraModel(model, r=8, alpha=16)               # W + s B A with s = alpha / r (Hu et al. 2022); W is frozen
    lora.load(factors, head, scale)                      # another client's, round's or file's adapter
    write_adapter(folder, factors, head, alpha=16, base_model="gpt2", **lora.about())
    file = read_adapter(folder)

A layer's name is its path in the transformers model (`roberta.encoder.layer.0.attention.self.query`), a head's
parameter has its name there (`classifier.dense.weight`).
"""

import hashlib
import math
import re
import shutil
import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from common.checkpoint import read_json, saving, swap, write_json
from common.cli import RunFailed, UsageError
from common.hub import quiet, reading
from common.products import add_to_weight
from common.seeding import seed_torch

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# The layers that LoRA adapts, by the names that an architecture has for them, where they are not peft's choice
TARGETS = {
    "gpt2": ("c_attn", "c_proj"),  # c_proj: of attention and of the MLP
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _ATTENTION),
    "modernbert": ("Wqkv",),  # queries, keys and values in one
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
}


def find_targets(model, wanted=None):
    """The module names that LoRA adapts, e.g. ("query", "value"): those wanted, else by architecture.

    By `TARGETS`, else peft's own table: of roberta, bert, electra and their kin queries and values.
    Raises: UsageError for an architecture that is in neither, or a name that no linear layer has; both list the names
        that there are.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT
    from transformers.pytorch_utils import Conv1D

    linear = {
        name.rsplit(".", 1)[-1]
        for name, part in model.base_model.named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D))
    }
    kind = model.config.model_type
    names = tuple(wanted or TARGETS.get(kind) or OF_PEFT.get(kind, ()))
    if names and linear.issuperset(names):
        return names
    wrong = f"has no linear layer {', '.join(sorted({*names} - linear))}"
    what = wrong if names else "is of an architecture whose layers are not known here"
    raise UsageError(f"model type {kind} {what}: choose --target-modules among {', '.join(sorted(linear))}")


class LoraModel:
    """A transformers model with one LoRA adapter.

    Attributes: model (peft), layers {layer: peft's LoRA module}, head {name: parameter}, targets, alpha, scale.
    Only the adapter and the head are trainable.

    Args: model: wrapped in place; r: rank; alpha: s = alpha / r; dropout: of the adapter's input; targets: as
        `find_targets`; modules_to_save: modules that are trained as a whole, such as a new head; task_type: peft's.
    Raises: UsageError for targets that the model has not, and a rank above an adapted layer's smaller side.
    """

    def __init__(self, model, r, alpha, dropout=0.0, targets=None, modules_to_save=(), task_type="CAUSAL_LM", seed=0):
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.alpha, self.targets = alpha, find_targets(model, targets)
        sides = [p.weight.shape for name, p in model.named_modules() if name.rsplit(".", 1)[-1] in self.targets]
        if r > (most := min(map(min, sides))):
            raise UsageError(f"rank {r} is above {most}, the smaller side of an adapted layer: lower --lora-r {r}")
        config = LoraConfig(
            task_type=task_type,
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(self.targets),
            modules_to_save=list(modules_to_save) or None,
        )
        seed_torch(seed, "adapter")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds it out by itself
            warnings.filterwarnings("ignore", category=FutureWarning)  # of names that peft uses
            self.model = get_peft_model(model, config)
        prefix = "base_model.model."
        parts = self.model.named_modules()
        self.layers = {name.removeprefix(prefix): part for name, part in parts if isinstance(part, LoraLayer)}
        self.head = {
            name.removeprefix(prefix).replace(".modules_to_save.default", ""): p
            for name, p in self.model.named_parameters()
            if ".modules_to_save.default." in name
        }
        self.scale = alpha / r

    def factors(self):
        """{layer: (A [r, k], B [d, r])}: the model's own parameters."""
        both = {name: (layer.lora_A["default"], layer.lora_B["default"]) for name, layer in self.layers.items()}
        return {name: (A.weight, B.weight) for name, (A, B) in both.items()}

    def trainable(self, letters=("A", "B")):
        """{name: parameter} of what is trained: `A.<layer>`, `B.<layer>` as asked, `head.<name>`.

        The others get requires_grad False.
        """
        found = {}
        for name, pair in self.factors().items():
            for letter, p in zip("AB", pair, strict=True):
                p.requires_grad_(letter in letters)
                if letter in letters:
                    found[f"{letter}.{name}"] = p
        return found | {f"head.{name}": p for name, p in self.head.items()}

    @torch.no_grad()
    def load(self, factors, head, scale):
        """Puts an adapter of any rank into the model (copies)."""
        for name, (A, B) in factors.items():
            layer = self.layers[name]
            for part, value in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
                old = part.weight
                if old.shape == value.shape:
                    old.copy_(value)
                else:  # another rank
                    part.weight = torch.nn.Parameter(value.detach().to(old, copy=True), old.requires_grad)
            layer.r["default"], layer.scaling["default"] = A.shape[0], scale
        for name, p in self.head.items():
            p.copy_(head[name])
        self.scale = scale

    def base_weights(self):
        """{layer: weight of the layer under the adapter}: the model's own tensors."""
        return {name: layer.base_layer.weight for name, layer in self.layers.items()}

    @torch.no_grad()
    def load_base(self, weights):
        """Puts {layer: weight} under the adapters (copies)."""
        for name, weight in weights.items():
            self.layers[name].base_layer.weight.copy_(weight)

    def updated(self, weights, updates):
        """{layer: weight} with the `Product`s of {layer: product} added; other layers as they are."""
        flipped = {name: layer.fan_in_fan_out for name, layer in self.layers.items()}
        return {
            name: add_to_weight(weight, updates[name], flipped[name]) if name in updates else weight
            for name, weight in weights.items()
        }

    def about(self):
        """What an adapter's file says of itself beside its factors: options of `write_adapter`."""
        config = self.model.peft_config["default"]
        names = ("fan_in_fan_out", "lora_dropout", "task_type", "modules_to_save")
        return {name: getattr(config, name) for name in names} | {"target_modules": list(self.targets)}

    def save_base(self, folder):
        """Writes the model without the adapter, as transformers loads it."""
        with quiet():
            deepcopy(self.model).unload().save_pretrained(folder)

    def save_merged(self, folder):
        """Writes the model with its adapter merged, as transformers loads it. The adapter is gone afterwards."""
        with quiet():
            self.model.merge_and_unload().save_pretrained(folder)


# ---- files: adapters in peft's own format, read without unpickling anything and without importing what a file names
#
# adapter_config.json         peft.LoraConfig
# adapter_model.safetensors   base_model.model.LAYER.lora_A.weight [r, k], .lora_B.weight [d, r], and the head as
#                             base_model.model.NAME (peft's modules_to_save)
#                             base_model.model.LAYER.base_layer.weight: where the base is no longer the model that
#                             the configuration names, its weight there (peft loads it too, over the model's own)
#
# `PeftModel.from_pretrained(model, folder)` loads what `write_adapter` wrote, without this project; `read_adapter`
# reads what `PeftModel.save_pretrained` wrote.

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OURS = {CONFIG, WEIGHTS, "fuse_manifest.json", "README.md"}  # README.md: peft's model card
_PREFIX = "base_model.model."
# Options that are read here or change no number of a trained adapter. Any other must be as in a fresh peft.LoraConfig.
_READ = {"r", "lora_alpha", "fan_in_fan_out", "head_pooling", "base_model_name_or_path", "task_type"}
_READ |= {"target_modules", "modules_to_save", "layers_pattern", "layers_to_transform", "exclude_modules"}
_READ |= {"inference_mode", "lora_dropout", "peft_version", "revision", "runtime_config"}
_STARTS = (None, True, False, "gaussian", "orthogonal")  # values of init_lora_weights that leave the base as it is


@dataclass
class AdapterFile:
    """An adapter, read and checked.

    factors: {layer: (A [r, k], B [d, r])}, head: {parameter name in the transformers model: tensor}, fp32 on the CPU;
    base: {layer: weight that replaces the base model's}, empty but for stack and residual; scale: s = alpha / r;
    target_modules: sorted names, the layers' full names where the file has a pattern or chooses among layers;
    head_pooling: what its head reads, "cls" or "mean"; sha256: of adapter_model.safetensors; config: all of
    adapter_config.json.
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


def read_adapter(folder):
    """The adapter in `folder`, an `AdapterFile`. A file that names no task type is taken for a classifier's.

    Raises: UsageError, with the file's name, for a folder or file that is missing or damaged, pickled weights, an
        adapter that is not plain LoRA (dora, rank_pattern, bias, ..., code to import) or of another task type, factors
        that are missing, do not fit r or are not finite, and tensors that belong to none of factors, head and base.
    """
    folder = Path(folder).expanduser()
    path, weights = folder / CONFIG, folder / WEIGHTS
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG}: give the folder of a peft adapter")
    with reading(f"{path} cannot be read", "save the adapter again"):
        config = dict(read_json(path))
    _check_plain(config, path)
    if not weights.is_file():
        raise UsageError(f"{folder} has no {WEIGHTS}: give an adapter in safetensors, pickles are not read")
    with reading(f"{weights} is damaged", "copy or save the adapter again"):
        data = weights.read_bytes()  # once, so that the hash is that of these tensors
        stored = safetensors.torch.load(data)
    modules_to_save = sorted(config.get("modules_to_save") or [])
    with reading(f"{path} does not fit {WEIGHTS}", "save the adapter again"):
        r, alpha, names = config["r"], config["lora_alpha"], config["target_modules"]
        if not 0 < alpha / r < math.inf:
            raise ValueError(f"r {r} and lora_alpha {alpha} must be above 0")
        factors, head, base = _sort_tensors(stored, modules_to_save, r)
    chosen = isinstance(names, str) or config.get("layers_to_transform") or config.get("exclude_modules")
    return AdapterFile(
        factors=factors,
        head=head,
        base=base,
        r=r,
        alpha=alpha,
        scale=alpha / r,
        target_modules=sorted(factors if chosen else names),
        modules_to_save=modules_to_save,
        base_model=config.get("base_model_name_or_path"),
        fan_in_fan_out=config.get("fan_in_fan_out") or False,
        head_pooling=config.get("head_pooling") or "cls",
        sha256=hashlib.sha256(data).hexdigest(),
        config=config,
        path=folder,
    )


def _check_plain(config, path):
    """Raises UsageError for an option that changes what a layer computes, or names code to import."""
    import peft  # only here: it takes seconds to import

    plain = peft.LoraConfig().to_dict()
    if config.get("task_type") not in ("SEQ_CLS", None):
        raise UsageError(f"{path} has task_type {config['task_type']}: only adapters of classifiers (SEQ_CLS) are read")
    for name, value in config.items():
        fits = value in _STARTS if name == "init_lora_weights" else (value or None) == (plain.get(name) or None)
        if name not in _READ and not fits:
            shown = " ".join(str(value).split())[:60]
            raise UsageError(f"{path} has {name} {shown} and only plain LoRA is read: save the adapter without it")


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
    for layer, pair in pairs.items():
        shapes = [list(pair[letter].shape) if letter in pair else None for letter in "AB"]
        if None in shapes or [len(shape) for shape in shapes] != [2, 2] or (shapes[0][0], shapes[1][1]) != (r, r):
            raise ValueError(f"A and B of {layer} are {shapes}, not [r, inputs] and [outputs, r] with r {r}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in pairs.items()}, head, base
