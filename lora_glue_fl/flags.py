"""The flags of this study's scripts: the source's names and defaults, and ours."""

from pathlib import Path

from common.choices import SPLITS
from common.cli import (
    Parser,
    UsageError,
    add_run_flags,
    half_open_fraction,
    non_negative_float,
    positive_float,
    positive_int,
    say,
)

DATASETS = ("glue", "demo")
SIZES = {"base": "roberta-base", "large": "roberta-large"}
MODES = ("iid", "overlap", "category", "category_overlap", "dirichlet")  # how examples are dealt to clients
BATCH = {"type": positive_int, "default": 32, "metavar": "B"}


def model_name(args):
    """The model that --model names, or --model-size (default: base)."""
    return args.model or SIZES[args.model_size or "base"]


def size_label(args):
    """What stands for the model in folder names: --model-size, else the model's last name."""
    return args.model_size or (Path(args.model).name if args.model else "base")


def make_parser(description, output_dir, *output_names, federated=False):
    """The parser of one training script: model, data, the run. Returns (parser, group for the script's own flags).

    Args: output_dir: the default; output_names: more spellings of --output-dir; federated: as `add_run_flags`.
    """
    parser = Parser(description)
    own = parser.add_argument_group("the method")
    add_task_flags(parser)
    text = "what the head reads: the first token, or the mean over all that are no padding (off: cls)"
    own.add_argument("--pooling", choices=["cls", "mean"], default="cls", help=text)
    add_run_flags(parser, federated=federated, folders=output_names)
    parser.set_defaults(output_dir=output_dir)
    return parser, own


def add_task_flags(parser, task_required=True):
    """Model, task and data."""
    model = parser.add_argument_group("the model")
    add_model_flags(model)
    model.add_argument("--tokenizer", metavar="NAME", help="demo, a folder or a name (default: the model's own)")
    data = parser.add_argument_group("the data")
    if task_required:
        data.add_argument("--task-name", required=True, metavar="TASK", help="a GLUE task, such as sst2")
    add_data_flags(data)
    data.add_argument("--max-length", type=positive_int, default=128, metavar="N", help="tokens of an example, at most")


def add_model_flags(group):
    """Which encoder."""
    group.add_argument(
        "--model-size",
        choices=list(SIZES),
        help="roberta-base or roberta-large (default: base, without --model)",
    )
    group.add_argument(
        "--model", metavar="NAME", help="another encoder: a folder or a name on the hub; tiny needs no download"
    )


def add_data_flags(group):
    """Where the examples come from."""
    group.add_argument("--dataset", choices=DATASETS, default="glue", help="demo is generated and needs no network")
    group.add_argument(
        "--data-root", metavar="DIR", help="folder with glue/ and tokenizers/ (default: $FEDQUARTET_DATA, else data)"
    )
    group.add_argument("--cache-dir", metavar="DIR", help="tokenised data (default: $FEDQUARTET_CACHE, else ~/.cache)")


def add_evaluation_flags(group):
    """How many examples at a time are evaluated."""
    group.add_argument("--eval-batch-size", "--per-device-eval-batch-size", **BATCH, help="examples a batch, evaluated")


def add_training_flags(parser, lr):
    """The optimiser; lr: the default. Returns the group."""
    train = parser.add_argument_group("training")
    train.add_argument("--batch-size", "--per-device-train-batch-size", **BATCH, help="examples a step")
    add_evaluation_flags(train)
    train.add_argument("--learning-rate", "--lr", type=positive_float, default=lr, metavar="X", help="AdamW's highest")
    text = "AdamW's, of what is no bias and no norm; off: 0"
    train.add_argument("--weight-decay", type=non_negative_float, default=0.0, metavar="X", help=text)
    train.add_argument(
        "--warmup-ratio", type=half_open_fraction, default=0.0, metavar="X", help="share of a fit's steps; off: 0"
    )
    train.add_argument(
        "--lr-scheduler", choices=["linear", "constant"], default="linear", help="after the warm-up: down to 0, or not"
    )
    train.add_argument(
        "--gradient-accumulation-steps",
        type=positive_int,
        default=1,
        metavar="N",
        help="batches a step, their gradients averaged; off: 1",
    )
    return train


def add_lora_flags(own):
    """The adapter."""
    own.add_argument("--lora-r", type=positive_int, default=8, metavar="R", help="rank of the adapters that train")
    own.add_argument("--lora-alpha", type=positive_float, default=8, metavar="X", help="their scale is alpha / r")
    own.add_argument("--lora-dropout", type=half_open_fraction, default=0.0, metavar="X", help="dropout; off: 0")
    own.add_argument("--target-modules", nargs="+", metavar="NAME", help="adapted layers (default: queries and values)")


def add_init_flag(own):
    """An adapter to begin with."""
    text = "begins with this adapter: its folder, its run's, or a round's fused one (default: A random, B zero)"
    own.add_argument("--init-from", "--init-adapter", dest="init_adapter", metavar="DIR", help=text)


def add_split_flag(own):
    """What svd makes of the singular values."""
    text = "svd: B = U S, A = V^T, or (balanced) the root of S in both"
    own.add_argument("--svd-split", choices=SPLITS, default="us", help=text)


def refuse(wrong, message):
    """Raises UsageError(message) where `wrong` is true."""
    if wrong:
        raise UsageError(message)


def make_central_parser(description, output_dir, learning_rate):
    """The parser of a central script. Returns (parser, group for the script's own flags)."""
    parser, own = make_parser(description, output_dir)
    own.add_argument("--do-train", action="store_true", help="train")
    own.add_argument("--do-eval", action="store_true", help="evaluate every epoch; without --do-train: zero-shot")
    train = add_training_flags(parser, learning_rate)
    train.add_argument(
        "--num-train-epochs", type=positive_float, default=3.0, metavar="X", help="passes over the examples"
    )
    train.add_argument("--max-examples", type=int, metavar="N", help="train on a stratified subset of N (default: all)")
    train.add_argument("--shard", metavar="FILE", help="train on a client's examples (client_1.json of sharding.py)")
    return parser, own


def complete_central(args):
    """The flags. Raises UsageError for flags that contradict each other."""
    refuse(not (args.do_train or args.do_eval), "nothing to do: give --do-train, --do-eval or both")
    unknown = args.final == "best" and not (args.do_train and args.do_eval)
    refuse(unknown, "--final best: the best epoch is known of --do-train with --do-eval: give both")
    refuse(args.shard and args.max_examples, "--shard and --max-examples are both given: choose one")
    return args


def complete_rounds(args):
    """Fills in what depends on other flags. Raises UsageError for flags that contradict each other."""
    if args.skip_svd:
        refuse(args.aggregate not in (None, "naive"), f"--skip-svd is --aggregate naive, not {args.aggregate}")
        args.aggregate = "naive"
    unknown = args.final == "best" and not args.eval_each_round
    refuse(unknown, "--final best: without --eval-each-round only the last round is evaluated: add it")
    args.aggregate = args.aggregate or "svd"
    if args.replay:
        one = args.aggregate in ("ffa", "rolora", "head")
        both = "a round that trains A and B: take svd, naive, stack, residual or rotate"
        refuse(one, f"--replay with --aggregate {args.aggregate}: the rules are compared on {both}")
        mixed = " ".join(map(str, args.client_ranks or ())) if {*(args.client_ranks or ())} - {args.lora_r} else ""
        refuse(
            mixed, f"--replay with --client-ranks {mixed}: naive needs rank {args.lora_r} of all: drop one of the two"
        )
    args.alpha = args.svd_rank if args.alpha is None else args.alpha
    args.keep = sorted(set(args.keep))
    return args


def run_name(args):
    """The run's folder: {task}_{size}, or where that holds a run of another rule or start, with these in its name."""
    from common.checkpoint import read_json

    name = f"{args.task_name.lower()}_{size_label(args)}"
    try:
        there = read_json(f"{args.output_dir}/{name}/run.json")["args"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return name
    if not isinstance(there, dict) or args.overwrite:
        return name
    if all(there.get(key) == getattr(args, key) for key in ("aggregate", "init_adapter")):
        return name
    other = f"{name}_{args.aggregate}" + "_warm" * bool(args.init_adapter)
    line = f"{args.output_dir}/{name} holds a run of {there.get('aggregate')}: this one goes to {other}"
    say(line)
    return other
