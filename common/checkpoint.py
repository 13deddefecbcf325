"""What a run must keep to go on after a crash: saved atomically, in safetensors and JSON, never unpickled.

A checkpoint is a folder:

    state.json                  round, counters, timings; SHA-256 of every other file
    theta.safetensors           the global weights, by name
    NAME.safetensors            one file per lasting object (server optimiser, best weights, ...)
    NAME_000007.safetensors     one file per client with lasting state (`common.client_rows`)

It is written beside the old one and swapped in by renaming, so that a process killed at any moment leaves one whole
checkpoint. `checkpoint.1` is the one before: where `checkpoint` is not there, it takes its place. Any number of
processes can read what any other number wrote.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import parallel
from common.cli import RunFailed, UsageError

# what a disk answers where nothing can be written any more
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


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
    """Turns what a disk raises while `path` is written (it is full, or read-only) into RunFailed.

    The half-written `parts` are removed.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)  # a folder
            with contextlib.suppress(OSError):
                Path(part).unlink()
        reason = getattr(error, "strerror", None) or str(error)
        do = "make it writable" if getattr(error, "errno", None) == errno.EROFS else "make room"
        raise RunFailed(f"cannot save {path}: {reason}; what was saved before is whole: {do}, then --resume") from error


def save(folder, meta, shared, rows=None):
    """Replaces the checkpoint at `folder`. Every process calls it.

    meta: JSON object (the main process's counts). shared: {name: {key: tensor}}, the same on every process;
    the main process writes it. rows: {name: `common.client_rows.ClientRows`}.
    Raises RunFailed if it cannot be written (disk full); the old checkpoint is then untouched.
    """
    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".new")
    main = parallel.is_main()
    with saving(folder, *[fresh] * main):
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        saved = {name: row.save(fresh, name, folder) for name, row in (rows or {}).items()}
        if main:
            of_main = {f"{name}.safetensors": tensors for name, tensors in shared.items()}
            files = {file: _save_tensors(fresh / file, tensors) for file, tensors in of_main.items()}
            of_clients = {name: {str(k): sha256 for k, sha256 in of.items()} for name, of in saved.items()}
            write_json(fresh / "state.json", meta | {"files": files, "rows": of_clients})
            swap(fresh, folder, _before(folder))
    parallel.barrier()


def load(folder, device="cpu"):
    """The checkpoint at `folder`: (meta, shared: {name: {key: tensor}}), or None if there is none.

    meta["rows"] is {name: {client: SHA-256 of its file}}, what `ClientRows.load` takes. The main process reads and
    sends it; every process calls it.
    Raises UsageError for a checkpoint that is not as it was saved.
    """
    meta = parallel.from_main(_meta, Path(folder))
    if meta is None:
        return None
    shared = {}
    for name in (Path(file).stem for file in meta["files"]):
        read = load_file(Path(folder) / f"{name}.safetensors") if parallel.is_main() else None
        shared[name] = parallel.broadcast_tensors(read, device)
    return meta, shared


def _meta(folder):
    """The checkpoint's state.json, None without one. Raises UsageError where a file is not as it was saved."""
    before = _before(folder)
    with saving(folder):
        if not folder.exists() and before.exists():  # a process died between the renames of `swap`
            os.replace(before, folder)
    if not folder.exists():
        return None
    if fault := _fault(folder):
        instead = f"delete {folder}, and --resume goes on from {before}" if before.exists() else "use --overwrite"
        raise UsageError(f"{fault}: {instead}")
    meta = read_json(folder / "state.json")
    meta["rows"] = {name: {int(k): sha256 for k, sha256 in of.items()} for name, of in meta["rows"].items()}
    return meta


def row_file(name, k):
    """The file of client k's row of `name` in a checkpoint."""
    return f"{name}_{k:06d}.safetensors"


def swap(fresh, folder, before=None):
    """Puts the finished folder `fresh` in the place of `folder`, which becomes `before` (None: is deleted)."""
    fresh, folder = Path(fresh), Path(folder)
    old = before or folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    if before is None:
        shutil.rmtree(old, ignore_errors=True)


def sync(path):
    """Waits until the file at `path` is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def seal(path):
    """Waits until the file at `path` is on the disk. Returns its SHA-256."""
    sync(path)
    return file_sha256(path)


def file_sha256(path):
    """SHA-256 of the file at `path`, in hexadecimal. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _before(folder):
    return folder.with_name(folder.name + ".1")


def _save_tensors(path, tensors):
    save_file({key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}, path)
    return seal(path)


def _fault(folder):
    """What in the checkpoint at `folder` is not as it was saved, None where all is."""
    path = folder / "state.json"
    try:
        state = read_json(path)
        files = dict(state["files"])
        files |= {row_file(name, int(k)): sha256 for name, of in state["rows"].items() for k, sha256 in of.items()}
        for file, sha256 in files.items():
            path = folder / file
            if file_sha256(path) != sha256:
                return f"{path} is damaged: not what was saved"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path} is damaged"
    return None
