"""FedFisher: clients' weights averaged with the precision that each client has of them.

    python mamba_fl/fed_fisher.py --layers 2         # with --dataset demo: offline, a CPU, about a minute

theta_j <- theta_j + eta_s sum_k n_k F_kj (theta_kj - theta_j) / sum_k n_k F_kj     (Matena & Raffel 2022, eq. 4)
F_k: diagonal of the Fisher information of a sequence (summed log-likelihood) at theta_k, plus rho times its mean.
"""

from common import aggregation
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl import flags
from mamba_fl.fed_core import Study, client_update, fisher
from mamba_fl.measuring import finish


def build_parser():
    return flags.make_parser(__doc__, flags.fisher_flags)


def main(args):
    with start_run("fed_fisher", args, flags.run_name("fed_fisher", args)) as run:
        study = Study(args, run, sent_vectors=2)  # theta_k and its precision
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = aggregation.PrecisionWeightedMean(theta, clients, args.fisher_damping)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k, precision=fisher(study, k, t))
            theta = mean.result(args.server_lr)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), flags.complete_flags)
    run_federated(main, args, *flags.footprint(args))
