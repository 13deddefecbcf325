"""What outlives a round on a client: AdamW's moments, a control variate, weights of its own; a row per client.

    moments = ClientRows(run.folder / "clients" / "moments", on_disk=rows_on_disk(...))
    row = moments.get(k)                    # {field: tensor} or None, of the client that the round is at
    moments.put(k, {"m": m, "v": v})        # counts, unless the client is left out

Where the same process trains a client every time (one process; or every client in every round), its row stays in that
process's memory. Else a client is trained by one process in this round and by another in the next: all rows are files
of the main process, which sends a row before the client's turn and takes the new one after it; a million clients cost
what the sampled ones need.
"""

import contextlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import parallel, rounds
from common.checkpoint import row_file, saving, seal, sync
from common.cli import RunFailed

MEMORY = 4 * 2**30  # bytes of rows that may stay in memory


def rows_on_disk(total_clients, sampled, row_bytes):
    """Whether rows belong into files: more of them than memory should hold, or clients that change processes."""
    moving = parallel.world().size > 1 and sampled < total_clients
    return moving or total_clients * row_bytes > MEMORY


class ClientRows(rounds.Follower):
    """Rows {field: tensor} of clients. A `lasting` object of a run: a checkpoint holds a file per client.

    Args: folder: the main process's working copies of rows on disk; on_disk: see `rows_on_disk`; in_place: the tensors
        of a row are trained where they lie: a client that is left out then starts anew (its old row is spoiled), else
        it keeps its old row; device: where rows are read to.
    """

    def __init__(self, folder, on_disk=False, in_place=False, device="cpu"):
        self.folder, self.on_disk, self.in_place, self.device = Path(folder), on_disk, in_place, device
        self._rows = {}  # client -> its row, of clients that this process trains
        self._offer = None
        self._changed = {}  # client -> whether it has a row; since the last checkpoint, here
        self._copies = set()  # main process: clients with a working copy
        self._saved, self._files = {}, None  # client -> SHA-256 of its file in the last checkpoint, (folder, name)
        self._to_fetch = set()  # clients whose rows the main process read from a checkpoint, and nobody has yet

    def get(self, k):
        """Client k's row, or None if it never took part. Rows from files are copies."""
        if k in self._rows:
            return self._rows[k]
        return self._read(k) if parallel.is_main() else None

    def put(self, k, row):
        """New row of client k, which the round is at. Tensors are not copied."""
        self._offer = row

    def open_wave(self, clients, wave):
        for rank, k in enumerate(wave):
            if self.on_disk or k in self._to_fetch:
                self._to_fetch.discard(k)
                row = self._read(k) if parallel.is_main() else None
                if rank and parallel.is_main():
                    parallel.send(row, rank)
                elif rank == parallel.world().rank:
                    row = parallel.receive(0, self.device) if rank else row
                    self._rows |= {} if row is None else {k: row}

    def close_wave(self, clients, wave):
        rank, offer, self._offer = parallel.world().rank, self._offer, None
        if rank < len(wave) and wave[rank] in clients.left_out:
            offer = {} if self.in_place else None  # {}: spoiled
        if self.on_disk:
            for k, row in clients.to_main(wave, offer):
                self._write(k, row)
            self._rows = {}
        elif rank < len(wave) and offer is not None:
            self._rows.pop(wave[rank], None)
            self._rows |= {wave[rank]: offer} if offer else {}
            self._changed[wave[rank]] = bool(offer)

    def remove(self):
        """Deletes the working copies, at the end of a run."""
        parallel.barrier()
        if parallel.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # rows of another kind
                self.folder.parent.rmdir()

    # ---- files, the main process's

    def _write(self, k, row):
        """Takes over a row as a working copy. Args: row: None where the old one stays, {} where there is none now."""
        if row is None:
            return
        path = self._path(k)
        with saving(path):
            if row:
                self.folder.mkdir(parents=True, exist_ok=True)
                _save(row, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)  # not in place: a checkpoint may hold the old file
                self._copies.add(k)
            else:
                self._copies.discard(k)
        self._changed[k] = bool(row)

    def _path(self, k):
        return self.folder / f"{k:06d}.safetensors"

    def _read(self, k):
        if k in self._copies:
            path = self._path(k)
        elif k in self._saved and k not in self._changed:
            path = self._files[0] / row_file(self._files[1], k)
        else:
            return None
        try:
            return load_file(path, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"cannot read {path}: {error}; the checkpoint has its own: go on with --resume") from error

    def save(self, fresh, name, folder):
        """Writes all rows into the folder `fresh`, which then becomes the checkpoint `folder`.

        What has not changed is linked, not copied. Every process calls it. Returns {client: SHA-256 of its file}, on
        the main process.
        """
        main, me = parallel.is_main(), parallel.world().rank
        for rank, part in enumerate(parallel.all_gather(dict(sorted(self._changed.items())))):
            for k, there in part.items():
                self._saved.pop(k, None)
                if not there:
                    continue
                row = None if self.on_disk else self._rows[k] if rank == me else main and parallel.receive(rank)
                if rank == me and not main:
                    parallel.send(row, 0)
                elif main:
                    target = fresh / row_file(name, k)
                    _link(self._path(k), target) if self.on_disk else _save(row, target)
                    self._saved[k] = None
        if main:
            for k, sha256 in self._saved.items():
                target = fresh / row_file(name, k)
                if sha256 is None:
                    self._saved[k] = seal(target)
                else:
                    _link(self._files[0] / target.name, target)
        self._changed, self._files = {}, (Path(folder), name)
        return dict(sorted(self._saved.items()))

    def load(self, folder, name, saved):
        """Goes on from the checkpoint `folder`; rows are read when they are needed. saved: {client: SHA-256}."""
        self._rows, self._changed, self._copies = {}, {}, set()
        self._saved, self._files, self._to_fetch = dict(saved), (Path(folder), name), set(saved)


def _save(row, path):
    save_file({field: t.detach().contiguous() for field, t in row.items()}, path)


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        sync(target)
