"""FedAvg: the clients' weights averaged by their number of examples.

    python mamba_fl/fed_avg.py --layers 2
    python mamba_fl/fed_avg.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + eta_s sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)
"""

from common.aggregation import WeightedMean
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl.fed_core import client_update, load_study
from mamba_fl.flags import SERVER_LR, complete_flags, footprint, make_parser, run_name
from mamba_fl.measuring import finish


def build_parser():
    parser, add = make_parser(__doc__)
    add("--server-lr", **SERVER_LR)
    return parser


def main(args):
    with start_run("fed_avg", args, run_name("fed_avg", args)) as run:
        study = load_study(args, run)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k)
            theta = mean.result(args.server_lr)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), complete_flags)
    run_federated(main, args, *footprint(args))
