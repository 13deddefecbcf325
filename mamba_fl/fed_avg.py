"""FedAvg: the clients' weights averaged by their number of examples.

    python mamba_fl/fed_avg.py --layers 2
    python mamba_fl/fed_avg.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta <- theta + sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)
"""

from common import parallel
from common.before.aggregation import WeightedMean
from common.cli import run_main
from common.evaluation import pick_device
from common.runlog import start_run
from mamba_fl.fed_core import Study
from mamba_fl.flags import complete_flags, make_parser, run_name


def main(args):
    complete_flags(args)
    parallel.init_parallel(pick_device(args.device))
    with start_run("fed_avg", args, run_name("fed_avg", args)) as run:
        study = Study(args, run)
        lasting = study.lasting
        theta = run.restore(study.initial_weights(), lasting)

        for round in run.rounds(study.rounds):
            clients = study.sample_clients(round)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k, n_k = study.local_update(theta, k, round)
                if study.left_out(k, theta_k):
                    continue
                mean.add(theta_k, weight=n_k)
            study.close_round(round)
            before, theta = theta, mean.result()
            if study.evaluated(round):
                study.report(before, theta, round)
                run.save(round, theta, lasting)

        study.finish(theta)


def build_parser():
    return make_parser(__doc__.split("\n")[0])[0]


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
