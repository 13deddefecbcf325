"""The encoders of this study and their LoRA adapters.

encoder = load_encoder(spec, task, tokenizer, seed)                  # spec: roberta-base, a folder, tiny, ...
adapted = Adapted(encoder, r=8, alpha=8, dropout=0.0)                # a peft model around it
adapted.load(factors, head, scale)                                   # another client's, round's or file's adapter

A layer's name is its path in the transformers model (`roberta.encoder.layer.0.attention.self.query`), a head's
parameter has its name there (`classifier.dense.weight`).
"""

import dataclasses
import warnings
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from common.cli import UsageError
from common.corpora import data_folder, hub_reachable, one_line
from common.products import add_to_weight, scaling
from common.seeding import seed_torch
from lora_glue_fl.data_prep import load_tokenizer
from lora_glue_fl.hub import download, hub_cache

SIZES = {"base": "roberta-base", "large": "roberta-large"}
# the layers that LoRA adapts: queries and values, by the names that each architecture has for them
TARGETS = {
    **dict.fromkeys(("roberta", "bert", "xlm-roberta", "camembert", "electra", "ernie", "albert"), ("query", "value")),
    **dict.fromkeys(("roberta-prelayernorm", "xlm-roberta-xl", "megatron-bert", "data2vec-text"), ("query", "value")),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),  # queries, keys and values in one
    "modernbert": ("Wqkv",),  # the same
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A transformers model with a head for the task.

    name: as the user gave it (an adapter's base model); head: the modules that begin at random and are trained with
    the adapter; notes: lines for the log.
    """

    model: torch.nn.Module
    name: str
    head: tuple[str, ...]
    notes: list[str]


def model_name(args):
    """The model that --model or --model-size names. Raises UsageError when neither does."""
    if args.model:
        return args.model
    if args.model_size is None:
        raise UsageError("no model: give --model-size base or large, or --model NAME_OR_PATH")
    return SIZES[args.model_size]


def size_label(args):
    """What stands for the model in folder names: --model-size, else the model's last name."""
    return args.model_size or Path(model_name(args)).name


def find_model(spec):
    """The folder of a model: `spec` itself, else what an earlier download left, else from the hub.

    Raises UsageError when it is not there, or a folder without config.json or model.safetensors.
    """
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        folder = _from_hub(spec)
    if not (folder / "config.json").is_file() or not list(folder.glob("model*.safetensors")):
        raise UsageError(
            f"model {spec}: {folder} has no config.json with model.safetensors (pickled weights are not read): give a "
            "folder that transformers wrote"
        )
    return folder


def _from_hub(spec):
    try:
        return download(spec, cache_dir=hub_cache(), online=False)
    except UsageError:
        if hub_reachable():
            return download(spec, cache_dir=hub_cache())
        raise UsageError(
            f"no model {spec}: not a folder, not downloaded before, and the hub is out of reach: run "
            "lora_glue_fl/download_roberta_models.py where there is a network, or take --model tiny --dataset demo"
        ) from None


def find_tokenizer(spec, dataset, data_root=None, model="tiny"):
    """The tokenizer `spec`, or where that is None the model's own (tiny: of the demo, or roberta-base's)."""
    if spec:
        return load_tokenizer(spec, data_root)
    if model == "tiny" and dataset == "demo":
        return load_tokenizer("demo")
    if model == "tiny":
        model = SIZES["base"]
        if (data_folder(data_root) / "tokenizers" / model).is_dir():
            return load_tokenizer(model, data_root)
    folder = find_model(model)
    if list(folder.glob("tokenizer*.json")) or list(folder.glob("vocab*")):
        return load_tokenizer(str(folder), data_root)
    return load_tokenizer(model, data_root)


def load_encoder(spec, task, tokenizer, seed):
    """The encoder `spec` with a head for `task`, on the CPU, in fp32: an `Encoder`.

    spec: a folder, a name on the hub, or "tiny": a small RoBERTa with random weights. Random weights follow from seed.
    What fits of a head in the file is taken, the rest is new.
    Raises UsageError for a model that is not there, cannot be read, or has fewer embeddings than the tokenizer tokens.
    """
    seed_torch(seed, "weights")
    if spec == "tiny":
        model, fresh = _tiny(task, tokenizer), set()
    else:
        model, fresh = _pretrained(spec, task)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        raise UsageError(
            f"model {spec} knows {model.get_input_embeddings().num_embeddings} tokens, the tokenizer has "
            f"{len(tokenizer)}: give the model's own --tokenizer"
        )
    inside = model.base_model_prefix
    head = [name for name, part in model.named_children() if name != inside and any(True for _ in part.parameters())]
    # a part of the encoder that the file lacks (BERT's pooler) begins at random too, and must be in the adapter's file
    missing = sorted({name.split(".")[1] for name in fresh if name.startswith(inside + ".")})
    if set(missing) - {"pooler"}:
        raise UsageError(f"model {spec}: model.safetensors lacks weights of {', '.join(missing)}: give a whole model")
    new = sorted({name.rpartition(".")[0] for name in fresh})
    notes = [f"not in {spec}, begins at random: {', '.join(new)}"] if new else []
    return Encoder(model, spec, (*head, *missing), notes)


def _labels(task):
    if task.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(task.labels))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def _tiny(task, tokenizer):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=len(tokenizer),
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        **{"max_position_embeddings": 514, "type_vocab_size": 1},
        initializer_range=0.125,  # 1 / sqrt(64): with transformers' 0.02 a random attention hardly mixes its tokens
        **{"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2},
        **_labels(task),
    )
    return RobertaForSequenceClassification(config)


def _pretrained(spec, task):
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    folder = find_model(spec)
    shown, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report of new weights: we have one line for that
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **_labels(task))
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a head of another task; anything else is refused below
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise UsageError(
            f"model {spec} cannot be read as an encoder ({one_line(error)}): give a folder that transformers wrote, or "
            "copy it again"
        ) from error
    finally:
        logging.set_verbosity(shown)
        if bar:
            logging.enable_progress_bar()
    wrong = [key[0] for key in info["mismatched_keys"] if key[0].startswith(model.base_model_prefix + ".")]
    if wrong:
        raise UsageError(f"model {spec}: {wrong[0]} has another size in its file than in its config.json")
    return model, set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}


def most_tokens(model):
    """The most tokens of an example that the encoder's learned positions take, None where it has no such positions."""
    for name, part in getattr(model, model.base_model_prefix).named_modules():
        if name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe") and isinstance(part, torch.nn.Embedding):
            # RoBERTa counts positions from behind the padding token's number
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return None


def find_targets(model, wanted=None):
    """The module names that LoRA adapts, e.g. ("query", "value"): those wanted, else by architecture.

    Raises UsageError for an architecture that is not in `TARGETS`, or a name that no linear layer has; both list
    the names that there are.
    """
    linear = {
        name.rsplit(".", 1)[-1]
        for name, part in getattr(model, model.base_model_prefix).named_modules()
        if isinstance(part, (torch.nn.Linear, Conv1D))
    }
    kind = model.config.model_type
    names = tuple(wanted or TARGETS.get(kind, ()))
    wrong = [name for name in names if name not in linear]
    if names and not wrong:
        return names
    what = (
        f"has no linear layer {', '.join(wrong)}" if wrong else "is of an architecture whose layers are not known here"
    )
    raise UsageError(f"model type {kind} {what}: choose --target-modules among {', '.join(sorted(linear))}")


class Adapted:
    """An encoder with one LoRA adapter (peft's), whose tensors can be exchanged.

    Attributes: model (peft), layers {layer: peft's LoRA module}, head {name: parameter}, targets, scale.
    Only the adapter and the head are trainable.

    Args: encoder: an `Encoder`, wrapped in place; r: rank; alpha: s = alpha / r; dropout: of the adapter's input.
    """

    def __init__(self, encoder, r, alpha, dropout=0.0, targets=None, seed=0):
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.encoder, self.alpha, self.dropout = encoder, alpha, dropout
        self.targets = find_targets(encoder.model, targets)
        config = LoraConfig(
            task_type="SEQ_CLS",
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(self.targets),
            modules_to_save=list(encoder.head),
        )
        seed_torch(seed, "adapter")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds it out by itself
            warnings.filterwarnings("ignore", category=FutureWarning)  # of names that peft uses
            self.model = get_peft_model(encoder.model, config)
        prefix = "base_model.model."
        self.layers = {
            name.removeprefix(prefix): part for name, part in self.model.named_modules() if isinstance(part, LoraLayer)
        }
        self.head = {
            name.removeprefix(prefix).replace(".modules_to_save.default", ""): p
            for name, p in self.model.named_parameters()
            if ".modules_to_save.default." in name
        }
        self.scale = scaling(alpha, r)

    @property
    def fan_in_fan_out(self):
        """Whether the adapted layers keep their weights as [k, d] (transformers' Conv1D)."""
        return any(layer.fan_in_fan_out for layer in self.layers.values())

    def factors(self):
        """{layer: (A [r, k], B [d, r])}: the model's own parameters."""
        return {
            name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            for name, layer in self.layers.items()
        }

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
                if part.weight.shape == value.shape:
                    part.weight.copy_(value)
                else:  # another rank
                    old = part.weight
                    part.weight = torch.nn.Parameter(
                        value.detach().to(old.device, old.dtype, copy=True), old.requires_grad
                    )
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

    def save_merged(self, folder):
        """Writes the model with its adapter merged, as transformers loads it. The adapter is gone afterwards."""
        self.model.merge_and_unload().save_pretrained(folder)
