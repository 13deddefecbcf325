"""FedFisher: clients' weights averaged with the precision that each client has of them.

    python mamba_fl/fed_fisher.py --layers 2
    python mamba_fl/fed_fisher.py --layers 2 --dataset demo      # offline, a CPU, about a minute

theta_j <- theta_j + sum_k n_k F_kj (theta_kj - theta_j) / sum_k n_k F_kj     (Matena & Raffel 2022, eq. 4)

F_k is the diagonal of client k's Fisher information at theta_k, per sequence (its summed log-likelihood), plus
rho times its mean.
"""

from common import parallel
from common.before.aggregation import PrecisionWeightedMean
from common.before.fisher import diagonal_fisher
from common.cli import non_negative_float, positive_int, run_main
from common.evaluation import pick_device
from common.runlog import start_run
from mamba_fl.fed_core import Study
from mamba_fl.flags import complete_flags, make_parser, run_name


def main(args):
    complete_flags(args)
    parallel.init_parallel(pick_device(args.device))
    with start_run("fed_fisher", args, run_name("fed_fisher", args)) as run:
        study = Study(args, run)
        lasting = study.lasting
        theta = run.restore(study.initial_weights(), lasting)

        for round in run.rounds(study.rounds):
            clients = study.sample_clients(round)
            mean = PrecisionWeightedMean(theta, clients, damping=args.fisher_damping, normalize=args.fisher_normalize)
            for k in clients:
                theta_k, n_k = study.local_update(theta, k, round)
                samples = study.calibration(k, round, args.fisher_samples, args.fisher_labels)
                fisher_k = diagonal_fisher(study.model, study.nll, samples, method="loop")
                if study.left_out(k, theta_k, fisher_k):
                    continue
                mean.add(theta_k, weight=n_k, precision=fisher_k)
            study.close_round(round, sent=2)  # the weights and their precision
            before, theta = theta, mean.result()
            if study.evaluated(round):
                study.report(before, theta, round)
                run.save(round, theta, lasting)

        study.finish(theta)


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
    run_main(main, build_parser().parse_args())
