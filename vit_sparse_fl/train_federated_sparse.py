"""Sparse FedAvg on CIFAR-100: only the weights in a mask are trained and sent.

    python vit_sparse_fl/train_federated_sparse.py --sparsity-ratio 0.9 --mask-strategy least_sensitive
    python vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --num-rounds 50    # offline, a CPU

The mask m is made once, before the first round, from how sensitive the model's outputs are to each weight (TaLoS,
Iurada et al. 2025), from the weights' magnitude, or at random. Clients then train under it:

    u <- m * (g + wd theta);  buf <- mu buf + u;  theta <- theta - lr buf     (J steps, buf starts anew each round)
    theta <- theta + eta_s sum_k p_k (theta_k - theta)                        (McMahan et al. 2017, eta_s: --server-lr)

A weight outside of the mask keeps its bits for the whole run. `--upload topk` is the plain alternative at equal bytes
up: train densely, send the largest changes. With `--download topk` bytes down are equal too.
"""

from common.cli import non_negative_float, only, unless
from common.early import parsed
from vit_sparse_fl.flags import NEVER, add_experiment_flags, choice, make_parser, number, parse, process_memory
from vit_sparse_fl.mask_flags import add_mask_flags, check_flags


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0], sparse=True)
    share = "share of the weights that is frozen, in (0, 1); of --mask FILE: the mask's own"
    number(own, "--sparsity-ratio", non_negative_float, 0.9, "X", share, when=unless(sparsity_experiment=True))
    add_mask_flags(own)
    text = "topk: no mask, each client sends its largest changes, as many bytes a round"
    choice(own, "--upload", ["masked", "topk"], "masked", text)
    keeps = only(upload="topk") & unless(error_feedback=False)
    text = "a client adds to its next changes what it did not send"
    own.add_argument("--error-feedback", action="store_true", when=keeps, help=text)
    text = "topk: the server too sends the largest differences to what a client has; off: whole"
    choice(own, "--download", ["whole", "topk"], "whole", text, when=only(upload="topk") & unless(download="whole"))
    sweep = {"action": "store_true", "when": NEVER}
    own.add_argument("--compare-strategies", **sweep, help="a run for each strategy")
    own.add_argument("--sparsity-experiment", **sweep, help="a run for each of --sparsity-values")
    shares = [0.5, 0.7, 0.9, 0.95, 0.99]
    many = {"nargs": "+", "when": only(sparsity_experiment=True)}
    number(own, "--sparsity-values", non_negative_float, shares, "X", "shares", **many)
    add_experiment_flags(own)
    return parser


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(parse, build_parser())

import numpy as np

from common import parallel
from common.aggregation import WeightedMean
from common.local import client_optimizer, local_steps
from common.participation import Turns, per_round
from common.processes import run_federated
from common.runlog import start_run
from vit_sparse_fl.best import BestCheckpoints
from vit_sparse_fl.calibration import make_mask, overlap_table
from vit_sparse_fl.experiments import repeated, run_each, sparse_settings
from vit_sparse_fl.interference import Interference
from vit_sparse_fl.mask_files import sparsity_of
from vit_sparse_fl.masks import check_sparsity, index_bytes, kept_apart
from vit_sparse_fl.sparse_sgdm import SparseSGDM
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
from vit_sparse_fl.topk import client_rows, received, remembered, uploaded


def train(args):
    with start_run("train_federated_sparse", args, args.run_name, unit="images") as run:
        study = load_study(args, run, sparse=True)
        weights, steps, topk = study.weights, args.local_steps, args.upload == "topk"
        best = BestCheckpoints(run.folder / "best", args.keep_best)
        turns = Turns(args.seed, args.num_clients, args.participation_rate)
        run.plan(args.num_rounds, args.eval_every, args.save_every, len(study.examples))
        first, fitted = fit_first(study, run)
        rows = client_rows(run, args, weights)
        theta = run.restore(first, weights.named, best=best, **fitted, **({"topk": rows} if rows else {}))
        if topk:  # as many bytes as the kept values: 8 for a value and its index, in every round
            size, kept = max(1, round((1 - args.sparsity_ratio) * weights.size) // 2), None
            sent, places, shares = 8 * size, 0, {}
            changing = sent if args.download == "topk" else weights.bytes
        else:
            mask = make_mask(study, run, first)
            kept = mask.nonzero().view(-1)  # [kept]
            sent = changing = 4 * len(kept)
            places = index_bytes(mask)  # once a client, down: which weights are kept
            named = weights.named(mask)
            shares = {f"kept_{name}": share for name, share in kept_apart(named).items()}
            shares["kept"] = {name: [int(part.sum()), part.numel()] for name, part in named.items()}
        frozen = study.frozen_squares()
        report(study, run, best, 0, theta)

        def as_sent(start, row):
            """(the client's weights as the server sees them, what it has not sent)."""
            return uploaded(theta, start, weights.theta, size, row.get("residual")) if topk else (weights.theta, None)

        for t in run.rounds():
            lr, before = learning_rate(args, t), turns.before(t)
            down = np.where(before, changing, study.model_bytes + places)
            clients = run.sample(study.client_weights, args.participation_rate, t, up=sent, down=down)
            mean = WeightedMean(theta, clients)
            pull = Interference(theta, clients, kept, frozen=frozen) if run.due(t + 1) else None
            cross = cross_losses(study, clients, theta, t, kept)
            for k in clients:
                row = rows and rows.get(k) or {}
                start = received(theta, row.get("copy"), size) if topk else theta
                local = client_update(study, start, kept, client_batches(study, k, t, before[k] * steps, steps), lr)
                clients.note(k, train_loss=local.loss)
                clients.work(steps * args.batch_size)
                theta_k, rest = as_sent(start, row)
                if mean.add(theta_k, weight=study.client_weights[k], finite=(weights.theta,)):
                    if rows:
                        rows.put(k, remembered(args, rest, start))
                    if pull:
                        pull.add(theta_k)
                    if cross and cross.add(theta_k, weights.theta - start):
                        client_update(study, start, kept, other_batches(study, k, t, before[k] * steps, steps), lr)
                        cross.add_other(weights.theta - start)
            theta = mean.result(args.server_lr)
            report(study, run, best, t + 1, theta, pull, cross, lr=lr)

        finish(study, run, best, theta, **shares)


def client_update(study, start, kept, batches, lr):
    """A client's local work on the `kept` weights (None: all); the model has its weights afterwards. Returns a
    `LocalResult`."""
    args, weights = study.args, study.weights
    weights.load(start)
    if kept is None:
        optimizer = client_optimizer("sgdm", weights.parameters, lr, args.momentum, args.weight_decay)
    else:
        optimizer = SparseSGDM(weights, kept, lr, args.momentum, args.weight_decay)
    return local_steps(study.loss, batches, weights, optimizer, amp=study.amp)


def main(args):
    check_flags(args)
    if args.mask:
        args.sparsity_ratio = sparsity_of(args.mask)  # the mask's own
    else:
        for sparsity in [args.sparsity_ratio, *(args.sparsity_values if args.sparsity_experiment else [])]:
            check_sparsity(sparsity)
    runs = repeated(args, sparse_settings(args))
    run_each("train_federated_sparse", train, runs)
    if args.compare_strategies and parallel.is_main():
        print("\n" + overlap_table(runs))


if __name__ == "__main__":
    clients = per_round(args.participation_rate, args.num_clients)
    run_federated(main, args, clients=clients, memory=process_memory(args))
