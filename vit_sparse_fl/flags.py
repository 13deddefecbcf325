"""The flags of this study's scripts and the keys of its yaml file: the source's names and defaults, and ours."""

import argparse
import contextlib
import json
from pathlib import Path

from common.cli import (
    RARE,
    Parser,
    UsageError,
    add_run_flags,
    apply_config,
    fraction,
    half_open_fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from common.participation import check_participation

DATASETS = ("cifar100", "demo")
SHARDINGS = ("iid", "non_iid", "dirichlet")
SWEEPS = ("heterogeneity_experiment", "local_steps_experiment", "compare_strategies", "sparsity_experiment")
SWEPT = ("nc_values", "j_values", "sparsity_values", "hp_epochs")  # numbers that only sweeps read
ON_OFF = argparse.BooleanOptionalAction


def number(group, name, kind, default, metavar, text, **options):
    """A flag of one number. Args: kind: of `common.cli`; metavar: its letter in the help."""
    names = name if isinstance(name, tuple) else (name,)
    group.add_argument(*names, type=kind, default=default, metavar=metavar, help=text, **options)


def make_parser(description, *, federated=True, sparse=False):
    """The parser of one script. sparse: only part of the weights is trained or sent. Flags of --help-all are `RARE`."""
    parser = Parser(description)
    parser.group("the method" if sparse else "experiments")  # the script's own come first
    _model_flags(parser, sparse)
    _data_flags(parser)
    if federated:
        _federated_flags(parser, sparse)
    train, rare = parser.group("training"), parser.group(RARE)
    unit, few = ("rounds", rare) if federated else ("epochs", train)
    if not federated:
        number(train, "--epochs", positive_int, 50, "N", "passes over the training images")
        number(rare, "--warmup-epochs", non_negative_int, 5, "N", "linear warm-up; off: 0")
    number(train, "--lr", non_negative_float, 0.01 if federated else 1e-3, "X", "learning rate, highest")
    number(few, "--batch-size", positive_int, 64, "B", "images a step")
    number(few, "--momentum", half_open_fraction, 0.9, "X", "momentum; off: 0")
    number(few, "--weight-decay", non_negative_float, 1e-4, "X", "weight decay; off: 0")
    number(rare, "--label-smoothing", half_open_fraction, 0.1, "X", "smoothing; off: 0")
    courses = ["cosine", "step", "none"]
    rare.add_argument("--scheduler", choices=courses, default="cosine", help=f"learning rate over the {unit}")
    number(rare, "--min-lr", non_negative_float, 1e-6, "X", "where the cosine ends, the lowest of step; 0: none")
    stop, patience = f"{unit} without a better validation accuracy; off: 0", 100 if federated else 10
    number(rare, "--early-stopping-patience", non_negative_int, patience, "N", stop)
    every = 50 if federated else 10
    number(rare, "--save-every", positive_int, every, "N", f"resumable checkpoint every N {unit}")
    rare.add_argument("--log-dir", metavar="DIR", help="text logs (default: OUTPUT_DIR/logs)")
    rare.add_argument("--use-wandb", action="store_true", help="the same as --track wandb")
    rare.add_argument("--wandb-project", default="fedquartet", metavar="NAME", help="project at wandb")
    rare.add_argument("--use-amp", action="store_true", help="the same as --amp auto")
    number(rare, "--num-workers", non_negative_int, 0, "N", "no effect: there is no loader")
    add_run_flags(parser, federated=federated, names=["--experiment-name"], folders=["--checkpoint-dir"])
    run = rare if sparse else parser.group("the run")
    number(run, "--num-runs", positive_int, 1, "N", "runs, with seeds SEED, SEED + 1, ...")
    run.add_argument("--config", metavar="FILE", help="yaml file with defaults for the flags (configs/default.yaml)")
    return parser


def _model_flags(parser, sparse):
    model, rare = parser.group("the model"), parser.group(RARE)
    text = "dino_vits16, tiny (random), a folder or a name on the hub"
    model.add_argument("--model", default="dino_vits16", metavar="NAME", help=text)
    model.add_argument("--init-from", metavar="RUN", help="start from the weights of another run (its folder)")
    text = "ridge: fitted on the frozen backbone's features before the first round; keep: that of --init-from "
    text += "(default: ridge; random where the backbone is not pretrained, and in central training)"
    model.add_argument("--head", choices=["ridge", "random", "keep"], help=text)
    rare.add_argument("--pretrained", action=ON_OFF, default=True, help="start from pretrained weights")
    text = "pixels, a multiple of the patch (default: those of --init-from, else of the model; tiny: 32)"
    number(rare, "--image-size", positive_int, None, "S", text)
    rare.add_argument("--freeze-head", action=ON_OFF, default=sparse, help="the head is not trained")
    number(rare, "--freeze-layers", non_negative_int, 0, "N", "first blocks; off: 0")
    part = rare if sparse else model
    part.add_argument("--freeze-backbone", action=ON_OFF, default=False, help="train the head only (a linear probe)")
    number(rare, "--dropout", half_open_fraction, 0.1, "X", "before the head; off: 0")


def _data_flags(parser):
    data, rare = parser.group("the data"), parser.group(RARE)
    data.add_argument("--dataset", choices=DATASETS, default="cifar100", help="demo is generated, without a network")
    text = "where the data set is (default: $FEDQUARTET_DATA, else data)"
    data.add_argument("--data-root", "--data-dir", metavar="DIR", help=text)
    text = "only the classes A to B-1, numbered from 0; rest: those that --init-from was not trained on (default: all)"
    number(data, "--classes", class_range, None, "A:B", text)
    number(rare, "--val-split", fraction, 0.1, "X", "share of the training images held out")


def _federated_flags(parser, sparse):
    data, train, rare = parser.group("the data"), parser.group("training"), parser.group(RARE)
    text = "images to clients: at random; --nc classes each; in Dirichlet(--alpha) proportions"
    data.add_argument("--sharding", choices=SHARDINGS, default="iid", help=text)
    number(data, "--nc", positive_int, 10, "N", "classes a client, for non_iid")
    number(rare, "--alpha", positive_float, 0.1, "X", "concentration, for dirichlet")
    number(train, "--num-clients", positive_int, 100, "K", "clients")
    number(train, ("--participation-rate", "--participation"), fraction, 0.1, "C", "share of clients a round")
    number(train, "--local-steps", positive_int, 4, "J", "steps a client and round")
    number(train, ("--num-rounds", "--rounds"), positive_int, 500, "T", "rounds")
    measured = rare if sparse else train
    number(measured, "--eval-every", positive_int, 10, "N", "evaluate every N rounds")
    text = "measure every N rounds what a client's update does to the others' losses (interference.py); off: 0"
    number(measured, "--interference-every", non_negative_int, 0, "N", text)
    own = rare if sparse else parser.group("experiments")
    sweep, many = {"action": "store_true"}, {"nargs": "+"}
    own.add_argument("--heterogeneity-experiment", **sweep, help="a run for each of --nc-values, and IID")
    scaled = "a run for each of --j-values, J x rounds as with the smallest"
    own.add_argument("--local-steps-experiment", **sweep, help=scaled)
    number(rare, "--nc-values", positive_int, [1, 5, 10, 50], "N", "classes a client", **many)
    number(rare, "--j-values", positive_int, [4, 8, 16], "J", "steps a client and round", **many)
    if sparse:
        share = "share of the weights that is frozen (topk: not sent)"
        number(parser.group("the method"), "--sparsity-ratio", half_open_fraction, 0.9, "X", share)


def process_memory(args):
    """Bytes that a process takes, at a guess: those of ViT-S/16 at 224 pixels, 85 MB an image of a batch."""
    return 2**30 if args.model == "tiny" else 2**31 + 85_000_000 * args.batch_size


def class_range(text):
    """ "A:B" as (A, B), 0 <= A < B; "rest" as it is."""
    if text == "rest":
        return text
    low, colon, high = text.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, such as 0:50 for the first 50 classes")
    return int(low), int(high)


# ------------------------------------------------------------------------------------------------ --config


def _section(section, same, **others):
    """{"section.key": flag}: keys that are called as their flag, and others with theirs (None: no effect)."""
    return {f"{section}.{key}": flag for key, flag in {**{key: key for key in same.split()}, **others}.items()}


_TRAINING = "momentum weight_decay label_smoothing scheduler early_stopping_patience"
_SHARED = {
    **{"seed": "seed", "device": "device", "num_workers": "num_workers", "pin_memory": None},
    **_section("dataset", "val_split batch_size", name="dataset", data_dir="data_root", num_classes=None),
    **_section("model", "pretrained freeze_backbone dropout freeze_layers", name="model"),
    **_section("logging", "use_wandb wandb_project log_dir", log_interval=None, save_interval="save_every"),
    **_section("logging", "", checkpoint_dir="output_dir"),
    **_section("experiment", "num_runs", name="run_name"),
}
_CENTRALIZED = _section("centralized", f"epochs warmup_epochs {_TRAINING}", learning_rate="lr")
_FEDERATED = {
    **_section("federated", "num_clients participation_rate local_steps num_rounds min_lr use_amp eval_every"),
    **_section("federated", _TRAINING, learning_rate="lr"),
    **_section("sharding", "nc", strategy="sharding"),
    **_section("heterogeneity_experiment", "nc_values j_values"),
    **_section("sparse", "sparsity_ratio calibration_rounds mask_strategy fisher_samples"),
}
# switches of the source that only set another flag -> (that flag, its value)
_SWITCHES = {"use_amp": ("amp", "auto"), "use_wandb": ("track", "wandb")}


def parse(parser, argv=None):
    """The flags from the command line over those of --config. Raises UsageError (see `common.cli.apply_config`).

    One file serves all scripts: a key of another script is checked for its name only.
    """
    finder = Parser("", add_help=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(argv)[0].config
    if config:
        # lr, momentum and others are in two sections: a script takes those of its own
        own = _FEDERATED if parser.get_default("num_rounds") else _CENTRALIZED
        apply_config(parser, config, {**_SHARED, **own}, {**_CENTRALIZED, **_FEDERATED}, _SWITCHES)
    return complete(parser.parse_args(argv))


def _native_size(args):
    """Pixels: of the run of --init-from, of a folder's own model, of tiny 32, else 224."""
    for folder in filter(None, (args.init_from and f"{args.init_from}/final", args.init_from, args.model)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # said where it is loaded
            return int(json.loads(Path(folder, "config.json").expanduser().read_text())["image_size"])
    return 32 if args.model == "tiny" else 224


def complete(args):
    """Fills in what depends on other flags. Raises UsageError for flags that contradict each other."""
    sweeps = [f"--{name.replace('_', '-')}" for name in SWEEPS if getattr(args, name, False)]
    if len(sweeps) > 1:
        raise UsageError(f"{' and '.join(sweeps)} are sweeps of their own: give one at a time")
    if "participation_rate" in args:
        check_participation(args.participation_rate, args.num_clients)
    if args.use_amp and args.amp == "off":
        args.amp = "auto"
    if args.use_wandb:
        args.track = "wandb"
    if args.head is None:
        fresh = not args.pretrained or args.model == "tiny" and not args.init_from
        args.head = "ridge" if "num_rounds" in args and not fresh else "random"
    for flag, value in (("classes", "rest"), ("head", "keep")):
        if getattr(args, flag) == value and not args.init_from:
            raise UsageError(f"--{flag} {value} is about the run of --init-from RUN: give that too")
    every = getattr(args, "interference_every", 0)
    if every and (every % args.eval_every or every > args.num_rounds):
        given = f"--interference-every {every}: measured where the run is evaluated"
        raise UsageError(f"{given}: give a multiple of --eval-every ({args.eval_every}) up to {args.num_rounds}")
    if getattr(args, "calibration_rounds", 1) is None:
        args.calibration_rounds = {"talos": 4, "seed": 5}[args.calibration]
    if args.image_size is None:
        args.image_size = _native_size(args)
    return args
