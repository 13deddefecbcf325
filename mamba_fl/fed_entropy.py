"""FedEntropy: clients' weights averaged with more weight on clients whose model is surer of their held-out text.

    python mamba_fl/fed_entropy.py --layers 2
    python mamba_fl/fed_entropy.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + sum_k alpha_k (theta_k - theta),  alpha_k = exp(-H_k / T) / sum_j exp(-H_j / T)

H_k is the mean entropy (nats a token) of client k's next-token distribution on text it does not train on. This is
the source project's method; the published FedEntropy (Ling et al. 2023) is another: it selects clients whose pooled
soft labels have the largest entropy.
"""

import math

import numpy as np
import torch

from common.aggregation import WeightedMean
from common.cli import checked, non_negative_int, positive_float
from common.evaluation import amp_context
from common.local import local_steps
from common.processes import run_federated
from common.runlog import start_run
from common.seeding import stream
from mamba_fl.cross_entropy import token_statistics
from mamba_fl.data import inputs_and_labels
from mamba_fl.fed_core import begin_client, end_client, eval_batch, evaluate, finish, load_study, with_perplexity
from mamba_fl.flags import complete_flags, footprint, make_parser, run_name


def main(args):
    with start_run("fed_entropy", args, run_name("fed_entropy", args)) as run:
        study = load_study(args, run)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, lambda: evaluate(study, theta, 0))

        for t in run.rounds():
            up, down = study.weights.bytes, study.bytes_down(t)
            clients = run.sample(study.client_weights, args.participation, t, up=up, down=down)
            mean = WeightedMean(theta, clients)
            for k in clients:
                batches = begin_client(study, theta, k, t)
                done = local_steps(study.loss, batches, study.weights, study.optimizer, amp=run.amp)
                theta_k = end_client(study, theta, k, t, clients, done)
                entropy_k = entropy(study, k, t)
                clients.note(k, entropy=entropy_k)
                mean.add(theta_k, study.client_weights[k], log_weight=-entropy_k / args.temperature)
            theta = mean.result()
            run.report(t + 1, theta, lambda: evaluate(study, theta, t + 1), with_perplexity)

        finish(study, theta)


@torch.no_grad()
def entropy(study, k, t):
    """H_k: mean entropy (nats a token) of the model's next-token distribution on client k's held-out text."""
    run, samples, held_out = study.run, study.args.entropy_samples, study.data.held_out[k]
    if 0 < samples < len(held_out):
        rows = stream(study.args.seed, "entropy", t, k).choice(len(held_out), samples, replace=False)
        held_out = held_out[np.sort(rows)]
    sums, tokens = [], 0
    for blocks in held_out.to(run.device).split(eval_batch(run.device)):
        inputs, labels = inputs_and_labels(blocks)
        with amp_context(run.amp, run.device):
            hidden = study.model.hidden(inputs).flatten(0, 1)  # [B T, D]
            _, total, _ = token_statistics(
                hidden, study.model.head_weight, labels.flatten(), vocab_size=study.data.vocab_size
            )
        sums.append(total.item())
        tokens += labels.numel()
    return math.fsum(sums) / tokens


def build_parser():
    parser, method = make_parser(__doc__.split("\n")[0])
    method.add_argument(
        "--temperature",
        type=positive_float,
        default=1.0,
        metavar="T",
        help="T, in nats: small picks the surest client, large weights all alike",
    )
    method.add_argument(
        "--entropy-prior",
        choices=["none", "examples"],
        help="examples: alpha_k ~ n_k exp(-H_k / T), as --client-weights examples; none: as uniform (default: none)",
    )
    method.add_argument(
        "--entropy-samples",
        type=non_negative_int,
        default=8,
        metavar="N",
        help="held-out sequences a client and round; 0: all of them",
    )
    return parser


if __name__ == "__main__":
    args = checked(complete_flags, build_parser().parse_args())
    run_federated(main, args, *footprint(args))
