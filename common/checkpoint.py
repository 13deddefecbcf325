"""What a run must keep to go on after a crash: saved atomically, in safetensors and JSON, never unpickled.

A checkpoint is a folder:

    state.json                  round, counters, timings, names of the files
    theta.safetensors           the global weights, by name
    NAME.safetensors            one file per lasting object (server optimiser, best weights, ...)
    NAME_000007.safetensors     one file per client with lasting state (`common.client_rows`)

It is written beside the old one and swapped in by renaming, so that a process killed at any moment leaves
one whole checkpoint. Any number of processes can read what any other number wrote.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import parallel
from common.cli import RunFailed, UsageError


def write_json(path, value):
    """Writes `value` as JSON so that the file at `path` is always whole: the old one or the new one."""
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)


def read_json(path):
    """The JSON value in the file at `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


@contextlib.contextmanager
def saving(path, *parts):
    """Turns what a full disk raises while `path` is written into RunFailed, and removes the half-written `parts`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)  # a folder
            with contextlib.suppress(OSError):
                Path(part).unlink()
        reason = getattr(error, "strerror", None) or str(error)
        raise RunFailed(
            f"cannot save {path}: {reason}; what was saved before is whole: make room, then --resume"
        ) from error


def save(folder, meta, shared, rows=None):
    """Replaces the checkpoint at `folder`. Every process calls it.

    meta: JSON object (the main process's counts). shared: {name: {key: tensor}}, the same on every process;
    the main process writes it. rows: {name: `common.client_rows.ClientRows`}.
    Raises RunFailed if it cannot be written (disk full); the old checkpoint is then untouched.
    """
    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".new")
    with saving(folder, fresh):
        if parallel.is_main():
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        parallel.barrier()
        ids = {name: row.save(fresh, name) for name, row in (rows or {}).items()}
        parallel.barrier()
        if parallel.is_main():
            for name, tensors in shared.items():
                _save_tensors(tensors, fresh / f"{name}.safetensors")
            write_json(fresh / "state.json", meta | {"shared": sorted(shared), "rows": ids})
        parallel.barrier()
    if parallel.is_main():
        with saving(folder):
            swap(fresh, folder)
    parallel.barrier()


def load(folder, device="cpu"):
    """The checkpoint at `folder`: (meta, shared: {name: {key: tensor}}), or None if there is none.

    Raises UsageError for a file that is damaged.
    """
    folder = Path(folder)
    if parallel.is_main():
        recover(folder)
    parallel.barrier()
    if not (folder / "state.json").exists():
        return None

    def read(name):
        file = folder / f"{name}.safetensors"
        try:
            return load_file(file, device=str(device))
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} is damaged ({error}): start the run anew with --overwrite") from None

    meta = read_json(folder / "state.json")
    return meta, {name: read(name) for name in meta["shared"]}


def swap(fresh, folder):
    """Puts the finished folder `fresh` in the place of `folder`. `recover` mends a death between the renames."""
    fresh, folder = Path(fresh), Path(folder)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder):
    """Puts `folder` back from its `.old` if a process died between the two renames of `swap`."""
    folder = Path(folder)
    old = folder.with_name(folder.name + ".old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, folder)


def _save_tensors(tensors, path):
    save_file({key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}, path)
    sync(path)


def sync(path):
    """Waits until the file at `path` is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
