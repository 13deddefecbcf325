"""Sparse FedAvg on CIFAR-100: only the weights in a mask are trained and sent.

    python vit_sparse_fl/train_federated_sparse.py --sparsity-ratio 0.9 --mask-strategy least_sensitive
    python vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --num-rounds 50    # offline, a CPU

The mask m is made once, before the first round, from how sensitive the model's outputs are to each weight (TaLoS,
Iurada et al. 2025), from the weights' magnitude, or at random. Clients then train under it:

    u <- m * (g + wd theta);  buf <- mu buf + u;  theta <- theta - lr buf     (J steps, buf starts anew each round)
    theta <- theta + sum_k p_k (theta_k - theta)                              (McMahan et al. 2017)

A weight outside of the mask keeps its bits for the whole run.
"""

from common.aggregation import WeightedMean
from common.cli import RARE, checked, half_open_fraction, positive_int
from common.participation import per_round
from common.processes import run_federated
from common.runlog import start_run
from vit_sparse_fl import flags
from vit_sparse_fl.experiments import federated_settings, repeated, run_each, variant
from vit_sparse_fl.masks import STRATEGIES, index_bytes, make_mask
from vit_sparse_fl.study import Study, client_update, finish, probes


def build_parser():
    parser = flags.make_parser(__doc__.split("\n")[0], sparse=True)
    own, rare, number = parser.group("the method"), parser.group(RARE), flags.number
    own.add_argument("--mask-strategy", choices=STRATEGIES, default="least_sensitive", help="which weights it keeps")
    own.add_argument("--compare-strategies", action="store_true", help="a run for each strategy")
    own.add_argument("--sparsity-experiment", action="store_true", help="a run for each of --sparsity-values")
    scope = "one threshold for all; one a tensor"
    rare.add_argument("--mask-scope", choices=["global", "layer"], default="global", help=scope)
    add_calibration_flags(parser)
    shares = [0.5, 0.7, 0.9, 0.95, 0.99]
    number(rare, "--sparsity-values", half_open_fraction, shares, "X", "shares", nargs="+")
    return parser


def add_calibration_flags(parser):
    own, rare, number = parser.group("the method"), parser.group(RARE), flags.number
    number(own, "--calibration-rounds", positive_int, None, "R", "calibration rounds (default: 4; seed: 5)")
    number(rare, "--fisher-samples", positive_int, 512, "N", "images a calibration round")
    how = "talos: rounds exclude step by step; seed: the source's mean over rounds"
    rare.add_argument("--calibration", choices=["talos", "seed"], default="talos", help=how)


def train(args):
    with start_run("train_federated_sparse", args, args.run_name, unit="images") as run:
        study = Study(args, run, sparse=True)
        theta = run.restore(study.first, study.weights.named, **study.lasting)
        mask = make_mask(study, run, study.first)
        kept = mask.nonzero().view(-1)  # [kept]
        study.up = study.down = 4 * len(kept)
        study.joining += index_bytes(mask)  # who joins learns what is kept
        run.watch(*probes(study))
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t, kept)
                mean.add(theta_k)
            theta = mean.result()
            run.report(t + 1, theta, study.evaluate)

        parts = study.weights.named(mask).items()  # of each tensor: how many are kept, of how many
        finish(study, theta, kept={name: [int(part.sum()), part.numel()] for name, part in parts})


def settings(args):
    """(name, flags) of every setting that the command line asks for."""
    asked = [args]
    if args.compare_strategies:
        asked = [variant(args, mask_strategy=strategy) for strategy in STRATEGIES]
    if args.sparsity_experiment:
        asked = [variant(args, sparsity_ratio=sparsity) for sparsity in args.sparsity_values]
    return [setting for one in asked for setting in federated_settings(one, mask_name(one))]


def mask_name(args):
    """sparse_STRATEGY_s0.9, with what differs from the default marked."""
    name = f"sparse_{args.mask_strategy}_s{args.sparsity_ratio:g}"
    if STRATEGIES[args.mask_strategy].images:
        name += f"_{args.calibration}{args.calibration_rounds}"
    return name + (f"_per_{args.mask_scope}" if args.mask_scope != "global" else "")


def main(args):
    run_each(train, repeated(args, settings(args)))


if __name__ == "__main__":
    args = checked(flags.parse, build_parser())
    run_federated(main, args, per_round(args.participation_rate, args.num_clients), flags.process_memory(args))
