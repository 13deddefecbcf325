"""What a federated round costs beyond its optimiser steps, for a ViT.

    python benchmarks/vit_round.py
    python benchmarks/vit_round.py --local-steps 16

A round of vit_sparse_fl (dense, and under a mask of sparsity 0.9) against the same number of SGD steps on the same
images in a bare loop, alternating in one run. No evaluation in any of them.
"""

import statistics
import tempfile
import time

import numpy as np
import torch
from torch.nn import functional as F

from common.before.aggregation import WeightedMean
from common.cli import Parser, positive_int, run_main
from common.runlog import start_run
from vit_sparse_fl import train_federated_sparse
from vit_sparse_fl.data import augment
from vit_sparse_fl.fed_core import Study
from vit_sparse_fl.flags import parse
from vit_sparse_fl.masks import calibrate


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        words = "--dataset demo --model tiny --batch-size 32 --num-clients 20 --participation-rate 0.5 "
        words += f"--threads {args.threads} --local-steps {args.local_steps} --output-dir {folder} --run-name benchmark"
        flags = parse(train_federated_sparse.build_parser(), words.split())
        with start_run("benchmark", flags, "benchmark", unit="images") as run:
            study = Study(flags, run, sparse=True)
            theta = study.initial_weights()
            masks = calibrate(theta, study.maskable, None, strategy="random", sparsity=0.9)
            measure(args, study, theta, masks)


def measure(args, study, theta, masks):
    kinds = {"bare steps": None, "dense round": None, "sparse round": masks}
    seconds = {kind: [] for kind in kinds}
    for repeat in range(args.repeats + 1):
        for kind, chosen in kinds.items():
            study.masks = chosen
            started = time.perf_counter()
            if kind == "bare steps":
                bare(study, repeat)
            else:
                one_round(study, theta, repeat)
            if repeat:  # the first is for warming up
                seconds[kind].append(time.perf_counter() - started)
    floor = statistics.median(seconds["bare steps"])
    steps = len(study._chosen(0)) * args.local_steps
    weights = sum(p.numel() for p in study.parameters.values())
    print(f"{weights} weights, {steps} steps of {study.args.batch_size} images a round")
    for kind, values in seconds.items():
        median = statistics.median(values)
        print(f"{kind:13s} {1000 * median:8.1f} ms   ratio {median / floor:.3f}")


def bare(study, round):
    """The round's optimiser steps, one after the other, in one model."""
    study.model.train()
    optimizer = torch.optim.SGD(study.trained.values(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
    generator = torch.Generator().manual_seed(round)
    draw = np.random.default_rng(round)
    for _ in range(len(study._chosen(round)) * study.args.local_steps):
        rows = torch.randint(len(study.data.train), (study.args.batch_size,), generator=generator)
        pixels = augment(study.data.train[rows], study.args.image_size, draw)
        optimizer.zero_grad()
        F.cross_entropy(study.model(pixels), study.data.train_labels[rows], label_smoothing=0.1).backward()
        optimizer.step()


def one_round(study, theta, round):
    """A round as in train_federated_sparse.py."""
    clients = study.sample_clients(round)
    mean = WeightedMean(theta, clients)
    for k in clients:
        theta_k, n_k = study.local_update(theta, k, round)
        if not study.left_out(k, theta_k):
            mean.add(theta_k, weight=n_k)
    study.close_round(round, sent=study.changing())
    return mean.result()


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--local-steps", type=positive_int, default=4, metavar="J", help="steps a client and round")
    parser.add_argument("--threads", type=positive_int, default=1, metavar="N", help="CPU threads")
    parser.add_argument("--repeats", type=positive_int, default=7, metavar="N", help="timed repeats of each")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
