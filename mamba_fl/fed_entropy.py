"""FedEntropy: clients' weights averaged with more weight on clients whose model is surer of their held-out text.

    python mamba_fl/fed_entropy.py --layers 2
    python mamba_fl/fed_entropy.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + sum_k alpha_k (theta_k - theta),  alpha_k = exp(-H_k / T) / sum_j exp(-H_j / T)

H_k is the mean entropy (nats a token) of client k's next-token distribution on text it does not train on. This is
the source project's method; the published FedEntropy (Ling et al. 2023) is another: it selects clients whose pooled
soft labels have the largest entropy.
"""

import torch

from common import parallel
from common.before.aggregation import WeightedMean, entropy_log_weight
from common.cli import non_negative_int, positive_float, run_main
from common.evaluation import pick_device
from common.runlog import start_run
from mamba_fl.fed_core import Study
from mamba_fl.flags import complete_flags, make_parser, run_name


def main(args):
    complete_flags(args)
    parallel.init_parallel(pick_device(args.device))
    with start_run("fed_entropy", args, run_name("fed_entropy", args)) as run:
        study = Study(args, run)
        lasting = study.lasting
        theta = run.restore(study.initial_weights(), lasting)

        for round in run.rounds(study.rounds):
            clients = study.sample_clients(round)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k, _ = study.local_update(theta, k, round)
                entropy_k = study.entropy(k, round, args.entropy_samples)
                if study.left_out(k, theta_k, {"entropy": torch.tensor(entropy_k)}):
                    continue
                prior_k = study.examples[k] if args.entropy_prior == "examples" else 1
                mean.add(theta_k, weight=prior_k, log_weight=entropy_log_weight(entropy_k, args.temperature))
                study.observe(k, entropy=entropy_k)
            study.close_round(round)
            before, theta = theta, mean.result()
            if study.evaluated(round):
                study.report(before, theta, round)
                run.save(round, theta, lasting)

        study.finish(theta)


def build_parser():
    parser, method = make_parser(__doc__.split("\n")[0], seed=42)
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
        default="none",
        help="examples: alpha_k ~ n_k exp(-H_k / T)",
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
    run_main(main, build_parser().parse_args())
