"""Which examples an optimiser step takes and at which rate, the same in federated and central training."""

import math

from common.schedules import lr_at
from lora_glue_fl.data_prep import training_batches


def plan_steps(lengths, args, epochs, round=0, client=0):
    """Which examples each optimiser step takes: a list (a step) of lists of row arrays (its micro-batches).

    The last step of an epoch has fewer micro-batches where they do not come out even.
    """
    batches = training_batches(lengths, args.batch_size, epochs, args.seed, round, client)
    n, per_epoch = args.gradient_accumulation_steps, math.ceil(len(lengths) / args.batch_size)
    parts = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    return [part[i : i + n] for part in parts for i in range(0, len(part), n)]


def learning_rates(args, total):
    """The rate of each of `total` steps, as transformers' schedules: a warm-up from 0, then constant or linear to 0."""
    warmup = math.ceil(args.warmup_ratio * total)
    schedule = {"kind": args.lr_scheduler, "warmup": warmup, "from_zero": True}
    return [lr_at(i, total, args.learning_rate, **schedule) for i in range(total)]


def batches(encoded, rows, steps, device):
    """For each step the micro-batches [(examples, (batch,))] that `common.local.local_steps` takes.

    Args: encoded: an `Encoded`; rows: int64, its examples that `steps` (of `plan_steps`) counts from 0.
    """
    for step in steps:
        parts = [(len(part), encoded.batch(rows[part])) for part in step]
        yield [(n, ({name: t.to(device, non_blocking=True) for name, t in batch.items()},)) for n, batch in parts]
