"""The flags of this study's scripts: the source's names and defaults, and ours."""

import argparse
import contextlib
import json
from pathlib import Path

from common.cli import (
    Parser,
    UsageError,
    fraction,
    half_open_fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from common.runlog import add_machine_flags, add_run_flags
from vit_sparse_fl.config_file import apply_config
from vit_sparse_fl.data import DATASETS, SHARDINGS

ON_OFF = argparse.BooleanOptionalAction
HEADS = ("ridge", "train", "random", "keep")


def NEVER(args):  # noqa: N802
    """`when` of flags that say how to run or what to run, not what a run computes."""
    return False


def make_parser(description, *, federated=True, sparse=False):
    """The parser of one script. Returns (parser, group for the script's own flags)."""
    parser = Parser(description)
    own = parser.add_argument_group("the method" if sparse else "experiments")
    _model_flags(parser, sparse)
    _data_flags(parser, federated)
    train = parser.add_argument_group("training")
    if federated:
        _federated_flags(train)
    else:
        _central_flags(train)
    train.add_argument("--batch-size", type=positive_int, default=64, metavar="B", help="images a step")
    train.add_argument(
        "--lr", type=non_negative_float, default=0.01 if federated else 1e-3, metavar="X", help="learning rate, highest"
    )
    train.add_argument("--momentum", type=half_open_fraction, default=0.9, metavar="X", help="momentum; off: 0")
    train.add_argument(
        "--weight-decay", type=non_negative_float, default=1e-4, metavar="X", help="weight decay; off: 0"
    )
    train.add_argument("--label-smoothing", type=half_open_fraction, default=0.1, metavar="X", help="smoothing; off: 0")
    train.add_argument(
        "--min-lr",
        type=non_negative_float,
        default=1e-6,
        metavar="X",
        when=lambda a: a.scheduler in ("cosine", "step"),
        help="where the cosine ends, the lowest of step; 0: none",
    )
    report = parser.add_argument_group("what is kept")
    unit = "rounds" if federated else "epochs"
    report.add_argument(
        "--save-every",
        type=positive_int,
        default=50 if federated else 10,
        metavar="N",
        when=NEVER,
        help=f"resumable checkpoint every N {unit}",
    )
    report.add_argument(
        "--keep-best",
        type=positive_int,
        default=3,
        metavar="N",
        when=NEVER,
        help="checkpoints with the best validation accuracy",
    )
    report.add_argument("--log-dir", metavar="DIR", help="text logs (default: OUTPUT_DIR/logs)")
    report.add_argument("--use-wandb", action="store_true", help="the same as --track wandb")
    report.add_argument("--wandb-project", default="fedquartet", metavar="NAME", help="project at wandb")
    run = add_run_flags(parser, "--experiment-name")
    run.add_argument(
        "--num-runs", type=positive_int, default=1, metavar="N", when=NEVER, help="runs, with seeds SEED, SEED + 1, ..."
    )
    run.add_argument("--config", metavar="FILE", help="yaml file with defaults for the flags (configs/default.yaml)")
    run.add_argument("--output-dir", "--checkpoint-dir", default="results", metavar="DIR", help="where run folders go")
    add_machine_flags(run, federated=federated)
    run.add_argument("--use-amp", action="store_true", when=NEVER, help="the same as --amp auto")
    run.add_argument("--compile", action="store_true", help="torch.compile, checked against eager at the first step")
    run.add_argument(
        "--num-workers", type=non_negative_int, default=0, metavar="N", help="no effect: there is no loader"
    )
    return parser, own


def _model_flags(parser, sparse):
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model", default="dino_vits16", metavar="NAME", help="dino_vits16, tiny, a folder or a name on the hub"
    )
    model.add_argument("--weights", metavar="FILE", help="DINO's own checkpoint, dino_deitsmall16_pretrain.pth")
    model.add_argument("--pretrained", action=ON_OFF, default=True, help="start from pretrained weights")
    model.add_argument("--init-from", metavar="RUN", help="start from the weights of another run (its folder)")
    model.add_argument(
        "--image-size", type=positive_int, metavar="S", help="pixels, a multiple of the patch (default: 224; tiny: 32)"
    )
    model.add_argument(
        "--head",
        choices=HEADS,
        help="ridge, train: fitted on the frozen backbone's features before the first round; keep: that of --init-from "
        "(default: ridge; random where the backbone is not pretrained, and in central training)",
    )
    model.add_argument("--freeze-head", action=ON_OFF, default=sparse, help="the head is not trained")
    model.add_argument("--freeze-layers", type=non_negative_int, default=0, metavar="N", help="first blocks; off: 0")
    model.add_argument("--freeze-backbone", action=ON_OFF, default=False, help="train the head only (a linear probe)")
    model.add_argument("--dropout", type=half_open_fraction, default=0.1, metavar="X", help="before the head; off: 0")


def _data_flags(parser, federated):
    data = parser.add_argument_group("the data")
    data.add_argument("--dataset", choices=DATASETS, default="cifar100", help="demo is generated and needs no network")
    data.add_argument(
        "--data-root", "--data-dir", metavar="DIR", help="where the data set is (default: $FEDQUARTET_DATA, else data)"
    )
    data.add_argument(
        "--val-split", type=fraction, default=0.1, metavar="X", help="share of the training images held out"
    )
    data.add_argument(
        "--classes", type=class_range, metavar="A:B", help="only the classes A to B-1, numbered from 0 (default: all)"
    )
    data.add_argument(
        "--num-classes", type=positive_int, metavar="N", when=NEVER, help="checked against the data (default: not)"
    )
    if not federated:
        return
    data.add_argument(
        "--sharding",
        choices=SHARDINGS,
        default="iid",
        help="images to clients: at random; --nc classes each; in Dirichlet(--alpha) proportions",
    )
    of_classes, of_dirichlet = (lambda a: a.sharding == "non_iid"), (lambda a: a.sharding == "dirichlet")
    data.add_argument(
        "--nc", type=positive_int, default=10, metavar="N", when=of_classes, help="classes a client, for non_iid"
    )
    data.add_argument(
        "--alpha",
        type=positive_float,
        default=0.1,
        metavar="X",
        when=of_dirichlet,
        help="concentration, for dirichlet",
    )
    data.add_argument(
        "--min-samples",
        type=non_negative_int,
        default=0,
        metavar="N",
        when=of_dirichlet,
        help="of each client, for dirichlet; 0: a batch",
    )
    data.add_argument(
        "--allow-unused-classes",
        action="store_true",
        when=of_classes,
        help="classes that no client gets are left out",
    )


def _central_flags(train):
    train.add_argument("--epochs", type=positive_int, default=50, metavar="N", help="passes over the training images")
    train.add_argument(
        "--scheduler", choices=["cosine", "step", "none"], default="cosine", help="learning rate's course"
    )
    train.add_argument("--warmup-epochs", type=non_negative_int, default=5, metavar="N", help="linear warm-up; off: 0")
    train.add_argument(
        "--early-stopping-patience",
        type=non_negative_int,
        default=10,
        metavar="N",
        help="epochs without a better validation accuracy; off: 0",
    )


def _federated_flags(train):
    train.add_argument("--num-clients", type=positive_int, default=100, metavar="K", help="clients")
    train.add_argument("--participation-rate", type=fraction, default=0.1, metavar="C", help="share of clients a round")
    train.add_argument("--local-steps", type=positive_int, default=4, metavar="J", help="steps a client and round")
    train.add_argument("--num-rounds", "--rounds", type=positive_int, default=500, metavar="T", help="rounds")
    train.add_argument(
        "--client-weights", choices=["examples", "uniform"], default="examples", help="weight of a client in the mean"
    )
    train.add_argument(
        "--scheduler", choices=["cosine", "step", "none"], default="cosine", help="learning rate over the rounds"
    )
    train.add_argument("--warmup-rounds", type=non_negative_int, default=0, metavar="N", help="linear warm-up; off: 0")
    train.add_argument("--eval-every", type=positive_int, default=10, metavar="N", help="evaluate every N rounds")
    train.add_argument(
        "--early-stopping-patience",
        type=non_negative_int,
        default=100,
        metavar="N",
        help="rounds without a better validation accuracy; off: 0",
    )


def add_experiment_flags(group):
    """The sweeps that both federated scripts have."""
    for name, values, metavar, runs, what in (
        ("heterogeneity", "--nc-values", "N", "each of --nc-values, and IID", "classes a client"),
        (
            "local-steps",
            "--j-values",
            "J",
            "each of --j-values, J x rounds as with the smallest",
            "steps a client and round",
        ),
    ):
        default = [1, 5, 10, 50] if metavar == "N" else [4, 8, 16]
        group.add_argument(f"--{name}-experiment", action="store_true", when=NEVER, help=f"a run for {runs}")
        group.add_argument(
            values, type=positive_int, nargs="+", default=default, metavar=metavar, when=NEVER, help=what
        )


def clients_a_round(args):
    """How many clients take part in a round."""
    return max(1, int(args.participation_rate * args.num_clients + 0.5))


def process_memory(args):
    """Bytes that a process takes, at a guess: what a step of the model keeps for its backward pass, and the data."""
    if args.model == "tiny":
        return 2**30
    tokens = (args.image_size // 16) ** 2 + 1
    kept = 12 * args.batch_size * tokens * (18 * 384 + 2 * 6 * tokens) * 4  # ViT-S: 12 blocks, 6 heads, fp32
    return 2**31 + kept


def class_range(text):
    """ "A:B" as (A, B), 0 <= A < B."""
    low, colon, high = text.partition(":")
    if not (colon and low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, such as 0:50 for the first 50 classes")
    return int(low), int(high)


def parse(parser, argv=None):
    """The flags from the command line over those of --config. Raises UsageError (see `apply_config`)."""
    finder = Parser("", add_help=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(argv)[0].config
    if config:
        apply_config(parser, config)
    return complete(parser.parse_args(argv))


def _native_size(model):
    """Pixels: of `tiny`, of a folder's own model, else 224."""
    config = Path(model) / "config.json"
    if config.is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # not a model: said where it is loaded
            return int(json.loads(config.read_text(encoding="utf-8"))["image_size"])
    return 32 if model == "tiny" else 224


def complete(args):
    """Fills in what depends on other flags."""
    if args.use_amp and args.amp == "off":
        args.amp = "auto"
    if args.use_wandb:
        args.track = "wandb"
    if not args.pretrained and (args.weights or args.init_from):
        raise UsageError("--no-pretrained contradicts --weights and --init-from: give one")
    if args.weights and args.init_from:
        raise UsageError("--weights and --init-from are both given: choose where the weights come from")
    if args.head is None:
        fresh = not args.pretrained or args.model == "tiny" and not args.init_from
        args.head = "ridge" if "num_rounds" in args and not fresh else "random"
    if args.head == "keep" and not args.init_from:
        raise UsageError("--head keep keeps the head of --init-from RUN, which is not given: use --head ridge")
    if getattr(args, "calibration_rounds", 1) is None:
        args.calibration_rounds = {"talos": 4, "seed": 5}[args.calibration]
    if args.image_size is None:
        args.image_size = _native_size(args.model)
    return args
