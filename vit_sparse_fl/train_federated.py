"""FedAvg on CIFAR-100: the clients' ViTs averaged by their number of images.

    python vit_sparse_fl/train_federated.py --sharding non_iid --nc 5
    python vit_sparse_fl/train_federated.py --dataset demo --model tiny --num-rounds 50      # offline, a CPU, a minute

theta <- theta + eta_s sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)

theta_k: J steps of SGD with momentum on client k's images; K clients, of which C K take part in a round;
eta_s: --server-lr, 1 in FedAvg (Reddi et al. 2021, algorithm 1). With --lora-r theta is LoRA's factors (and the head,
where it is not frozen): their mean is FedIT's (Zhang et al. 2024).
"""

from common.cli import non_negative_int, unless
from common.early import parsed
from vit_sparse_fl.flags import add_experiment_flags, make_parser, number, parse, process_memory


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0])
    text = "train and send LoRA's factors of this rank instead of the backbone; off: 0"
    number(own, "--lora-r", non_negative_int, 0, "R", text, when=unless(lora_r=0))
    add_experiment_flags(own)
    return parser


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(parse, build_parser())

import numpy as np

from common.aggregation import WeightedMean
from common.local import client_optimizer, local_steps
from common.participation import Turns, per_round
from common.processes import run_federated
from common.runlog import start_run
from vit_sparse_fl.best import BestCheckpoints
from vit_sparse_fl.experiments import federated_settings, repeated, run_each
from vit_sparse_fl.interference import Interference
from vit_sparse_fl.study import (
    client_batches,
    cross_losses,
    finish,
    fit_first,
    learning_rate,
    load_study,
    other_batches,
    report,
)


def train(args):
    with start_run("train_federated", args, args.run_name, unit="images") as run:
        study = load_study(args, run)
        weights, steps = study.weights, args.local_steps
        best = BestCheckpoints(run.folder / "best", args.keep_best)
        turns = Turns(args.seed, args.num_clients, args.participation_rate)
        run.plan(args.num_rounds, args.eval_every, args.save_every, len(study.examples))
        theta, fitted = fit_first(study, run)
        theta = run.restore(theta, weights.named, best=best, **fitted)
        frozen = study.frozen_squares()
        report(study, run, best, 0, theta)

        for t in run.rounds():
            lr, before = learning_rate(args, t), turns.before(t)
            down = np.where(before, weights.bytes, study.model_bytes)  # the whole model to who joins
            clients = run.sample(study.client_weights, args.participation_rate, t, up=weights.bytes, down=down)
            mean = WeightedMean(theta, clients)
            pull = Interference(theta, clients, frozen=frozen) if run.due(t + 1) else None
            cross = cross_losses(study, clients, theta, t)
            for k in clients:
                local = client_update(study, theta, client_batches(study, k, t, before[k] * steps, steps), lr)
                clients.note(k, train_loss=local.loss)
                clients.work(steps * args.batch_size)
                if mean.add(weights.theta, weight=study.client_weights[k]):
                    if pull:
                        pull.add(weights.theta)
                    if cross and cross.add(weights.theta, weights.theta - theta):
                        client_update(study, theta, other_batches(study, k, t, before[k] * steps, steps), lr)
                        cross.add_other(weights.theta - theta)
            theta = mean.result(args.server_lr)
            report(study, run, best, t + 1, theta, pull, cross, lr=lr)

        finish(study, run, best, theta)


def client_update(study, theta, batches, lr):
    """A client's local work from theta; the model has its weights afterwards. Returns a `LocalResult`."""
    args, weights = study.args, study.weights
    weights.load(theta)
    optimizer = client_optimizer("sgdm", weights.parameters, lr, args.momentum, args.weight_decay)
    return local_steps(study.loss, batches, weights, optimizer, amp=study.amp)


def main(args):
    name = f"fedavg_lora{args.lora_r}" if args.lora_r else "fedavg"
    run_each("train_federated", train, repeated(args, federated_settings(args, name)))


if __name__ == "__main__":
    clients = per_round(args.participation_rate, args.num_clients)
    run_federated(main, args, clients=clients, memory=process_memory(args))
