"""What a federated round costs over the bare optimiser steps in it (the floor).

    python benchmarks/fed_round.py
    python benchmarks/fed_round.py --d-model 512 --local-updates 8

The floor is a loop of the same number of AdamW steps on batches of the same size, without clients: no weights
loaded, no per-client moments, no sum. Both are timed in turn in one process; the ratio is of the medians. Peak
memory is measured for K clients and for 4 K: what grows with their number is only what a client keeps.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time

from common.before.aggregation import WeightedMean
from mamba_fl import fed_avg
from mamba_fl.fed_core import Study
from mamba_fl.flags import complete_flags


class NoRun:
    """Stands in for the run: nothing is written."""

    def begin(self, *_):
        pass

    def count(self, **_):
        pass


def make_study(options, clients, state="keep", more=""):
    words = f"--dataset demo --num-clients {clients} --d-model {options.d_model} --layers {options.layers} --threads 1 "
    words += f"--local-updates {options.local_updates} --client-state {state} --val-freq 1000000 --rounds 100000 "
    args = fed_avg.build_parser().parse_args([*(words + more).split(), "--amp", options.amp])
    return Study(complete_flags(args), NoRun())


def bare(study, steps):
    """The same optimiser steps, one after the other."""
    optimizer = study.clients.optimizer(0)
    for rows in study.clients.batches(0, 0, steps, 0):
        optimizer.zero_grad(set_to_none=True)
        study.loss(study.train[0][rows]).backward()
        optimizer.step()
    study.clients.keep(0, {})


def federated(study, theta, round):
    clients = study.sample_clients(round)
    mean = WeightedMean(theta, clients)
    for k in clients:
        theta_k, n_k = study.local_update(theta, k, round)
        if not study.left_out(k, theta_k):
            mean.add(theta_k, weight=n_k)
    study.close_round(round)
    return mean.result()


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def peak(options, clients, state):
    """Peak memory in MiB of three rounds with so many clients, in a fresh process."""
    words = ["--peak", str(clients), state, "--d-model", str(options.d_model), "--layers", str(options.layers)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--local-updates", type=int, default=1)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--amp", default="off")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        # the demo's text in so many parts: some are short
        short = "--sequence-length 32 --batch-size 1"
        study = make_study(options, int(options.peak[0]), options.peak[1], short)
        theta = study.initial_weights()
        for round in range(3):
            theta = federated(study, theta, round)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    study = make_study(options, options.clients)
    theta = study.initial_weights()
    floor, whole = [], []
    for round in range(options.rounds + 2):
        floor.append(timed(bare, study, options.clients * options.local_updates)[0])
        seconds, theta = timed(federated, study, theta, round)
        whole.append(seconds)
    floor, whole = statistics.median(floor[2:]), statistics.median(whole[2:])
    size = sum(p.numel() for p in study.parameters.values())
    print(f"{size:,} parameters, {options.clients} clients, {options.local_updates} local steps, --amp {options.amp}")
    print(f"bare steps {floor * 1e3:.1f} ms, round {whole * 1e3:.1f} ms, ratio {whole / floor:.3f}")
    for state in ("keep", "reset"):
        few, many = peak(options, options.clients, state), peak(options, 4 * options.clients, state)
        print(
            f"peak memory, --client-state {state}: {few:.0f} MiB with {options.clients} clients, "
            f"{many:.0f} MiB with {4 * options.clients}"
        )


if __name__ == "__main__":
    main()
