"""Which weights a sparse run may change: scores, exact thresholds, calibration over several rounds, mask files.

A mask is True where a weight is trained. Masks cover the maskable parameters only; in a sparse run every other
parameter stays as it is.

    names = maskable(model)
    masks = calibrate(theta, names, scores, strategy="least_sensitive", sparsity=0.9)

`scores(theta, round)` is the caller's: the server's own data (`sensitivity`), or the mean of what clients sent
(`mean_over_clients`). References: Iurada et al. 2025 (TaLoS) and its public code, called so below.
"""

import contextlib
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.before.aggregation import WeightedMean
from common.before.fisher import diagonal_fisher
from common.checkpoint import saving
from common.cli import RunFailed, UsageError
from common.seeding import stream

STRATEGIES = ("least_sensitive", "most_sensitive", "lowest_magnitude", "highest_magnitude", "random")
SENSITIVITY = STRATEGIES[:2]
CALIBRATIONS = ("talos", "seed")
SCOPES = ("global", "layer")
DAMPING = 0.1  # TaLoS: what an excluded weight is multiplied by while the next round's scores are computed
_BATCH = 64  # images that are prepared, and labelled by the model, at once
_SMALL = 2**21  # weights up to which vmap is faster than the loop on a CPU too (tiny: 2.5x; ViT-S at 224: equal)


def maskable(model, head="classifier"):
    """Names of the parameters that a mask covers, in the order of `named_parameters`.

    Weights and biases of linear, convolution, attention and layer-norm modules that are trainable; not the head,
    nor what a module holds itself (class token, position embedding). So the patch projection, a convolution, is
    maskable unless the embeddings are frozen, as in TaLoS.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.MultiheadAttention)
    found = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, kinds) and prefix.split(".")[0] != head
        for name, _ in module.named_parameters(recurse=False)
    }
    return [name for name, p in model.named_parameters() if name in found and p.requires_grad]


def check_sparsity(sparsity):
    """Raises UsageError unless 0 < sparsity < 1, sparsity being the fraction of weights that is frozen."""
    if sparsity == 0:
        raise UsageError("sparsity 0 freezes nothing: use train_federated.py, or a sparsity between 0 and 1")
    if sparsity == 1:
        raise UsageError("sparsity 1 freezes every weight, nothing would be trained: use one below 1, such as 0.99")
    if not 0 < sparsity < 1:
        raise UsageError(f"sparsity {sparsity} is the fraction of weights that is frozen: use one between 0 and 1")


def choose(scores, keep, *, largest=False, scope="global", allowed=None):
    """Masks of exactly k weights, those with the lowest (or `largest`) scores: by rank, never by a threshold.

    k = round(keep * n), n the number of all weights ("global") or of each tensor's ("layer"). Among equal scores
    the one that comes first wins: tensors in the order of `scores`, elements as they lie in memory. (A threshold
    from a quantile keeps every tied weight: 40 % where 10 % was asked for, if these are zeros.)

    Args: scores: dict name -> tensor; keep: fraction, or for "global" k itself (an int); allowed: dict of bool
        tensors, only these weights may be kept (n still counts all).
    Returns: dict name -> bool tensor on the CPU, of the scores' shapes. The same bits for any number of threads.
    Raises: RunFailed for scores that are not finite; ValueError for an unknown scope, keep outside [0, 1], or
        fewer than k allowed weights.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r} is none of {', '.join(SCOPES)}")
    if scope == "layer":
        masks = {}
        for name, score in scores.items():
            part = None if allowed is None else {name: allowed[name]}
            masks.update(choose({name: score}, float(keep), largest=largest, allowed=part))
        return masks
    double = any(score.dtype == torch.float64 for score in scores.values())
    flat = [_flat(name, score, double) for name, score in scores.items()]
    values = np.concatenate(flat) if len(flat) > 1 else flat[0]
    k = keep if isinstance(keep, int) else _count_of(keep, values.size)
    if allowed is None:
        kept = _lowest(-values if largest else values, k)
    else:
        open_ = np.concatenate([allowed[name].detach().cpu().numpy().reshape(-1) for name in scores])
        values = values[open_]
        kept = np.zeros(open_.size, dtype=bool)
        kept[open_] = _lowest(-values if largest else values, k)
    masks, start = {}, 0
    for name, score in scores.items():
        part = kept[start : start + score.numel()]
        masks[name] = torch.from_numpy(part.reshape(score.shape).copy())
        start += score.numel()
    return masks


def calibrate(
    theta, names, scores, *, strategy, sparsity, method="talos", rounds=4, scope="global", seed=0, damping=DAMPING
):
    """The masks of a strategy: exactly round((1 - sparsity) n) weights, over all tensors or in each.

    Sensitivity strategies call `scores(weights, r)` for r = 0 .. rounds - 1:

        "talos"  multi-round: after round r = 1 .. R a fraction (1 - sparsity)^(r/R) is kept; what a round excludes
                 stays excluded, and its weights are multiplied by `damping` for the next scores.
        "seed"   one threshold on the mean of R scores at theta, which the caller takes from R disjoint batches
                 (`calibration_rows`).

    The magnitude and random strategies need one round and no data: |theta_j|; a uniform draw keyed by `seed`.
    theta is never changed: damped weights are copies.

    Args: theta: dict name -> tensor; names: of `maskable`; scores: function (weights, round) -> dict name ->
        tensor for these names, weights a dict like theta.
    Returns: dict name -> bool tensor on the CPU.
    Raises: UsageError for a sparsity outside (0, 1), or one that keeps no weight; ValueError for unknown words.
    """
    check_sparsity(sparsity)
    if strategy not in STRATEGIES or method not in CALIBRATIONS or rounds < 1:
        raise ValueError(f"unknown strategy {strategy!r} or calibration {method!r}, or rounds {rounds} below 1")
    if not names:
        raise UsageError("every weight is frozen, there is nothing to mask: thaw layers (--freeze-layers)")
    keep = 1.0 - sparsity
    total = sum(theta[name].numel() for name in names)
    if not any(_count_of(keep, n) for n in ([total] if scope == "global" else [theta[n].numel() for n in names])):
        raise UsageError(f"sparsity {sparsity} keeps 0 of {total} weights: use a lower one")
    rule = {"largest": strategy in ("most_sensitive", "highest_magnitude"), "scope": scope}
    if strategy == "random":
        return choose(_random_scores(theta, names, seed), keep, **rule)
    if strategy not in SENSITIVITY:
        return choose({name: theta[name].detach().abs() for name in names}, keep, **rule)
    if method == "seed":
        mean = {name: torch.zeros(theta[name].shape, dtype=torch.float64) for name in names}
        for r in range(rounds):
            for name, score in _of_names(scores(theta, r), names).items():
                mean[name] += score.double().cpu() / rounds
        return choose(mean, keep, **rule)
    masks = None
    for r in range(rounds):
        weights = theta if masks is None else damped(theta, masks, damping)
        found = _of_names(scores(weights, r), names)
        masks = choose(found, keep ** ((r + 1) / rounds), allowed=masks, **rule)
    return masks


def damped(theta, masks, damping=DAMPING):
    """theta with the weights that the masks exclude multiplied by `damping`: copies; other entries are theta's."""
    weights = dict(theta)
    for name, mask in masks.items():
        old = theta[name].detach()
        weights[name] = torch.where(mask.to(old.device), old, old * damping)
    return weights


def calibration_rows(n, samples, rounds, seed, *, method="talos", client=0):
    """Rows of the n images for each calibration round: a list of `rounds` int64 tensors.

    "seed": disjoint batches of `samples` each, or of n // rounds where there are not so many; "talos": the same
    `samples` (at most n) in every round, as its code does: there the weights change. Keyed by (seed, client).
    Raises UsageError where a round would get no image.
    """
    size = min(samples, n if method == "talos" else n // rounds)
    if size < 1:
        raise UsageError(f"{n} images do not give {rounds} calibration rounds one image each: lower the rounds")
    order = torch.from_numpy(stream(seed, "calibration", 0, client).permutation(n))
    return [order[:size] if method == "talos" else order[r * size : (r + 1) * size] for r in range(rounds)]


def sensitivity(
    model, names, images, *, labels=None, weights=None, uniform=None, prepare=None, method="auto", chunk_size=None
):
    """S_j = mean over samples of (d f(sample) / d theta_j)^2, per sample, in eval mode, without label smoothing.

    With `labels` f is the plain NLL of the label (empirical Fisher, "seed"); without, f is the *logit* of a label
    that is drawn from the model, as TaLoS has it (its sum over samples is n S_j: the same ranking).

    Args:
        model: module, images [B, 3, S, S] -> logits [B, C]. Weights, modes, requires_grad and .grad are afterwards
            as before, bit for bit.
        names: of `maskable`; images: [n, ...]; labels: int64 [n].
        weights: dict name -> tensor to compute at, instead of the model's own.
        uniform: numpy generator, draws one number a sample for its label (not needed with labels).
        prepare: function images -> model input, applied to 64 at a time.
        method, chunk_size: as for `diagonal_fisher`, but "auto" is vmap for a small model on a CPU too.
    Returns: dict name -> fp32 tensor, for `names`.
    """
    if labels is None and uniform is None:
        raise ValueError("labels are to be drawn from the model: pass uniform=stream(...)")
    if not len(images):
        raise ValueError("no image to calibrate on")
    if method == "auto" and sum(p.numel() for name, p in model.named_parameters() if name in names) <= _SMALL:
        method = "vmap"
    totals = {}
    # The fused attention kernels have no rule for vmap, and their backward passes on CUDA are not deterministic.
    with _exchanged(model, names, weights), sdpa_kernel(SDPBackend.MATH):
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            inputs = part if prepare is None else prepare(part)  # [b, 3, S, S]
            if labels is None:
                wanted = _draw_labels(model, inputs, uniform)  # [b]
            else:
                wanted = labels[start : start + _BATCH].to(inputs.device)  # [b]
            function = _logit if labels is None else _nll
            fisher = diagonal_fisher(model, function, (inputs, wanted), method=method, chunk_size=chunk_size)
            for name in names:
                piece = fisher[name].mul_(len(part) / len(images))
                totals[name] = totals[name].add_(piece) if name in totals else piece
    return totals


def mean_over_clients(lanes, shapes, client_scores):
    """The server's mean of the clients' scores, weighted by samples, in fp64; the same bits on every process.

    Args: lanes: `common.parallel.Lanes`; shapes: dict name -> shape; client_scores: function k -> (scores, number
        of samples). Every process calls this.
    Returns: dict name -> fp64 tensor.
    """
    mean = None
    for k in lanes:
        scores_k, n_k = client_scores(k)
        if mean is None:
            mean = WeightedMean(_zeros(shapes, scores_k), lanes)
        mean.add({name: scores_k[name] for name in shapes}, weight=n_k)
    # A process without a client still takes part in the exchange.
    return (mean or WeightedMean(_zeros(shapes), lanes)).delta()


def merge(several, how):
    """The "union" or "intersection" of masks of one model. It keeps more, or fewer, weights than each."""
    if how not in ("union", "intersection") or not several:
        raise ValueError(f"merge {how!r} of {len(several)} masks: use 'union' or 'intersection' of at least one")
    merged = {name: mask.clone() for name, mask in several[0].items()}
    for masks in several[1:]:
        _check_same(merged, masks)
        for name, mask in masks.items():
            merged[name] = merged[name] | mask if how == "union" else merged[name] & mask
    return merged


def jaccard(a, b):
    """|a and b| / |a or b|, over all tensors; 1 for two empty masks. Two random ones: (1-s) / (1+s)."""
    _check_same(a, b)
    either = sum(int((a[name] | b[name]).sum()) for name in a)
    return sum(int((a[name] & b[name]).sum()) for name in a) / either if either else 1.0


def count(masks):
    """The number of weights that are kept."""
    return sum(int(mask.sum()) for mask in masks.values())


def kept_per_layer(masks):
    """Kept fraction of each module (its weight and bias together): dict module name -> float."""
    kept, size = {}, {}
    for name, mask in masks.items():
        layer = name.rpartition(".")[0] or name
        kept[layer] = kept.get(layer, 0) + int(mask.sum())
        size[layer] = size.get(layer, 0) + mask.numel()
    return {layer: kept[layer] / size[layer] for layer in kept}


def index_bytes(masks):
    """Bytes that tell a receiver which weights are kept: one bit a weight, or 4 bytes a kept one if that is less."""
    return min(math.ceil(sum(mask.numel() for mask in masks.values()) / 8), 4 * count(masks))


def save_mask(path, masks, provenance):
    """Writes masks as packed bits (8 weights a byte, first weight in the highest bit) into a safetensors file.

    Metadata `mask`, one JSON object (safetensors does not fix the order of several entries): what is in `provenance`
    (strategy, sparsity, scope, calibration, rounds, samples, seed, ...), `shapes` (in order), `kept` (a count per
    tensor), `kept_per_layer` (fractions), `sha256` of the bits. The file is replaced atomically, and the same masks
    give the same bytes. Raises RunFailed if the disk is full.
    """
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in masks.items()}
    about = {
        **provenance,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "kept": {name: int(mask.sum()) for name, mask in masks.items()},
        "kept_per_layer": kept_per_layer(masks),
        "sha256": _digest(packed),
    }
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    with saving(path, fresh):
        save_file(packed, fresh, metadata={"mask": json.dumps(about)})
        os.replace(fresh, path)


def load_mask(path, shapes):
    """Reads what `save_mask` wrote: (masks, provenance), masks in the order of `shapes`.

    Args: shapes: dict name -> shape of the model's maskable parameters.
    Raises: UsageError when there is no such file, it is damaged, or the mask is another model's (its first
        differing tensors are named).
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no mask at {path}: give the mask.safetensors of a sparse run")
    try:
        with safe_open(path, "pt") as file:
            packed = {name: file.get_tensor(name) for name in file.keys()}
            about = json.loads((file.metadata() or {}).get("mask", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UsageError(f"the mask {path} is damaged ({error}): make it anew") from None
    if not {"shapes", "kept", "sha256"} <= about.keys():
        raise UsageError(f"{path} is a safetensors file but no mask: give the mask.safetensors of a sparse run")
    stored = {name: tuple(shape) for name, shape in about["shapes"].items()}
    _check_model(path, stored, {name: tuple(shape) for name, shape in shapes.items()})
    if packed.keys() != stored.keys() or _digest({name: packed[name] for name in stored}) != about["sha256"]:
        raise UsageError(f"the mask {path} is damaged (its bits do not have the SHA-256 it names): make it anew")
    masks = {}
    for name, shape in shapes.items():
        bits = np.unpackbits(packed[name].numpy(), count=math.prod(shape))
        masks[name] = torch.from_numpy(bits.astype(bool).reshape(tuple(shape)))
    return masks, about


def _check_model(path, stored, shapes):
    odd = [name for name in [*shapes, *stored] if stored.get(name) != shapes.get(name)]
    if odd:
        said = [f"{n} is {_size(stored.get(n))} in the mask, {_size(shapes.get(n))} in the model" for n in odd[:3]]
        more = f" and {len(set(odd)) - len(said)} more" if len(set(odd)) > len(said) else ""
        raise UsageError(f"the mask {path} is for another model: {'; '.join(dict.fromkeys(said))}{more}")


def _size(shape):
    return "missing" if shape is None else "x".join(map(str, shape))


def _digest(packed):
    sha = hashlib.sha256()
    for name, bits in packed.items():
        sha.update(f"{name}:{bits.numel()}:".encode())
        sha.update(bits.numpy().tobytes())
    return sha.hexdigest()


def _count_of(fraction, n):
    if not 0 <= fraction <= 1:
        raise ValueError(f"keep {fraction} is not a fraction")
    return round(fraction * n)


def _flat(name, score, double):
    values = score.detach().to("cpu", torch.float64 if double else torch.float32).reshape(-1).numpy()
    if not np.isfinite(values).all():
        raise RunFailed(f"the scores of {name} are not finite: the model's weights or the images are broken")
    return values


def _lowest(values, k):
    """bool [n]: the k lowest values, among equal ones the first. O(n)."""
    if not 0 <= k <= values.size:
        raise ValueError(f"{k} weights are to be kept, {values.size} may be")
    if k in (0, values.size):
        return np.full(values.size, k > 0)
    edge = np.partition(values, k - 1)[k - 1]
    kept = values < edge
    ties = np.flatnonzero(values == edge)
    kept[ties[: k - np.count_nonzero(kept)]] = True
    return kept


def _random_scores(theta, names, seed):
    # fp64: among 21 million fp32 draws many are equal, and equal ones favour the first layers.
    draws = stream(seed, "random mask").random(sum(theta[name].numel() for name in names))
    parts = torch.from_numpy(draws).split([theta[name].numel() for name in names])
    return {name: part.reshape(theta[name].shape) for name, part in zip(names, parts, strict=True)}


def _of_names(scores, names):
    missing = [name for name in names if name not in scores]
    if missing:
        raise ValueError(f"scores are missing for {', '.join(missing[:3])}")
    return {name: scores[name] for name in names}


def _zeros(shapes, like=None):
    devices = {name: "cpu" if like is None else like[name].device for name in shapes}
    return {name: torch.zeros(tuple(shape), device=devices[name]) for name, shape in shapes.items()}


def _check_same(a, b):
    odd = [name for name in [*a, *b] if name not in a or name not in b or a[name].shape != b[name].shape]
    if odd:
        raise ValueError(f"the masks are of different models: {', '.join(odd[:3])}")


@torch.no_grad()
def _draw_labels(model, inputs, uniform):
    """int64 [b]: labels drawn from the model's softmax, by the inverse of its distribution function."""
    sums = model(inputs).double().softmax(-1).cumsum(-1)  # [b, C]
    draws = torch.from_numpy(uniform.random(len(inputs))).to(sums.device)  # [b]
    return (sums <= draws[:, None] * sums[:, -1:]).sum(-1).clamp_(max=sums.shape[-1] - 1)  # [b]


def _logit(model, sample):
    image, label = sample  # [3, S, S], []
    return model(image[None])[0].gather(0, label[None])[0]


def _nll(model, sample):
    image, label = sample
    return F.cross_entropy(model(image[None]), label[None])


@contextlib.contextmanager
def _exchanged(model, names, weights):
    """The model in eval mode at other weights, with gradients for `names` only; all as before afterwards."""
    parameters = dict(model.named_parameters())
    wanted = set(names)
    flags = {name: p.requires_grad for name, p in parameters.items()}
    modes = [(module, module.training) for module in model.modules()]
    changed = {} if weights is None else {n: p for n, p in parameters.items() if n in weights}
    old = {name: p.detach().clone() for name, p in changed.items()}
    try:
        with torch.no_grad():
            for name, p in changed.items():
                p.copy_(weights[name])
        for name, p in parameters.items():
            p.requires_grad_(name in wanted)
        model.eval()
        yield
    finally:
        with torch.no_grad():
            for name, p in changed.items():
                p.copy_(old[name])
        for name, p in parameters.items():
            p.requires_grad_(flags[name])
        for module, training in modes:
            module.training = training
