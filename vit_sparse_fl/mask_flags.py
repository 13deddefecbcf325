"""The flags that say how a sparse run's mask is made, and when a run reads them."""

import argparse

from common.cli import UsageError, only, positive_int, unless
from vit_sparse_fl.flags import choice, number

CALIBRATIONS = ("talos", "seed")
SCOPES = ("global", "layer", "kind", "unit", "block")
FORMS = ("auto", "logit", "true", "nll")
# those of the table in masks.py, which takes seconds to import: whether they look at images
STRATEGIES = {
    "least_sensitive": True,
    "most_sensitive": True,
    "lowest_magnitude": False,
    "highest_magnitude": False,
    "random": False,
}


def strategy(text):
    """The name of a strategy: one of ours, or else one that somebody put into the table of masks.py."""
    if text not in STRATEGIES and text not in (table := _table()):
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(table)})")
    return text


def _table():
    from vit_sparse_fl.masks import STRATEGIES as table

    return table


def _images(name):
    return STRATEGIES[name] if name in STRATEGIES else _table()[name].images


_MADE = {"upload": "masked", "mask": (None, "")}
masked = only(**_MADE)  # whether the run makes a mask of its own
calibrated = only(**_MADE, mask_strategy=_images)  # whether images enter it
_images_read = calibrated | only(**_MADE, compare_strategies=True)
_on_clients = only(calibrate_on="clients") & _images_read


def add_mask_flags(group):
    """The flags that say how a mask is made."""
    text = f"which weights the mask keeps: {', '.join(STRATEGIES)}"
    one = masked & unless(compare_strategies=True)
    number(group, "--mask-strategy", strategy, "least_sensitive", "NAME", text, when=one)
    text = (
        "one threshold for all; one a tensor; one a kind of tensor (all blocks'); whole heads and neurons; whole blocks"
    )
    choice(group, "--mask-scope", SCOPES, "global", text, when=masked)
    text = "key_bias: not the keys' biases of attention, whose gradient is always zero; off: none"
    omits = only(upload="masked") & unless(mask_omit="none")
    choice(group, "--mask-omit", ["none", "key_bias"], "none", text, when=omits)
    text = "talos: rounds exclude step by step; seed: the source's mean over rounds"
    choice(group, "--calibration", CALIBRATIONS, "talos", text, when=_images_read)
    text = "calibration rounds (default: 4; seed: 5)"
    number(group, "--calibration-rounds", positive_int, None, "R", text, when=_images_read)
    text = "square of the gradient of: a drawn label's logit (TaLoS's code); true: its log-likelihood (the Fisher "
    text += "information, the paper's); nll: the data's label's; auto: logit, of --calibration seed nll"
    choice(group, "--fisher-form", FORMS, "auto", text, when=_images_read & unless(fisher_form="auto"))
    number(group, "--fisher-samples", positive_int, 512, "N", "images a calibration round", when=_images_read)
    text = "server: on its validation images; clients: the mean of scores that clients send"
    choice(group, "--calibrate-on", ["server", "clients"], "server", text, when=_images_read)
    number(group, "--calibration-clients", positive_int, 10, "N", "clients that calibrate", when=_on_clients)
    text = "of masks that the clients make each; none: one mask from the mean of their scores"
    choice(group, "--mask-merge", ["none", "union", "intersection"], "none", text, when=_on_clients)
    group.add_argument("--mask", metavar="FILE", help="use this mask.safetensors of another run")


def check_flags(args):
    """Raises UsageError for flags of the mask that contradict each other."""
    if args.mask_merge != "none" and args.calibrate_on != "clients":
        raise UsageError(f"--mask-merge {args.mask_merge} merges clients' masks: add --calibrate-on clients")
    if args.mask and (args.compare_strategies or args.sparsity_experiment or args.upload == "topk"):
        raise UsageError(
            f"--mask {args.mask} decides the weights: drop --compare-strategies, --sparsity-experiment, topk"
        )
    if args.upload == "topk" and args.compare_strategies:
        raise UsageError("--upload topk has no mask, so no strategies to compare: drop one of the two")
    if args.mask_merge != "none" and not args.compare_strategies and not _images(args.mask_strategy):
        raise UsageError(f"--mask-merge {args.mask_merge}: {args.mask_strategy} masks need no clients: drop it")
    if args.freeze_backbone:
        raise UsageError("--freeze-backbone leaves no weight to mask: drop it, or use train_federated.py")
