"""A task's examples as tokens and batches: tokenised once, cached, padded per batch; what an optimiser step takes.

tokenizer = load_tokenizer("roberta-base")
encoded = encode(data, tokenizer, max_length=128)          # of `lora_glue_fl.glue_data.load_task`
for rows in training_batches(encoded["train"].lengths(), 32, epochs, seed, round, client):
    batch = encoded["train"].batch(rows)                   # input_ids, attention_mask, labels
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import tokenizers
import torch

from common.batches import padded
from common.cache import cache_folder, cached, pack_arrays, sha256_of, unpack_arrays
from common.cli import UsageError
from common.corpora import data_folder
from common.hub import reading
from common.local import client_optimizer
from common.schedules import lr_at
from common.seeding import stream
from common.text import hub_tokenizer, reading_tokenizer, tokenizer_fingerprint, vocabulary_size
from lora_glue_fl.demo_glue import demo_tokenizer

# Batches that are sorted by length together; half of them where there are few, so that batches mix every epoch
POOL = 16
_CACHE_FORMAT = 1  # raise it when the meaning of a cached file changes
MAX_GRAD_NORM = 1.0  # to which a step's gradients are clipped, as transformers' Trainer does
CHUNK = 10_000  # examples tokenised at a time: the library's own form of them is large


# ---------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(spec, data_root=None):
    """A fast tokenizer of `transformers` that pads.

    spec: "demo" (the words of the generated sentences), a name under `data_root`/tokenizers, a folder, or a name on
    the hub (what an earlier download left first). No code from a tokenizer's folder is run.

    Raises UsageError when it is not there, cannot be read, or has no fast version or padding token.
    """
    if spec == "demo":
        return demo_tokenizer()
    named = data_folder(data_root) / "tokenizers" / spec
    for path in (named, Path(spec).expanduser()):
        if path.is_dir():
            import transformers

            with reading_tokenizer(path):
                how = {"local_files_only": True, "trust_remote_code": False}
                return _checked(transformers.AutoTokenizer.from_pretrained(path, **how), spec)
    with reading_tokenizer(spec):
        tokenizer = hub_tokenizer(spec)
    if tokenizer is None:
        raise UsageError(
            f"no tokenizer {spec!r}: not a folder, not in {named.parent}, and not from the hub; give a folder with "
            "tokenizer.json and tokenizer_config.json, or take the tokenizer demo"
        )
    return _checked(tokenizer, spec)


def _checked(tokenizer, spec):
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UsageError(f"tokenizer {spec!r} has no fast version: give one with a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise UsageError(f"tokenizer {spec!r} has no padding token: give an encoder's, such as roberta-base")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # what transformers makes of a folder without the tokenizer's files
        raise UsageError(f"tokenizer {spec!r} knows no words: give a folder with tokenizer.json, or a name")
    return tokenizer


# ---------------------------------------------------------------------------------------------- tokenised


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


def encode(data, tokenizer, max_length=128, cache_dir=None):
    """{split: `Encoded`} of a `TaskData`. Of a pair the longer sentence is cut first; max_length counts all tokens.

    Cached under a key of the texts, the tokenizer (all of it), max_length and the version of the library. A file
    that is damaged is built again, with a warning.
    Raises UsageError for a max_length below 8 or above what the tokenizer's model takes.
    """
    if not 8 <= max_length <= tokenizer.model_max_length:
        raise UsageError(
            f"--max-length {max_length} is outside 8 to {tokenizer.model_max_length}, the most that this tokenizer's "
            "model takes: choose one in between"
        )
    rules = [tokenizer_fingerprint(tokenizer), tokenizer.model_input_names, tokenizer.truncation_side]
    hashes = sorted(data.fingerprint["sha256"].items())
    key = sha256_of(["glue", _CACHE_FORMAT, data.task.name, hashes, rules, max_length, tokenizers.__version__])
    path = cache_folder(cache_dir) / f"glue-{data.task.name}-{key[:24]}.npz"

    def make():
        every = {split: tokenize(examples, tokenizer, max_length) for split, examples in data.splits.items()}
        return {f"{split}_{name}": array for split, arrays in every.items() for name, array in arrays.items()}

    arrays = cached(path, make, pack_arrays, unpack_arrays, "tokenising")
    return {
        split: Encoded(
            *(arrays.get(f"{split}_{name}") for name in ("tokens", "types", "offsets")),
            labels=examples.labels,
            pad=tokenizer.pad_token_id,
        )
        for split, examples in data.splits.items()
    }


def tokenize(split, tokenizer, max_length):
    """{"tokens", "offsets" (and "types")} of a `Split`, as `Encoded` has them."""
    with_types = "token_type_ids" in tokenizer.model_input_names
    kind = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.int32
    tokens, types, lengths = [], [], [0]
    for start in range(0, len(split), CHUNK):
        with reading("this tokenizer cannot split the sentences", "give another --tokenizer"):
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
    arrays = {"tokens": np.concatenate(tokens), "offsets": np.cumsum(lengths, dtype=np.int64)}
    return arrays | ({"types": np.concatenate(types)} if with_types else {})


# -------------------------------------------------------------------------------------------- training steps


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


def plan_steps(encoded, rows, args, epochs, t=0, client=0):
    """Which examples each optimiser step takes: a list (a step) of lists of row arrays (its micro-batches).

    The last step of an epoch has fewer micro-batches where they do not come out even. rows: int64, those to train on.
    """
    cut = training_batches(encoded.lengths()[rows], args.batch_size, epochs, args.seed, t, client)
    n, per_epoch = args.gradient_accumulation_steps, math.ceil(len(rows) / args.batch_size)
    parts = [[rows[batch] for batch in cut[i : i + per_epoch]] for i in range(0, len(cut), per_epoch)]
    return [part[i : i + n] for part in parts for i in range(0, len(part), n)]


def adamw(args, model, parameters):
    """AdamW over {name: parameter} of `model`; as in transformers' Trainer biases and norms do not decay."""
    spared = ()  # without a decay one group
    if args.weight_decay:
        from transformers.trainer_pt_utils import get_parameter_names

        named = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
        decayed = {id(model.get_parameter(name)) for name in get_parameter_names(model, [torch.nn.LayerNorm], named)}
        spared = [name for name, p in parameters.items() if id(p) not in decayed]
    decay = {"weight_decay": args.weight_decay, "not_decayed": spared}
    return client_optimizer("adamw", parameters, args.learning_rate, **decay)


def learning_rates(args, total):
    """The rate of each of `total` steps, as transformers' schedules: a warm-up from 0, then constant or linear to 0."""
    schedule = {"kind": args.lr_scheduler, "warmup": math.ceil(args.warmup_ratio * total), "from_zero": True}
    return [lr_at(i, total, args.learning_rate, **schedule) for i in range(total)]


def batches(encoded, steps, device):
    """For each of `steps` (`plan_steps`) the micro-batches [(examples, (batch,))] that `local_steps` takes."""
    for step in steps:
        parts = [(len(rows), encoded.batch(rows)) for rows in step]
        yield [(n, ({name: t.to(device, non_blocking=True) for name, t in batch.items()},)) for n, batch in parts]
