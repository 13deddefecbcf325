"""The folders of rounds: `round_r/client_i/adapter`, `round_r/fused_r8/adapter`, which of them stay, what they weigh.

Clients and rounds count from 1 in names, from 0 in code.
"""

import re
import shutil
from pathlib import Path

import torch

from common import parallel
from common.adapter_files import CONFIG, read_adapter, write_adapter
from common.best import lower
from common.checkpoint import saving, write_json
from common.cli import UsageError
from common.participation import per_round

_ROUND = re.compile(r"round_([1-9]\d*)")


class RoundFolders:
    """Writes each round's adapters and deletes those that `--keep` does not name.

    Its state (the best round, how good and, where asked, its theta) is part of the run's checkpoint. A folder is
    deleted only after the checkpoint of a later round: a run that is broken off finds what it goes on with.

    Args: folder: the run's; keep: some of "all", "last", "best"; fused: name of the fused folder, such as fused_r8;
        about: keyword arguments of `write_adapter` for every adapter, but alpha.
    """

    def __init__(self, folder, keep, fused, about):
        self.folder, self.keep, self.fused, self.about = folder, keep, fused, about
        self.best, self.value, self.theta = None, None, {}

    def write(self, folder, factors, head, alpha, base=None):
        """Writes an adapter. base: {layer: weight} under it, where rounds have changed the base model."""
        write_adapter(folder, factors, head, alpha=alpha, base=base, **self.about)

    def client(self, t, k, *adapter):
        """Writes what client k trained: factors, head, alpha and the changed base."""
        self.write(self._path(t) / f"client_{k + 1}" / "adapter", *adapter)

    def server(self, t, adapter, manifest):
        """Writes what the server serves, by the main process. adapter: (factors, head, alpha, changed base)."""
        if not parallel.is_main():
            return
        place = self._path(t) / self.fused
        self.write(place / "adapter", *adapter)
        with saving(place):
            write_json(place / "fuse_manifest.json", manifest)

    def offer(self, t, value, theta):
        """A round's headline metric, of equal ones the first is the best, and what is kept of its theta."""
        if self.value is None or lower(-value, -self.value):
            self.best, self.value, self.theta = t, value, theta

    def prune(self, last):
        """Deletes the folders of rounds up to `last` that are not kept.

        Later rounds are not looked at: another process may be writing its clients of the next one.
        """
        kept = {last if "last" in self.keep else None, self.best if "best" in self.keep else None}
        if "all" not in self.keep:
            self._delete(lambda t: t <= last and t not in kept)

    def clean(self, last):
        """Before the first round: deletes what an interrupted session left of rounds after `last`, and prunes."""
        self._delete(lambda t: t > last)
        self.prune(last)
        parallel.barrier()

    def _delete(self, chosen):
        if parallel.is_main():
            for path in list(self.folder.iterdir()):
                match = _ROUND.fullmatch(path.name)
                if match and chosen(int(match[1]) - 1):
                    shutil.rmtree(path)

    def _path(self, t):
        return self.folder / f"round_{t + 1}"

    def state_dict(self):
        """The best round, its value and its theta as tensors."""
        if self.best is None:
            return {}
        return {"best": torch.tensor(self.best), "value": torch.tensor(self.value, dtype=torch.float64), **self.theta}

    def load_state_dict(self, state):
        """Takes over what `state_dict` returned."""
        if state:
            self.theta = dict(state)
            self.best, self.value = int(self.theta.pop("best")), self.theta.pop("value").item()


def size_on_disk(study):
    """A line on what the run will leave."""
    a, theta = study.args, study.theta
    adapter = 4 * sum(t.numel() for name, t in theta.items() if not name.startswith("base."))
    base = 4 * sum(t.numel() for name, t in theta.items() if name.startswith("base."))
    whole = 4 * study.run.manifest["parameters"]["total"] if base else adapter  # final/
    rounds = a.rounds if "all" in a.keep else min(a.rounds, len(a.keep))
    clients = per_round(a.participation, len(study.rows)) if a.save_clients else 0
    checkpoints = 2 * (1 + (a.final == "best"))
    total = (rounds * (clients + 1) + checkpoints) * (adapter + base) + whole
    changed = " with the base's changed weights, unless --no-save-clients" * bool(base and clients)
    return (
        f"on disk at the end: about {total / 2**20:,.1f} MiB ({rounds} rounds (--keep {' '.join(a.keep)}) of {clients} "
        f"+ 1 adapters of {(adapter + base) / 2**20:.2f} MiB{changed}, checkpoints, final/)"
    )


def fuse_manifest(study, row, alpha, metrics, t):
    """What the server's folder says of itself after t rounds; clients and rounds count from 1. row: of the log."""
    a, model, served = study.args, study.model, study.served
    left_out = [k for round, k in row.get("left_out", ()) if round == t]
    counted = [k for k in row["clients"] if k not in left_out]
    weights = [study.examples[k] for k in counted]
    return {
        "dataset": a.dataset,
        "model_id": model.encoder.name,
        "task": model.task.name,
        "round": t,
        "k_adapters": len(counted),
        "adapters": [f"../client_{k + 1}/adapter" for k in counted] if a.save_clients else [],
        "weights": [w / sum(weights) for w in weights],
        "left_out": [k + 1 for k in left_out],
        "aggregate": a.aggregate,
        "svd_rank": a.svd_rank if a.aggregate == "svd" else None,
        "alpha": alpha,
        "target_modules": list(model.adapted.targets),
        "aggregation_error": served.error,
        "discarded_energy": served.discarded,
        "metrics": metrics,
    }


def read_served(path):
    """`read_adapter` of a folder, of a run's (what it ended with), or of a round's client or fused folder.

    Raises: UsageError as `read_adapter`, and for a run that has no adapter (yet).
    """
    path = Path(path).expanduser()
    if not (path / CONFIG).exists():
        path = next((path / part for part in ("final", "adapter") if (path / part).is_dir()), path)
    if (path / "run.json").exists():
        raise UsageError(f"{path} has no final/: end that run with --resume, or give a round's fused folder")
    if (path / "config.json").exists() and not (path / CONFIG).exists():
        raise UsageError(
            f"{path} is a whole model (stack and residual change the base), no adapter: give it as --model; "
            "baseline_run.py --do-eval evaluates it"
        )
    return read_adapter(path)
