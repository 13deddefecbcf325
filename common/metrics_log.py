"""metrics.jsonl: a line of JSON for each evaluated round of a run; what writes, checks and cuts it.

Its field peak_memory (bytes) is that of the process of the run that has held most in this session.
"""

import contextlib
import json
import math
import os
import resource
import sys
from pathlib import Path

import torch

from common import checkpoint, manifest
from common.cli import UsageError
from common.curves import read_metrics

SHOWN = ("train_loss", "val_loss", "val_ppl", "val_accuracy", "val_f1", "val_matthews", "val_pearson")  # while it runs


def client_fields(clients):
    """`clients` (ids), client_NAME of each (null: left out), train_loss: their mean by their weights.

    clients: a `common.rounds.Round` that is over; every process calls it.
    """
    notes, weights, row = clients.notes(), clients.weights, {}
    losses = {k: seen["train_loss"] for k, seen in notes.items() if seen and "train_loss" in seen}
    if losses:
        row["train_loss"] = math.fsum(weights[k] * v for k, v in losses.items()) / math.fsum(weights[k] for k in losses)
    row["clients"] = list(notes)
    for name in dict.fromkeys(name for seen in notes.values() if seen for name in seen):
        row[f"client_{name}"] = [seen and seen.get(name) for seen in notes.values()]
    return row


def peak_memory(device):
    """The most bytes that this process has held: on CUDA what tensors had of its GPU, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux; its ru_maxrss may be that of the program that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def shown(line):
    """{name: text} of the metrics that are said while a run goes on."""
    return {name: f"{line[name]:.4g}" for name in SHOWN if name in line}


def append(folder, line):
    """Adds a line, on the disk before the checkpoint that counts it."""
    path = folder / "metrics.jsonl"
    with checkpoint.saving(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(manifest.json_safe(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines_to(folder, t, due):
    """The lines up to round t, that of a checkpoint. due: whether there is an evaluation after so many rounds.

    Raises UsageError where some are missing, twice there or out of order.
    """
    path = folder / "metrics.jsonl"
    try:
        rows = [row for row in read_metrics(folder) if row["round"] <= t] if path.exists() else []
    except ValueError as error:
        raise UsageError(f"{error}: mend it, or start the run anew with --overwrite") from None
    seen = [row["round"] for row in rows]
    if seen != sorted({*seen, *filter(due, range(t + 1))}):
        raise UsageError(f"{path} has not one line a round up to the checkpoint's ({t}): mend it, or use --overwrite")
    return rows


def cut(folder, rows):
    """Leaves these lines only: the others are of rounds that will be done again."""
    path = folder / "metrics.jsonl"
    if path.exists():
        fresh = path.with_name("metrics.jsonl.new")
        with checkpoint.saving(path, fresh):
            fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            checkpoint.sync(fresh)
            os.replace(fresh, path)


def tracker(args, folder, command):
    """A function that takes a line of metrics, for --track; None when off."""
    if args.track == "off":
        return None
    if args.track == "wandb":
        import wandb

        project = getattr(args, "wandb_project", "fedquartet")
        session = wandb.init(project=project, id=folder.name, config=vars(args), resume="allow")
        return lambda line: session.log(line, step=line["round"])
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(line):
        for key, value in line.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"{command}/{key}", value, line["round"])
        writer.flush()

    return write
