"""A run's mask: calibrated on the server's or on the clients' images, taken from a file, kept in the run folder."""

import numpy as np
import torch

from common import parallel
from common.checkpoint import read_json
from common.cli import RunFailed, UsageError
from common.seeding import stream
from vit_sparse_fl.masks import (
    SENSITIVITY,
    calibrate,
    calibration_rows,
    check_sparsity,
    choose,
    count,
    jaccard,
    kept_per_layer,
    load_mask,
    mean_over_clients,
    merge,
    save_mask,
    sensitivity,
)


def check_masks(args, model, names, server_images, client_images):
    """Raises UsageError for what `make_masks` could not use, before anything of the run is written.

    Args: names: of `maskable`; server_images, client_images: how many the server and the smallest client have.
    """
    check_sparsity(args.sparsity_ratio)
    shapes = {name: p.shape for name, p in model.named_parameters() if name in names}
    if not names:
        raise UsageError("every weight is frozen, there is nothing to mask: thaw layers (--freeze-layers)")
    if args.mask:
        load_mask(args.mask, shapes)
    sizes = [shape.numel() for shape in shapes.values()]
    sizes = [sum(sizes)] if args.mask_scope == "global" else sizes
    if not any(round((1 - args.sparsity_ratio) * size) for size in sizes):
        raise UsageError(f"sparsity {args.sparsity_ratio} keeps 0 of {max(sizes)} weights: use a lower one")
    if args.mask_strategy in SENSITIVITY and not args.mask:
        images = server_images if args.calibrate_on == "server" else client_images
        calibration_rows(images, 1, args.calibration_rounds, args.seed, method=args.calibration)


def make_masks(study, theta):
    """The masks of this run, also written to mask.safetensors in its folder; the resumed run's own if there are some.

    theta: the weights before the first round. Under `--upload topk` the masks only say how many weights to send.
    """
    args, run = study.args, study.run
    names = study.maskable
    shapes = {name: theta[name].shape for name in names}
    path = run.folder / "mask.safetensors"
    if run.start_round:  # calibrated before the checkpoint was made
        return _on(study.device, load_mask(path, shapes)[0])
    study.load(theta)
    if args.mask:
        masks, about = load_mask(args.mask, shapes)
        about = {key: about[key] for key in about if key not in ("shapes", "kept", "kept_per_layer", "sha256")}
        study.log.info(f"mask of {args.mask}: {about}")
    else:
        masks, overlap = _calibrated(study, theta, names, shapes)
        about = {
            "strategy": args.mask_strategy,
            "sparsity": args.sparsity_ratio,
            "scope": args.mask_scope,
            "seed": args.seed,
        }
        if args.mask_strategy in SENSITIVITY:
            about |= {
                "calibration": args.calibration,
                "rounds": args.calibration_rounds,
                "samples": samples_a_round(study),
                "calibrated_on": args.calibrate_on,
                "merge": args.mask_merge,
                "client_overlap": overlap,
            }
    kept, total = count(masks), sum(mask.numel() for mask in masks.values())
    if not kept:
        raise RunFailed(f"the {args.mask_merge} of the clients' masks keeps none of {total} weights: use another")
    study.log.info(f"mask: {kept} of {total} weights are trained, {100 * kept / total:.2f} %")
    for layer, fraction in kept_per_layer(masks).items():
        study.log.info(f"kept {100 * fraction:6.2f} % of {layer}", extra={"quiet": True})
    if parallel.is_main():
        save_mask(path, masks, about)
    parallel.barrier()
    return _on(study.device, masks)


def samples_a_round(study):
    """Images that a calibration round really reads: --fisher-samples, or fewer where there are not so many."""
    args = study.args
    number = min(args.calibration_clients, len(study.examples))
    sets = [(len(study.data.validation), args.fisher_samples)]
    if args.calibrate_on == "clients":
        sets = [(study.examples[k], -(-args.fisher_samples // number)) for k in _calibrating(study)]
    rounds = args.calibration_rounds if args.calibration == "seed" else 1
    return sum(min(samples, images // rounds) for images, samples in sets)


def _calibrating(study):
    """The clients that calibrate, sorted."""
    number = min(study.args.calibration_clients, len(study.examples))
    draw = stream(study.args.seed, "calibration clients")
    return sorted(draw.choice(len(study.examples), number, replace=False).tolist())


def topk_size(study, masks):
    """How many (value, index) pairs cost as many bytes as the masked values: 8 bytes a pair, 4 a value."""
    return max(1, count(masks) // 2) if study.args.upload == "topk" else 0


def topk_update(theta, theta_k, k):
    """theta with the k largest changes of theta_k in absolute value, the rest not sent (no error feedback: clients
    keep nothing between rounds). Returns a dict of new tensors."""
    change = {name: (theta_k[name] - theta[name]).abs() for name in theta}
    sent = choose(change, k, largest=True)
    return {name: torch.where(sent[name].to(old.device), theta_k[name], old) for name, old in theta.items()}


def overlap_table(runs):
    """Jaccard index of the masks of several runs' strategies, as lines of text. runs: pairs (name, flags)."""
    masks = {}
    for _, flags in runs:
        folder = f"{flags.output_dir}/{flags.run_name}"
        shapes = read_json(f"{folder}/run.json")["parameters"]["maskable"]
        masks.setdefault(flags.mask_strategy, load_mask(f"{folder}/mask.safetensors", shapes)[0])
    width = max(len(name) for name in masks)
    lines = [f"{'overlap (Jaccard)':{width}s}" + "".join(f"  {name:>{width}s}" for name in masks)]
    for a in masks:
        lines.append(f"{a:{width}s}" + "".join(f"  {jaccard(masks[a], masks[b]):{width}.3f}" for b in masks))
    return "\n".join(lines)


def _on(device, masks):
    return {name: mask.to(device) for name, mask in masks.items()}


def _calibrated(study, theta, names, shapes):
    """(masks, mean Jaccard index of the clients' own masks or None)."""
    args = study.args
    rule = {
        "strategy": args.mask_strategy,
        "sparsity": args.sparsity_ratio,
        "method": args.calibration,
        "rounds": args.calibration_rounds,
        "scope": args.mask_scope,
        "seed": args.seed,
    }
    weights = {name: p.detach() for name, p in theta.items()}
    if args.mask_strategy not in SENSITIVITY:
        return calibrate(weights, names, None, **rule), None
    if args.calibrate_on == "server":
        data = study.data
        return calibrate(weights, names, _scores(study, names, data.validation, data.validation_labels), **rule), None

    lanes = parallel.Lanes(_calibrating(study))
    number = len(lanes)
    per_client = -(-args.fisher_samples // number)
    size = 4 * sum(shape.numel() for shape in shapes.values())
    study.run.count(bytes_down=number * size)
    if args.mask_merge == "none":

        def of_clients(weights, r):
            study.run.count(bytes_up=number * size, bytes_down=number * size if r else 0)
            own = {k: _client_scores(study, names, k, per_client) for k in lanes.mine}
            return mean_over_clients(lanes, shapes, lambda k: (own[k](weights, r), own[k].samples))

        return calibrate(weights, names, of_clients, **rule), None

    own = {k: calibrate(weights, names, _client_scores(study, names, k, per_client), **rule) for k in lanes}
    study.run.count(bytes_up=number * sum(shape.numel() for shape in shapes.values()) // 8)
    packed = lanes.gather(
        {k: {n: np.packbits(mask.numpy().reshape(-1)) for n, mask in m.items()} for k, m in own.items()}
    )
    masks = [
        {
            n: torch.from_numpy(np.unpackbits(bits, count=shapes[n].numel()).astype(bool)).view(shapes[n])
            for n, bits in m.items()
        }
        for m in packed.values()
    ]
    pairs = [jaccard(a, b) for i, a in enumerate(masks) for b in masks[:i]]
    overlap = sum(pairs) / len(pairs) if pairs else None
    if pairs:
        study.log.info(
            f"overlap of {number} clients' masks (Jaccard): mean {overlap:.3f}, lowest {min(pairs):.3f}, "
            f"of random ones {(1 - args.sparsity_ratio) / (1 + args.sparsity_ratio):.3f}"
        )
    return merge(masks, args.mask_merge), overlap


def _client_scores(study, names, k, samples):
    rows = study.rows[k]
    return _scores(study, names, study.data.train[rows], study.data.train_labels[rows], k + 1, samples)


def _scores(study, names, images, labels, client=0, samples=None):
    """scores(weights, round) on these images, for `calibrate`; its attribute `samples` is their number a round."""
    args = study.args
    rows = calibration_rows(
        len(images),
        samples or args.fisher_samples,
        args.calibration_rounds,
        args.seed,
        method=args.calibration,
        client=client,
    )

    def scores(weights, r):
        chosen = rows[r].to(images.device)
        return sensitivity(
            study.model,
            names,
            images[chosen],
            labels=labels[chosen] if args.calibration == "seed" else None,
            weights=weights,
            uniform=stream(args.seed, "calibration labels", r, client),
            prepare=study.pixels,
        )

    scores.samples = len(rows[0])
    return scores
