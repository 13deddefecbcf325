"""FedEntropy: clients' weights averaged with more weight on clients whose model is surer of their held-out text.

    python mamba_fl/fed_entropy.py --layers 2         # with --dataset demo: offline, a CPU, about a minute

theta <- theta + eta_s sum_k alpha_k (theta_k - theta),  alpha_k = exp(-H_k / T) / sum_j exp(-H_j / T)

H_k: mean entropy (nats a token) of client k's next-token distribution on text it does not train on. The source's
method; the published FedEntropy (Ling et al. 2023) selects clients by the entropy of their pooled soft labels.
"""

from common import aggregation
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl import flags
from mamba_fl.fed_core import Study, client_update, entropy
from mamba_fl.measuring import finish


def build_parser():
    return flags.make_parser(__doc__, flags.entropy_flags)


def main(args):
    with start_run("fed_entropy", args, flags.run_name("fed_entropy", args)) as run:
        study = Study(args, run, uniform=True)  # alpha_k knows no n_k
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = aggregation.WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k, log_weight=-entropy(study, k, t) / args.temperature)
            theta = mean.result(args.server_lr)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), flags.complete_flags)
    run_federated(main, args, *flags.footprint(args))
