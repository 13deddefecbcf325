"""The folders of rounds: `round_r/client_i/adapter`, `round_r/fused_r8/adapter`, and which of them stay.

Clients and rounds count from 1 in names, from 0 in code.
"""

import re
import shutil
from pathlib import Path

import torch

from common import parallel
from common.adapter_files import write_adapter
from common.checkpoint import saving, write_json

_ROUND = re.compile(r"round_([1-9]\d*)")


class RoundFolders:
    """Writes each round's adapters and deletes those that `--keep` does not name.

    Its state (the best round and how good) is part of the run's checkpoint. A folder is deleted only after the
    checkpoint of a later round: a run that is broken off finds what it goes on with.

    Args: folder: the run's; keep: some of "all", "last", "best"; fused: name of the fused folder, such as fused_r8;
        about: keyword arguments of `write_adapter` for every adapter, but alpha.
    """

    def __init__(self, folder, keep, fused, about):
        self.folder, self.keep, self.fused, self.about = Path(folder), set(keep), fused, about
        self.best, self.value = None, None

    def client(self, round, k, factors, head, alpha):
        """Writes what client k trained."""
        self._write(self.path(round) / f"client_{k + 1}" / "adapter", factors, head, alpha)

    def server(self, round, factors, head, alpha, base, manifest):
        """Writes what the server serves, by the main process. base: {file key: tensor}, changed base weights."""
        if not parallel.is_main():
            return
        place = self.path(round) / self.fused
        self._write(place / "adapter", factors, head, alpha)
        with saving(place):
            if base:
                from safetensors.torch import save_file

                save_file({key: t.detach().cpu().contiguous() for key, t in base.items()}, place / "base.safetensors")
            write_json(place / "fuse_manifest.json", manifest)

    def offer(self, round, value):
        """A round's headline metric: of equal ones the first is the best."""
        if self.value is None or value > self.value:
            self.best, self.value = round, value

    def prune(self, last):
        """Deletes the folders of rounds up to `last` that are not kept.

        Later rounds are not looked at: another process may be writing its clients of the next one.
        """
        kept = {last if "last" in self.keep else None, self.best if "best" in self.keep else None}
        if "all" not in self.keep:
            self._delete(lambda round: round <= last and round not in kept)

    def clean(self, last):
        """Before the first round: deletes what an interrupted session left of rounds after `last`, and prunes."""
        self._delete(lambda round: round > last)
        self.prune(last)
        parallel.barrier()

    def _delete(self, chosen):
        if not parallel.is_main() or not self.folder.is_dir():
            return
        for path in list(self.folder.iterdir()):
            match = _ROUND.fullmatch(path.name)
            if match and chosen(int(match[1]) - 1):
                shutil.rmtree(path)

    def path(self, round):
        """The folder of a round."""
        return self.folder / f"round_{round + 1}"

    def rounds_kept(self, rounds):
        """How many rounds' folders there are at the end, at most."""
        return rounds if "all" in self.keep else min(rounds, len(self.keep))

    def state_dict(self):
        """The best round and its value as tensors."""
        if self.best is None:
            return {}
        return {"best": torch.tensor(self.best), "value": torch.tensor(self.value, dtype=torch.float64)}

    def load_state_dict(self, state):
        """Takes over what `state_dict` returned."""
        if state:
            self.best, self.value = int(state["best"]), state["value"].item()

    def _write(self, folder, factors, head, alpha):
        with saving(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_adapter(folder, factors, head, alpha=alpha, **self.about)
