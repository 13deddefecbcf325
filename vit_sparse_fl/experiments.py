"""Several runs from one command line: names, one run after the other."""

import sys
from argparse import Namespace

from common import parallel
from vit_sparse_fl.flags import SWEEPS, SWEPT


def variant(args, **changes):
    """A copy of the flags with some of them changed."""
    return Namespace(**vars(args) | changes)


def shards_name(args):
    """iid, non_iid_nc5 or dirichlet_a0.1, and the part of the classes if it is one."""
    name = {"iid": "iid", "non_iid": f"non_iid_nc{args.nc}", "dirichlet": f"dirichlet_a{args.alpha:g}"}[args.sharding]
    return name + classes_name(args)


def classes_name(args):
    """_classes_50_100, _classes_rest, or nothing for all classes."""
    words = ("rest",) if args.classes == "rest" else args.classes or ()
    return "_".join(["_classes", *map(str, words)]) if words else ""


def federated_settings(args, method="fedavg"):
    """(name, flags) of every setting that the two sweeps of the federated scripts ask for, or of the one run."""
    asked = [args]
    if args.heterogeneity_experiment:
        asked = [variant(args, sharding="iid")]
        asked += [variant(args, sharding="non_iid", nc=nc) for nc in args.nc_values]
    if args.local_steps_experiment:  # the same number of local steps in all: fewer rounds where there are more a round
        fewest = min(args.j_values)
        asked = [variant(args, local_steps=j, num_rounds=max(1, args.num_rounds * fewest // j)) for j in args.j_values]
    return [(f"{method}_{shards_name(flags)}_J{flags.local_steps}", flags) for flags in asked]


def repeated(args, settings):
    """The runs of `settings`, a list of (name, flags), with --num-runs seeds each: a list of (name, flags).

    A run's folder is its name, `NAME_seed_S`; --experiment-name goes before it where there are several runs.
    """
    several = len(settings) * args.num_runs > 1
    # a run of a sweep is the run that its flags alone would start
    alone = dict.fromkeys(("hp_search", *SWEEPS), False) | dict.fromkeys(SWEPT) | {"num_runs": 1}
    alone = {flag: value for flag, value in alone.items() if flag in args}
    runs = []
    for name, flags in settings:
        for seed in range(args.seed, args.seed + args.num_runs):
            folder = f"{name}_seed_{seed}" + ("_demo" if args.dataset == "demo" else "")
            if args.run_name:
                folder = f"{args.run_name}_{folder}" if several else args.run_name
            runs.append((name, variant(flags, seed=seed, run_name=folder, **alone)))
    return runs


def run_each(train, runs):
    """Calls train(flags) for each of `runs`, in order.

    Of several, finished ones are skipped and broken ones go on, without --resume too: a run of one sweep is often one
    of another.
    """
    for _, flags in runs:
        flags.resume = flags.resume or len(runs) > 1 and not flags.overwrite
        try:
            train(flags)
        except SystemExit as stop:  # already finished
            if stop.code:
                raise
            sys.stdout.flush()
    if len(runs) > 1 and parallel.is_main():
        print(f"their table: python plots/tables.py vit_sparse_fl --data-dir {flags.output_dir}")
