"""FedMomentum: the clients' mean update as a gradient for an optimiser on the server.

    python mamba_fl/fed_momentum.py --layers 2         # with --dataset demo: offline, a CPU, about a minute

Delta = sum_k p_k (theta_k - theta)             (Hsu et al. 2019; adam: Reddi et al. 2021, algorithm 2)
momentum    v <- beta v + Delta (ema, the source's: (1 - beta) Delta),  theta <- theta + eta_s v
nesterov    theta <- theta + eta_s (beta v + Delta), with the new v      (DiLoCo: eta_s 0.7, beta 0.9)
adam        m, v <- b1 m + (1 - b1) Delta, b2 v + (1 - b2) Delta^2,  theta <- theta + eta_s m / (sqrt v + tau)
"""

from common import aggregation
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl import flags
from mamba_fl.fed_core import Study, client_update, server_optimizer
from mamba_fl.measuring import finish


def build_parser():
    return flags.make_parser(__doc__, flags.momentum_flags)


def main(args):
    with start_run("fed_momentum", args, flags.run_name("fed_momentum", args)) as run:
        study = Study(args, run)
        server = server_optimizer(args)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting, server=server)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = aggregation.WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k)
            server.lr = study.server_rate(t)
            theta = server.step(theta, mean.delta())
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), flags.complete_flags)
    run_federated(main, args, *flags.footprint(args))
