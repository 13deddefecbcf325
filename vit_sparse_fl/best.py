"""The best K checkpoints of a run by validation accuracy; others are deleted."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common import parallel
from common.checkpoint import saving


class BestCheckpoints:
    """Files `round_000120.safetensors` in a folder: all weights after the rounds with the best validation accuracy.

    Among equal accuracies the earlier round is better. Its state (which rounds, how good) is part of the run's
    checkpoint; a file of a later round than the checkpoint is written anew when its round is done again.
    """

    def __init__(self, folder, keep):
        self.folder, self.keep = Path(folder), keep
        self._kept = []  # (accuracy, round), best first

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
        self._kept = ranked[: self.keep]
        if not parallel.is_main():
            return
        if (accuracy, t) in self._kept:
            fresh = self._file(t).with_suffix(".new")
            with saving(self._file(t), fresh):
                self.folder.mkdir(exist_ok=True)
                save_file({name: w.detach().clone() for name, w in tensors.items()}, fresh)
                fresh.replace(self._file(t))
        self._delete_others()

    def load(self, device):
        """The weights of the best round."""
        parallel.barrier()  # the main process has written them
        return load_file(self._file(self.round), device=str(device))

    def state_dict(self):
        """Rounds and accuracies as tensors."""
        if not self._kept:
            return {}
        accuracies, rounds = zip(*self._kept, strict=True)
        return {"accuracies": torch.tensor(accuracies, dtype=torch.float64), "rounds": torch.tensor(rounds)}

    def load_state_dict(self, state):
        """Takes over what `state_dict` returned; files of other rounds are deleted."""
        self._kept = []
        if state:
            self._kept = list(zip(state["accuracies"].tolist(), state["rounds"].tolist(), strict=True))
        if parallel.is_main():
            self._delete_others()

    def _delete_others(self):
        known = {self._file(t) for _, t in self._kept}
        for file in self.folder.glob("round_*"):
            if file not in known:
                file.unlink()

    def _file(self, t):
        return self.folder / f"round_{t:06d}.safetensors"
