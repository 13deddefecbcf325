"""A task of GLUE as tokens and batches: its official tsv files, the hub's or generated ones, tokenised.

data = load_task("rte", data_root=None)                    # official files, else the hub; dataset="demo": neither
encoded = encode(data, tokenizer, max_length=128)
for rows in training_batches(encoded["train"].lengths(), 32, epochs, seed, round, client):
    batch = encoded["train"].batch(rows)                   # input_ids, attention_mask, labels
"""

import dataclasses
import math

import numpy as np
import torch

from common.batches import padded
from common.cli import UsageError
from common.hub import hub_dataset, reading
from common.local import lr_at
from common.seeding import stream
from common.text import data_folder, vocabulary_size
from lora_glue_fl.flags import refuse
from lora_glue_fl.glue_tasks import Split, Task, demo_task, find_task, make_split

HUB_NAME = "nyu-mll/glue"
_COLA_HEADER = ["source", "label", "star", "sentence"]  # CoLA's files have no header line
_MOST_SKIPPED = 1e-3  # of a file's rows; QQP's train file has three broken ones
# Batches that are sorted by length together; half of them where there are few, so that batches mix every epoch
POOL = 16
MAX_GRAD_NORM = 1.0  # to which a step's gradients are clipped, as transformers' Trainer does
CHUNK = 10_000  # examples tokenised at a time: the library's own form of them is large


# ---- the examples


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's splits. fingerprint: for run.json (SHA-256 and examples of each split)."""

    task: Task
    splits: dict[str, Split]
    fingerprint: dict


def load_task(name, dataset="glue", data_root=None, splits=None):
    """The task `name` ("cola" ... "wnli") as `TaskData`.

    dataset: "glue" (the official tsv files under the data folder, else the hub) or "demo" (generated). splits: which
    are needed, all by default.
    Raises UsageError for an unknown task, and for data that are missing or damaged.
    """
    task = find_task(name)
    splits = splits or task.splits
    if dataset == "demo":
        generated = demo_task(task.name)
        there, source = {split: generated[split] for split in splits}, "generated"
    else:
        there, source = _read_task(task, splits, data_root)
    fingerprint = {
        "dataset": dataset,
        "task": task.name,
        "source": source,
        "sha256": {split: there[split].sha256() for split in splits},
        "counts": {split: len(there[split]) for split in splits},
    }
    return TaskData(task, there, fingerprint)


def _read_task(task, splits, data_root):
    """({split: Split}, source): the asked splits of an official task.

    From the folder `data_root`/glue/FOLDER where that is there, else the hub or its library's cache.
    """
    root = data_folder(data_root)
    folder = root / "glue" / task.folder
    if folder.is_dir():
        return {split: _read_tsv(task, folder / _file_name(split)) for split in splits}, str(folder)
    rows = hub_dataset(
        (HUB_NAME, task.name),
        dict.fromkeys(task.splits, (*task.columns, "label")),
        f"no GLUE task {task.name} under {root}",
        f"{', '.join(map(_file_name, task.splits))} into {root / 'glue' / task.folder}",
    )

    def of(split):
        texts = {column: rows[split][column] for column in task.columns}
        return make_split(task, texts, rows[split]["label"], {}, lambda i: f"{HUB_NAME} {split} example {i}")

    return {split: of(split) for split in splits}, f"hub, {HUB_NAME} {task.name}"


def _file_name(split):
    return split.replace("validation", "dev") + ".tsv"


def _read_tsv(task, path):
    """One file as a `Split`. Quotes are literal; rows that lack a column are skipped, but for many of them refused."""
    if not path.is_file():
        raise UsageError(f"{path.parent} lacks {path.name}: put it there, or take another --data-root or task")
    with reading(f"cannot read {path}", "get the file again"):
        text = path.read_bytes().decode("utf-8-sig")  # MRPC's files start with a byte-order mark
    # Only "\n" ends a line: splitlines would also cut at the rarer separators that stand inside sentences.
    rows = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    header, first = (_COLA_HEADER, 0) if task.name == "cola" else (rows[0], 1)
    if missing := [name for name in task.file_columns.values() if name not in header]:
        raise UsageError(f"{path} has no column {' nor '.join(missing)}: it is not the official file of {task.name}")
    places = {column: header.index(name) for column, name in task.file_columns.items()}
    needed = 1 + max(places.values())
    lines = [i for i in range(first, len(rows)) if len(rows[i]) >= needed]
    skipped = len(rows) - first - len(lines)
    if not lines or skipped > max(3, _MOST_SKIPPED * len(rows)):
        raise UsageError(f"{path}: {skipped} of {len(rows) - first} rows lack columns: get the file again")
    columns = {column: [rows[i][place] for i in lines] for column, place in places.items()}
    texts, labels = {column: columns.pop(column) for column in task.columns}, columns.pop("label")
    return make_split(task, texts, labels, columns, lambda i: f"{path} line {lines[i] + 1}")


# ---- tokenised


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenised split: example i is `tokens[offsets[i] : offsets[i + 1]]`, special tokens included.

    tokens: uint16 or int32; types: uint8 of the same shape (which sentence of the pair), None where the model takes
    none; offsets: int64 [n + 1]; labels: int64 or float32 [n]; pad: the id of the padding token.
    """

    tokens: np.ndarray
    types: np.ndarray | None
    offsets: np.ndarray
    labels: np.ndarray
    pad: int

    def __len__(self):
        return len(self.labels)

    def lengths(self):
        """Tokens of each example: int64 [n]."""
        return np.diff(self.offsets)

    def batch(self, rows):
        """The examples `rows` as tensors, padded on the right to the longest of them.

        Returns {"input_ids", "attention_mask" (and "token_type_ids"): int64 [B, L], "labels": int64 or float32 [B]}.
        """
        ids, mask = padded(self.tokens, self.offsets, rows, self.pad)
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        if self.types is not None:
            batch["token_type_ids"] = padded(self.types, self.offsets, rows, 0)[0]
        batch["labels"] = self.labels[rows]
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def encode(data, tokenizer, max_length=128):
    """{split: `Encoded`} of a `TaskData`. Of a pair the longer sentence is cut first; max_length counts all tokens.

    Raises UsageError for a max_length below 8 or above what the tokenizer's model takes.
    """
    most = tokenizer.model_max_length
    refuse(not 8 <= max_length <= most, f"--max-length {max_length} is outside 8 to {most}, what the model takes")
    with_types = "token_type_ids" in tokenizer.model_input_names
    return {name: _tokenized(split, tokenizer, max_length, with_types) for name, split in data.splits.items()}


def _tokenized(split, tokenizer, max_length, with_types):
    kind = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.int32
    tokens, types, lengths = [], [], [0]
    for start in range(0, len(split), CHUNK):
        with reading("the tokenizer cannot split the sentences", "give another --model"):
            chunk = tokenizer(
                *(column[start : start + CHUNK] for column in split.texts.values()),
                truncation="longest_first",
                max_length=max_length,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=with_types,
            )
        lengths += map(len, chunk["input_ids"])
        tokens += [np.array(ids, dtype=kind) for ids in chunk["input_ids"]]
        types += [np.array(ids, dtype=np.uint8) for ids in chunk.get("token_type_ids", ())]
    offsets, types = np.cumsum(lengths, dtype=np.int64), np.concatenate(types) if with_types else None
    return Encoded(np.concatenate(tokens), types, offsets, split.labels, tokenizer.pad_token_id)


# ---- training steps


def plan_steps(encoded, rows, args, epochs, t=0, client=0):
    """Which of the examples `rows` (int64) each optimiser step takes: a list of int64 arrays."""
    return [rows[i] for i in training_batches(encoded.lengths()[rows], args.batch_size, epochs, args.seed, t, client)]


def training_batches(lengths, batch_size, epochs, seed, round=0, client=0):
    """Which examples each step takes: a list of int64 arrays of at most batch_size, every epoch each example once.

    Batches hold examples of similar length: the epoch's random order is cut into pools of up to `POOL` batches, half
    the epoch at most, which are sorted by length and cut into batches; the batches are then shuffled. An
    epoch's draws have the key (seed, round, client, epoch).
    lengths: tokens of each example [n]; epochs: above 0, 0.5 is the first half (rounded up) of an epoch's batches.
    """
    lengths = np.asarray(lengths)
    steps = -(-len(lengths) // batch_size)  # of an epoch
    wanted = math.ceil(epochs * steps - 1e-9)
    batches = []
    for epoch in range(math.ceil(wanted / steps)):
        generator = stream(seed, f"batches of epoch {epoch}", round, client)
        order = generator.permutation(len(lengths))
        pool = batch_size * min(POOL, max(1, steps // 2))
        cut = []
        for start in range(0, len(order), pool):
            rows = order[start : start + pool]
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            cut += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        batches += [cut[i] for i in generator.permutation(len(cut))]
    return batches[:wanted]


def learning_rates(args, total):
    """The rate of each of `total` steps: constant, or linear to 0 as transformers' schedule."""
    return [lr_at(i, total, args.learning_rate, args.lr_scheduler) for i in range(total)]


def batches(encoded, steps, device):
    """For each of `steps`, arrays of rows, the batch (in a tuple) that `common.local.local_steps` takes."""
    for rows in steps:
        yield ({name: t.to(device, non_blocking=True) for name, t in encoded.batch(rows).items()},)
