"""FedEntropy: clients' weights averaged with more weight on clients whose model is surer of their held-out text.

    python mamba_fl/fed_entropy.py --layers 2
    python mamba_fl/fed_entropy.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + eta_s sum_k alpha_k (theta_k - theta),  alpha_k = exp(-H_k / T) / sum_j exp(-H_j / T)

H_k is the mean entropy (nats a token) of client k's next-token distribution on text it does not train on. This is
the source project's method; the published FedEntropy (Ling et al. 2023) is another: it selects clients whose pooled
soft labels have the largest entropy.
"""

import math

import torch

from common import cli
from common.aggregation import WeightedMean
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl.cross_entropy import entropies
from mamba_fl.data import inputs_and_labels
from mamba_fl.fed_core import client_update, load_study, sampled_blocks
from mamba_fl.flags import SERVER_LR, complete_flags, footprint, make_parser, run_name
from mamba_fl.measuring import finish


def build_parser():
    parser, add = make_parser(__doc__)
    add("--temperature", type=cli.positive_float, default=1.0, metavar="T", help="T, in nats; small: the surest client")
    add("--server-lr", **SERVER_LR)
    return parser


SEQUENCES = 8  # of a client's held-out text, for its entropy


def main(args):
    with start_run("fed_entropy", args, run_name("fed_entropy", args)) as run:
        study = load_study(args, run, uniform=True)  # alpha_k knows no n_k
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k, log_weight=-entropy(study, k, t) / args.temperature)
            theta = mean.result(args.server_lr)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


@torch.no_grad()
def entropy(study, k, t):
    """H_k: mean entropy (nats a token) of the model's next-token distribution on client k's held-out text."""
    held_out = sampled_blocks(study, "entropy", study.data.held_out[k], SEQUENCES, k, t)
    sums = []
    for blocks in held_out.split(study.eval_batch):
        inputs, _ = inputs_and_labels(blocks)
        with study.autocast():
            hidden = study.model.hidden(inputs).flatten(0, 1)  # [B T, D]
            sums.append(entropies(hidden, study.model.head_weight, study.data.vocab_size).sum().item())
    value = math.fsum(sums) / (len(held_out) * study.args.sequence_length)
    study.run.clients.note(k, entropy=value)
    return value


if __name__ == "__main__":
    args = parse(build_parser(), complete_flags)
    run_federated(main, args, *footprint(args))
