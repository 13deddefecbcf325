"""The cache: files that can be made again, named by the SHA-256 of everything that shapes them."""

import contextlib
import hashlib
import io
import json
import os
import uuid
import warnings
from pathlib import Path

import numpy as np


def cache_folder(cache_dir=None):
    """The cache: `cache_dir`, else environment variable FEDQUARTET_CACHE, else ~/.cache/fedquartet."""
    return Path(cache_dir or os.environ.get("FEDQUARTET_CACHE") or "~/.cache/fedquartet").expanduser()


def sha256_of(parts):
    """SHA-256 (hex) of a list of strings and numbers; as JSON, so that no two lists run together."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def one_line(error):
    """The first line of an exception's message, for a UsageError."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def cached(path, make, pack, unpack, again):
    """What `make()` returns, kept at `path` as the bytes `pack(value)`; read by `unpack(bytes)` where it is there.

    Another process sees all of a file or nothing. A file that `unpack` cannot read is made `again`, with a warning. A
    cache that cannot be written is only a warning.
    """
    if path.is_file():
        try:
            return unpack(path.read_bytes())
        except Exception as error:
            warnings.warn(f"{path} is damaged ({one_line(error)}): {again} again", stacklevel=3)
    value, part = make(), path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(pack(value))
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        warnings.warn(f"cannot write the cache ({error}): the next start does this work again", stacklevel=2)
    return value


def pack_arrays(arrays):
    """{name: array} as the bytes of an npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack_arrays(data):
    """{name: array} of the bytes of an npz file; reading a member checks its CRC."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
