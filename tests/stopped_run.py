"""A federated script for the tests of what ends it: python tests/stopped_run.py OUTPUT_DIR PROCESSES [RANK:WHAT ...]

In round 2 process RANK does WHAT at its first client: sleep, raise (RunFailed), bug (ValueError), refuse (UsageError),
kill (SIGKILL).
"""

import os
import signal
import sys
import time

import torch
from small_run import Four, arguments

from common.aggregation import WeightedMean
from common.cli import RunFailed, UsageError
from common.parallel import world
from common.processes import run_federated
from common.runlog import start_run

WHAT = {int(rank): name for rank, _, name in (word.partition(":") for word in sys.argv[3:])}


def act(folder, what):
    (folder.parent / f"pid_{os.getpid()}").touch()
    if what == "sleep":
        time.sleep(60)
    elif what == "raise":
        raise RunFailed("no room")
    elif what == "bug":
        raise ValueError("a bug")
    elif what == "refuse":
        raise UsageError("no such file")
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)


def main(args):
    with start_run("train", args, "r") as run:
        run.begin({"dataset": "none"}, {"total": 2})
        run.plan(3)
        theta = run.restore(torch.zeros(2), lambda v: {"a": v})
        run.report(0, theta, lambda *_: {"val_loss": 9.0})
        for t in run.rounds():
            clients = run.sample(Four, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                if t == 1 and k < 2:
                    act(run.folder, WHAT.get(world().rank, ""))
                mean.add(theta + 1.0)
            theta = mean.result()
            run.report(t + 1, theta, lambda *_: {"val_loss": float(t)})
        run.finish({})


if __name__ == "__main__":
    args = arguments(sys.argv[1], processes=int(sys.argv[2]), participation=1.0, resume=not WHAT)
    run_federated(main, args, clients=4)
