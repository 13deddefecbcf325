"""One-shot FedAvg: trained adapters of several clients merged into one.

    python lora_glue_fl/fedavg_merge.py --model_size base --task_name sst2 --adapters client1/adapter client2/adapter \\
        --shard_manifests shards/client_1.json shards/client_2.json --svd_rank 8 --save_adapter out_merged/adapter

    svd      Delta = sum_k p_k s_k B_k A_k, truncated to rank --svd_rank     (ranks and alphas may differ)
    naive    A = sum_k p_k A_k,  B = sum_k p_k B_k                            (--skip_svd; not the mean of products)

p_k: from --weights, the clients' numbers of examples (--shard_manifests), or equal. The heads are averaged too. Writes
a peft adapter with fuse_manifest.json beside it; prints each rule's ||served - Delta|| / ||Delta||, then the folder.
"""

import argparse
import math
import tempfile
from pathlib import Path

from common.adapter_files import read_adapter, refuse_other_files, write_adapter
from common.before.aggregation import WeightedMean
from common.before.lowrank import AdapterMean
from common.cli import Parser, UsageError, positive_float, positive_int, run_main
from common.parallel import Lanes
from common.products import SPLITS
from common.runlog import add_machine_flags
from lora_glue_fl.flags import add_task_flags, refuse
from lora_glue_fl.glue_tasks import find_task
from lora_glue_fl.models import SIZES
from lora_glue_fl.sharding import load_manifest

RULES = ("svd", "naive")


def main(args):
    rule = "naive" if args.skip_svd else args.aggregate
    task = None if args.task_name == "glue" else find_task(args.task_name).name
    refuse(args.eval and task is None, "--eval needs the task: give --task-name, such as sst2")
    check_place(args)
    weights = client_weights(args, task)
    adapters = [read_adapter(path) for path in args.adapters]
    check_alike(adapters)
    base = base_model(args, adapters)
    refuse(args.eval and base is None, "--eval needs the base model, which the adapters do not name: give --model")
    refuse(
        args.eval and not adapters[0].head,
        f"{adapters[0].path} has no head to evaluate with: train it with modules_to_save, or drop --eval",
    )

    served, alpha, lines = average(adapters, weights, rule, args)
    head = mean_head(adapters, weights)
    manifest = {
        "dataset": args.dataset,
        "model_id": base,
        "task": task or "glue",
        "k_adapters": len(adapters),
        "adapters": [str(path) for path in args.adapters],
        "weights": weights,
        "svd_rank": args.svd_rank,
        "alpha": alpha,
        "target_modules": adapters[0].target_modules,
        "aggregate": rule,
        "sha256": [adapter.sha256 for adapter in adapters],
        "relative_error": served.error,
        "discarded": served.discarded,
        "svd_split": args.svd_split if rule == "svd" else None,
        "seed": args.seed,
    }

    def write(folder):
        write_adapter(
            folder,
            served.factors,
            head,
            alpha=alpha,
            target_modules=adapters[0].target_modules,
            modules_to_save=sorted({name for adapter in adapters for name in adapter.modules_to_save}) if head else [],
            base_model=base,
            fan_in_fan_out=adapters[0].fan_in_fan_out,
            more={"fuse_manifest.json": manifest},
        )

    if args.eval:
        # Before anything is written where the user asked for it: evaluation finds bad input too
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch) / "adapter")
            manifest["eval"] = evaluate(Path(scratch) / "adapter", base, args)
        lines += [f"{name}: {value:.6g}" for name, value in manifest["eval"].items()]
    write(args.save_adapter)
    print("\n".join([*lines, str(args.save_adapter)]))


# ------------------------------------------------------------------------------------------------ checks


def check_place(args):
    """Raises UsageError where --save-adapter cannot take the result."""
    place = Path(args.save_adapter).expanduser()
    args.save_adapter = place
    refuse_other_files(place)
    if place.is_dir() and any(place.iterdir()) and not args.overwrite:
        raise UsageError(f"--save-adapter {place} exists: choose another folder, or give --overwrite")
    if place.resolve() in [Path(path).expanduser().resolve() for path in args.adapters]:
        raise UsageError(f"--save-adapter {place} is one of --adapters: choose another folder")
    for suffix in (".new", ".old"):  # the names of the steps in which `write_adapter` replaces a folder
        beside = place.with_name(place.name + suffix)
        refuse(beside.exists(), f"{beside} would be deleted: move it away, or choose another --save-adapter")


def client_weights(args, task):
    """p_k, a list of numbers with sum 1. Raises UsageError for weights or manifests that do not fit."""
    k = len(args.adapters)
    refuse(
        args.weights is not None and args.shard_manifests is not None,
        "--weights and --shard-manifests are both given: give one of them",
    )
    weights = [1.0] * k
    if args.shard_manifests is not None:
        refuse(
            len(args.shard_manifests) != k,
            f"{len(args.shard_manifests)} --shard-manifests for {k} --adapters: give one for each, in the same order",
        )
        weights = _examples(args.shard_manifests, task)
    if args.weights is not None:
        weights = args.weights
        refuse(len(weights) != k, f"{len(weights)} --weights for {k} --adapters: give one for each")
    total = sum(weights)
    if not all(w >= 0 and math.isfinite(w) for w in weights) or not 0 < total < math.inf:
        shown = " ".join(f"{w:g}" for w in weights)
        raise UsageError(f"--weights {shown}: give finite numbers of at least 0 with a sum above 0")
    return [w / total for w in weights]


def _examples(paths, task):
    manifests = [load_manifest(path, task_name=task) for path in paths]
    for key, what in (("task", "task"), ("fingerprint", "data with fingerprint")):
        known = [(path, m[key]) for path, m in zip(paths, manifests, strict=True) if m.get(key) is not None]
        for path, value in known:
            refuse(
                value != known[0][1],
                f"{path} is of {what} {str(value)[:12]}, {known[0][0]} of {str(known[0][1])[:12]}: give shards of one "
                "data set",
            )
    return [float(len(manifest["indices"])) for manifest in manifests]


def check_alike(adapters):
    """Raises UsageError, with the two folders' names, for adapters that cannot be averaged."""
    first = adapters[0]
    for other in adapters[1:]:
        pair = f"{other.path} and {first.path}"
        mine, theirs = _normal(first.base_model), _normal(other.base_model)
        if (mine, first.config.get("revision")) != (theirs, other.config.get("revision")):
            raise UsageError(
                f"{pair} have different base models ({theirs}, {mine}): merge adapters of one base model; if it is the "
                "same one under two names, correct base_model_name_or_path in adapter_config.json"
            )
        odd = sorted(other.factors.keys() ^ first.factors.keys())
        if odd:
            raise UsageError(
                f"{pair} have different targets ({', '.join(other.target_modules)}; {', '.join(first.target_modules)}; "
                f"{odd[0]} is in one of them): merge adapters with the same targets"
            )
        if other.fan_in_fan_out != first.fan_in_fan_out:
            raise UsageError(f"{pair} differ in fan_in_fan_out: merge adapters of one base model")
        for layer, (A, B) in other.factors.items():
            here, there = _size(*first.factors[layer]), _size(A, B)
            if here != there:
                raise UsageError(
                    f"{pair} are for different base models: {layer} is {there[0]} x {there[1]} and {here[0]} x "
                    f"{here[1]}: merge adapters of one base model"
                )
        shapes = [{name: list(t.shape) for name, t in adapter.head.items()} for adapter in (other, first)]
        if not all(shapes) and any(shapes):
            without = other if first.head else first
            raise UsageError(f"{without.path} has no head, the others have one: save all with modules_to_save, or none")
        if shapes[0] != shapes[1]:
            odd = min(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            raise UsageError(
                f"{pair} have different heads: {odd} is {shapes[0].get(odd)} and {shapes[1].get(odd)}: merge adapters "
                "of one task"
            )


def _size(A, B):
    return B.shape[0], A.shape[1]


def _normal(name):
    """The hub knows roberta-base as FacebookAI/roberta-base too."""
    return name and name.rstrip("/").removeprefix("FacebookAI/")


def base_model(args, adapters):
    """The base model of the result: --model, else the adapters' own, else by --model-size."""
    own = adapters[0].base_model
    wrong = [size for size, name in SIZES.items() if size != args.model_size and _normal(own) == name]
    if args.model_size and not args.model and wrong:
        raise UsageError(f"--model-size {args.model_size}, but the adapters are of {own}: give --model-size {wrong[0]}")
    return args.model or own or SIZES.get(args.model_size)


# ------------------------------------------------------------------------------------------------ the mean


def average(adapters, weights, rule, args):
    """What `rule` serves (`common.before.lowrank.Served`), its alpha, and a line on each rule's error."""
    ranks, scales = sorted({a.r for a in adapters}), sorted({a.scale for a in adapters})
    widest = max(min(_size(*pair)) for pair in adapters[0].factors.values())
    refuse(args.svd_rank > widest, f"--svd-rank {args.svd_rank} is above the layers' {widest}: lower it")
    together = sum(a.r for a in adapters)
    refuse(
        args.svd_rank > together,
        f"--svd-rank {args.svd_rank} is above {together}, the rank of {len(adapters)} adapters together: lower it",
    )
    alike = len(ranks) == len(scales) == 1
    alpha = args.svd_rank if args.alpha is None else args.alpha
    if rule == "naive":
        if not alike or ranks[0] != args.svd_rank:
            raise UsageError(
                f"without SVD the ranks stay: the adapters have ranks {_listed(ranks)} and scales {_listed(scales)}, "
                f"not one rank --svd-rank {args.svd_rank} and one scale: take --aggregate svd"
            )
        own = scales[0] * ranks[0]
        if args.alpha is not None and not math.isclose(args.alpha, own, rel_tol=1e-9):
            raise UsageError(f"without SVD alpha stays {own:g}, not --alpha {args.alpha:g}: drop it, or take svd")
        alpha = own
    served, lines = {}, []
    for each in RULES:
        if each == "naive" and not alike:
            lines.append(f"naive: not defined for ranks {_listed(ranks)} at scales {_listed(scales)}")
            continue
        rank, scale = (args.svd_rank, alpha / args.svd_rank) if each == "svd" else (ranks[0], scales[0])
        start = adapters[0].factors
        mean = AdapterMean(
            *(each, start, adapters[0].scale, lanes := Lanes(range(len(adapters)))),
            **{"seed": args.seed, "rank": rank, "new_scale": scale, "split": args.svd_split},
        )
        for k in lanes:
            mean.add(adapters[k].factors, weights[k], adapters[k].scale)
        served[each] = mean.result()
        lines.append(f"{each}: relative error {served[each].error:.4g}" + _share(each, served[each], len(start) * rank))
    return served[rule], alpha, lines


def _share(rule, served, directions):
    if rule != "svd":
        return ""
    text = f", discarded energy {served.discarded:.4g}"
    if served.missing:
        text += f", {served.missing} of {directions} directions without a value: B is 0 there, A random"
    return text


def _listed(values):
    return ", ".join(f"{value:g}" for value in values)


def mean_head(adapters, weights):
    """{name: sum_k p_k head_k}, in fp64 and rounded once; {} where the adapters have no head."""
    if not adapters[0].head:
        return {}
    mean = WeightedMean(adapters[0].head, lanes := Lanes(range(len(adapters))))
    for k in lanes:
        mean.add(adapters[k].head, weight=weights[k])
    return mean.result()


def evaluate(folder, base, args):
    """{"val_...": number} of the adapter in `folder` on the validation split."""
    from lora_glue_fl.task_model import evaluate_adapter

    return evaluate_adapter(folder, argparse.Namespace(**{**vars(args), "model": base}))


# ------------------------------------------------------------------------------------------------ command


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
    own.add_argument(
        "--svd-split",
        choices=SPLITS,
        default="us",
        help="us: B = U S, A = V^T; balanced: the root of S in both",
    )
    own.add_argument("--save-adapter", required=True, metavar="DIR", help="folder of the result")
    own.add_argument("--overwrite", action="store_true", help="replace an adapter in that folder")
    own.add_argument("--eval", action="store_true", help="the task's metrics of the result on its validation split")
    add_task_flags(parser, task_required=False)
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--task-name", default="glue", metavar="TASK", help="a GLUE task, checked against the manifests; glue: any"
    )
    run.add_argument(
        "--eval-batch-size", type=positive_int, default=32, metavar="B", help="examples a batch in evaluation"
    )
    add_machine_flags(run)
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
