"""The encoders of this study, and a task of GLUE with a model for it: loss, evaluation, what run.json says of both.

model = TaskModel(args, (r, alpha, dropout, targets))                # the task of `args`, with an adapter
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import hub, parallel
from common.batches import evaluation_batches
from common.checkpoint import saving
from common.cli import UsageError
from common.evaluation import amp_context, pick_device, resolve_amp
from common.lora import CONFIG, LoraModel, read_adapter
from common.products import fit_rank
from common.seeding import seed_torch, torch_stream
from common.text import saved_tokenizer
from common.vector import fingerprint
from lora_glue_fl.data_prep import encode, load_task
from lora_glue_fl.flags import SIZES, model_name, refuse
from lora_glue_fl.glue_tasks import demo_tokenizer, evaluate, find_task

# ---- encoders


def find_model(spec):
    """The folder of a model (`common.hub.find_model`)."""
    advice = "run lora_glue_fl/download_roberta_models.py where there is a network, or take --model tiny --dataset demo"
    return hub.find_model(spec, advice=advice)


def load_tokenizer(model, dataset):
    """The fast tokenizer of a model, a folder or a name on the hub; tiny's: of the demo's words, else roberta-base's.

    Raises UsageError where it is not there, cannot be read, or has no padding token or words.
    """
    if model == "tiny" and dataset == "demo":
        return demo_tokenizer()
    folder = find_model(SIZES["base"] if model == "tiny" else model)
    tokenizer = saved_tokenizer(str(folder), None, "give an encoder's folder as --model")
    # without the tokenizer's files transformers makes one that knows no words
    useless = tokenizer.pad_token_id is None or len(tokenizer) <= len(set(tokenizer.all_special_ids))
    refuse(useless, f"the tokenizer in {folder} has no padding token or knows no words: give an encoder as --model")
    return tokenizer


def load_encoder(spec, task, tokenizer, seed, pooling="cls"):
    """The encoder `spec` with a head for `task`, on the CPU, in fp32.

    spec: a folder, a name on the hub, or "tiny": a small RoBERTa with random weights. Random weights follow from seed.
    What fits of a head in the file is taken, the rest is new. pooling: "mean" as `read_mean`; its config says so.
    Returns: (model of transformers, names of the modules that are trained with an adapter, notes: lines for the log).
    Raises UsageError for a model that is not there, cannot be read, or was trained with mean pooling where "cls" is
    asked for.
    """
    seed_torch(seed, "weights")
    model, fresh = (tiny_encoder(task, tokenizer), set()) if spec == "tiny" else _pretrained(spec, task)
    other = pooling == "cls" and getattr(model.config, "head_pooling", pooling) == "mean"
    refuse(other, f"model {spec} was trained with --pooling mean: give it")
    if pooling == "mean":
        model.config.head_pooling = pooling
        read_mean(model)
    inside = model.base_model_prefix
    head = [name for name, part in model.named_children() if name != inside and any(True for _ in part.parameters())]
    # a part of the encoder that the file lacks (BERT's pooler) begins at random too, and must be in the adapter's file
    missing = sorted({name.split(".")[1] for name in fresh if name.startswith(inside + ".")})
    lacks = f"model.safetensors lacks weights of {', '.join(missing)}, or has them in other sizes than config.json says"
    refuse(set(missing) - {"pooler"}, f"model {spec}: {lacks}: give a whole model")
    new = sorted({name.rpartition(".")[0] for name in fresh})
    notes = [f"not in {spec}, begins at random: {', '.join(new)}"] if new else []
    return model, [*head, *missing], notes


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

    model, info = hub.load_pretrained(
        AutoModelForSequenceClassification,
        find_model(spec),
        f"model {spec} cannot be read as an encoder",
        "give a folder that transformers wrote, or copy it again",
        ignore_mismatched_sizes=True,  # a head of another task; anything else is refused by `load_encoder`
        **_labels(task),
    )
    return model, set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}


# ---- a task with a model


class TaskModel:
    """Data, tokens and model of a command line.

    Attributes: task, data (`TaskData`), tokenizer, encoded {split: `Encoded`}, name (the model's, as the user gave it),
    head (the modules that are trained with an adapter), adapted (`common.lora.LoraModel`, None without LoRA), model
    (what is called), device, amp, notes (lines for the log).

    Args: args: the flags of any of this study's scripts; lora: (r, alpha, dropout, targets), None: all weights train;
        train: whether the training split is needed.
    """

    def __init__(self, args, lora, train=True):
        self.args, self.device, self.name = args, pick_device(args.device), model_name(args)
        self.amp = resolve_amp(args.amp, self.device)
        self.task = find_task(args.task_name)
        splits = self.task.splits if train else self.task.evaluation_splits
        self.data = load_task(self.task.name, args.dataset, args.data_root, splits)
        self.tokenizer = load_tokenizer(self.name, args.dataset)
        self.encoded = encode(self.data, self.tokenizer, args.max_length)
        encoder, self.head, self.notes = load_encoder(self.name, self.task, self.tokenizer, args.seed, args.pooling)
        self.adapted = LoraModel(encoder, *lora, self.head, "SEQ_CLS", args.seed) if lora else None
        self.model = (self.adapted.model if lora else encoder).to(self.device)

    def loss(self, batch):
        """Mean loss over the examples of {input_ids, attention_mask, (token_type_ids): [B, L], labels: [B]}: nats of
        the label, or (regression) the squared error of the score."""
        return self._loss(self._outputs(batch), batch["labels"])

    def _outputs(self, batch):
        with amp_context(self.amp, self.device):
            logits = self.model(**{name: t for name, t in batch.items() if name != "labels"}).logits
        return logits.float()  # [B, num_labels]

    def _loss(self, outputs, labels):
        if self.task.regression:
            return F.mse_loss(outputs[:, 0], labels)
        return F.cross_entropy(outputs, labels)

    @torch.no_grad()
    def outputs(self, split, share=True, rows=None):
        """The model's outputs on a split: float32 [n, num_labels] on the CPU.

        share: the processes share the batches; without it this process computes all (where the others have other
        weights in their models). rows: int64 [n], only these of its examples.
        """
        self.model.eval()
        encoded = self.encoded[split]
        rows = np.arange(len(encoded)) if rows is None else rows
        every = evaluation_batches(encoded.lengths()[rows], self.args.eval_batch_size)
        parts = []
        for places in parallel.my_share(every) if share else every:
            batch = {name: t.to(self.device) for name, t in encoded.batch(rows[places]).items()}
            parts.append((places, self._outputs(batch).cpu()))
        outputs = torch.empty(len(rows), self.task.num_labels)  # [n, num_labels]
        for part in parallel.all_gather(parts) if share else [parts]:
            for places, values in part:
                outputs[places] = values
        return outputs

    def mean_loss(self, outputs, labels):
        """The mean loss of outputs [n, num_labels] and numpy's labels [n], in fp64."""
        kind = torch.float64 if self.task.regression else torch.int64
        return self._loss(outputs.double(), torch.from_numpy(labels).to(kind)).item()

    def evaluate(self, share=True):
        """{val_loss, val_<metric> ...} on the task's validation examples; mnli: on both parts, the loss on the matched.

        Raises RunFailed for outputs that are not finite.
        """
        result = {}
        for split in self.task.evaluation_splits:
            result = self._measures(split, self.outputs(split, share), self.encoded[split].labels) | result
        return result

    def _measures(self, split, outputs, labels):
        return {"val_loss": self.mean_loss(outputs, labels)} | evaluate(self.task, split, outputs.numpy(), labels)

    def held_out(self, rows):
        """{held_out_loss, held_out_<metric> ...} on these examples, int64 [n], of the training split."""
        values = self._measures("train", self.outputs("train", rows=rows), self.encoded["train"].labels[rows])
        return {name.replace("val", "held_out", 1): value for name, value in values.items()}

    @property
    def headline(self):
        """The field of the task's first metric."""
        return f"val_{self.task.metrics[0]}"

    def sizes(self, trainable):
        """Counts for run.json, and a fingerprint of what is frozen. Args: trainable: {name: parameter}."""
        # peft keeps the head that it replaced
        used = {name: p for name, p in self.model.named_parameters() if ".original_module." not in name}
        frozen = {name: p for name, p in used.items() if not p.requires_grad}
        return {
            "total": sum(p.numel() for p in used.values()),
            "trainable": sum(p.numel() for p in trainable.values()),
            "head": sum(p.numel() for name, p in trainable.items() if name.startswith("head.")),
            "frozen_sha256": fingerprint(frozen) if frozen else None,
        }

    def about(self, folder):
        """Keyword arguments of `write_adapter` for adapters of the run in `folder`, but alpha."""
        base = str(folder / "base") if self.name == "tiny" else self.name
        return self.adapted.about() | {"base_model": base, "head_pooling": self.args.pooling}

    def save_base(self, folder):
        """Writes the tiny model, which can be loaded from nowhere else, with its tokenizer to folder/base, once."""
        base = folder / "base"
        whole = (base / "tokenizer_config.json").is_file()  # written last
        if self.name == "tiny" and not whole:
            with saving(base, base):
                self.adapted.save_base(base)
                self.tokenizer.save_pretrained(base)

    def start(self, path, rank, scale, least):
        """What --init-from names, for adapters of this rank and scale: ({layer: (A, B)}, head, the file's SHA-256).

        Raises: UsageError where it does not fit the model or its base, or has a rank above `least`.
        """
        file = read_served(path)
        self.check_fits(file)
        shown = f"was trained with --pooling {file.head_pooling}, not {self.args.pooling}"
        refuse(file.head_pooling != self.args.pooling, f"--init-from {path} {shown}: give the other")
        refuse(file.base, f"--init-from {path} belongs to a changed base: give its run's final/ as --model")
        advice = f"raise --lora-r and --client-ranks, or compress it with fedavg_merge.py --svd-rank {least}"
        refuse(file.r > least, f"--init-from {path} has rank {file.r}, above {least}: {advice}")
        return resized(file.factors, file.scale, rank, scale, self.args.seed, 0), file.head, file.sha256

    def check_fits(self, file):
        """Raises UsageError unless the `AdapterFile` has the adapted model's layers and head, and their sizes."""
        there, here = _shapes(file.factors, file.head), _shapes(self.adapted.factors(), self.adapted.head)
        if odd := sorted(part for part in there | here if there.get(part) != here.get(part)):
            shown = f"{odd[0]} is {there.get(odd[0])}, in {self.name} {here.get(odd[0])}"
            raise UsageError(f"{file.path}: {shown}: give its --model and --task-name")


def _shapes(factors, head):
    """{part: its shape} of an adapter, whatever its rank."""
    sizes = {layer: (B.shape[0], A.shape[1]) for layer, (A, B) in factors.items()}
    return sizes | {name: tuple(t.shape) for name, t in head.items()}


def named_views(vector, like):
    """{name: view} of a vector of all numbers of {name: tensor} `like`, in its order and shapes."""
    pieces = vector.split([t.numel() for t in like.values()])
    return {name: piece.view(t.shape) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def resized(pairs, scale, rank, new_scale, seed, t):
    """An adapter for clients of another rank or scale; new rows of A are the same for all clients of round t."""
    if scale == new_scale and all(A.shape[0] == rank for A, _ in pairs.values()):
        return pairs
    return {
        name: fit_rank(A, B, rank, torch_stream(seed, f"new rows of {name}", t), scale / new_scale)
        for name, (A, B) in pairs.items()
    }


# ---- saved adapters


def read_served(path):
    """`read_adapter` of a folder, of a run's (what it ended with), or of a round's client or fused folder."""
    path = Path(path).expanduser()
    if not (path / CONFIG).exists():
        path = next((path / part for part in ("final", "adapter") if (path / part).is_dir()), path)
    return read_adapter(path)


def print_values(row):
    """Prints the val_ fields of a row of metrics, and returns them."""
    values = {name: v for name, v in row.items() if name.startswith("val_")}
    if values:
        print("  ".join(f"{name} {v:.4f}" for name, v in values.items()))
    return values
