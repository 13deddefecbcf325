"""FedMomentum: the clients' mean update as a gradient for an optimiser on the server.

    python mamba_fl/fed_momentum.py --layers 2
    python mamba_fl/fed_momentum.py --layers 2 --dataset demo      # offline, a CPU, about a minute

Delta = sum_k p_k (theta_k - theta)
momentum    v <- beta v + Delta,  theta <- theta + eta_s v                           (Hsu et al. 2019)
nesterov    theta <- theta + eta_s (beta v + Delta), with the new v      (DiLoCo: eta_s 0.7, beta 0.9)
adam, ...   m <- b1 m + (1 - b1) Delta,  v <- b2 v + (1 - b2) Delta^2,
            theta <- theta + eta_s m / (sqrt v + tau)                  (Reddi et al. 2021, algorithm 2)
"""

from common import parallel
from common.before.aggregation import ServerAdam, ServerMomentum, WeightedMean
from common.cli import half_open_fraction, positive_float, run_main
from common.evaluation import pick_device
from common.runlog import start_run
from mamba_fl.fed_core import Study
from mamba_fl.flags import complete_flags, make_parser, run_name


def main(args):
    complete_flags(args)
    if args.server_lr is None:
        args.server_lr = 1.0 if args.server_optimizer in ("momentum", "nesterov") else 0.01
    parallel.init_parallel(pick_device(args.device))
    with start_run("fed_momentum", args, run_name("fed_momentum", args)) as run:
        study = Study(args, run)
        server = server_optimizer(args)
        lasting = {**study.lasting, "server": server}
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
            before, theta = theta, server.step(theta, mean.delta())
            if study.evaluated(round):
                study.report(before, theta, round)
                run.save(round, theta, lasting)

        study.finish(theta)


def server_optimizer(args):
    """The server's optimiser that the flags ask for."""
    if args.server_optimizer in ("momentum", "nesterov"):
        nesterov = args.server_optimizer == "nesterov"
        return ServerMomentum(args.server_lr, args.server_momentum, nesterov=nesterov, form=args.momentum_form)
    return ServerAdam(
        args.server_optimizer,
        args.server_lr,
        b1=args.server_momentum,
        b2=args.server_beta2,
        tau=args.server_tau,
    )


def build_parser():
    parser, method = make_parser(__doc__.split("\n")[0], seed=42)
    method.add_argument(
        "--server-optimizer",
        choices=["momentum", "nesterov", "adam", "yogi", "adagrad"],
        default="momentum",
        help="what the server does with the mean update",
    )
    method.add_argument(
        "--server-lr",
        type=positive_float,
        metavar="X",
        help="its learning rate eta_s (default: 1; adam, yogi, adagrad: 0.01)",
    )
    method.add_argument(
        "--server-momentum",
        type=half_open_fraction,
        default=0.9,
        metavar="X",
        help="beta; Adam's, Yogi's and Adagrad's b1; off: 0",
    )
    method.add_argument(
        "--momentum-form",
        choices=["heavy_ball", "ema"],
        default="heavy_ball",
        help="ema: v <- beta v + (1 - beta) Delta, the source's, steps ten times smaller",
    )
    method.add_argument(
        "--server-beta2", type=half_open_fraction, default=0.99, metavar="X", help="b2 of Adam and Yogi"
    )
    method.add_argument("--server-tau", type=positive_float, default=1e-3, metavar="X", help="tau of Adam and the like")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
