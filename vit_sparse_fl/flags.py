"""The flags of this study's scripts and the keys of its yaml file: the source's names and defaults, and ours."""

import argparse
import contextlib
import json
from pathlib import Path

from common.cli import (
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
ON_OFF = argparse.BooleanOptionalAction
NATIVE = {"tiny": 32, "small": 64}  # pixels of the models that have no weights of their own
HEADS = ("ridge", "random", "keep")


def number(group, name, kind, default, metavar, text, **options):
    """A flag of one number. Args: kind: of `common.cli`; metavar: its letter in the help."""
    names = name if isinstance(name, tuple) else (name,)
    group.add_argument(*names, type=kind, default=default, metavar=metavar, help=text, **options)


def choice(group, name, choices, default, text, **options):
    """A flag of one of several words."""
    group.add_argument(name, choices=choices, default=default, help=text, **options)


def make_parser(description, *, federated=True, sparse=False):
    """The parser of one script. Returns (parser, group for the script's own flags)."""
    parser = Parser(description)
    own = parser.add_argument_group("the method" if sparse else "experiments")
    _model_flags(parser.add_argument_group("the model"), sparse)
    data = parser.add_argument_group("the data")
    _data_flags(data)
    train = parser.add_argument_group("training")
    if federated:
        _client_flags(data)
        _federated_flags(train)
    else:
        _central_flags(train)
    number(train, "--batch-size", positive_int, 64, "B", "images a step")
    number(train, "--lr", non_negative_float, 0.01 if federated else 1e-3, "X", "learning rate, highest")
    number(train, "--momentum", half_open_fraction, 0.9, "X", "momentum; off: 0")
    number(train, "--weight-decay", non_negative_float, 1e-4, "X", "weight decay; off: 0")
    number(train, "--label-smoothing", half_open_fraction, 0.1, "X", "smoothing; off: 0")
    end = "where the cosine ends, the lowest of step; 0: none"
    number(train, "--min-lr", non_negative_float, 1e-6, "X", end)
    report, unit = parser.add_argument_group("what is kept"), "rounds" if federated else "epochs"
    every = 50 if federated else 10
    number(report, "--save-every", positive_int, every, "N", f"resumable checkpoint every N {unit}")
    if federated:
        _interference_flags(report)
    report.add_argument("--log-dir", metavar="DIR", help="text logs (default: OUTPUT_DIR/logs)")
    report.add_argument("--use-wandb", action="store_true", help="the same as --track wandb")
    report.add_argument("--wandb-project", default="fedquartet", metavar="NAME", help="project at wandb")
    add_run_flags(parser, federated=federated, names=["--experiment-name"], folders=["--checkpoint-dir"])
    run = parser.group("the run")
    number(run, "--num-runs", positive_int, 1, "N", "runs, with seeds SEED, SEED + 1, ...")
    run.add_argument("--config", metavar="FILE", help="yaml file with defaults for the flags (configs/default.yaml)")
    run.add_argument("--use-amp", action="store_true", help="the same as --amp auto")
    number(run, "--num-workers", non_negative_int, 0, "N", "no effect: there is no loader")
    return parser, own


def _model_flags(model, sparse):
    text = "dino_vits16, tiny, small (ViT-S/8; both random), a folder or a name on the hub"
    model.add_argument("--model", default="dino_vits16", metavar="NAME", help=text)
    model.add_argument("--weights", metavar="FILE", help="DINO's own checkpoint, dino_deitsmall16_pretrain.pth")
    model.add_argument("--pretrained", action=ON_OFF, default=True, help="start from pretrained weights")
    model.add_argument("--init-from", metavar="RUN", help="start from the weights of another run (its folder)")
    text = "pixels, a multiple of the patch (default: those of --init-from, else of the model; tiny: 32, small: 64)"
    number(model, "--image-size", positive_int, None, "S", text)
    text = "ridge: fitted on the frozen backbone's features before the first round; keep: that of --init-from "
    text += "(default: ridge; random where the backbone is not pretrained, and in central training)"
    choice(model, "--head", HEADS, None, text)
    model.add_argument("--freeze-head", action=ON_OFF, default=sparse, help="the head is not trained")
    number(model, "--freeze-layers", non_negative_int, 0, "N", "first blocks; off: 0")
    model.add_argument("--freeze-backbone", action=ON_OFF, default=False, help="train the head only (a linear probe)")
    number(model, "--dropout", half_open_fraction, 0.1, "X", "before the head; off: 0")


def _data_flags(data):
    choice(data, "--dataset", DATASETS, "cifar100", "demo is generated and needs no network")
    text = "where the data set is (default: $FEDQUARTET_DATA, else data)"
    data.add_argument("--data-root", "--data-dir", metavar="DIR", help=text)
    number(data, "--val-split", fraction, 0.1, "X", "share of the training images held out")
    text = "only the classes A to B-1, numbered from 0; rest: those that --init-from was not trained on (default: all)"
    number(data, "--classes", class_range, None, "A:B", text)
    number(data, "--num-classes", positive_int, None, "N", "checked against the data (default: not)")


def _client_flags(data):
    text = "images to clients: at random; --nc classes each; in Dirichlet(--alpha) proportions"
    choice(data, "--sharding", SHARDINGS, "iid", text)
    number(data, "--nc", positive_int, 10, "N", "classes a client, for non_iid")
    number(data, "--alpha", positive_float, 0.1, "X", "concentration, for dirichlet")


def _schedule_flags(train, unit, warmup, patience, text):
    choice(train, "--scheduler", ["cosine", "step", "none"], "cosine", text)
    number(train, f"--warmup-{unit}", non_negative_int, warmup, "N", "linear warm-up; off: 0")
    stop = f"{unit} without a better validation accuracy; off: 0"
    number(train, "--early-stopping-patience", non_negative_int, patience, "N", stop)


def _central_flags(train):
    number(train, "--epochs", positive_int, 50, "N", "passes over the training images")
    _schedule_flags(train, "epochs", 5, 10, "learning rate's course")


def _federated_flags(train):
    number(train, "--num-clients", positive_int, 100, "K", "clients")
    number(train, ("--participation-rate", "--participation"), fraction, 0.1, "C", "share of clients a round")
    number(train, "--local-steps", positive_int, 4, "J", "steps a client and round")
    number(train, ("--num-rounds", "--rounds"), positive_int, 500, "T", "rounds")
    step = "the server's step, as a multiple of the mean update; off: 1, the plain mean"
    number(train, "--server-lr", positive_float, 1.0, "X", step)
    _schedule_flags(train, "rounds", 0, 100, "learning rate over the rounds")
    number(train, "--eval-every", positive_int, 10, "N", "evaluate every N rounds")


def _interference_flags(report):
    text = "measure every N rounds what a client's update does to the others' losses (cross_losses.py); off: 0"
    number(report, "--interference-every", non_negative_int, 0, "N", text)


def add_experiment_flags(group):
    """The sweeps that both federated scripts have."""
    sweep = {"action": "store_true"}
    group.add_argument("--heterogeneity-experiment", **sweep, help="a run for each of --nc-values, and IID")
    many = {"nargs": "+"}
    number(group, "--nc-values", positive_int, [1, 5, 10, 50], "N", "classes a client", **many)
    scaled = "a run for each of --j-values, J x rounds as with the smallest"
    group.add_argument("--local-steps-experiment", **sweep, help=scaled)
    number(group, "--j-values", positive_int, [4, 8, 16], "J", "steps a client and round", **many)


def add_sparsity_flag(group):
    """How much is not sent."""
    share = "share of the weights that is frozen (topk: not sent), in (0, 1); of --mask FILE: the mask's own"
    number(group, "--sparsity-ratio", non_negative_float, 0.9, "X", share)


def process_memory(args):
    """Bytes that a process takes, at a guess: what a step of the model keeps for its backward pass, and the data."""
    if args.model == "tiny":
        return 2**30
    tokens = (args.image_size // (8 if args.model in NATIVE else 16)) ** 2 + 1
    kept = 12 * args.batch_size * tokens * (18 * 384 + 2 * 6 * tokens) * 4  # ViT-S: 12 blocks, 6 heads, fp32
    return 2**31 + kept


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
    **_section("dataset", "val_split batch_size num_classes", name="dataset", data_dir="data_root"),
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
    """Pixels: of the run of --init-from, of a folder's own model, of NATIVE's, else 224."""
    for folder in (args.init_from and f"{args.init_from}/final", args.init_from, args.model):
        # what is no model is said where it is loaded
        with contextlib.suppress(OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError):
            config = Path(folder or "", "config.json").expanduser()
            if folder and config.is_file():
                return int(json.loads(config.read_text(encoding="utf-8"))["image_size"])
    return NATIVE.get(args.model, 224)


def complete(args):
    """Fills in what depends on other flags. Raises UsageError for flags that contradict each other."""
    sweeps = [f"--{name.replace('_', '-')}" for name in SWEEPS if getattr(args, name, False)]
    if len(sweeps) > 1:
        raise UsageError(f"{' and '.join(sweeps)} are sweeps of their own: give one at a time")
    if "participation_rate" in args:
        check_participation(args.participation_rate, args.num_clients)
    if getattr(args, "warmup_rounds", 0) >= getattr(args, "num_rounds", 1):
        given = f"--warmup-rounds {args.warmup_rounds} of --num-rounds {args.num_rounds}"
        raise UsageError(f"{given}: the rate would never get to --lr ({args.lr:g}): lower the warm-up")
    if args.scheduler != "none" and args.min_lr > max(args.lr, 1e-6):
        raise UsageError(f"--min-lr {args.min_lr:g} is above --lr ({args.lr:g}), where the schedule starts: lower it")
    if args.use_amp and args.amp == "off":
        args.amp = "auto"
    if args.use_wandb:
        args.track = "wandb"
    if not args.pretrained and (args.weights or args.init_from):
        raise UsageError("--no-pretrained contradicts --weights and --init-from: give one")
    if args.weights and args.init_from:
        raise UsageError("--weights and --init-from are both given: choose where the weights come from")
    if args.head is None:
        fresh = not args.pretrained or args.model in NATIVE and not args.init_from
        args.head = "ridge" if "num_rounds" in args and not fresh else "random"
    if args.classes == "rest" and not args.init_from:
        raise UsageError(
            "--classes rest leaves out the classes of --init-from RUN, which is not given: give --classes A:B"
        )
    if args.head == "keep" and not args.init_from:
        raise UsageError("--head keep keeps the head of --init-from RUN, which is not given: use --head ridge")
    if every := getattr(args, "interference_every", 0):
        if every % args.eval_every or every > args.num_rounds:
            given = f"--interference-every {every} with --eval-every {args.eval_every}, --num-rounds {args.num_rounds}"
            raise UsageError(
                f"{given}: it is measured where the run is evaluated: give a multiple, no more than there are"
            )
    if getattr(args, "calibration_rounds", 1) is None:
        args.calibration_rounds = {"talos": 4, "seed": 5}[args.calibration]
    if args.image_size is None:
        args.image_size = _native_size(args)
    return args
