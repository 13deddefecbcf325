"""The cache: files that can be made again, named by the SHA-256 of everything that shapes them."""

import hashlib
import io
import json
import os
import uuid
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

# What reading a damaged file raises: archives and gzip check CRCs, `unpack` checks the rest
_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, NotImplementedError, zlib.error, zipfile.BadZipFile)


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

    unpack raises for bytes that are damaged (ValueError, KeyError, ...): a warning says so and what is done `again`.
    Another process sees all of a file or nothing. A cache that cannot be written is only a warning.
    """
    try:
        return unpack(path.read_bytes())
    except FileNotFoundError:
        pass
    except _DAMAGED as error:
        warnings.warn(f"{path} is damaged ({one_line(error)}): {again} again", stacklevel=3)
    value = make()
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(pack(value))
            os.replace(part, path)
        finally:  # Ctrl-C included
            part.unlink(missing_ok=True)
    except OSError as error:
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
