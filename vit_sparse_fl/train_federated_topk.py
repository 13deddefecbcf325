"""FedAvg on CIFAR-100 with sparse uploads: a client sends the largest of its changes only.

    python vit_sparse_fl/train_federated_topk.py --sparsity-ratio 0.9
    python vit_sparse_fl/train_federated_topk.py --dataset demo --model tiny --num-rounds 50      # offline, a CPU

theta <- theta + sum_k p_k C(theta_k - theta)     C: the k largest entries, the others 0 (Stich et al. 2018)

The plain alternative to a mask at equal bytes up: k is such that values and their places take as many bytes as the
values that a mask of --sparsity-ratio keeps.
"""

import torch

from common.aggregation import WeightedMean
from common.cli import checked
from common.participation import per_round
from common.processes import run_federated
from common.runlog import start_run
from vit_sparse_fl import flags
from vit_sparse_fl.experiments import federated_settings, repeated, run_each
from vit_sparse_fl.study import Study, client_update, finish, probes


def build_parser():
    return flags.make_parser(__doc__.split("\n")[0], sparse=True)


def top_k_size(sparsity, n):
    """How many of n values, with their places, take as many bytes as the values that a mask keeps."""
    return max(1, round((1 - sparsity) * n) // 2)


def top_k(theta, theta_k, size):
    """theta [n] with the `size` largest changes of the client, among equal ones the first: what the server gets."""
    change = (theta_k - theta).abs()
    edge = change.topk(size).values[-1]
    sent = ~(change <= edge)  # with a nan among them all: the client is then seen not to be finite
    ties = (change == edge).nonzero().view(-1)
    sent[ties[: size - int(sent.sum())]] = True
    return torch.where(sent, theta_k, theta)


def train(args):
    with start_run("train_federated_topk", args, args.run_name, unit="images") as run:
        study = Study(args, run, sparse=True)
        theta = run.restore(study.first, study.weights.named, **study.lasting)
        size = top_k_size(args.sparsity_ratio, study.weights.size)
        study.up = 8 * size  # a value and its place
        run.watch(*probes(study))
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(top_k(theta, theta_k, size))
            theta = mean.result()
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


def main(args):
    run_each(train, repeated(args, federated_settings(args, f"topk_s{args.sparsity_ratio:g}")))


if __name__ == "__main__":
    args = checked(flags.parse, build_parser())
    run_federated(main, args, per_round(args.participation_rate, args.num_clients), flags.process_memory(args))
