"""A federated script of a few lines, for the tests of runs: python tests/small_run.py OUTPUT_DIR [--resume]

With more words, PROCESSES [RANK:WHAT ...]: in round 2 process RANK does WHAT, a key of `WHAT`, at its client.
"""

import math
import os
import signal
import sys
import time
from argparse import Namespace

import torch
from safetensors.torch import save_file

from common.aggregation import WeightedMean
from common.cli import RunFailed, UsageError
from common.client_rows import ClientRows, rows_on_disk
from common.parallel import world
from common.processes import run_federated
from common.runlog import start_run


def arguments(folder, **more):
    base = {"output_dir": str(folder), "run_name": None, "resume": False, "overwrite": False, "track": "off", "lr": 0.1}
    base["participation"] = 0.5
    machine = {"device": "cpu", "threads": 1, "amp": "off", "seed": 3, "processes": 0}
    return Namespace(**{**base, **machine, **more})


class Four:
    """Four clients, of which --participation takes part."""

    client_weights = [1.0, 2.0, 3.0, 4.0]

    @staticmethod
    def bytes_of(t):
        return 8, lambda k: k


class Counter:
    """A lasting object with one number."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": torch.tensor(self.value)}

    def load_state_dict(self, state):
        self.value = int(state["value"])


def train(args, rounds, at=None, bad=(), stop=None, save_every=2, val_loss=float, act=None):
    """Clients add 1 to theta. at: {round: what happens before it}; bad: (round, client) of updates not finite.

    val_loss: of a round. act: called with (round, run folder) for every client.
    """
    with start_run("train", args, "r") as run:
        run.begin({"dataset": "none", "source": "here"}, {"total": 2}, clients={"examples": [1, 2, 3, 4]})
        run.plan(rounds, 1, save_every, clients=4)
        rows = ClientRows(run.folder / "clients" / "rows", rows_on_disk(4, 2, 4), in_place=True)
        counter = Counter()
        theta = run.restore(torch.zeros(2), lambda v: {"a": v[:1], "b": v[1:]}, counter=counter, rows=rows)
        run.report(0, theta, lambda *_: {"val_loss": 9.0})
        for t in run.rounds():
            if at and t in at:
                at[t]()
            clients = run.sample(Four, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                if act:
                    act(t, run.folder)
                row = rows.get(k)
                rows.put(k, {"n": row["n"] + 1 if row else torch.ones(1)})
                clients.note(k, train_loss=torch.tensor(float(k)), tag=k, turns=row["n"].item() if row else 0)
                clients.work(5)
                mean.add(theta + (math.nan if (t, k) in bad else 1.0))
            theta = mean.result()
            counter.value += 10
            run.report(t + 1, theta, lambda *_: {"val_loss": val_loss(t)})
            if stop == t:
                run.stop("plateau", "no progress")

        def write(folder):
            folder.mkdir()
            save_file({"theta": theta}, folder / "theta.safetensors")

        run.write_final(write)
        kept = {k: rows.get(k) for k in range(4)}
        run.finish({"w": theta[0].item(), "count": counter.value})
    return theta, kept


def fail(error):
    raise error


WHAT = {
    "": lambda: None,
    "sleep": lambda: time.sleep(60),
    "raise": lambda: fail(RunFailed("no room")),
    "bug": lambda: fail(ValueError("a bug")),
    "refuse": lambda: fail(UsageError("no data here")),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main(args):
    acts = {int(rank): WHAT[what] for rank, _, what in (word.partition(":") for word in sys.argv[3:])}

    def act(t, folder):
        if t == 1 and world().rank in acts:
            (folder.parent / f"pid_{os.getpid()}").touch()
            acts[world().rank]()

    train(args, 2, save_every=1, act=act)


if __name__ == "__main__":
    resume = "--resume" in sys.argv
    size = int(sys.argv[2]) if sys.argv[2:] and not resume else 0
    run_federated(main, arguments(sys.argv[1], resume=resume, processes=size), clients=2)
