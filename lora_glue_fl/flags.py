"""The flags of this study's scripts: the source's names and defaults, and ours."""

from pathlib import Path

from common.cli import (
    RARE,
    RESPLIT,
    Parser,
    UsageError,
    add_run_flags,
    half_open_fraction,
    positive_float,
    positive_int,
)

DATASETS = ("glue", "demo")
SIZES = {"base": "roberta-base", "large": "roberta-large"}
BATCH = {"type": positive_int, "default": 32, "metavar": "B"}


def model_name(args):
    """The model that --model names, or --model-size (default: base)."""
    return args.model or SIZES[args.model_size or "base"]


def size_label(args):
    """What stands for the model in folder names: --model-size, else the model's last name."""
    return args.model_size or (Path(args.model).name if args.model else "base")


def make_parser(description, output_dir, *output_names, federated=False):
    """The parser of one training script. output_dir: the default; output_names: more spellings of --output-dir."""
    parser = Parser(description)
    parser.group("the method")
    add_task_flags(parser)
    text = "what the head reads: the first token, or the mean over all that are no padding (off: cls)"
    parser.group(RARE).add_argument("--pooling", choices=["cls", "mean"], default="cls", help=text)
    add_run_flags(parser, federated=federated, folders=output_names)
    parser.set_defaults(output_dir=output_dir)
    return parser


def add_task_flags(parser):
    """Model, task and data."""
    add_model_flags(parser)
    parser.group("the data").add_argument("--task-name", required=True, metavar="TASK", help="a GLUE task, as sst2")
    add_data_flags(parser)
    add = parser.group(RARE).add_argument
    add("--max-length", type=positive_int, default=128, metavar="N", help="tokens of an example, at most")
    text = "examples a batch, evaluated"
    add("--eval-batch-size", "--per-device-eval-batch-size", **BATCH, help=text)


def add_model_flags(parser):
    """Which encoder."""
    add = parser.group("the model").add_argument
    add("--model-size", choices=list(SIZES), help="roberta-base or roberta-large (default: base, without --model)")
    text = "another encoder: a folder or a name on the hub; tiny needs no download"
    add("--model", metavar="NAME", help=text)


def add_data_flags(parser):
    """Where the examples come from."""
    text = "demo is generated and needs no network"
    parser.group("the data").add_argument("--dataset", choices=DATASETS, default="glue", help=text)
    text = "folder with glue/ (default: $FEDQUARTET_DATA, else data)"
    parser.group(RARE).add_argument("--data-root", metavar="DIR", help=text)


def add_training_flags(parser, lr):
    """The optimiser; lr: the default."""
    add = parser.group("training").add_argument
    add("--batch-size", "--per-device-train-batch-size", **BATCH, help="examples a step")
    add("--learning-rate", "--lr", type=positive_float, default=lr, metavar="X", help="AdamW's highest")
    text = "of a fit: down to 0, or not"
    parser.group(RARE).add_argument("--lr-scheduler", choices=["linear", "constant"], default="linear", help=text)


def add_lora_flags(parser):
    """The adapter, and one to begin with."""
    add = parser.group("the method").add_argument
    add("--lora-r", type=positive_int, default=8, metavar="R", help="rank of the adapters that train")
    add("--lora-alpha", type=positive_float, default=8, metavar="X", help="their scale is alpha / r")
    text = "begins with this adapter: its folder, its run's, or a round's fused one (default: A random, B zero)"
    add("--init-from", "--init-adapter", dest="init_adapter", metavar="DIR", help=text)
    add = parser.group(RARE).add_argument
    add("--lora-dropout", type=half_open_fraction, default=0.0, metavar="X", help="dropout; off: 0")
    add("--target-modules", nargs="+", metavar="NAME", help="adapted layers (default: queries and values)")


def refuse(wrong, message):
    """Raises UsageError(message) where `wrong` is true."""
    if wrong:
        raise UsageError(message)


def complete_rounds(args):
    """Fills in what depends on other flags. Raises UsageError for flags that contradict each other."""
    if args.skip_svd:
        refuse(args.aggregate not in (None, "naive"), f"--skip-svd is --aggregate naive, not {args.aggregate}")
        args.aggregate = "naive"
    unknown = args.final == "best" and not args.eval_each_round
    refuse(unknown, "--final best: without --eval-each-round only the last round is evaluated: add it")
    args.aggregate = args.aggregate or "svd"
    fixed = args.split and args.aggregate not in ("svd", *RESPLIT)
    refuse(fixed, f"--split {args.split} is for svd, {', '.join(RESPLIT)}, which serve both factors: drop it")
    one = args.replay and args.aggregate in ("ffa", "rolora", "head")
    refuse(one, f"--replay compares rules that train A and B: take another --aggregate than {args.aggregate}")
    mixed = args.replay and set(args.client_ranks or ()) - {args.lora_r}
    refuse(mixed, f"--replay needs --lora-r {args.lora_r} of all clients: drop it or --client-ranks")
    args.alpha = args.svd_rank if args.alpha is None else args.alpha
    return args


def run_name(args):
    """The run's folder: {task}_{size} of the source; a rule other than svd and a start are in its name."""
    rule = "" if args.aggregate == "svd" else f"_{args.aggregate}"
    return f"{args.task_name.lower()}_{size_label(args)}{rule}" + "_warm" * bool(args.init_adapter)
