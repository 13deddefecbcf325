"""FedEntropy: clients' weights averaged with more weight on clients whose model is surer of their held-out text.

    python mamba_fl/fed_entropy.py --layers 2
    python mamba_fl/fed_entropy.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + eta_s sum_k alpha_k (theta_k - theta),  alpha_k = exp(-H_k / T) / sum_j exp(-H_j / T)

H_k is the mean entropy (nats a token) of client k's next-token distribution on text it does not train on. This is
the source project's method; the published FedEntropy (Ling et al. 2023) is another: it selects clients whose pooled
soft labels have the largest entropy.
"""

from common import cli
from common.early import parsed
from mamba_fl.flags import SERVER_LR, complete_flags, footprint, make_parser, run_name


def build_parser():
    parser, add = make_parser(__doc__)
    add("--temperature", type=cli.positive_float, default=1.0, metavar="T", help="T, in nats; small: the surest client")
    prior = "examples: alpha_k ~ n_k exp(-H_k / T), as --client-weights examples; none: as uniform (default: none)"
    add("--entropy-prior", choices=["none", "examples"], help=prior)
    add("--entropy-samples", type=cli.non_negative_int, default=8, metavar="N", help="held-out sequences used; 0: all")
    add("--server-lr", **SERVER_LR)
    return parser


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(complete_flags, build_parser().parse_args())

import math

import torch

from common.aggregation import WeightedMean
from common.local import local_steps
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl.cross_entropy import entropies
from mamba_fl.data import inputs_and_labels
from mamba_fl.fed_core import begin_client, end_client, load_study, sampled_blocks
from mamba_fl.measuring import evaluate, finish, with_perplexity


def main(args):
    with start_run("fed_entropy", args, run_name("fed_entropy", args)) as run:
        study = load_study(args, run)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, lambda: evaluate(study, theta, 0))

        for t in run.rounds():
            up, down = study.bytes_of(t)
            clients = run.sample(study.client_weights, args.participation, t, up=up, down=down)
            mean = WeightedMean(theta, clients)
            study.moments.open_round(clients)
            lrs, max_norm = study.learning_rates(t), args.max_grad_norm
            for k in clients:
                batches = begin_client(study, theta, k, t)
                done = local_steps(
                    study.loss, batches, study.weights, study.optimizer, amp=run.amp, lrs=lrs, max_norm=max_norm
                )
                theta_k = end_client(study, theta, k, t, clients, done)
                entropy_k = entropy(study, k, t)
                clients.note(k, entropy=entropy_k)
                n_k, moments_k = study.client_weights[k], study.moments.of_client()
                if mean.add(theta_k, n_k, log_weight=-entropy_k / args.temperature, finite=moments_k):
                    study.moments.offer(n_k)
            theta = mean.result(args.server_lr)
            study.moments.close_round(mean.delta(), sum(lrs) / len(lrs))
            run.report(t + 1, theta, lambda: evaluate(study, theta, t + 1), with_perplexity)

        finish(study, theta)


@torch.no_grad()
def entropy(study, k, t):
    """H_k: mean entropy (nats a token) of the model's next-token distribution on client k's held-out text."""
    held_out = sampled_blocks(study, "entropy", study.data.held_out[k], study.args.entropy_samples, k, t)
    sums = []
    for blocks in held_out.split(study.eval_batch):
        inputs, _ = inputs_and_labels(blocks)
        with study.autocast():
            hidden = study.model.hidden(inputs).flatten(0, 1)  # [B T, D]
            sums.append(entropies(hidden, study.model.head_weight, study.data.vocab_size).sum().item())
    return math.fsum(sums) / (len(held_out) * study.args.sequence_length)


if __name__ == "__main__":
    run_federated(main, args, *footprint(args))
