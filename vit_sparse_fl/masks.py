"""Which weights a sparse run may change, and SGD that changes only these.

A mask is a bool vector [n] over the weights it covers (`maskable`), True where a weight is trained; every other
parameter stays as it is. `STRATEGIES` is the one table of strategies. TaLoS: Iurada et al. 2025 and its public code.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import parallel
from common.checkpoint import saving
from common.cli import RunFailed, UsageError
from common.fisher import diagonal_fisher
from common.hub import reading
from common.seeding import stream
from common.vector import Weights

DAMPING = 0.1  # TaLoS: what an excluded weight is multiplied by while the next round's scores are computed
BATCH = 64  # images that are prepared, and labelled by the model, at once
SMALL = 2**21  # weights up to which vmap is faster than the loop on a CPU too (tiny: 2.5x; ViT-S at 224: equal)


@dataclass(frozen=True)
class Sample:
    """What a strategy scores the weights on: the model, and the images of one calibration round.

    model: in eval mode, images [B, 3, S, S] -> logits [B, C]; weights: of the model (`common.vector`), weights.theta
    [n] are the values to score; draws: a numpy generator of this seed and round; images: uint8 [m, 3, H, W];
    labels: int64 [m]; prepare: function images -> the model's input; form: of `sensitivity`.
    """

    model: nn.Module
    weights: Weights
    draws: np.random.Generator | None = None
    images: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    prepare: Callable = nn.Identity()
    form: str = "logit"


@dataclass(frozen=True)
class Strategy:
    """Keeps the weights with the lowest (or `largest`) `scores`, a function of a `Sample` to a vector [n].

    images: whether it looks at images: else it is asked once, not in each calibration round.
    """

    scores: Callable
    largest: bool = False
    images: bool = True


def sensitivity(sample):
    """S_j = mean over the images of (d f(image) / d theta_j)^2, per image, without label smoothing: fp32 [n].

    "logit"  f = the *logit* of a label y drawn from the model: TaLoS's code (its sum is n S_j: the same ranking)
    "nll"    f = -log p(y), y the data's label: the empirical Fisher
    """
    model, weights = sample.model, sample.weights
    method = "vmap" if weights.size <= SMALL else "auto"
    total = torch.zeros_like(weights.theta)
    # The fused attention kernels have no rule for vmap, and their backward passes on CUDA are not deterministic.
    with sdpa_kernel(SDPBackend.MATH):
        for images, labels in zip(sample.images.split(BATCH), sample.labels.split(BATCH), strict=True):
            inputs, function = sample.prepare(images), _nll  # [b, 3, S, S]
            if sample.form == "logit":
                labels, function = _drawn_labels(model, inputs, sample.draws), _logit  # [b]
            squares = diagonal_fisher(model, weights, function, (inputs, labels), method=method)
            total += squares * (len(images) / len(sample.images))
    return total


@torch.no_grad()
def _drawn_labels(model, inputs, draws):
    """int64 [b]: labels drawn from the model's softmax, by the inverse of its distribution function."""
    sums = model(inputs).double().softmax(-1).cumsum(-1)  # [b, C]
    points = torch.from_numpy(draws.random(len(inputs))).to(sums.device)  # [b]
    return (sums <= points[:, None] * sums[:, -1:]).sum(-1).clamp_(max=sums.shape[-1] - 1)  # [b]


def _logit(model, sample):
    image, label = sample  # [3, S, S], []
    return model(image[None])[0].gather(0, label[None])[0]


def _nll(model, sample):
    return F.cross_entropy(model(sample[0][None]), sample[1][None])


def by_magnitude(sample):
    """|theta_j|."""
    return sample.weights.theta.abs()


def at_random(sample):
    """A uniform draw, fp64: among 21 million fp32 draws many are equal, which favours the first layers."""
    return torch.from_numpy(sample.draws.random(sample.weights.size))


STRATEGIES = {
    "least_sensitive": Strategy(sensitivity),
    "most_sensitive": Strategy(sensitivity, largest=True),
    "lowest_magnitude": Strategy(by_magnitude, images=False),
    "highest_magnitude": Strategy(by_magnitude, largest=True, images=False),
    "random": Strategy(at_random, images=False),
}


def maskable(model):
    """Names of the parameters that a mask covers, in the order of `named_parameters`.

    Weights and biases of linear, convolution and layer-norm modules that are trainable (of a head that is not frozen
    too), not what another module holds itself (class token, position embedding).
    """
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm)
    covered = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    return [name for name, p in model.named_parameters() if p.requires_grad and name.rpartition(".")[0] in covered]


def choose(scores, keep, sizes, *, largest=False, scope="global", allowed=None):
    """A mask of exactly k weights, those with the lowest (or `largest`) scores: by rank, never by a threshold, which
    keeps every tied weight. Among equal scores the one that comes first wins.

    k = round(keep * m), m the number of all weights, or of each tensor's ("layer").
    Args: scores [n]; keep: fraction; sizes: elements of each tensor; allowed: bool [n], only these weights may be kept
        (m still counts all, so that k of them must be allowed).
    Returns: bool [n] on the CPU. Raises: RunFailed for scores that are not finite.
    """
    values = scores.detach().cpu().double().numpy()
    if odd := int(values.size - np.isfinite(values).sum()):
        raise RunFailed(f"the scores of {odd} weights are not finite: the model's weights or the images are broken")
    values = -values if largest else values
    if allowed is not None:
        values = np.where(allowed.cpu().numpy(), values, np.inf)
    kept = np.zeros(values.size, dtype=bool)
    ends = np.cumsum(sizes) if scope == "layer" else [values.size]
    for start, end in itertools.pairwise([0, *ends]):
        order = np.argsort(values[start:end], kind="stable")
        kept[start + order[: round(keep * (end - start))]] = True
    return torch.from_numpy(kept)


def calibrate(theta, scores, sizes, *, sparsity, method="talos", rounds=4, **rule):
    """A mask of exactly round((1 - sparsity) m) weights, over all tensors or in each: bool [n] on the CPU.

        "talos"  multi-round: after round r = 1 .. R a fraction (1 - sparsity)^(r/R) is kept; what a round excludes
                 stays excluded, and its weights are multiplied by `DAMPING` for the next scores.
        "seed"   one threshold on the mean of R scores at theta, of R disjoint batches.
    Args: theta [n], not changed; scores: function (weights [n], r) -> [n] for r = 0 .. rounds - 1; sizes, rule: as for
        `choose`. A strategy without images has one round.
    """
    keep = 1.0 - sparsity
    if method == "seed":
        mean = sum(scores(theta, r).double().cpu() / rounds for r in range(rounds))
        return choose(mean, keep, sizes, **rule)
    mask = None
    for r in range(rounds):
        at = theta if mask is None else torch.where(mask.to(theta.device), theta, theta * DAMPING)
        mask = choose(scores(at, r), keep ** ((r + 1) / rounds), sizes, allowed=mask, **rule)
    return mask


def calibration_rows(n, samples, rounds, seed, method="talos"):
    """Rows of the n images for each calibration round: a list of `rounds` int64 tensors, keyed by the seed.

    "seed": disjoint batches of `samples` each, or of n // rounds where there are not so many; "talos": the same
    `samples` (at most n) in every round. Raises UsageError where a round would get no image.
    """
    size = min(samples, n if method == "talos" else n // rounds)
    if size < 1:
        raise UsageError(f"{n} images do not give {rounds} calibration rounds one image each: lower the rounds")
    order = torch.from_numpy(stream(seed, "calibration").permutation(n))
    return [order[:size] if method == "talos" else order[r * size : (r + 1) * size] for r in range(rounds)]


def merge(masks, how):
    """The "union" or "intersection" of masks [n]. It keeps more, or fewer, weights than each."""
    return functools.reduce(torch.logical_or if how == "union" else torch.logical_and, masks)


def index_bytes(mask):
    """Bytes that tell a receiver which weights are kept: one bit a weight, or 4 bytes a kept one if that is less."""
    return min(math.ceil(mask.numel() / 8), 4 * int(mask.sum()))


# ---- a run's mask


def check_mask(args, size, images):
    """Raises UsageError for what `make_mask` could not use, before anything of the run is written.

    Args: size: how many weights a mask covers; images: how many the server has.
    """
    if not round((1 - args.sparsity_ratio) * size):
        raise UsageError(f"sparsity {args.sparsity_ratio} keeps 0 of {size} weights: use a lower one, or thaw layers")
    if STRATEGIES[args.mask_strategy].images:
        calibration_rows(images, 1, args.calibration_rounds, args.seed, args.calibration)


def make_mask(study, run, theta):
    """The mask of this run, bool [n], also written to mask.safetensors in its folder; the resumed run's own if it has.

    Args: theta [n]: the weights before the first round, which the model has afterwards.
    """
    weights, path = study.weights, run.folder / "mask.safetensors"
    if run.start_round:  # calibrated before the checkpoint was made
        return parallel.from_main(load_mask, path, weights.shapes).to(study.device)
    mask = new_mask(study, study.args, theta)
    study.tell(f"mask: {int(mask.sum())} of {len(mask)} weights are trained, {100 * mask.double().mean():.2f} %")
    if parallel.is_main():
        with saving(path, path):
            save_file({name: part.clone() for name, part in weights.named(mask).items()}, path)
    return mask


def new_mask(study, args, theta):
    """The mask that the flags ask for, bool [n], at the weights theta [n], which the model has afterwards."""
    weights, strategy = study.weights, STRATEGIES[args.mask_strategy]
    study.model.eval()
    weights.load(theta)
    sizes, rounds = [shape.numel() for shape in weights.shapes.values()], args.calibration_rounds
    rule = {"method": args.calibration, "largest": strategy.largest, "scope": args.mask_scope}
    rule |= {"sparsity": args.sparsity_ratio, "rounds": rounds if strategy.images else 1}
    mask = calibrate(theta, _scores(study, args, strategy), sizes, **rule)
    weights.load(theta)
    return parallel.broadcast_tensors({"mask": mask}, study.device)["mask"]


def _scores(study, args, strategy):
    """The function (theta, r) -> scores [n] of `calibrate`: on the server's validation images, or without any."""
    data, model, weights = study.data, study.model, study.weights
    if not strategy.images:
        sample = Sample(model, weights, stream(args.seed, "random mask"))
        return lambda theta, r: strategy.scores(sample)
    images, labels = data.validation, data.validation_labels
    rows = calibration_rows(len(images), args.fisher_samples, args.calibration_rounds, args.seed, args.calibration)
    form = {"talos": "logit", "seed": "nll"}[args.calibration]

    def scores(theta, r):
        chosen, draws = rows[r].to(images.device), stream(args.seed, "calibration labels", r)
        weights.load(theta)
        return strategy.scores(Sample(model, weights, draws, images[chosen], labels[chosen], study.pixels, form))

    return scores


def load_mask(path, shapes):
    """The mask in a file, a bool vector in the order of `shapes`: {name: shape} of the model's weights.

    Raises: UsageError where it cannot be read, or is of other weights.
    """
    with reading(f"no mask of this model could be read from {path}", "start anew with --overwrite"):
        masks = load_file(path)
        return torch.cat([masks[name].view(shape).reshape(-1) for name, shape in shapes.items()])


# ---- training under a mask


class SparseSGDM:
    """SGD with momentum on the kept weights   (torch.optim.SGD, restricted to a mask):

        u = g + weight_decay * w              only at the kept weights
        buf = momentum * buf + u              (first step: buf = u)
        w -= lr * buf

    Kept weights are gathered, updated and written back, so that a masked weight is never written: weight decay,
    -0.0 or a NaN gradient at a masked place cannot reach it. With a full mask it is torch.optim.SGD, bit for bit.
    Momentum starts at zero in each new optimiser, so that one mask's is never another's.

    Args: weights: `common.vector.Weights`; kept: int64 [kept], the kept weights' places in its vector, ascending.
    """

    def __init__(self, weights, kept, lr, momentum=0.0, weight_decay=0.0):
        self._weights, self._kept, self._buffer = weights, kept, None
        self._lr, self._momentum, self._decay = lr, momentum, weight_decay

    @torch.no_grad()
    def step(self):
        """One update."""
        theta, gradients = self._weights.theta, [p.grad.reshape(-1) for p in self._weights.parameters.values()]
        u, w = (vector.index_select(0, self._kept) for vector in (torch.cat(gradients), theta))  # [kept]
        # the operations and their order are torch's
        if self._decay:
            u.add_(w, alpha=self._decay)
        if self._momentum:
            self._buffer = u.clone() if self._buffer is None else self._buffer.mul_(self._momentum).add_(u)
            u = self._buffer
        theta.index_copy_(0, self._kept, w.add_(u, alpha=-self._lr))
