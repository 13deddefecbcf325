"""The encoders of this study.

encoder = load_encoder(spec, task, tokenizer, seed)                  # spec: roberta-base, a folder, tiny, ...
adapted = encoder.adapted(r=8, alpha=8)                              # a `common.lora.LoraModel` around it
"""

import dataclasses

import torch

from common import hub
from common.cli import UsageError
from common.corpora import data_folder
from common.lora import LoraModel
from common.seeding import seed_torch
from common.text import vocabulary_size
from lora_glue_fl.data_prep import load_tokenizer
from lora_glue_fl.flags import SIZES


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

    def adapted(self, r, alpha, dropout=0.0, targets=None, seed=0):
        """A `LoraModel` around it, its head trained along with the adapter."""
        return LoraModel(self.model, r, alpha, dropout, targets, self.head, "SEQ_CLS", seed)


def find_model(spec):
    """The folder of a model (`common.hub.find_model`)."""
    return hub.find_model(
        spec,
        advice="run lora_glue_fl/download_roberta_models.py where there is a network, or take --model tiny "
        "--dataset demo",
    )


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
    inside = any(True for pattern in ("tokenizer*.json", "vocab*") for _ in folder.glob(pattern))
    return load_tokenizer(str(folder) if inside else model, data_root)


def load_encoder(spec, task, tokenizer, seed, pooling="cls"):
    """The encoder `spec` with a head for `task`, on the CPU, in fp32: an `Encoder`.

    spec: a folder, a name on the hub, or "tiny": a small RoBERTa with random weights. Random weights follow from seed.
    What fits of a head in the file is taken, the rest is new. pooling: "mean" as `read_mean`; its config says so.
    Raises UsageError for a model that is not there, cannot be read, has fewer embeddings than the tokenizer tokens, or
    was trained with mean pooling where "cls" is asked for.
    """
    seed_torch(seed, "weights")
    if spec == "tiny":
        model, fresh = tiny_encoder(task, tokenizer), set()
    else:
        model, fresh = _pretrained(spec, task)
    if model.get_input_embeddings().num_embeddings < vocabulary_size(tokenizer):
        raise UsageError(
            f"model {spec} knows {model.get_input_embeddings().num_embeddings} tokens, the tokenizer has "
            f"{vocabulary_size(tokenizer)}: give the model's own --tokenizer"
        )
    if pooling == "cls" and getattr(model.config, "head_pooling", pooling) == "mean":
        raise UsageError(f"model {spec} was trained with --pooling mean: give it")
    if pooling == "mean":
        model.config.head_pooling = pooling
        read_mean(model)
    inside = model.base_model_prefix
    head = [name for name, part in model.named_children() if name != inside and any(True for _ in part.parameters())]
    # a part of the encoder that the file lacks (BERT's pooler) begins at random too, and must be in the adapter's file
    missing = sorted({name.split(".")[1] for name in fresh if name.startswith(inside + ".")})
    if set(missing) - {"pooler"}:
        raise UsageError(f"model {spec}: model.safetensors lacks weights of {', '.join(missing)}: give a whole model")
    new = sorted({name.rpartition(".")[0] for name in fresh})
    notes = [f"not in {spec}, begins at random: {', '.join(new)}"] if new else []
    return Encoder(model, spec, (*head, *missing), notes)


def read_mean(model):
    """From now on the head reads the mean of the last hidden states over the tokens that are not padding.

    h [B, L, H], mask [B, L]: m = sum_l mask_l h_l / sum_l mask_l. The head, which takes h[:, 0], gets m as h [B, 1, H],
    and so does the encoder's pooler where it has one.
    """

    def pool(encoder, _, given, out):
        h, mask = out["last_hidden_state"], given["attention_mask"][:, :, None]  # [B, L, H], [B, L, 1]
        out["last_hidden_state"] = (h * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)  # [B, 1, H]
        if out.get("pooler_output") is not None:
            out["pooler_output"] = encoder.pooler(out["last_hidden_state"])
        return out

    model.base_model.register_forward_hook(pool, with_kwargs=True)


def _labels(task):
    if task.regression:
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(task.labels))
    return {"id2label": names, "label2id": {name: i for i, name in names.items()}}


def tiny_encoder(task, tokenizer):
    """A RoBERTa of two layers with random weights and a head for the task."""
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
    from transformers import AutoModelForSequenceClassification

    folder = find_model(spec)
    model, info = hub.load_pretrained(
        AutoModelForSequenceClassification,
        folder,
        f"model {spec} cannot be read as an encoder",
        "give a folder that transformers wrote, or copy it again",
        ignore_mismatched_sizes=True,  # a head of another task; anything else is refused below
        **_labels(task),
    )
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


def named_head(vector, head):
    """{name: view} of a vector [h] of all numbers of a head, in the order and shapes of {name: tensor} `head`."""
    pieces = vector.split([t.numel() for t in head.values()])
    return {name: piece.view(t.shape) for (name, t), piece in zip(head.items(), pieces, strict=True)}
