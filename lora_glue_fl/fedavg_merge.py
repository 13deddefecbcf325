"""One-shot FedAvg: trained adapters of several clients merged into one.

    python lora_glue_fl/fedavg_merge.py --adapters client1 client2 --svd_rank 8 --save_adapter merged
    python lora_glue_fl/fedavg_merge.py --adapters client1 client2 --svd_rank 8 --save_adapter merged \\
        --task_name sst2 --shard_manifests shards/client_1.json shards/client_2.json

    svd      Delta = sum_k p_k s_k B_k A_k, truncated to rank --svd_rank     (ranks and alphas may differ)
    naive    A = sum_k p_k A_k,  B = sum_k p_k B_k                            (--skip_svd; not the mean of products)
    rotate   the same of R_k^T A_k and B_k R_k, R_k a rotation that takes A_k nearest to the first adapter's A

p_k: from --weights, the clients' numbers of examples (--shard_manifests), or equal. The heads are averaged too. Writes
a peft adapter with fuse_manifest.json beside it; prints each rule's ||served - Delta|| / ||Delta||, then the folder.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from common.adapter_files import write_adapter
from common.aggregation import WeightedMean
from common.cli import Parser, add_machine_flags, parse, positive_float, positive_int, run_main
from common.evaluation import pick_device
from common.lowrank import AdapterMean
from common.parallel import Round
from lora_glue_fl.flags import add_evaluation_flags, add_split_flag, add_task_flags, refuse
from lora_glue_fl.glue_tasks import find_task
from lora_glue_fl.merging import base_model, check_alike, check_place, check_ranks, client_weights, error_lines
from lora_glue_fl.models import named_head
from lora_glue_fl.round_folders import read_served
from lora_glue_fl.task_model import evaluate_adapter

RULES = ("svd", "naive", "rotate")


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    own = parser.add_argument_group("the merge")
    own.add_argument("--adapters", nargs="+", required=True, metavar="DIR", help="the clients' adapter folders")
    own.add_argument("--weights", nargs="+", type=float, metavar="X", help="of the adapters (default: equal)")
    own.add_argument(
        "--shard-manifests", nargs="+", metavar="FILE", help="client_1.json ...: weights are numbers of examples"
    )
    own.add_argument("--aggregate", choices=RULES, default="svd", help="the rule")
    own.add_argument("--skip-svd", action="store_true", help="the same as --aggregate naive")
    own.add_argument("--svd-rank", type=positive_int, required=True, metavar="R", help="rank of the result")
    own.add_argument("--alpha", type=positive_float, metavar="X", help="alpha of the result (default: --svd-rank)")
    add_split_flag(own)
    own.add_argument("--save-adapter", required=True, metavar="DIR", help="folder of the result")
    own.add_argument("--overwrite", action="store_true", help="replace an adapter in that folder")
    own.add_argument("--eval", action="store_true", help="the task's metrics of the result on its validation split")
    add_task_flags(parser, task_required=False)
    run = parser.group("the run")
    run.add_argument(
        "--task-name", default="glue", metavar="TASK", help="a GLUE task, checked against the manifests; glue: any"
    )
    add_evaluation_flags(run)
    add_machine_flags(parser)
    return parser


def main(args):
    rule = "naive" if args.skip_svd else args.aggregate
    task = None if args.task_name == "glue" else find_task(args.task_name).name
    refuse(args.eval and task is None, "--eval needs the task: give --task-name, such as sst2")
    pick_device(args.device)  # one that is not there is refused without --eval too
    place, weights = check_place(args), client_weights(args, task)
    adapters = [read_served(path) for path in args.adapters]
    check_alike(adapters)
    first, base = adapters[0], base_model(args, adapters)
    refuse(args.eval and base is None, "--eval needs the base model, which the adapters do not name: give --model")
    without = f"{first.path} has no head to evaluate with: train it with modules_to_save, or drop --eval"
    refuse(args.eval and not first.head, without)
    alpha = check_ranks(args, adapters, rule)

    alike = len({(a.r, a.scale) for a in adapters}) == 1
    by_svd = {"rank": args.svd_rank, "new_scale": alpha / args.svd_rank, "split": args.svd_split}
    served = {"svd": average("svd", adapters, weights, seed=args.seed, **by_svd)}
    if alike:
        served["naive"] = average("naive", adapters, weights, rank=first.r)
        served["rotate"] = average("rotate", adapters, weights, rank=first.r)
    lines = error_lines(adapters, served)
    head = mean_head(adapters, weights)
    about = {"target_modules": first.target_modules, "base_model": base, "fan_in_fan_out": first.fan_in_fan_out}
    about["head_pooling"] = first.head_pooling
    about["modules_to_save"] = sorted({name for a in adapters for name in a.modules_to_save}) if head else []
    manifest = {
        "dataset": args.dataset,
        "model_id": base,
        "task": task or "glue",
        "k_adapters": len(adapters),
        "adapters": [str(path) for path in args.adapters],
        "weights": weights,
        "svd_rank": args.svd_rank,
        "alpha": alpha,
        "target_modules": first.target_modules,
        "aggregate": rule,
        "sha256": [adapter.sha256 for adapter in adapters],
        "relative_error": served[rule].error,
        "discarded": served[rule].discarded,
        "svd_split": args.svd_split if rule == "svd" else None,
        "seed": args.seed,
    }

    def write(folder):
        more = {"fuse_manifest.json": manifest}
        write_adapter(folder, served[rule].factors, head, alpha=alpha, base=first.base, more=more, **about)

    if args.eval:
        # Before anything is written where the user asked for it: evaluation finds bad input too
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            write(folder)
            manifest["eval"] = evaluate_adapter(folder, argparse.Namespace(**{**vars(args), "model": base}))
        lines += [f"{name}: {value:.6g}" for name, value in manifest["eval"].items()]
    write(place)
    print("\n".join([*lines, str(place)]))


def average(rule, adapters, weights, **served_as):
    """What the rule serves, a `common.lowrank.Served`."""
    clients = Round(range(len(adapters)), weights)
    mean = AdapterMean(rule, adapters[0].factors, adapters[0].scale, clients, **served_as)
    for k in clients:
        mean.add(adapters[k].factors, scale=adapters[k].scale)
    return mean.result()


def mean_head(adapters, weights):
    """{name: sum_k p_k head_k}; {} where the adapters have no head."""
    first = adapters[0].head
    if not first:
        return {}
    vectors = [torch.cat([adapter.head[name].reshape(-1) for name in first]) for adapter in adapters]
    mean = WeightedMean(vectors[0], clients := Round(range(len(adapters)), weights))
    for k in clients:
        mean.add(vectors[k])
    return named_head(mean.result(), first)


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
