"""FedFisher: clients' weights averaged with the precision that each client has of them.

    python mamba_fl/fed_fisher.py --layers 2
    python mamba_fl/fed_fisher.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta_j <- theta_j + sum_k n_k F_kj (theta_kj - theta_j) / sum_k n_k F_kj     (Matena & Raffel 2022, eq. 4)

F_k is the diagonal of client k's Fisher information at theta_k, per sequence (its summed log-likelihood), plus
rho times its mean.
"""

import numpy as np
import torch

from common.aggregation import PrecisionWeightedMean
from common.cli import checked, non_negative_float, positive_int
from common.evaluation import amp_context
from common.fisher import diagonal_fisher
from common.local import local_steps
from common.processes import run_federated
from common.runlog import start_run
from common.seeding import stream, torch_stream
from mamba_fl.cross_entropy import sample_labels
from mamba_fl.data import inputs_and_labels
from mamba_fl.fed_core import begin_client, end_client, evaluate, finish, load_study, with_perplexity
from mamba_fl.flags import complete_flags, footprint, make_parser, run_name


def main(args):
    with start_run("fed_fisher", args, run_name("fed_fisher", args)) as run:
        study = load_study(args, run)

        def nll(model, sample):  # summed over one sequence
            inputs, labels = sample
            with amp_context(run.amp, run.device):
                return model.nll(inputs[None], labels[None])

        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, lambda: evaluate(study, theta, 0))

        for t in run.rounds():
            up, down = 2 * study.weights.bytes, study.bytes_down(t)  # up: the weights and their precision
            clients = run.sample(study.client_weights, args.participation, t, up=up, down=down)
            mean = PrecisionWeightedMean(theta, clients, args.fisher_damping, args.fisher_normalize)
            for k in clients:
                batches = begin_client(study, theta, k, t)
                done = local_steps(study.loss, batches, study.weights, study.optimizer, amp=run.amp)
                theta_k = end_client(study, theta, k, t, clients, done)
                fisher_k = diagonal_fisher(study.model, study.weights, nll, calibration(study, k, t), method="loop")
                mean.add(theta_k, weight=study.client_weights[k], precision=fisher_k)
            theta = mean.result()
            run.report(t + 1, theta, lambda: evaluate(study, theta, t + 1), with_perplexity)

        finish(study, theta)


def calibration(study, k, t):
    """Training sequences of client k for its Fisher: (inputs [n, T], labels [n, T]); its weights are in the model.

    --fisher-labels model: labels are drawn from the model's own distribution (the Fisher information); data: they are
    the text's (the empirical Fisher).
    """
    args, run = study.args, study.run
    draw, n = stream(args.seed, "fisher", t, k), len(study.train[k])
    rows = np.sort(draw.choice(n, min(args.fisher_samples, n), replace=False))
    inputs, targets = inputs_and_labels(study.train[k][torch.from_numpy(rows).to(run.device)])
    if args.fisher_labels == "data":
        return inputs, targets
    generator = torch_stream(args.seed, "fisher labels", t, k)
    with torch.no_grad(), amp_context(run.amp, run.device):
        hidden = study.model.hidden(inputs).flatten(0, 1)  # [n T, D]
        labels = sample_labels(hidden, study.model.head_weight, vocab_size=study.data.vocab_size, generator=generator)
    return inputs, labels.view_as(targets)


def build_parser():
    parser, method = make_parser(__doc__.split("\n")[0])
    method.add_argument(
        "--fisher-samples",
        type=positive_int,
        default=8,
        metavar="N",
        help="training sequences a client and round for its Fisher",
    )
    method.add_argument(
        "--fisher-damping",
        type=non_negative_float,
        default=0.1,
        metavar="RHO",
        help="rho: adds rho x mean(F_k) to F_k; off: 0",
    )
    method.add_argument("--fisher-normalize", action="store_true", help="divide each F_k by its L2 norm")
    method.add_argument(
        "--fisher-labels",
        choices=["model", "data"],
        default="model",
        help="model: drawn from it (the Fisher); data: the text's (the empirical Fisher)",
    )
    return parser


if __name__ == "__main__":
    args = checked(complete_flags, build_parser().parse_args())
    run_federated(main, args, *footprint(args))
