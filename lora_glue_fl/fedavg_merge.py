"""One-shot FedAvg: trained adapters of several clients merged into one.

    python lora_glue_fl/fedavg_merge.py --adapters client1 client2 --svd_rank 8 --save_adapter merged
    python lora_glue_fl/fedavg_merge.py --adapters client1 client2 --svd_rank 8 --save_adapter merged \\
        --task_name sst2 --shard_manifests shards/client_1.json shards/client_2.json

Delta = sum_k p_k s_k B_k A_k, truncated to rank --svd_rank: FlexLoRA (Bai et al. 2024); ranks and alphas may differ.

p_k: from --weights, the clients' numbers of examples (--shard_manifests), or equal. The heads are averaged too. Writes
a peft adapter with fuse_manifest.json beside it; prints ||served - Delta|| / ||Delta||, then the folder.
"""

import math
from pathlib import Path

import torch

from common.cli import Parser, UsageError, parse, positive_float, positive_int, run_main
from common.lora import refuse_other_files, write_adapter
from common.lowrank import AdapterMean
from common.rounds import Round
from common.vector import fingerprint
from lora_glue_fl.flags import SIZES, add_data_flags, add_model_flags, refuse
from lora_glue_fl.glue_tasks import find_task
from lora_glue_fl.models import named_views, read_served
from lora_glue_fl.sharding import load_manifest


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.group("the merge").add_argument
    add("--adapters", nargs="+", required=True, metavar="DIR", help="the clients' adapter folders")
    add("--weights", nargs="+", type=float, metavar="X", help="of the adapters (default: equal)")
    text = "client_1.json ...: weights are numbers of examples"
    add("--shard-manifests", nargs="+", metavar="FILE", help=text)
    add("--svd-rank", type=positive_int, required=True, metavar="R", help="rank of the result")
    add("--alpha", type=positive_float, metavar="X", help="alpha of the result (default: --svd-rank)")
    add("--save-adapter", required=True, metavar="DIR", help="folder of the result")
    text = "a GLUE task, checked against the manifests; glue: any"
    add("--task-name", default="glue", metavar="TASK", help=text)
    add_model_flags(parser)
    add_data_flags(parser)
    return parser


def main(args):
    task = None if args.task_name == "glue" else find_task(args.task_name).name
    place, weights = Path(args.save_adapter).expanduser(), client_weights(args, task)
    refuse_other_files(place)
    refuse(str(place) in args.adapters, f"--save-adapter {place} is one of --adapters: choose another folder")
    adapters = [read_served(path) for path in args.adapters]
    check_alike(adapters)
    rank, together = args.svd_rank, sum(a.r for a in adapters)
    refuse(rank > together, f"--svd-rank {rank} is above {together}, the adapters' ranks together: lower it")
    first, alpha = adapters[0], rank if args.alpha is None else args.alpha
    base = args.model or first.base_model or SIZES.get(args.model_size)

    clients = Round(range(len(adapters)), weights)
    heads = [torch.cat([a.head[name].reshape(-1) for name in first.head]) if first.head else None for a in adapters]
    served_as = {"rank": rank, "new_scale": alpha / rank, "seed": 42, "head": heads[0]}
    mean = AdapterMean("svd", first.factors, first.scale, clients, **served_as)
    for k in clients:
        mean.add(adapters[k].factors, heads[k], scale=adapters[k].scale)
    served = mean.result()

    head = named_views(served.head, first.head) if first.head else {}
    about = {"target_modules": first.target_modules, "base_model": base, "fan_in_fan_out": first.fan_in_fan_out}
    about |= {"alpha": alpha, "head_pooling": first.head_pooling, "base": first.base}
    about["modules_to_save"] = sorted({name for a in adapters for name in a.modules_to_save}) if head else []
    manifest = {
        "dataset": args.dataset,
        "model_id": base,
        "task": task or "glue",
        "k_adapters": len(adapters),
        "adapters": [str(path) for path in args.adapters],
        "weights": weights,
        "svd_rank": rank,
        "alpha": alpha,
        "target_modules": first.target_modules,
        "sha256": [adapter.sha256 for adapter in adapters],
        "relative_error": served.error,
    }
    write_adapter(place, served.factors, head, more={"fuse_manifest.json": manifest}, **about)
    print(f"relative error {served.error:.4g}")
    print(place)


# ---- what is refused


def client_weights(args, task):
    """p_k, a list of numbers with sum 1. Raises UsageError for weights or manifests that do not fit."""
    k, weights, files = len(args.adapters), args.weights, args.shard_manifests
    refuse(weights and files, "--weights and --shard-manifests are both given: give one of them")
    if files:
        weights = [float(len(load_manifest(path, task)["indices"])) for path in files]
    weights = weights or [1.0] * k
    flag = "--shard-manifests" if files else "--weights"
    refuse(len(weights) != k, f"{len(weights)} {flag} for {k} --adapters: give one for each")
    wrong = not all(0 <= w < math.inf for w in weights) or not any(weights)
    refuse(wrong, f"--weights {weights}: give finite numbers of at least 0, one above 0")
    return [w / sum(weights) for w in weights]


def check_alike(adapters):
    """Raises UsageError, with the two folders' names, for adapters that cannot be averaged."""
    first, here = adapters[0], facts(adapters[0])
    for other in adapters[1:]:
        there = facts(other)
        if odd := [what for what in here if there[what] != here[what]]:
            shown = f"{odd[0]} ({str(there[odd[0]])[:200]}; {str(here[odd[0]])[:200]})"
            raise UsageError(f"{other.path} and {first.path} differ in their {shown}: merge adapters that agree in it")


def facts(adapter):
    """{what: value} of what adapters that are averaged must agree in."""
    return {
        "base model": (adapter.base_model or "").removeprefix("FacebookAI/"),  # the hub's other name of roberta-base
        "pooling of the head": adapter.head_pooling,
        "layers' sizes": {layer: (len(B), A.shape[1]) for layer, (A, B) in adapter.factors.items()},
        "base weights": fingerprint(adapter.base),  # of one round of stack or residual they are the same
        "head": {name: tuple(t.shape) for name, t in adapter.head.items()},
    }


if __name__ == "__main__":
    args = parse(build_parser())
    run_main(main, args)
