"""A run's mask: calibrated on the server's or on the clients' images, or taken from a file; mask.safetensors."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from common import parallel
from common.aggregation import WeightedMean
from common.checkpoint import saving
from common.cli import UsageError
from common.hub import reading
from common.seeding import stream
from vit_sparse_fl.masks import STRATEGIES, Sample, calibrate, calibration_rows, kept_shares

CLIENTS = 10  # that calibrate under --calibrate-on clients
# flags that a mask file names
MADE_BY = ("mask_strategy", "sparsity_ratio", "mask_scope", "seed")
MADE_BY += ("calibration", "calibration_rounds", "fisher_samples", "calibrate_on")


def check_mask(args, shapes, server_images, client_images):
    """Raises UsageError for what `make_mask` could not use, before anything of the run is written.

    Args: shapes: {name: shape} of what a mask covers; *_images: how many the server and the smallest client have.
    """
    size = sum(map(math.prod, shapes.values()))
    if not round((1 - args.sparsity_ratio) * size):
        raise UsageError(f"sparsity {args.sparsity_ratio} keeps 0 of {size} weights: use a lower one, or thaw layers")
    if args.mask:
        load_mask(args.mask, shapes)
    elif STRATEGIES[args.mask_strategy].images:
        images = server_images if args.calibrate_on == "server" else client_images
        calibration_rows(images, 1, args.calibration_rounds, args.seed, method=args.calibration)


def make_mask(study, run, theta):
    """The mask of this run, bool [n], also written to mask.safetensors in its folder; the resumed run's own if it has.

    Args: theta [n]: the weights before the first round, which the model has afterwards.
    """
    args, weights = study.args, study.weights
    path = run.folder / "mask.safetensors"
    if run.start_round:  # calibrated before the checkpoint was made
        return load_mask(path, weights.shapes)[0].to(study.device)
    if args.mask:
        mask, about = load_mask(args.mask, weights.shapes)
        study.tell(f"mask of {args.mask}: {about}")
    else:
        about = {name: getattr(args, name) for name in MADE_BY}
        study.model.eval()
        mask = _made(study, run, theta)
        weights.load(theta)
    kept, named = int(mask.sum()), weights.named(mask)
    apart = ", ".join(f"{100 * share:.2f} % of the {kind}" for kind, share in kept_shares(named).items())
    study.tell(f"mask: {kept} of {len(mask)} weights are trained, {100 * kept / len(mask):.2f} % ({apart})")
    for name, part in named.items():
        study.log.info(f"kept {100 * part.double().mean():6.2f} % of {name}")
    if parallel.is_main():
        save_mask(path, named, about)
    parallel.barrier()
    return mask.to(study.device)


def _made(study, run, theta):
    """The mask bool [n] by the strategy's scores at the server, on its validation images, or at some clients."""
    args, data, strategy = study.args, study.data, STRATEGIES[study.args.mask_strategy]
    rounds = args.calibration_rounds
    if not strategy.images:
        sample, rounds = Sample(study.model, study.weights, stream(args.seed, "random mask")), 1
        study.weights.load(theta)

        def scores(at, r):
            return strategy.scores(sample)
    elif args.calibrate_on == "clients":
        scores = _client_scores(study, run)
    else:
        scores, _ = _scores(study, data.validation, data.validation_labels, args.fisher_samples)
    sizes = [shape.numel() for shape in study.weights.shapes.values()]
    rule = {"largest": strategy.largest, "scope": args.mask_scope}
    return calibrate(theta, scores, sizes, sparsity=args.sparsity_ratio, method=args.calibration, rounds=rounds, **rule)


def _client_scores(study, run):
    """The function (theta, r) -> mean of the scores [n] that some clients send, by their images; counts its bytes."""
    args, data, size = study.args, study.data, study.weights.bytes
    number = min(CLIENTS, len(study.examples))
    chosen = stream(args.seed, "calibration clients").choice(len(study.examples), number, replace=False).tolist()
    scores, samples = {}, {}
    for k in chosen:
        rows, each = study.rows[k], math.ceil(args.fisher_samples / number)
        scores[k], samples[k] = _scores(study, data.train[rows], data.train_labels[rows], each, client=k + 1)

    def mean_scores(theta, r):
        run.count(bytes_up=number * size, bytes_down=number * size)
        clients = parallel.Round(chosen, samples)
        mean = WeightedMean(torch.zeros_like(theta), clients)
        for k in clients:
            mean.add(scores[k](theta, r))
        return mean.delta()

    return mean_scores


def _scores(study, images, labels, samples, client=0):
    """(function (theta, r) -> scores [n] on these images, images a round: `samples`, or all where there are fewer)."""
    args = study.args
    rows = calibration_rows(
        len(images), samples, args.calibration_rounds, args.seed, method=args.calibration, client=client
    )
    about = {"prepare": study.pixels, "form": {"talos": "logit", "seed": "nll"}[args.calibration]}

    def scores(theta, r):
        chosen = rows[r].to(images.device)
        study.weights.load(theta)
        draws = stream(args.seed, "calibration labels", r, client)
        sample = Sample(study.model, study.weights, draws, images[chosen], labels[chosen], **about)
        return STRATEGIES[args.mask_strategy].scores(sample)

    return scores, len(rows[0])


def save_mask(path, masks, about):
    """Writes {name: bool tensor} into a safetensors file whose metadata `mask` is the JSON object `about`."""
    fresh = path.with_name(path.name + ".new")
    with saving(path, fresh):
        save_file({name: mask.clone() for name, mask in masks.items()}, fresh, metadata={"mask": json.dumps(about)})
        fresh.replace(path)


def read_mask(path):
    """({name: bool tensor}, how it was made) of what `save_mask` wrote. Raises UsageError where it cannot be read."""
    wanted = "give the mask.safetensors of a sparse run"
    if not Path(path).is_file():
        raise UsageError(f"there is no mask at {path}: {wanted}")
    with reading(f"no mask could be read from {path}", wanted), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["mask"])


def load_mask(path, shapes):
    """(mask, how it was made), the mask a bool vector in the order of `shapes`: {name: shape} of the model's weights.

    Raises: UsageError when there is no such file, or the mask is another model's.
    """
    masks, about = read_mask(path)
    stored = {name: list(mask.shape) for name, mask in masks.items()}
    wanted = {name: list(shape) for name, shape in shapes.items()}
    if other := sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name)):
        raise UsageError(f"the mask {path} is for another model: {other[0]} and {len(other) - 1} more differ")
    return torch.cat([masks[name].reshape(-1) for name in shapes]), about


def sparsity_of(path):
    """The share of the weights that the mask in a file freezes, to four digits. Raises UsageError as `read_mask`."""
    masks = read_mask(path)[0].values()
    return round(1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks), 4)
