"""FedAvg: the clients' weights averaged by their number of examples.

    python mamba_fl/fed_avg.py --layers 2         # with --dataset demo: offline, a CPU, about a minute

theta <- theta + eta_s sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)
"""

from common import aggregation
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl import flags
from mamba_fl.fed_core import Study, client_update
from mamba_fl.measuring import finish


def build_parser():
    return flags.make_parser(__doc__, flags.fed_avg_flags)


def main(args):
    with start_run("fed_avg", args, flags.run_name("fed_avg", args)) as run:
        study = Study(args, run)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = aggregation.WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k)
            theta = study.parts.merge(theta, mean.result(args.server_lr), t)  # all of the mean, without --average-every
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), flags.complete_flags)
    run_federated(main, args, *flags.footprint(args))
