"""Central training of a ViT on CIFAR-100: the ceiling for the federated runs.

    python vit_sparse_fl/train_centralized.py --epochs 50 --lr 0.001
    python vit_sparse_fl/train_centralized.py --dataset demo --model tiny --epochs 5      # offline, a CPU, a minute

u <- g + wd theta;  buf <- mu buf + u;  theta <- theta - lr buf     (SGD with momentum, over all images)

A round of its metrics is an epoch.
"""

import math

from common import parallel
from common.cli import RARE, RunFailed, UsageError, checked, non_negative_float, positive_int, run_main
from common.evaluation import pick_device
from common.local import OptimizerState, client_optimizer, local_steps
from common.runlog import start_run
from common.seeding import stream
from vit_sparse_fl import flags
from vit_sparse_fl.data import mixed
from vit_sparse_fl.experiments import classes_name, repeated, run_each, variant
from vit_sparse_fl.study import Study, client_batches, finish, learning_rate

RATES, DECAYS = (3e-4, 1e-3, 3e-3, 1e-2), (1e-4, 1e-3)  # of --hp-search


def build_parser():
    parser = flags.make_parser(__doc__.split("\n")[0], federated=False)
    own = parser.group("experiments")
    text = "mix pairs of images and their labels in shares of Beta(A, A); off: 0"
    flags.number(own, "--mixup", non_negative_float, 0.0, "A", text)
    grid = f"a run for each rate of {RATES} and weight decay of {DECAYS}"
    own.add_argument("--hp-search", action="store_true", help=grid)
    flags.number(parser.group(RARE), "--hp-epochs", positive_int, 10, "N", "epochs of each of these runs")
    return parser


def train(args):
    with start_run("train_centralized", args, args.run_name, unit="images") as run:
        study = Study(args, run, federated=False)
        weights = study.weights
        steps = study.examples[0] // args.batch_size  # an epoch's; a short last batch waits for the next
        optimizer = client_optimizer("sgdm", weights.parameters, args.lr, args.momentum, args.weight_decay)
        momentum = OptimizerState(optimizer, weights.parameters)
        theta = run.restore(study.first, weights.named, momentum=momentum, **study.lasting)
        run.report(0, theta, study.evaluate)
        weights.load(theta)

        for epoch in run.rounds():
            batches = client_batches(study, 0, epoch, epoch * steps, steps)
            if args.mixup:
                draws = stream(args.seed, "mixup", epoch)
                batches = (mixed(*batch, study.data.n_classes, args.mixup, draws) for batch in batches)
            rates = [learning_rate(args, epoch)] * steps
            loss = local_steps(study.loss, batches, weights, optimizer, amp=study.run.amp, lrs=rates).loss.item()
            if not math.isfinite(loss):
                raise RunFailed(f"epoch {epoch + 1}: the loss is {loss}: lower --lr ({args.lr}) or --amp off")
            run.count(images=steps * args.batch_size)
            row = {"train_loss": loss}
            run.report(epoch + 1, weights.snapshot(), lambda theta, t, _: row | study.evaluate(theta, t, row))

        finish(study, weights.snapshot())


def settings(args):
    """(name, flags) of every setting that the command line asks for."""
    name = "centralized" + classes_name(args)
    if args.freeze_backbone:
        name += "_linear_probe"
    if not args.hp_search:
        return [(name, args)]
    return [
        (f"{name}_hp_lr{lr:g}_wd{decay:g}", variant(args, lr=lr, weight_decay=decay, epochs=args.hp_epochs))
        for lr in RATES
        for decay in DECAYS
    ]


def main(args):
    if parallel.init_parallel(pick_device(args.device)).size > 1:
        raise UsageError("central training is one process: start it without torchrun")
    run_each(train, repeated(args, settings(args)))


if __name__ == "__main__":
    run_main(main, checked(flags.parse, build_parser()))
