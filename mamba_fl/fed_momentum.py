"""FedMomentum: the clients' mean update as a gradient for an optimiser on the server.

    python mamba_fl/fed_momentum.py --layers 2
    python mamba_fl/fed_momentum.py --layers 2 --dataset demo      # offline, a CPU, about a minute

Delta = sum_k p_k (theta_k - theta)
momentum    v <- beta v + Delta,  theta <- theta + eta_s v                           (Hsu et al. 2019)
            ema, the source's: v <- beta v + (1 - beta) Delta, steps ten times smaller
nesterov    theta <- theta + eta_s (beta v + Delta), with the new v      (DiLoCo: eta_s 0.7, beta 0.9)
adam, ...   m <- b1 m + (1 - b1) Delta,  v <- b2 v + (1 - b2) Delta^2,
            theta <- theta + eta_s m / (sqrt v + tau)                  (Reddi et al. 2021, algorithm 2)
"""

from common import cli
from common.aggregation import ServerAdam, ServerMomentum, WeightedMean
from common.cli import parse
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl.fed_core import client_update, load_study
from mamba_fl.flags import complete_flags, footprint, make_parser, run_name
from mamba_fl.measuring import finish

MOMENTUM, ADAPTIVE = ("momentum", "nesterov"), ("adam", "yogi", "adagrad")


def build_parser():
    parser, add = make_parser(__doc__)
    kinds = [*MOMENTUM, *ADAPTIVE]
    add("--server-optimizer", choices=kinds, default="momentum", help="what the server does with the mean update")
    add("--server-lr", type=cli.positive_float, metavar="X", help="eta_s (default: 1; adam, yogi, adagrad: 0.01)")
    add("--server-momentum", type=cli.half_open_fraction, default=0.9, metavar="X", help="beta; Adam's b1; off: 0")
    forms = ["heavy_ball", "ema"]
    add("--momentum-form", choices=forms, default="heavy_ball", help="ema: the source's average")
    add("--server-beta2", type=cli.half_open_fraction, default=0.99, metavar="X", help="b2")
    text = "Adam's m and v over 1 - b^t, as in Adam; Reddi's has none"
    add(
        "--server-bias-correction",
        action="store_true",
        help=text,
    )
    text = "whose rate --lr-scheduler and --warmup-steps change, as --lr's share"
    add(
        "--scheduled",
        choices=["clients", "server"],
        default="clients",
        help=text,
    )
    add("--server-tau", type=cli.positive_float, default=1e-3, metavar="X", help="Adam's tau")
    return parser


def main(args):
    args.server_lr = args.server_lr or (1.0 if args.server_optimizer in MOMENTUM else 0.01)
    with start_run("fed_momentum", args, run_name("fed_momentum", args)) as run:
        study = load_study(args, run)
        server = server_optimizer(args)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting, server=server)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k)
            server.lr = study.server_rate(t)
            theta = server.step(theta, mean.delta())
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


def server_optimizer(args):
    """The server's optimiser that the flags ask for."""
    kind, lr, b1 = args.server_optimizer, args.server_lr, args.server_momentum
    if kind in MOMENTUM:
        return ServerMomentum(lr, b1, nesterov=kind == "nesterov", form=args.momentum_form)
    corrected = args.server_bias_correction and kind == "adam"
    return ServerAdam(kind, lr, b1=b1, b2=args.server_beta2, tau=args.server_tau, bias_correction=corrected)


if __name__ == "__main__":
    args = parse(build_parser(), complete_flags)
    run_federated(main, args, *footprint(args))
