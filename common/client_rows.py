"""What outlives a round on a client: AdamW's moments, a control variate, weights of its own; a row per client.

    moments = ClientRows(run.folder / "clients" / "moments", on_disk=rows_on_disk(...))
    row = moments.get(k)                    # {field: tensor} or None
    moments.put(k, {"m": m, "v": v})        # counts from the end of the round, unless the client is left out

A client is trained by one process in this round and by another in the next, so its row must lie where any process can
read it: in memory where the same process has it every time (one process; or every client in every round), else in a
file per client in the run folder, written for sampled clients only: a million clients cost what the sampled ones need.
"""

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import parallel
from common.checkpoint import row_file, saving, seal, sync
from common.cli import RunFailed

MEMORY = 4 * 2**30  # bytes of rows that may stay in memory


def rows_on_disk(total_clients, sampled, row_bytes):
    """Whether rows belong into files: more of them than memory should hold, or clients that change processes."""
    moving = parallel.world().size > 1 and sampled < total_clients
    return moving or total_clients * row_bytes > MEMORY


class ClientRows(parallel.Follower):
    """Rows {field: tensor} of clients. A `lasting` object of a run: a checkpoint holds a file per client.

    Args: folder: working copies of rows on disk; on_disk: see `rows_on_disk`; in_place: the tensors of a row are
        trained where they lie: a client that is left out then starts anew (its old row is spoiled), else it keeps its
        old row; device: where rows are read to.
    """

    def __init__(self, folder, on_disk=False, in_place=False, device="cpu"):
        self.folder, self.on_disk, self.in_place = Path(folder), on_disk, in_place
        self._rows, self._offers = {}, {}  # client -> row, or None where the row is a file
        # client -> SHA-256 of its file in the last checkpoint (folder, name), of those whose row has not changed since
        self._saved, self._files = {}, None
        self.device = device

    def get(self, k):
        """Client k's row, or None if it never took part. Rows from files are copies."""
        if k in self._rows:
            row = self._rows[k]
            return self._read(self.path(k)) if row is None else row
        return self._read(self._files[0] / row_file(self._files[1], k)) if k in self._saved else None

    def put(self, k, row):
        """Client k's new row; it counts from the end of the round. Tensors are not copied."""
        if self.on_disk:
            fresh = self.path(k, ".offer")
            with saving(fresh, fresh):
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({name: t.detach().contiguous() for name, t in row.items()}, fresh)
            row = None
        self._offers[k] = row

    def close_round(self, clients):
        """Takes over the round's rows; those of clients that were left out do not count. Every process calls it."""
        for k in self._offers.keys() & set(clients.left_out):
            self._offers.pop(k)
            if self.on_disk:
                with saving(self.path(k)):
                    self.path(k, ".offer").unlink(missing_ok=True)
        for k in clients.left_out if self.in_place else ():
            self._rows.pop(k, None)
            self._saved.pop(k, None)
        new = self._offers
        if self.on_disk:
            for k in new:
                with saving(self.path(k)):
                    os.replace(self.path(k, ".offer"), self.path(k))
            new = dict.fromkeys(k for part in parallel.all_gather(sorted(new)) for k in part)
        for k in new:
            self._saved.pop(k, None)
        self._rows.update(new)
        self._offers = {}

    def path(self, k, suffix=""):
        """The working copy of client k's row."""
        return self.folder / f"{k:06d}.safetensors{suffix}"

    def remove(self):
        """Deletes the working copies, at the end of a run."""
        parallel.barrier()
        if parallel.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what a checkpoint holds

    def save(self, fresh, name, folder):
        """Writes this process's share of the rows into the folder `fresh`, which then becomes the checkpoint `folder`.

        What has not changed is linked, not copied. Every process calls it. Returns {client: SHA-256 of its file}.
        """
        mine = sorted(self._rows.keys() - self._saved.keys())
        changed = sorted({k for part in parallel.all_gather(mine) for k in part})
        share = parallel.my_share(changed) if self.on_disk else mine
        written = {k: self._write(k, fresh / row_file(name, k)) for k in share}
        written = {k: sha256 for part in parallel.all_gather(written) for k, sha256 in part.items()}
        if parallel.is_main():
            for k in self._saved.keys() - written.keys():
                _link(self._files[0] / row_file(name, k), fresh / row_file(name, k))
        self._saved, self._files = dict(sorted((self._saved | written).items())), (Path(folder), name)
        return dict(self._saved)

    def load(self, folder, name, saved):
        """Goes on from the checkpoint `folder`; rows are read when they are asked for. saved: {client: SHA-256}."""
        self._rows, self._offers = {}, {}
        self._saved, self._files = dict(saved), (Path(folder), name)

    def _write(self, k, target):
        """Client k's changed row as a file of a checkpoint. Returns its SHA-256."""
        if self._rows[k] is None:
            _link(self.path(k), target)
        else:
            save_file({field: t.detach().contiguous() for field, t in self._rows[k].items()}, target)
        return seal(target)

    def _read(self, path):
        try:
            return load_file(path, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"cannot read {path}: {error}; the checkpoint has its own: go on with --resume") from error


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        sync(target)
