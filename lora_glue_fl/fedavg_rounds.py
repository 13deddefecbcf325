"""Federated LoRA on a GLUE task: rounds of local AdamW, the clients' adapters averaged by one of six rules.

    python lora_glue_fl/fedavg_rounds.py --model_size base --task_name sst2 --shard_dir out/sst2_base/shards_iid_k3
    python lora_glue_fl/sharding.py --task_name sst2 --k 3 --out_dir shards --dataset demo        # offline, a CPU:
    python lora_glue_fl/fedavg_rounds.py --model tiny --dataset demo --task_name sst2 --shard_dir shards --rounds 3

Delta_k = s_k B_k A_k,  p_k = n_k / sum_j n_j;  svd serves the best rank-r approximation of sum_k p_k Delta_k (FlexLoRA,
Bai et al. 2024), the other rules are in common/lowrank.py. The head is averaged by p_k too.
"""

import argparse

from common import parallel
from common.before.aggregation import WeightedMean
from common.before.lowrank import RULES
from common.checkpoint import read_json
from common.cli import half_open_fraction, non_negative_float, positive_float, positive_int, run_main
from common.evaluation import pick_device
from common.products import SPLITS
from common.runlog import start_run
from lora_glue_fl.fed_core import Study
from lora_glue_fl.flags import add_lora_flags, add_training_flags, make_parser, refuse
from lora_glue_fl.models import size_label


def train(args):
    with start_run("fedavg_rounds", args, args.run_name, unit="examples") as run:
        study = Study(args, run)
        lasting = study.lasting
        theta = run.restore(study.initial_weights(), lasting, same_shapes=False)
        study.folders.clean(run.start_round - 1)

        for round in run.rounds(args.rounds):
            clients = study.begin_round(theta, round)
            mean, heads = study.adapter_mean(theta, round), WeightedMean(study.head(theta), clients)
            for k in clients:
                factors_k, head_k, n_k = study.local_update(theta, k, round)
                if study.left_out(k, factors_k, head_k):
                    continue
                mean.add(factors_k, weight=n_k)
                heads.add(head_k, weight=n_k)
                study.keep_client(k, factors_k, head_k, round)
            study.check_left_out(round)
            served = mean.result(study.step())
            study.close_round(served, round)
            theta = study.serve(theta, served, heads)
            study.report(theta, served, round)
            run.save(round, theta, lasting)
            study.folders.prune(round)

        study.finish(theta)


def main(args):
    parallel.init_parallel(pick_device(args.device))
    train(complete(args))


def complete(args):
    """Fills in what depends on other flags. Raises UsageError for flags that contradict each other."""
    if args.skip_svd:
        refuse(args.aggregate not in (None, "naive"), f"--skip-svd is --aggregate naive, not {args.aggregate}")
        args.aggregate = "naive"
    args.aggregate = args.aggregate or "svd"
    args.alpha = args.svd_rank if args.alpha is None else args.alpha
    if args.server_lr is None:
        args.server_lr = 1.0 if args.server_optimizer in ("none", "momentum") else 0.01
    args.keep = sorted(set(args.keep))
    args.run_name = args.run_name or run_name(args)
    return args


def run_name(args):
    """The run's folder: {task}_{size}, or where that holds a run of another rule or start, with these in its name."""
    name = f"{args.task_name.lower()}_{size_label(args)}"
    manifest = f"{args.output_dir}/{name}/run.json"
    try:
        there = read_json(manifest)["args"]
    except (OSError, ValueError, KeyError):
        return name
    if args.overwrite or all(there.get(key) == getattr(args, key) for key in ("aggregate", "init_adapter")):
        return name
    other = f"{name}_{args.aggregate}" + "_warm" * bool(args.init_adapter)
    if parallel.is_main():
        print(f"{args.output_dir}/{name} holds a run of {there.get('aggregate')}: this one goes to {other}")
    return other


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0], "./out_fedavg", "--output-root")
    own.add_argument(
        "--aggregate", choices=RULES, help="how the server averages the adapters, see common/lowrank.py (default: svd)"
    )
    own.add_argument("--skip-svd", action="store_true", help="the same as --aggregate naive")
    own.add_argument("--svd-rank", type=positive_int, default=8, metavar="R", help="svd: rank of what is served")
    own.add_argument("--alpha", type=positive_float, metavar="X", help="svd: alpha of what is served (default: R)")
    own.add_argument(
        "--svd-split",
        choices=SPLITS,
        default="us",
        help="svd: B = U S, A = V^T, or the singular values' roots in both",
    )
    add_lora_flags(own)
    own.add_argument(
        "--client-ranks",
        type=positive_int,
        nargs="+",
        metavar="R",
        help="svd, stack: rank of each client, repeated in turn (default: --lora-r)",
    )
    own.add_argument("--init-adapter", metavar="DIR", help="adapter to begin with (default: A random, B zero)")
    own.add_argument("--mu", type=non_negative_float, default=0.0, metavar="X", help="FedProx's mu; off: 0")
    own.add_argument(
        "--server-optimizer",
        choices=["none", "momentum", "adam", "yogi", "adagrad"],
        default="none",
        help="on the mean factors and head, for naive, ffa and rolora",
    )
    own.add_argument(
        "--server-lr", type=positive_float, metavar="X", help="its learning rate (default: 1 for momentum, else 0.01)"
    )
    own.add_argument("--server-beta", type=half_open_fraction, default=0.9, metavar="X", help="of momentum; off: 0")
    federated = parser.add_argument_group("rounds")
    federated.add_argument("--shard-dir", required=True, metavar="DIR", help="manifests that sharding.py wrote")
    federated.add_argument("--rounds", "--num-rounds", type=positive_int, default=5, metavar="T", help="rounds")
    federated.add_argument(
        "--local-epochs", type=positive_float, default=1.0, metavar="X", help="passes over a client's examples a round"
    )
    federated.add_argument(
        "--client-weights", choices=["examples", "uniform"], default="examples", help="weight of a client in the mean"
    )
    add_training_flags(
        parser,
        2e-4,
        *("--batch-size", "--eval-batch-size"),
        *("--per-device-train-batch-size", "--per-device-eval-batch-size"),
    )
    report = parser.add_argument_group("what is kept")
    report.add_argument("--eval-each-round", action="store_true", help="evaluate every round (else only the last)")
    report.add_argument("--eval-clients", action="store_true", help="evaluate each client's adapter too")
    report.add_argument(
        "--keep",
        nargs="+",
        choices=["all", "last", "best"],
        default=["last", "best"],
        metavar="WHICH",
        help="folders of rounds that stay: all, last, best (default: last best)",
    )
    report.add_argument(
        "--save-clients", action=argparse.BooleanOptionalAction, default=True, help="write the clients' adapters too"
    )
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
