"""A run's mask: calibrated on the server's or on the clients' images, taken from a file, kept in the run folder."""

import torch

from common import parallel
from common.aggregation import WeightedMean
from common.checkpoint import read_json
from common.cli import UsageError
from common.seeding import stream
from vit_sparse_fl.mask_files import load_mask, save_mask
from vit_sparse_fl.mask_flags import calibrated
from vit_sparse_fl.masks import (
    STRATEGIES,
    Sample,
    calibrate,
    calibration_rows,
    check_kept,
    jaccard,
    kept_apart,
    kept_per_layer,
)

CLIENTS = 10  # that calibrate under --calibrate-on clients


def check_mask(args, shapes, server_images, client_images):
    """Raises UsageError for what `make_mask` could not use, before anything of the run is written.

    Args: shapes: {name: shape} of what a mask covers; server_images, client_images: how many the server and the
        smallest client have.
    """
    if args.mask:
        load_mask(args.mask, shapes)
        return
    check_kept(args.sparsity_ratio, [shape.numel() for shape in shapes.values()], args.mask_scope)
    if calibrated(args):
        weights = sum(shape.numel() for shape in shapes.values())
        if args.calibration_rounds > weights:  # each takes some more of them away
            shown = f"--calibration-rounds {args.calibration_rounds} is above the {weights} weights of a mask"
            raise UsageError(f"{shown}: lower it")
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
        about = {
            key: about[key] for key in about if key not in ("shapes", "kept", "kept_per_layer", "kept_apart", "sha256")
        }
        study.log.info(f"mask of {args.mask}: {about}")
    else:
        study.model.eval()
        mask, about = _made(study, run, theta)
        weights.load(theta)
    kept, named = int(mask.sum()), weights.named(mask)
    apart = ", ".join(f"{100 * share:.2f} % of the {kind}" for kind, share in kept_apart(named).items())
    study.log.info(f"mask: {kept} of {len(mask)} weights are trained, {100 * kept / len(mask):.2f} % ({apart})")
    for layer, share in kept_per_layer(named).items():
        study.log.info(f"kept {100 * share:6.2f} % of {layer}", extra={"quiet": True})
    if parallel.is_main():
        save_mask(path, named, about)
    parallel.barrier()
    return mask.to(study.device)


def _made(study, run, theta):
    """(mask, its provenance)."""
    args, data, strategy = study.args, study.data, STRATEGIES[study.args.mask_strategy]
    about = {"strategy": args.mask_strategy, "sparsity": args.sparsity_ratio}
    about |= {"scope": args.mask_scope, "seed": args.seed}
    sizes = [shape.numel() for shape in study.weights.shapes.values()]
    rule = {"sparsity": args.sparsity_ratio, "largest": strategy.largest, "scope": args.mask_scope}
    if not strategy.images:
        sample = Sample(study.model, study.weights, stream(args.seed, "random mask"))
        study.weights.load(theta)
        return calibrate(theta, lambda *_: strategy.scores(sample), sizes, rounds=1, **rule), about
    rule |= {"method": args.calibration, "rounds": args.calibration_rounds}
    about |= {"calibration": args.calibration, "rounds": args.calibration_rounds, "samples": args.fisher_samples}
    about |= {"calibrated_on": args.calibrate_on}
    if args.calibrate_on == "server":
        scores, about["samples"] = _scores(study, data.validation, data.validation_labels, args.fisher_samples)
        return calibrate(theta, scores, sizes, **rule), about

    number = min(CLIENTS, len(study.examples))
    chosen = stream(args.seed, "calibration clients").choice(len(study.examples), number, replace=False).tolist()
    of_client = {}
    for k in chosen:
        rows = study.rows[k]
        each = -(-args.fisher_samples // number)
        of_client[k] = _scores(study, data.train[rows], data.train_labels[rows], each, client=k + 1)
    about["samples"] = sum(samples for _, samples in of_client.values())
    run.count(bytes_down=number * study.weights.bytes)

    def mean_scores(at, r):
        run.count(bytes_up=number * study.weights.bytes, bytes_down=number * study.weights.bytes if r else 0)
        clients = parallel.Round(chosen, {k: samples for k, (_, samples) in of_client.items()})
        mean = WeightedMean(torch.zeros_like(theta), clients)
        for k in clients:
            mean.add(of_client[k][0](at, r))
        return mean.delta()

    return calibrate(theta, mean_scores, sizes, **rule), about


def _scores(study, images, labels, samples, client=0):
    """(function (theta, r) -> scores [n] on these images, images a round: `samples`, or all where there are fewer)."""
    args, strategy = study.args, STRATEGIES[study.args.mask_strategy]
    rows = calibration_rows(
        len(images), samples, args.calibration_rounds, args.seed, method=args.calibration, client=client
    )
    about = {"prepare": study.pixels, "form": {"talos": "logit", "seed": "nll"}[args.calibration]}

    def scores(theta, r):
        chosen = rows[r].to(images.device)
        study.weights.load(theta)
        draws = stream(args.seed, "calibration labels", r, client)
        return strategy.scores(Sample(study.model, study.weights, draws, images[chosen], labels[chosen], **about))

    return scores, len(rows[0])


def overlap_table(runs):
    """Jaccard index of the masks of several runs' strategies, as lines of text. runs: pairs (name, flags)."""
    masks = {}
    for _, flags in runs:
        folder = f"{flags.output_dir}/{flags.run_name}"
        shapes = read_json(f"{folder}/run.json")["parameters"]["maskable"]
        masks.setdefault(flags.mask_strategy, load_mask(f"{folder}/mask.safetensors", shapes)[0])
    width = max(map(len, masks))
    lines = [f"{'overlap (Jaccard)':{width}s}" + "".join(f"  {name:>{width}s}" for name in masks)]
    for name, mask in masks.items():
        lines.append(f"{name:{width}s}" + "".join(f"  {jaccard(mask, other):{width}.3f}" for other in masks.values()))
    return "\n".join(lines)
