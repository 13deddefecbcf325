"""FedFisher: clients' weights averaged with the precision that each client has of them.

    python mamba_fl/fed_fisher.py --layers 2
    python mamba_fl/fed_fisher.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta_j <- theta_j + eta_s sum_k n_k F_kj (theta_kj - theta_j) / sum_k n_k F_kj     (Matena & Raffel 2022, eq. 4)

F_k is the diagonal of client k's Fisher information at theta_k, per sequence (its summed log-likelihood), plus
rho times its mean.
"""

import torch

from common import cli
from common.aggregation import PrecisionWeightedMean
from common.cli import parse
from common.fisher import diagonal_fisher
from common.processes import run_federated
from common.runlog import start_run
from common.seeding import torch_stream
from mamba_fl.cross_entropy import sample_labels
from mamba_fl.data import inputs_and_labels
from mamba_fl.fed_core import client_update, load_study, sampled_blocks
from mamba_fl.flags import SERVER_LR, complete_flags, footprint, make_parser, run_name
from mamba_fl.measuring import finish


def build_parser():
    parser, add = make_parser(__doc__)
    add("--fisher-samples", type=cli.positive_int, default=8, metavar="N", help="training sequences for a client's F_k")
    add("--fisher-damping", type=cli.non_negative_float, default=0.1, metavar="RHO", help="adds rho mean(F_k); off: 0")
    add("--fisher-labels", choices=["model", "data"], default="model", help="model: the Fisher; data: the empirical")
    add("--server-lr", **SERVER_LR)
    return parser


def main(args):
    with start_run("fed_fisher", args, run_name("fed_fisher", args)) as run:
        study = load_study(args, run, sent_vectors=2)  # theta_k and its precision
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = PrecisionWeightedMean(theta, clients, args.fisher_damping)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k, precision=fisher(study, k, t))
            theta = mean.result(args.server_lr)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


def fisher(study, k, t):
    """F_k [n] at the weights in the model, over some training sequences of client k."""
    blocks = sampled_blocks(study, "fisher", study.train[k], study.args.fisher_samples, k, t)  # [n, T + 1]
    inputs, labels = inputs_and_labels(blocks)
    if study.args.fisher_labels == "model":  # else the text's: the empirical Fisher
        generator = torch_stream(study.args.seed, "fisher labels", t, k)
        with torch.no_grad(), study.autocast():
            hidden = study.model.hidden(inputs).flatten(0, 1)  # [n T, D]
            labels = sample_labels(hidden, study.model.head_weight, study.data.vocab_size, generator).view_as(inputs)

    def nll(model, sample):  # summed over one sequence
        with study.autocast():
            return model.nll(*(part[None] for part in sample))

    return diagonal_fisher(study.model, study.weights, nll, (inputs, labels), method="loop")


if __name__ == "__main__":
    args = parse(build_parser(), complete_flags)
    run_federated(main, args, *footprint(args))
