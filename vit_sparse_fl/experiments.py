"""Several runs from one command line: names, one run after the other, a table of what they reached."""

import contextlib
import copy
import functools
import io
import statistics
import sys
from pathlib import Path

from common import parallel
from common.checkpoint import read_json
from common.cli import UsageError
from common.runlog import start_run
from vit_sparse_fl.data import check_batch_size, classes_of, deal, load_images
from vit_sparse_fl.mask_flags import calibrated
from vit_sparse_fl.masks import STRATEGIES

# what the flags of sweeps are in each of their runs
NO_SWEEP = dict.fromkeys(("hp_search", "heterogeneity_experiment", "local_steps_experiment"), False)
NO_SWEEP |= dict.fromkeys(("compare_strategies", "sparsity_experiment"), False)
NO_SWEEP |= dict.fromkeys(("hp_epochs", "nc_values", "j_values", "sparsity_values"))
COLUMNS = {
    "best validation": "val_accuracy_best",
    "test (last)": "test_accuracy_last",
    "test (best)": "test_accuracy_best",
}


def variant(args, **changes):
    """A copy of the flags with some of them changed."""
    other = copy.copy(args)
    vars(other).update(changes)
    return other


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
    asked = []
    if args.heterogeneity_experiment:
        asked += [variant(args, sharding="iid")]
        asked += [variant(args, sharding="non_iid", nc=nc) for nc in args.nc_values]
    if args.local_steps_experiment:  # the same number of local steps in all: fewer rounds where there are more a round
        fewest = min(args.j_values)
        asked += [variant(args, local_steps=j, num_rounds=max(1, args.num_rounds * fewest // j)) for j in args.j_values]
    return [(f"{method}_{shards_name(flags)}_J{flags.local_steps}", flags) for flags in asked or [args]]


def sparse_settings(args):
    """(name, flags) of every setting that the sparse script's command line asks for."""
    asked = []
    if args.compare_strategies:
        asked += [variant(args, mask_strategy=strategy) for strategy in STRATEGIES]
    if args.sparsity_experiment:
        asked += [variant(args, sparsity_ratio=sparsity) for sparsity in args.sparsity_values]
    for one in asked or [args]:
        yield from federated_settings(one, sparse_name(one))


def sparse_name(args):
    """sparse_STRATEGY_s0.9, with what differs from the default marked."""
    if args.mask:
        return f"mask_of_{Path(args.mask).resolve().parent.name}_s{args.sparsity_ratio:g}"
    name = f"sparse_{args.mask_strategy}_s{args.sparsity_ratio:g}"
    if calibrated(args):
        name += f"_{args.calibration}{args.calibration_rounds}"
        name += "_clients" if args.calibrate_on == "clients" else ""
    name += f"_per_{args.mask_scope}" if args.mask_scope != "global" else ""
    return name + (f"_no_{args.mask_omit}" if args.mask_omit != "none" else "")


def repeated(args, settings):
    """The runs of `settings`, a list of (name, flags), with --num-runs seeds each: a list of (name, flags).

    A run's folder is its name, `NAME_seed_S`; --experiment-name goes before it where there are several runs.
    Raises UsageError where two of the settings have one name: they differ in nothing.
    """
    settings = list(settings)
    names = [name for name, _ in settings]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the sweep has two runs {twice[0]}: drop one of the values that are alike")
    several = len(settings) * args.num_runs > 1
    # a run of a sweep is the run that its flags alone would start
    alone = {"num_runs": 1, **{name: value for name, value in NO_SWEEP.items() if name in args}}
    runs = []
    for name, flags in settings:
        for seed in range(args.seed, args.seed + args.num_runs):
            folder = f"{name}_seed_{seed}" + ("_demo" if args.dataset == "demo" else "")
            if args.run_name:
                folder = f"{args.run_name}_{folder}" if several else args.run_name
            runs.append((name, variant(flags, seed=seed, run_name=folder, **alone)))
    return runs


def run_each(command, train, runs):
    """Calls train(flags) for each of `runs`, in order. With several, prints the table.

    Of several, finished ones are skipped and broken ones go on, without --resume too: a run of one sweep is often one
    of another. Raises UsageError before the first run where a folder holds a run with other flags, or where a run's
    clients cannot be made.

    Args: command: the script's name, as in run.json.
    """
    if len(runs) > 1:
        for _, flags in runs:
            flags.resume = not flags.overwrite
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
                with start_run(command, flags, flags.run_name):
                    pass  # the folder is free again
        check_shards([flags for _, flags in runs])
    for _, flags in runs:
        try:
            train(flags)
        except SystemExit as stop:  # already finished
            if stop.code:
                raise
            sys.stdout.flush()
    if len(runs) > 1 and parallel.is_main():
        print("\n" + table(runs))


def check_shards(several):
    """Raises UsageError where one of several runs would end for its clients, so that none of them starts."""
    for flags in several:
        if "sharding" in flags:
            labels = _training_labels(flags.dataset, flags.seed, flags.val_split, classes_of(flags), flags.data_root)
            check_batch_size([len(rows) for rows in deal(flags, labels)[0]], flags.batch_size)


@functools.lru_cache(maxsize=1)
def _training_labels(*about):
    return load_images(*about).train_labels


def table(runs):
    """Mean and standard deviation over seeds of each setting's accuracy, as lines of text."""
    results = {}
    for name, flags in runs:
        manifest = read_json(Path(flags.output_dir) / flags.run_name / "run.json")
        results.setdefault(name, []).append(manifest["results"])
    width = max(map(len, results))
    lines = [f"{'accuracy, %':{width}s}" + "".join(f"  {column:>16s}" for column in COLUMNS) + "  seeds"]
    for name, seeds in results.items():
        cells = [mean_and_spread([100 * one[key] for one in seeds]) for key in COLUMNS.values()]
        lines.append(f"{name:{width}s}" + "".join(f"  {cell:>16s}" for cell in cells) + f"  {len(seeds):5d}")
    return "\n".join(lines)


def mean_and_spread(values):
    """ "12.3 ± 0.4" (standard deviation, n - 1), or the value alone where there is one."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
