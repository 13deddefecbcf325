"""A task of GLUE with a model for it: loss, evaluation, and what run.json says of both."""

import copy
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from common import parallel
from common.adapter_files import read_tensors
from common.batches import evaluation_batches
from common.checkpoint import saving
from common.cli import UsageError, say
from common.evaluation import amp_context, pick_device, resolve_amp
from common.products import fit_rank
from common.runlog import prepare_machine
from common.seeding import torch_stream
from common.vector import fingerprint
from lora_glue_fl.data_prep import encode
from lora_glue_fl.flags import model_name
from lora_glue_fl.glue_data import load_task
from lora_glue_fl.glue_tasks import evaluate, find_task
from lora_glue_fl.models import find_tokenizer, load_encoder, most_tokens
from lora_glue_fl.round_folders import read_served


class TaskModel:
    """Data, tokens and model of a command line.

    Attributes: task, data (`TaskData`), encoded {split: `Encoded`}, encoder, adapted (`common.lora.LoraModel`, None
    without LoRA), model (what is called), device, amp, notes (lines for the log).

    Args: args: the flags of any of this study's scripts; lora: (r, alpha, dropout, targets), None: all weights train;
        train: whether the training split is needed.
    """

    def __init__(self, args, lora, train=True):
        self.args, self.device = args, pick_device(args.device)
        self.amp = resolve_amp(args.amp, self.device)
        self.task, name = find_task(args.task_name), model_name(args)
        splits = self.task.splits if train else self.task.evaluation_splits
        self.data = load_task(self.task.name, args.dataset, args.data_root, splits)
        self.tokenizer = find_tokenizer(args.tokenizer, args.dataset, args.data_root, name)
        self.encoded = encode(self.data, self.tokenizer, args.max_length, args.cache_dir)
        self.encoder = load_encoder(name, self.task, self.tokenizer, args.seed, args.pooling)
        longest, most = max(int(e.lengths().max()) for e in self.encoded.values()), most_tokens(self.encoder.model)
        if most is not None and longest > most:
            raise UsageError(
                f"an example has {longest} tokens, model {name} takes {most}: lower --max-length {args.max_length} to "
                f"{most}"
            )
        self.adapted = self.encoder.adapted(*lora, args.seed) if lora else None
        self.model = (self.adapted or self.encoder).model.to(self.device)
        self.notes = self.data.notes + self.encoder.notes

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
            outputs, labels = self.outputs(split, share), self.encoded[split].labels
            result |= {key: value for key, value in self.measures(split, outputs, labels).items() if key not in result}
        return result

    def measures(self, split, outputs, labels):
        """{val_loss, val_<metric> ...} of outputs [n, num_labels]. Raises RunFailed where they are not finite."""
        return {"val_loss": self.mean_loss(outputs, labels)} | evaluate(self.task, split, outputs.numpy(), labels)

    def held_out(self, rows):
        """{held_out_loss, held_out_<metric> ...} on these examples, int64 [n], of the training split."""
        outputs, labels = self.outputs("train", rows=rows), self.encoded["train"].labels[rows]
        values = self.measures("train", outputs, labels)
        return {name.replace("val", "held_out", 1): value for name, value in values.items()}

    @property
    def headline(self):
        """The field of the task's first metric."""
        return f"val_{self.task.metrics[0]}"

    def facts(self):
        """What run.json says of the data."""
        return {**self.data.fingerprint, "model": self.encoder.name}

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

    def base_model(self, folder):
        """What an adapter names as its base: the model as the user gave it, tiny: where `save_base` wrote it."""
        return str(folder / "base") if self.encoder.name == "tiny" else self.encoder.name

    def about(self, folder):
        """Keyword arguments of `write_adapter` for adapters of the run in `folder`, but alpha."""
        more = {"base_model": self.base_model(folder), "head_pooling": self.args.pooling}
        return self.adapted.about() | more

    def save_base(self, folder):
        """Writes the tiny model, which can be loaded from nowhere else, with its tokenizer to folder/base, once."""
        base = folder / "base"
        whole = (base / "tokenizer_config.json").is_file()  # written last
        if self.encoder.name == "tiny" and not whole:
            with saving(base, base):
                self.adapted.save_base(base)
                self.tokenizer.save_pretrained(base)

    def start(self, path, rank, scale, least):
        """What --init-from names, for adapters of this rank and scale: ({layer: (A, B)}, head, the file's SHA-256).

        Raises: UsageError where it does not fit the model or its base, or has a rank above `least`.
        """
        file = read_served(path)
        self.check_fits(file)
        if file.head_pooling != self.args.pooling:
            shown = f"was trained with --pooling {file.head_pooling}, not {self.args.pooling}"
            raise UsageError(f"--init-from {path} {shown}: give --pooling {file.head_pooling}")
        if file.base:
            raise UsageError(
                f"--init-from {path} belongs to a base that its run has changed: begin with that run's final/ as "
                "--model"
            )
        if file.r > least:
            flag = "--lora-r" if least == rank else "--client-ranks"
            raise UsageError(
                f"--init-from {path} has rank {file.r}, above {flag} {least}: raise {flag}, or compress it with "
                f"fedavg_merge.py --adapters {file.path} --svd-rank {least}"
            )
        self.notes += self.check_base(file)
        return resized(file.factors, file.scale, rank, scale, self.args.seed, 0), file.head, file.sha256

    def check_base(self, file):
        """Lines for the log where the `AdapterFile` names another model whose weights are not there to compare.

        Raises: UsageError where they are there, and are others than the model's.
        """
        there, here = file.base_model, self.encoder.name
        if not there or there.removeprefix("FacebookAI/") == here.removeprefix("FacebookAI/"):
            return []
        weights = Path(there).expanduser() / "model.safetensors"
        if not weights.is_file():
            return [f"warning: {file.path} was trained on {there}, which cannot be compared with {here}"]
        stored = read_tensors(weights)[0]
        for layer, weight in ({} if file.base else self.adapted.base_weights()).items():
            key = next((key for key in stored if f".{layer}.weight".endswith(f".{key}")), None)
            if key is None or not torch.equal(stored[key].to(weight), weight):
                shown = f"{file.path} was trained on {there}, whose {layer} differs from that of {here}"
                raise UsageError(f"{shown}: give --model {there}")
        return []

    def check_fits(self, file):
        """Raises UsageError unless the `AdapterFile` has the adapted model's layers, their sizes and its head."""
        here, under, name = self.adapted.factors(), self.adapted.base_weights(), self.encoder.name
        odd = sorted(file.factors.keys() ^ here.keys())
        if odd:
            raise UsageError(f"{file.path}: its layers are not those of {name} ({odd[0]}): give its --model")
        for layer, (A, B) in file.factors.items():
            size, wanted = (B.shape[0], A.shape[1]), (here[layer][1].shape[0], here[layer][0].shape[1])
            if size != wanted or (layer in file.base and file.base[layer].shape != under[layer].shape):
                shown = f"{layer} is {size[0]} x {size[1]}, in {name} {wanted[0]} x {wanted[1]}"
                raise UsageError(f"{file.path}: {shown}: give its --model")
        heads = [{name: tuple(t.shape) for name, t in head.items()} for head in (file.head, self.adapted.head)]
        if heads[0] != heads[1]:
            raise UsageError(
                f"{file.path}: its head ({_shapes(heads[0])}) is not the task's ({_shapes(heads[1])}): give its "
                "--task-name and --model"
            )


def _shapes(head):
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in head.items()) or "none"


def resized(pairs, scale, rank, new_scale, seed, t):
    """An adapter for clients of another rank or scale; new rows of A are the same for all clients of round t."""
    if scale == new_scale and all(A.shape[0] == rank for A, _ in pairs.values()):
        return pairs
    return {
        name: fit_rank(A, B, rank, torch_stream(seed, f"new rows of {name}", t), scale / new_scale)
        for name, (A, B) in pairs.items()
    }


def evaluate_adapter(path, args):
    """A saved adapter on its task's validation examples: {"val_loss", "val_<metric>", ..., "seconds"}.

    path: folder in peft's format; args: task_name, model_size, model, tokenizer, dataset, data_root, cache_dir,
    max_length, eval_batch_size, device, amp, threads, seed.
    Raises UsageError for an adapter that cannot be read, or of another model or task.
    """
    started = time.perf_counter()
    prepare_machine(args)
    file, args = read_served(path), copy.copy(args)
    args.pooling = file.head_pooling
    if model_name(args) == "tiny" and file.base_model and Path(file.base_model).is_dir():
        # its weights follow from a seed: take those that the adapter was trained on
        args.model, args.tokenizer = file.base_model, args.tokenizer or file.base_model
    model = TaskModel(args, (file.r, file.alpha, 0.0, file.target_modules), train=False)
    model.check_fits(file)
    for line in model.check_base(file):
        say(line)
    model.adapted.load_base(file.base)
    model.adapted.load(file.factors, file.head, file.scale)
    return {**model.evaluate(), "seconds": time.perf_counter() - started}


def print_values(row):
    """Prints the val_ fields of a row of metrics, and returns them."""
    values = {name: v for name, v in row.items() if name.startswith("val_")}
    if values:
        print("  ".join(f"{name} {v:.4f}" for name, v in values.items()))
    return values
