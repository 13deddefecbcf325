"""A transformers model with one LoRA adapter (peft's), whose tensors can be exchanged.

    lora = LoraModel(model, r=8, alpha=16)               # W + s B A with s = alpha / r (Hu et al. 2022); W is frozen
    lora.load(factors, head, scale)                      # another client's, round's or file's adapter

A layer's name is its path in the transformers model (`roberta.encoder.layer.0.attention.self.query`), a head's
parameter has its name there (`classifier.dense.weight`).
"""

import warnings
from copy import deepcopy

import torch

from common.cli import UsageError
from common.hub import quiet
from common.products import add_to_weight, scaling
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
        self.scale = scaling(alpha, r)

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
