"""What a run must keep to go on after a crash: saved atomically, in safetensors and JSON, never unpickled.

A checkpoint is a folder:

    state.json                  round, counters, timings; SHA-256 of every file, of this, and of what the run has
                                published beside it; dtypes and shapes
    theta.safetensors           the global weights, by name
    NAME.safetensors            one file per lasting object (server optimiser, best weights, ...)
    NAME_000007.safetensors     one file per client with lasting state (`common.client_rows`)

It is written beside the old one and swapped in by renaming, so that a process killed at any moment leaves
one whole checkpoint. `checkpoint.1` is the one before (`--keep-checkpoints`): where `checkpoint` is not there, it takes
its place. Any number of processes can read what any other number wrote.
"""

import contextlib
import errno
import hashlib
import itertools
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

# folders of a run whose files are no checkpoint's to answer for, with those of ClientRows
CHANGING = ("checkpoint", "final", "adapter")


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


def save(folder, meta, shared, rows=None, keep=1):
    """Replaces the checkpoint at `folder`. Every process calls it.

    meta: JSON object (the main process's counts). shared: {name: {key: tensor}}, the same on every process;
    the main process writes it. rows: {name: `common.client_rows.ClientRows`}. keep: how many checkpoints stay, this
    one and those before it.
    Raises RunFailed if it cannot be written (disk full); the old checkpoint is then untouched.
    """
    folder = Path(folder)
    fresh = folder.with_name(folder.name + ".new")
    with saving(folder, *[fresh] * parallel.is_main()):  # or the main one's reason is that the folder is gone
        if parallel.is_main():
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        parallel.barrier()
        saved = {name: row.save(fresh, name, folder) for name, row in (rows or {}).items()}
        parallel.barrier()
        if parallel.is_main():
            files = {f"{name}.safetensors": _save_tensors(fresh, name, tensors) for name, tensors in shared.items()}
            of_clients = {name: {str(k): sha256 for k, sha256 in of.items()} for name, of in saved.items()}
            state = meta | {"files": files, "rows": of_clients, "published": _published(folder, rows)}
            write_json(fresh / "state.json", state | {"sha256": _digest(state)})
            _sync_folder(fresh)
        parallel.barrier()
    if parallel.is_main():
        with saving(folder):
            swap(fresh, folder, keep)
            for path in earlier(folder)[keep - 1 :]:
                shutil.rmtree(path)
            _sync_folder(folder.parent)
    parallel.barrier()


def load(folder, device="cpu"):
    """The checkpoint at `folder`: (meta, shared: {name: {key: tensor}}), or None if there is none.

    meta["rows"] is {name: {client: SHA-256 of its file}}, what `ClientRows.load` takes. Every process calls it.
    Raises UsageError for a checkpoint that is not as it was saved.
    """
    folder = Path(folder)
    if parallel.is_main():
        with saving(folder):
            recover(folder, earlier(folder))
    parallel.barrier()
    if not folder.exists():
        return None
    try:
        meta = _read_state(folder)
        return meta, {name: load_file(folder / f"{name}.safetensors", device=str(device)) for name in meta["shared"]}
    except ValueError as error:
        raise UsageError(f"{error}: {_instead(folder)}") from None


def row_file(name, k):
    """The file of client k's row of `name` in a checkpoint."""
    return f"{name}_{k:06d}.safetensors"


def earlier(folder):
    """The checkpoints before the one at `folder`, the last first."""
    numbered = [path for path in folder.parent.glob(f"{folder.name}.*") if path.suffix[1:].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.suffix[1:]))


def swap(fresh, folder, keep=1):
    """Puts the finished folder `fresh` in the place of `folder`. `recover` mends a death between the renames.

    keep: with 2, what was at `folder` becomes folder.1; with 3, what was at folder.1 becomes folder.2; ...
    """
    fresh, folder = Path(fresh), Path(folder)
    places = [folder, *(folder.with_name(f"{folder.name}.{i}") for i in range(1, keep)), _old(folder)]
    shutil.rmtree(places[-1], ignore_errors=True)
    for newer, older in reversed(list(itertools.pairwise(places))):
        if newer.exists():
            os.replace(newer, older)
    os.replace(fresh, folder)
    shutil.rmtree(places[-1], ignore_errors=True)


def recover(folder, before=()):
    """Puts `folder`, where it is not there, back from the first of `before`, else from its `.old`.

    A process died between the renames of `swap`, or a user removed it to go on from the one before.
    """
    folder = Path(folder)
    old = _old(folder)
    if not folder.exists():
        for path in (*before, old):
            if path.exists():
                os.replace(path, folder)
                break
    if old.exists():
        shutil.rmtree(old)


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


def _old(folder):
    return folder.with_name(folder.name + ".old")


def _sync_folder(path):
    """Waits until the names in a folder are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _digest(state):
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _save_tensors(folder, name, tensors):
    """Writes a file of the main process. Returns what state.json says of it."""
    path = folder / f"{name}.safetensors"
    save_file({key: t.detach().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}, path)
    about = {key: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for key, t in tensors.items()}
    return {"sha256": seal(path), "tensors": about}


def _published(folder, rows):
    """{path beside the checkpoint `folder`: SHA-256} of the weights that the run has published for good so far."""
    before, run, working = {}, folder.parent, [row.folder for row in (rows or {}).values()]
    with contextlib.suppress(OSError, ValueError):
        before = read_json(folder / "state.json").get("published", {})  # what is published stays as it is
    paths = [path for kind in ("*.safetensors", "*.npz") for path in run.rglob(kind) if path.parent not in working]
    paths = [path.relative_to(run) for path in paths]
    paths = [path for path in paths if path.parts[0].split(".")[0] not in CHANGING and ".new" not in str(path)]
    return {str(path): before.get(str(path)) or seal(run / path) for path in sorted(paths)}


def _read_state(folder):
    """What state.json says, with "shared", the names of what all clients share; every file is as it says.

    Every process calls it. Raises ValueError, on every process, naming the file that is not as it was saved.
    """
    path = folder / "state.json"
    try:
        state = read_json(path)
        whole = state.pop("sha256") == _digest(state)
        rows = {name: {int(k): of[k] for k in of} for name, of in state["rows"].items()}
        files = {file: about["sha256"] for file, about in state["files"].items()}
        shared = [Path(file).stem for file in files]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged") from None
    if not whole:
        raise ValueError(f"{path} is damaged or was edited")
    files |= {row_file(name, k): value for name, of in rows.items() for k, value in of.items()}
    paths = {folder / file: value for file, value in files.items()}
    published = {folder.parent / file: value for file, value in state.get("published", {}).items()}
    paths |= {path: value for path, value in published.items() if path.exists()}  # a round's may be deleted
    faults = [_fault(path, paths[path]) for path in parallel.my_share(sorted(paths))]
    faults = [fault for part in parallel.all_gather([f for f in faults if f]) for fault in part]
    if faults:
        raise ValueError(faults[0])
    return state | {"rows": rows, "shared": shared}


def _fault(path, sha256):
    """What is wrong with a file that was saved with this SHA-256, "" where nothing is."""
    try:
        same = sha256 == file_sha256(path)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return "" if same else f"{path} is damaged: not what was saved"


def _instead(folder):
    """What to do where the checkpoint at `folder` is damaged."""
    for path in earlier(folder):
        with contextlib.suppress(ValueError):
            t = _read_state(path).get("round")
            return f"delete {folder}, and --resume goes on from {path}, after round {t}"
    return "start the run anew with --overwrite"
