"""What `fedavg_merge.py` refuses, and what it takes from its flags: adapters that fit, weights, the base model."""

import math
from pathlib import Path

import torch

from common.adapter_files import refuse_other_files
from common.cli import UsageError, say
from lora_glue_fl.flags import SIZES, refuse
from lora_glue_fl.shards import load_manifest


def check_place(args):
    """Where the result goes, a `Path`. Raises UsageError where --save-adapter cannot take it."""
    place = Path(args.save_adapter).expanduser()
    refuse_other_files(place)
    if place.is_dir() and any(place.iterdir()) and not args.overwrite:
        raise UsageError(f"--save-adapter {place} exists: choose another folder, or give --overwrite")
    read = [Path(path).expanduser().resolve() / part for path in args.adapters for part in ("", "final", "adapter")]
    if place.resolve() in read:
        raise UsageError(f"--save-adapter {place} is one of --adapters: choose another folder")
    for suffix in (".new", ".old"):  # the names of the steps in which `write_adapter` replaces a folder
        beside = place.with_name(place.name + suffix)
        refuse(beside.exists(), f"{beside} would be deleted: move it away, or choose another --save-adapter")
    return place


def client_weights(args, task):
    """p_k, a list of numbers with sum 1. Raises UsageError for weights or manifests that do not fit."""
    k, weights, files = len(args.adapters), args.weights, args.shard_manifests
    refuse(weights and files, "--weights and --shard-manifests are both given: give one of them")
    if files:
        refuse(len(files) != k, f"{len(files)} --shard-manifests for {k} --adapters: give one for each, in that order")
        weights = _examples(files, task)
    weights = weights or [1.0] * k
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
            first, other = known[0]
            shown = f"{path} is of {what} {str(value)[:12]}, {first} of {str(other)[:12]}"
            refuse(value != other, f"{shown}: give shards of one data set")
    return [float(len(manifest["indices"])) for manifest in manifests]


def check_alike(adapters):
    """Raises UsageError, with the two folders' names, for adapters that cannot be averaged."""
    first = adapters[0]
    for other in adapters[1:]:
        pair = f"{other.path} and {first.path}"
        bases = [(_normal(each.base_model), each.config.get("revision")) for each in (other, first)]
        refuse(
            bases[0] != bases[1],
            f"{pair} have different base models ({bases[0][0]}, {bases[1][0]}): merge adapters of one base model; if "
            "it is the same one under two names, correct base_model_name_or_path in adapter_config.json",
        )
        odd = sorted(other.factors.keys() ^ first.factors.keys())
        if odd:
            raise UsageError(
                f"{pair} have different targets ({', '.join(other.target_modules)}; {', '.join(first.target_modules)}; "
                f"{odd[0]} is in one of them): merge adapters with the same targets"
            )
        both = f"{other.head_pooling} and {first.head_pooling}"
        refuse(
            other.head_pooling != first.head_pooling,
            f"{pair} were trained with --pooling {both}: merge adapters whose heads read the same",
        )
        differ = other.fan_in_fan_out != first.fan_in_fan_out
        refuse(differ, f"{pair} differ in fan_in_fan_out: merge adapters of one base model")
        for layer in other.factors:
            (d, k), (d_0, k_0) = (layer_size(each, layer) for each in (other, first))
            refuse(
                (d, k) != (d_0, k_0),
                f"{pair} are for different base models: {layer} is {d} x {k} and {d_0} x {k_0}: merge adapters of one "
                "base model",
            )
        same = other.base.keys() == first.base.keys()
        refuse(
            not same or any(not torch.equal(weight, first.base[layer]) for layer, weight in other.base.items()),
            f"{pair} belong to other base weights, those of other rounds or runs: merge clients of one round",
        )
        shapes = [{name: list(t.shape) for name, t in each.head.items()} for each in (other, first)]
        if not all(shapes) and any(shapes):
            without = other if first.head else first
            raise UsageError(f"{without.path} has no head, the others have one: save all with modules_to_save, or none")
        if shapes[0] != shapes[1]:
            odd = min(name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name))
            raise UsageError(
                f"{pair} have different heads: {odd} is {shapes[0].get(odd)} and {shapes[1].get(odd)}: merge adapters "
                "of one task"
            )


def layer_size(adapter, layer):
    """(d, k) of a layer that the adapter changes."""
    A, B = adapter.factors[layer]
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
    if args.model and own and not Path(own).is_dir() and Path(own).name != Path(args.model).name:
        say(f"warning: the adapters were trained on {own}, the result names --model {args.model}")
    return args.model or own or SIZES.get(args.model_size)


def check_ranks(args, adapters, rule):
    """The result's alpha. Raises UsageError for a rank or an alpha that the rule does not serve."""
    ranks, scales = sorted({a.r for a in adapters}), sorted({a.scale for a in adapters})
    rank, together = args.svd_rank, sum(a.r for a in adapters)
    widest = max(min(layer_size(adapters[0], layer)) for layer in adapters[0].factors)
    refuse(rank > widest, f"--svd-rank {rank} is above the layers' {widest}: lower it")
    shown = f"--svd-rank {rank} is above {together}, the rank of {len(adapters)} adapters together"
    refuse(rank > together, f"{shown}: lower it")
    if rule == "svd":
        return rank if args.alpha is None else args.alpha
    if ranks != [rank] or len(scales) > 1:
        raise UsageError(
            f"without SVD the ranks stay: the adapters have ranks {_listed(ranks)} and scales {_listed(scales)}, not "
            f"one rank --svd-rank {rank} and one scale: take --aggregate svd"
        )
    alpha = scales[0] * rank
    if args.alpha is not None and not math.isclose(args.alpha, alpha, rel_tol=1e-9):
        raise UsageError(f"without SVD alpha stays {alpha:g}, not --alpha {args.alpha:g}: drop it, or take svd")
    return alpha


def error_lines(adapters, served):
    """`svd: relative error 0.1, discarded energy 0.01`, a line a rule. served: {rule: `common.lowrank.Served`}."""
    lines = [f"{rule}: relative error {each.error:.4g}" for rule, each in served.items()]
    svd = served["svd"]
    lines[0] += f", discarded energy {svd.discarded:.4g}"
    if svd.missing:
        directions = sum(len(A) for A, _ in svd.factors.values())
        lines[0] += f", {svd.missing} of {directions} directions without a value: B is 0 there, A random"
    if "naive" not in served:
        ranks, scales = (sorted({getattr(a, name) for a in adapters}) for name in ("r", "scale"))
        lines.append(f"naive, rotate: not defined for ranks {_listed(ranks)} at scales {_listed(scales)}")
    return lines


def _listed(values):
    return ", ".join(f"{value:g}" for value in values)
