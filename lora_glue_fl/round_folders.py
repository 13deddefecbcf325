"""The folders of rounds: `round_r/client_i/adapter`, `round_r/fused_r8/adapter`, and which of them stay.

Clients and rounds count from 1 in names, from 0 in code.
"""

import shutil

from common import parallel, rounds
from common.lora import write_adapter


class RoundFolders(rounds.ToMain):
    """Writes each round's adapters, and deletes those of earlier rounds unless all are kept.

    A folder is deleted only after the checkpoint of a later round: a run that is broken off finds what it goes on with.

    Args: folder: the run's; keep: "all" or "last"; fused: name of the fused folder, such as fused_r8; about: keyword
        arguments of `write_adapter` for every adapter, but alpha.
    """

    def __init__(self, folder, keep, fused, about):
        super().__init__(self._client)
        self.folder, self.keep, self.fused, self.about = folder, keep, fused, about

    def write(self, folder, factors, head, alpha, base=None):
        """Writes an adapter. base: {layer: weight} under it, where rounds have changed the base model."""
        write_adapter(folder, factors, head, alpha=alpha, base=base, **self.about)

    def open_round(self, clients, theta):
        self._round = clients.number

    def client(self, *adapter):
        """Leaves what the client that the round is at trained: factors, head, alpha and the changed base or None."""
        self.leave(adapter)

    def _client(self, k, adapter):
        self.write(self.folder / f"round_{self._round + 1}" / f"client_{k + 1}" / "adapter", *adapter)

    def server(self, t, *adapter):
        """Writes what the server serves after round t, by the main process; arguments as of `client`."""
        if parallel.is_main():
            self.write(self.folder / f"round_{t + 1}" / self.fused / "adapter", *adapter)

    def prune(self, last):
        """Deletes the folders of rounds before `last`, where not all are kept."""
        if self.keep != "all":
            self._delete(lambda t: t < last)

    def clean(self, last):
        """Before the first round: deletes what an interrupted session left of rounds after `last`, and prunes."""
        self._delete(lambda t: t > last)
        self.prune(last)
        parallel.barrier()

    def _delete(self, chosen):
        for path in self.folder.glob("round_*") if parallel.is_main() else ():
            if chosen(int(path.name.removeprefix("round_")) - 1):
                shutil.rmtree(path)
