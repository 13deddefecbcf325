"""FedMomentum: the clients' mean update as a gradient for an optimiser on the server.

    python mamba_fl/fed_momentum.py --layers 2
    python mamba_fl/fed_momentum.py --layers 2 --dataset demo      # offline, a CPU, about a minute

Delta = sum_k p_k (theta_k - theta)
momentum    v <- beta v + Delta,  theta <- theta + eta_s v                           (Hsu et al. 2019)
nesterov    theta <- theta + eta_s (beta v + Delta), with the new v      (DiLoCo: eta_s 0.7, beta 0.9)
adam, ...   m <- b1 m + (1 - b1) Delta,  v <- b2 v + (1 - b2) Delta^2,
            theta <- theta + eta_s m / (sqrt v + tau)                  (Reddi et al. 2021, algorithm 2)
"""

from common.aggregation import ServerAdam, ServerMomentum, WeightedMean
from common.cli import checked, half_open_fraction, positive_float
from common.local import local_steps
from common.processes import run_federated
from common.runlog import start_run
from mamba_fl.fed_core import begin_client, end_client, evaluate, finish, load_study, with_perplexity
from mamba_fl.flags import complete_flags, footprint, make_parser, run_name

MOMENTUM = ("momentum", "nesterov")


def main(args):
    if args.server_lr is None:
        args.server_lr = 1.0 if args.server_optimizer in MOMENTUM else 0.01
    with start_run("fed_momentum", args, run_name("fed_momentum", args)) as run:
        study = load_study(args, run)
        server = server_optimizer(args)
        theta = run.restore(study.weights.snapshot(), study.weights.named, **study.lasting, server=server)
        run.report(0, theta, lambda: evaluate(study, theta, 0))

        for t in run.rounds():
            up, down = study.weights.bytes, study.bytes_down(t)
            clients = run.sample(study.client_weights, args.participation, t, up=up, down=down)
            mean = WeightedMean(theta, clients)
            for k in clients:
                batches = begin_client(study, theta, k, t)
                done = local_steps(study.loss, batches, study.weights, study.optimizer, amp=run.amp)
                theta_k = end_client(study, theta, k, t, clients, done)
                mean.add(theta_k, weight=study.client_weights[k])
            theta = server.step(theta, mean.delta())
            run.report(t + 1, theta, lambda: evaluate(study, theta, t + 1), with_perplexity)

        finish(study, theta)


def server_optimizer(args):
    """The server's optimiser that the flags ask for."""
    if args.server_optimizer in MOMENTUM:
        nesterov = args.server_optimizer == "nesterov"
        return ServerMomentum(args.server_lr, args.server_momentum, nesterov=nesterov, form=args.momentum_form)
    b1, b2, tau = args.server_momentum, args.server_beta2, args.server_tau
    return ServerAdam(args.server_optimizer, args.server_lr, b1=b1, b2=b2, tau=tau)


def build_parser():
    parser, method = make_parser(__doc__.split("\n")[0])
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
        when=lambda a: a.server_optimizer in MOMENTUM,
        help="ema: v <- beta v + (1 - beta) Delta, the source's, steps ten times smaller",
    )
    method.add_argument(
        "--server-beta2",
        type=half_open_fraction,
        default=0.99,
        metavar="X",
        when=lambda a: a.server_optimizer in ("adam", "yogi"),
        help="b2 of Adam and Yogi",
    )
    method.add_argument(
        "--server-tau",
        type=positive_float,
        default=1e-3,
        metavar="X",
        when=lambda a: a.server_optimizer not in MOMENTUM,
        help="tau of Adam and the like",
    )
    return parser


if __name__ == "__main__":
    args = checked(complete_flags, build_parser().parse_args())
    run_federated(main, args, *footprint(args))
