"""The best checkpoints of a run by validation accuracy; others are deleted."""

import torch
from safetensors.torch import load_file, save_file

from common import parallel
from common.checkpoint import saving
from common.hub import reading

KEEP = 3


class BestCheckpoints:
    """Files `round_000120.safetensors` in a folder: all weights after the rounds with the best validation accuracy.

    Among equal accuracies the earlier round is better. Its state (which rounds, how good) is part of the run's
    checkpoint; a file of a later round than the checkpoint is written anew when its round is done again.
    Attributes: kept: (accuracy, round), the best first.
    """

    def __init__(self, folder):
        self.folder, self.kept = folder, []

    @property
    def round(self):
        """How many rounds the best weights have."""
        return self.kept[0][1]

    def offer(self, t, accuracy, tensors):
        """Keeps {name: tensor}, the weights after t rounds, if their accuracy is among the best."""
        self.kept = sorted([*self.kept, (accuracy, t)], key=lambda kept: (-kept[0], kept[1]))[:KEEP]
        if (accuracy, t) in self.kept and parallel.is_main():
            file = self._file(t)
            with saving(file, file):
                self.folder.mkdir(exist_ok=True)
                save_file({name: w.detach().clone() for name, w in tensors.items()}, file)
        self._delete_others()

    def load(self, device):
        """The weights of the best round. Raises UsageError where its file cannot be read."""
        return {name: weight.to(device) for name, weight in parallel.from_main(self._read).items()}

    def _read(self):
        file = self._file(self.round)
        with reading(f"{file} is damaged or not there", "put it back and --resume, or start anew with --overwrite"):
            return load_file(file)

    def state_dict(self):
        """{"kept": fp64 [kept, 2]}: accuracies and rounds."""
        return {"kept": torch.tensor(self.kept, dtype=torch.float64)} if self.kept else {}

    def load_state_dict(self, state):
        """Takes over what `state_dict` returned; files of other rounds are deleted."""
        self.kept = [(accuracy, int(t)) for accuracy, t in state["kept"].tolist()] if state else []
        self._delete_others()

    def _delete_others(self):
        known = {self._file(t) for _, t in self.kept}
        for file in self.folder.glob("round_*"):
            if parallel.is_main() and file not in known:
                file.unlink()

    def _file(self, t):
        return self.folder / f"round_{t:06d}.safetensors"
