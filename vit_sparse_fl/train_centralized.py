"""Central training of a ViT on CIFAR-100: the ceiling for the federated runs.

    python vit_sparse_fl/train_centralized.py --epochs 50 --lr 0.001
    python vit_sparse_fl/train_centralized.py --dataset demo --model tiny --epochs 5      # offline, a CPU, a minute

u <- g + wd theta;  buf <- mu buf + u;  theta <- theta - lr buf     (SGD with momentum, over all images)

A round of its metrics is an epoch.
"""

from common import parallel
from common.cli import UsageError, positive_float, positive_int, run_main
from common.evaluation import pick_device
from common.runlog import start_run
from vit_sparse_fl.central import CentralStudy, Momentum
from vit_sparse_fl.experiments import repeated, run_each, variant
from vit_sparse_fl.flags import make_parser, parse


def train(args):
    with start_run("train_centralized", args, args.run_name, unit="images") as run:
        study = CentralStudy(args, run)
        optimizer = study.optimizer(args.lr)
        lasting = {**study.lasting, "momentum": Momentum(optimizer, study.trained)}
        theta = run.restore(study.initial_weights(), lasting)
        study.load(theta)

        for epoch in run.rounds(args.epochs):
            if study.stopped(epoch):
                break
            lr = study.lr(epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = study.train_epoch(optimizer, epoch)
            theta = {name: p.detach() for name, p in study.parameters.items()}
            study.close_epoch(loss, epoch)
            study.report_loss(theta, epoch, lr, loss)
            if study.saved(epoch):
                run.save(epoch, theta, lasting)

        study.finish(theta)


def settings(args):
    """(name, flags) of every setting that the command line asks for."""
    name = "centralized" + (f"_classes_{args.classes[0]}_{args.classes[1]}" if args.classes else "")
    if args.freeze_backbone:
        name += "_linear_probe"
    if not args.hp_search:
        return [(name, args)]
    grid = [(lr, decay) for lr in args.hp_lrs for decay in args.hp_weight_decays]
    return [
        (f"{name}_hp_lr{lr:g}_wd{decay:g}", variant(args, lr=lr, weight_decay=decay, epochs=args.hp_epochs))
        for lr, decay in grid
    ]


def main(args):
    if parallel.init_parallel(pick_device(args.device)).size > 1:
        raise UsageError("central training is one process: start it without torchrun")
    run_each("train_centralized", train, repeated(args, settings(args)))


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0], federated=False)
    own.add_argument("--hp-search", action="store_true", help="a run for each of --hp-lrs x --hp-weight-decays")
    own.add_argument("--hp-epochs", type=positive_int, default=10, metavar="N", help="epochs of each of these runs")
    own.add_argument(
        "--hp-lrs", type=positive_float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], metavar="X", help="learning rates"
    )
    own.add_argument(
        "--hp-weight-decays", type=positive_float, nargs="+", default=[1e-4, 1e-3], metavar="X", help="weight decays"
    )
    return parser


if __name__ == "__main__":
    run_main(lambda parser: main(parse(parser)), build_parser())
