"""Sparse FedAvg on CIFAR-100: only the weights in a mask are trained and sent.

    python vit_sparse_fl/train_federated_sparse.py --sparsity-ratio 0.9 --mask-strategy least_sensitive
    python vit_sparse_fl/train_federated_sparse.py --dataset demo --model tiny --num-rounds 50    # offline, a CPU

The mask m is made once, before the first round, from how sensitive the model's outputs are to each weight (TaLoS,
Iurada et al. 2025), from the weights' magnitude, or at random. Clients then train under it:

    u <- m * (g + wd theta);  buf <- mu buf + u;  theta <- theta - lr buf     (J steps, buf starts anew each round)
    theta <- theta + sum_k p_k (theta_k - theta)                              (McMahan et al. 2017, algorithm 1)

A weight outside of the mask keeps its bits for the whole run. `--upload topk` is the plain alternative at equal bytes:
train densely, send the largest changes.
"""

from pathlib import Path

from common import parallel
from common.before.aggregation import WeightedMean
from common.cli import UsageError, non_negative_float, positive_int, run_main
from common.evaluation import pick_device
from common.runlog import start_run
from vit_sparse_fl.calibration import make_masks, overlap_table, topk_size, topk_update
from vit_sparse_fl.experiments import federated_settings, repeated, run_each, variant
from vit_sparse_fl.fed_core import Study
from vit_sparse_fl.flags import add_experiment_flags, make_parser, parse
from vit_sparse_fl.interference import Interference
from vit_sparse_fl.masks import CALIBRATIONS, SCOPES, SENSITIVITY, STRATEGIES, check_sparsity, index_bytes


def train(args):
    with start_run("train_federated_sparse", args, args.run_name, unit="images") as run:
        study = Study(args, run, sparse=True)
        lasting = study.lasting
        first = study.initial_weights()
        theta = run.restore(first, lasting)
        masks = make_masks(study, first)
        size = topk_size(study, masks)
        study.masks = masks if args.upload == "masked" else None

        for round in run.rounds(args.num_rounds):
            if study.stopped(round):
                break
            clients = study.sample_clients(round)
            mean = WeightedMean(theta, clients)
            pull = Interference(theta, clients, study.masks) if study.evaluated(round) else None
            for k in clients:
                theta_k, n_k = study.local_update(theta, k, round)
                if study.left_out(k, theta_k):
                    continue
                if args.upload == "topk":
                    theta_k = topk_update(theta, theta_k, size)
                mean.add(theta_k, weight=n_k)
                if pull:
                    pull.add(theta_k)
            if args.upload == "topk":  # a value and an index each, every round
                study.close_round(round, sent=2 * size)
            else:
                study.close_round(round, sent=study.changing(), indices=index_bytes(masks))
            theta = mean.result()
            if pull:
                study.report(theta, round, study.lr(round), **pull.result())
            if study.saved(round):
                run.save(round, theta, lasting)

        study.finish(theta)


def settings(args):
    """(name, flags) of every setting that the command line asks for."""
    found = []
    if args.compare_strategies:
        found += [variant(args, mask_strategy=strategy) for strategy in STRATEGIES]
    if args.sparsity_experiment:
        found += [variant(args, sparsity_ratio=sparsity) for sparsity in args.sparsity_values]
    for one in found or [args]:
        for name, flags in federated_settings(one):
            yield name.replace("fedavg", method_name(flags), 1), flags


def method_name(args):
    """sparse_STRATEGY_s0.9, with what differs from the default marked."""
    if args.upload == "topk":
        return f"topk_s{args.sparsity_ratio:g}"
    if args.mask:
        return f"mask_of_{Path(args.mask).resolve().parent.name}"
    name = f"sparse_{args.mask_strategy}_s{args.sparsity_ratio:g}"
    if args.mask_strategy in SENSITIVITY:
        name += f"_{args.calibration}{args.calibration_rounds}"
        name += "_clients" if args.calibrate_on == "clients" else ""
        name += f"_{args.mask_merge}" if args.mask_merge != "none" else ""
    return name + ("_per_layer" if args.mask_scope == "layer" else "")


def main(args):
    for sparsity in [args.sparsity_ratio, *(args.sparsity_values if args.sparsity_experiment else [])]:
        check_sparsity(sparsity)
    if args.mask_merge != "none" and args.calibrate_on != "clients":
        raise UsageError(f"--mask-merge {args.mask_merge} merges clients' masks: add --calibrate-on clients")
    if args.mask and (args.compare_strategies or args.sparsity_experiment or args.upload == "topk"):
        raise UsageError(
            f"--mask {args.mask} decides the weights: drop --compare-strategies, --sparsity-experiment, topk"
        )
    if args.upload == "topk" and args.compare_strategies:
        raise UsageError("--upload topk has no mask, so no strategies to compare: drop one of the two")
    if args.mask_merge != "none" and not args.compare_strategies and args.mask_strategy not in SENSITIVITY:
        raise UsageError(f"--mask-merge {args.mask_merge}: {args.mask_strategy} masks need no clients: drop it")
    if args.freeze_backbone:
        raise UsageError("--freeze-backbone leaves no weight to mask: drop it, or use train_federated.py")
    parallel.init_parallel(pick_device(args.device))
    runs = repeated(args, settings(args))
    run_each("train_federated_sparse", train, runs)
    if args.compare_strategies and parallel.is_main():
        print("\n" + overlap_table(runs))


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0], sparse=True)
    own.add_argument(
        "--sparsity-ratio",
        type=sparsity,
        default=0.9,
        metavar="X",
        help="share of the weights that is frozen, in (0, 1)",
    )
    own.add_argument(
        "--mask-strategy", choices=STRATEGIES, default="least_sensitive", help="which weights the mask keeps"
    )
    own.add_argument("--mask-scope", choices=SCOPES, default="global", help="one threshold, or one for each tensor")
    own.add_argument(
        "--calibration",
        choices=CALIBRATIONS,
        default="talos",
        help="talos: rounds exclude step by step; seed: the source's mean over rounds",
    )
    own.add_argument(
        "--calibration-rounds", type=positive_int, metavar="R", help="calibration rounds (default: 4; seed: 5)"
    )
    own.add_argument("--fisher-samples", type=positive_int, default=512, metavar="N", help="images a calibration round")
    own.add_argument(
        "--calibrate-on",
        choices=["server", "clients"],
        default="server",
        help="server: on its validation images; clients: the mean of scores that clients send",
    )
    own.add_argument("--calibration-clients", type=positive_int, default=10, metavar="N", help="clients that calibrate")
    own.add_argument(
        "--mask-merge",
        choices=["none", "union", "intersection"],
        default="none",
        help="of masks that the clients make each; none: one mask from the mean of their scores",
    )
    own.add_argument("--mask", metavar="FILE", help="use this mask.safetensors of another run")
    own.add_argument(
        "--upload",
        choices=["masked", "topk"],
        default="masked",
        help="topk: no mask, each client sends its largest changes, as many bytes a round",
    )
    own.add_argument("--compare-strategies", action="store_true", help="a run for each strategy")
    own.add_argument("--sparsity-experiment", action="store_true", help="a run for each of --sparsity-values")
    own.add_argument(
        "--sparsity-values", type=sparsity, nargs="+", default=[0.5, 0.7, 0.9, 0.95, 0.99], metavar="X", help="shares"
    )
    add_experiment_flags(own)
    return parser


def sparsity(text):
    """A number; what it may be is said by `check_sparsity`."""
    return non_negative_float(text)


if __name__ == "__main__":
    run_main(lambda parser: main(parse(parser)), build_parser())
