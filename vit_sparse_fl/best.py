"""The best checkpoints of a run by validation accuracy; others are deleted."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import parallel
from common.checkpoint import file_sha256, saving, seal
from common.cli import RunFailed

KEEP = 3


class BestCheckpoints:
    """Files `round_000120.safetensors` in a folder: all weights after the rounds with the best validation accuracy.

    Among equal accuracies the earlier round is better. Its state (which rounds, how good) is part of the run's
    checkpoint; a file of a later round than the checkpoint is written anew when its round is done again.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self._kept = []  # (accuracy, round), best first
        self._sums = {}  # {round: SHA-256 of its file}, of the main process

    @property
    def round(self):
        """How many rounds the best weights have, None before the first."""
        return self._kept[0][1] if self._kept else None

    @property
    def accuracy(self):
        """The best validation accuracy, None before the first."""
        return self._kept[0][0] if self._kept else None

    def offer(self, t, accuracy, tensors):
        """Keeps {name: tensor}, the weights after t rounds, if their accuracy is among the best; deletes what falls
        out."""
        ranked = sorted([*self._kept, (accuracy, t)], key=lambda kept: (-kept[0], kept[1]))
        self._kept = ranked[:KEEP]
        if not parallel.is_main():
            return
        if (accuracy, t) in self._kept:
            fresh = self._file(t).with_suffix(".new")
            with saving(self._file(t), fresh):
                self.folder.mkdir(exist_ok=True)
                save_file({name: w.detach().clone() for name, w in tensors.items()}, fresh)
                self._sums[t] = seal(fresh)
                fresh.replace(self._file(t))
        self._delete_others()

    def load(self, device):
        """The weights of the best round. Raises RunFailed where its file is not as it was saved."""
        parallel.barrier()  # the main process has written them
        file = self._file(self.round)
        try:
            if self._sums.get(self.round) in (None, file_sha256(file)):
                return load_file(file, device=str(device))
        except (OSError, SafetensorError):
            pass
        raise RunFailed(f"{file} is damaged or not there: put it back and --resume, or start anew with --overwrite")

    def state_dict(self):
        """Rounds and accuracies as tensors."""
        if not self._kept:
            return {}
        accuracies, rounds = zip(*self._kept, strict=True)
        sums = [list(bytes.fromhex(self._sums.get(t, ""))) for t in rounds]
        known = {"sha256": torch.tensor(sums, dtype=torch.uint8)} if all(sums) else {}
        return {"accuracies": torch.tensor(accuracies, dtype=torch.float64), "rounds": torch.tensor(rounds)} | known

    def load_state_dict(self, state):
        """Takes over what `state_dict` returned; files of other rounds are deleted."""
        self._kept = []
        if state:
            self._kept = list(zip(state["accuracies"].tolist(), state["rounds"].tolist(), strict=True))
            sums = state.get("sha256", torch.empty(0)).tolist()  # not known of before there were some
            self._sums = {t: bytes(sha256).hex() for (_, t), sha256 in zip(self._kept, sums, strict=False)}
        if parallel.is_main():
            self._delete_others()

    def _delete_others(self):
        known = {self._file(t) for _, t in self._kept}
        for file in self.folder.glob("round_*"):
            if file not in known:
                file.unlink()

    def _file(self, t):
        return self.folder / f"round_{t:06d}.safetensors"
