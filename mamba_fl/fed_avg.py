"""FedAvg: the clients' weights averaged by their number of examples.

    python mamba_fl/fed_avg.py --layers 2
    python mamba_fl/fed_avg.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + eta_s sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)
"""

from common.early import parsed
from mamba_fl.flags import SERVER_LR, complete_flags, footprint, make_parser, run_name


def build_parser():
    parser, add = make_parser(__doc__)
    add("--server-lr", **SERVER_LR)
    return parser


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(complete_flags, build_parser().parse_args())

from common.aggregation import WeightedMean
from common.local import local_steps
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl.fed_core import begin_client, end_client, load_study
from mamba_fl.measuring import evaluate, finish, with_perplexity


def main(args):
    with start_run("fed_avg", args, run_name("fed_avg", args)) as run:
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
                n_k, moments_k = study.client_weights[k], study.moments.of_client()
                if mean.add(theta_k, weight=n_k, finite=moments_k):
                    study.moments.offer(n_k)
            theta = mean.result(args.server_lr)
            study.moments.close_round(mean.delta(), sum(lrs) / len(lrs))
            run.report(t + 1, theta, lambda: evaluate(study, theta, t + 1), with_perplexity)

        finish(study, theta)


if __name__ == "__main__":
    run_federated(main, args, *footprint(args))
