"""The flags that say how a sparse run's mask is made."""

import argparse

from common.cli import UsageError, positive_int
from vit_sparse_fl.flags import choice, number

CALIBRATIONS = ("talos", "seed")
SCOPES = ("global", "layer")
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


def calibrated(args):
    """Whether images enter the mask that the run makes."""
    return not args.mask and _images(args.mask_strategy)


def add_mask_flags(group):
    """The flags that say how a mask is made."""
    text = f"which weights the mask keeps: {', '.join(STRATEGIES)}"
    number(group, "--mask-strategy", strategy, "least_sensitive", "NAME", text)
    choice(group, "--mask-scope", SCOPES, "global", "one threshold for all; one a tensor")
    text = "key_bias: not the keys' biases of attention, whose gradient is always zero; off: none"
    choice(group, "--mask-omit", ["none", "key_bias"], "none", text)
    text = "talos: rounds exclude step by step; seed: the source's mean over rounds"
    choice(group, "--calibration", CALIBRATIONS, "talos", text)
    text = "calibration rounds (default: 4; seed: 5)"
    number(group, "--calibration-rounds", positive_int, None, "R", text)
    number(group, "--fisher-samples", positive_int, 512, "N", "images a calibration round")
    text = "server: on its validation images; clients: the mean of scores that clients send"
    choice(group, "--calibrate-on", ["server", "clients"], "server", text)
    group.add_argument("--mask", metavar="FILE", help="use this mask.safetensors of another run")


def check_flags(args):
    """Raises UsageError for flags of the mask that contradict each other."""
    if args.mask and (args.compare_strategies or args.sparsity_experiment):
        raise UsageError(f"--mask {args.mask} decides the weights: drop --compare-strategies, --sparsity-experiment")
    if args.freeze_backbone:
        raise UsageError("--freeze-backbone leaves no weight to mask: drop it, or use train_federated.py")
