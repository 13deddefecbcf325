"""Central training of a ViT on CIFAR-100: the ceiling for the federated runs.

    python vit_sparse_fl/train_centralized.py --epochs 50 --lr 0.001
    python vit_sparse_fl/train_centralized.py --dataset demo --model tiny --epochs 5      # offline, a CPU, a minute

u <- g + wd theta;  buf <- mu buf + u;  theta <- theta - lr buf     (SGD with momentum, over all images)

A round of its metrics is an epoch.
"""

from common.cli import RunFailed, UsageError, non_negative_float, only, positive_float, positive_int, run_main, unless
from common.early import parsed
from vit_sparse_fl.flags import NEVER, make_parser, number, parse


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0], federated=False)
    text = "mix pairs of images and their labels in shares of Beta(A, A); off: 0"
    number(own, "--mixup", non_negative_float, 0.0, "A", text, when=unless(mixup=0.0))
    grid = "a run for each of --hp-lrs x --hp-weight-decays"
    own.add_argument("--hp-search", action="store_true", when=NEVER, help=grid)
    number(own, "--hp-epochs", positive_int, 10, "N", "epochs of each of these runs", when=only(hp_search=True))
    many = {"nargs": "+", "when": only(hp_search=True)}
    number(own, "--hp-lrs", positive_float, [3e-4, 1e-3, 3e-3, 1e-2], "X", "learning rates", **many)
    number(own, "--hp-weight-decays", positive_float, [1e-4, 1e-3], "X", "weight decays", **many)
    return parser


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(parse, build_parser())

import math

from common import parallel
from common.evaluation import pick_device
from common.local import OptimizerState, client_optimizer, local_steps
from common.runlog import start_run
from common.seeding import stream
from vit_sparse_fl.best import BestCheckpoints
from vit_sparse_fl.data import mixed
from vit_sparse_fl.experiments import classes_name, repeated, run_each, variant
from vit_sparse_fl.study import client_batches, finish, fit_first, learning_rate, load_study, report


def train(args):
    with start_run("train_centralized", args, args.run_name, unit="images") as run:
        study = load_study(args, run, federated=False)
        weights = study.weights
        steps = study.examples[0] // args.batch_size  # an epoch's; a short last batch waits for the next
        best = BestCheckpoints(run.folder / "best", args.keep_best)
        run.plan(args.epochs, 1, args.save_every)
        theta, fitted = fit_first(study, run)
        optimizer = client_optimizer("sgdm", weights.parameters, args.lr, args.momentum, args.weight_decay)
        momentum = OptimizerState(optimizer, weights.parameters)
        theta = run.restore(theta, weights.named, best=best, momentum=momentum, **fitted)
        report(study, run, best, 0, theta)
        weights.load(theta)

        for epoch in run.rounds():
            lr = learning_rate(args, epoch)
            batches = client_batches(study, 0, epoch, epoch * steps, steps)
            if args.mixup:
                draws = stream(args.seed, "mixup", epoch)
                batches = (mixed(*batch, study.data.n_classes, args.mixup, draws) for batch in batches)
            local = local_steps(study.loss, batches, weights, optimizer, amp=study.amp, lrs=[lr] * steps)
            loss = local.loss.item()
            if not math.isfinite(loss):
                raise RunFailed(f"epoch {epoch + 1}: the loss is {loss}: lower --lr ({args.lr}) or --amp off")
            run.count(images=steps * args.batch_size)
            report(study, run, best, epoch + 1, weights.snapshot(), train_loss=loss, lr=lr)

        finish(study, run, best, weights.snapshot())


def settings(args):
    """(name, flags) of every setting that the command line asks for."""
    name = "centralized" + classes_name(args)
    if args.freeze_backbone:
        name += "_linear_probe"
    if not args.hp_search:
        return [(name, args)]
    return [
        (f"{name}_hp_lr{lr:g}_wd{decay:g}", variant(args, lr=lr, weight_decay=decay, epochs=args.hp_epochs))
        for lr in args.hp_lrs
        for decay in args.hp_weight_decays
    ]


def main(args):
    if parallel.init_parallel(pick_device(args.device)).size > 1:
        raise UsageError("central training is one process: start it without torchrun")
    run_each("train_centralized", train, repeated(args, settings(args)))


if __name__ == "__main__":
    run_main(main, args)
