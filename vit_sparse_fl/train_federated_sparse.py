"""Sparse FedAvg on CIFAR-100: only the weights in a mask are trained and sent.

    python vit_sparse_fl/train_federated_sparse.py --sparsity-ratio 0.9 --mask-strategy least_sensitive
    python vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --num-rounds 50    # offline, a CPU

The mask m is made once, before the first round, from how sensitive the model's outputs are to each weight (TaLoS,
Iurada et al. 2025), from the weights' magnitude, or at random. Clients then train under it:

    u <- m * (g + wd theta);  buf <- mu buf + u;  theta <- theta - lr buf     (J steps, buf starts anew each round)
    theta <- theta + eta_s sum_k p_k (theta_k - theta)                        (McMahan et al. 2017, eta_s: --server-lr)

A weight outside of the mask keeps its bits for the whole run.
"""

from common import parallel
from common.aggregation import WeightedMean
from common.cli import checked, non_negative_float
from common.participation import per_round
from common.processes import run_federated
from common.runlog import start_run
from vit_sparse_fl import flags
from vit_sparse_fl.calibration import make_mask, overlap_table
from vit_sparse_fl.experiments import repeated, run_each, sparse_settings
from vit_sparse_fl.mask_files import sparsity_of
from vit_sparse_fl.mask_flags import add_mask_flags, check_flags
from vit_sparse_fl.masks import check_sparsity, facts_of, index_bytes
from vit_sparse_fl.study import client_update, finish, load_study, probes


def build_parser():
    parser, own = flags.make_parser(__doc__.split("\n")[0], sparse=True)
    flags.add_sparsity_flag(own)
    add_mask_flags(own)
    own.add_argument("--compare-strategies", action="store_true", help="a run for each strategy")
    own.add_argument("--sparsity-experiment", action="store_true", help="a run for each of --sparsity-values")
    shares = [0.5, 0.7, 0.9, 0.95, 0.99]
    flags.number(own, "--sparsity-values", non_negative_float, shares, "X", "shares", nargs="+")
    flags.add_experiment_flags(own)
    return parser


def train(args):
    with start_run("train_federated_sparse", args, args.run_name, unit="images") as run:
        study = load_study(args, run, sparse=True)
        theta = run.restore(study.first, study.weights.named, **study.lasting)
        mask = make_mask(study, run, study.first)
        kept = mask.nonzero().view(-1)  # [kept]
        study.sends(4 * len(kept), joining=study.model_bytes + index_bytes(mask))  # who joins learns what is kept
        run.watch(*probes(study, kept))
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t, kept)
                mean.add(theta_k)
            theta = mean.result(args.server_lr)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta, **facts_of(study.weights.named(mask)))


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
    args = checked(flags.parse, build_parser())
    run_federated(main, args, per_round(args.participation_rate, args.num_clients), flags.process_memory(args))
