"""The flags of this study's scripts: the source's names and defaults, and ours."""

import os
from pathlib import Path

from common.cli import (
    Parser,
    UsageError,
    add_run_flags,
    fraction,
    half_open_fraction,
    layer_count,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from common.participation import check_participation, per_round

LAYERS = {f"pure_ssm_{n}_layer": n for n in (1, 2, 4)}  # the source's configurations
# What a flag that was not given means, by data set. The demo's need no download.
DEFAULTS = {
    "wikitext2": {"tokenizer": "gpt2", "d_model": 512, "sequence_length": 256, "n_epochs": 1.0, "val_freq": 30},
    "demo": {"tokenizer": "bpe:1024", "d_model": 128, "sequence_length": 128, "n_epochs": 3.0, "val_freq": 10},
}
SIZES = {  # flag -> its default, its names in a config.json: mamba-ssm's and transformers'
    "layers": (1, "n_layer", "num_hidden_layers"),
    "d_model": (None, "d_model", "hidden_size"),  # the data set's
    "d_state": (128, "d_state", "state_size"),
    "headdim": (64, "headdim", "head_dim"),
}
SERVER_LR = {
    "type": positive_float,
    "default": 1.0,
    "metavar": "X",
    "help": "eta_s, of the mean update; the plain mean: 1",
}


def make_parser(doc, *, federated=True):
    """The parser of one script: the source's flags and ours. doc: the script's docstring.

    Returns (parser, the function that adds a flag to the method's own).
    """
    parser = Parser(doc.split("\n")[0])
    add_to_method = parser.add_argument_group("the method").add_argument if federated else None

    add = parser.add_argument_group("the model").add_argument
    add("--layers", type=layer_count, metavar="N", help="Mamba-2 layers (default: 1)")
    add("--config", choices=LAYERS, help="the same by name: pure_ssm_1_layer is --layers 1")
    add("--d-model", type=positive_int, metavar="N", help="width (default: 512; demo: 128)")
    add("--d-state", type=positive_int, metavar="N", help="state size per head (default: 128)")
    add("--headdim", type=positive_int, metavar="N", help="channels per head (default: 64)")
    start = "start from another run's weights (its folder, or its final/): sizes and tokenizer are then those"
    start += " (default: fresh weights)"
    add("--init-from", metavar="RUN", help=start)
    add("--kernel", choices=["auto", "torch", "mamba_ssm"], default="auto", help="auto: mamba_ssm on CUDA if installed")

    add = parser.add_argument_group("the data").add_argument
    add("--dataset", default="wikitext2", metavar="NAME", help="wikitext2, or demo (needs no network)")
    add("--tokenizer", help="gpt2, bpe:N (trained on the training text) or a path (default: gpt2; demo: bpe:1024)")
    add("--sequence-length", type=positive_int, metavar="T", help="tokens (default: 256; demo: 128)")
    add("--data-root", "--cache-dir", metavar="DIR", help="folder of the data (default: $FEDQUARTET_DATA, else data)")
    dealt = "documents in corpus order, or shuffled"
    add("--sharding", choices=["contiguous", "iid"], default="contiguous", help=dealt)
    shards = "clients that the text is dealt to" if federated else "shards that are trained on together"
    add("--num-clients", type=positive_int, default=4, metavar="K", help=shards)

    add = parser.add_argument_group("training").add_argument
    add("--n-epochs", type=positive_float, metavar="X", help="passes over the text (default: 1; demo: 3)")
    add("--lr", type=non_negative_float, default=5e-4, metavar="X", help="learning rate")
    add("--weight-decay", type=non_negative_float, default=0.01, metavar="X", help="not on dt_bias, A_log, D; off: 0")
    schedules = ["constant", "cosine", "linear"]
    add("--lr-scheduler", choices=schedules, default="constant", help="of the rate, after the warm-up")
    rise = "steps in which it rises to --lr; off: 0"
    add("--warmup-steps", type=non_negative_int, default=0, metavar="N", help=rise)
    lowest = "the rate that cosine and linear end at"
    add("--min-lr", type=non_negative_float, default=0.0, metavar="X", help=lowest)
    for name, usual, words in (("beta1", 0.9, "b1 of AdamW; off: 0"), ("beta2", 0.999, "b2 of AdamW")):
        add(f"--{name}", type=half_open_fraction, default=usual, metavar="X", help=words)
    clip = "norm that a step's gradient is clipped to; off: 0"
    add("--max-grad-norm", type=non_negative_float, default=0.0, metavar="X", help=clip)
    if federated:
        add("--batch-size", type=positive_int, default=4, metavar="B", help="sequences a step and client")
        add("--local-updates", type=positive_int, default=1, metavar="H", help="steps a client and round")
        add("--rounds", "--num-rounds", type=positive_int, metavar="R", help="rounds (default: what --n-epochs needs)")
        spelled, share = ("--participation", "--participation-rate"), "share of clients a round"
        add(*spelled, type=fraction, default=1.0, metavar="C", help=share)
        add("--client-optimizer", choices=["adamw", "sgd"], default="adamw", help="local optimiser")
        add(
            "--client-state",
            choices=["keep", "reset", "pooled"],
            default="keep",
            help="AdamW's moments from round to round: a client's own, none, or sent: as of the pooled batch",
        )
    else:
        add("--batch-size", type=positive_int, default=16, metavar="B", help="sequences a step")
        add("--rounds", "--steps", type=positive_int, metavar="N", help="steps (default: what --n-epochs needs)")
        # central training is one client with all of the text, one step a round
        parser.set_defaults(client_optimizer="adamw", client_state="keep", local_updates=1, participation=1.0)

    add = parser.add_argument_group("what is measured").add_argument
    if federated:
        add("--val-freq", type=positive_int, metavar="N", help="evaluate every N rounds (default: 30; demo: 10)")
        add("--save-freq", type=positive_int, metavar="N", help="checkpoint every N rounds (default: as --val-freq)")
        own = "validation sequences for each client's own model; off: 0"
        add("--client-val-sequences", type=non_negative_int, default=32, metavar="N", help=own)
    else:
        add("--val-freq", type=positive_int, default=10, metavar="N", help="evaluate every N steps")
        add("--save-freq", type=positive_int, default=100, metavar="N", help="checkpoint every N steps")
    while_training = "validation sequences used while training (the end uses all); 0: all"
    add("--val-sequences", type=non_negative_int, default=256, metavar="N", help=while_training)
    add("--save-deltas", action="store_true", help="store the updates of the state-space parameters")
    add("--prompt", type=str, default="Once upon a time,", help="text that the samples go on from; off: ''")

    add_run_flags(parser, 0, federated, folders=["--data-dir"])
    return parser, add_to_method


def complete_flags(args):
    """Fills in the defaults that depend on other flags. Raises UsageError where two flags contradict each other."""
    if args.dataset not in DEFAULTS:
        raise UsageError(f"unknown dataset {args.dataset!r}: choose {' or '.join(DEFAULTS)}")
    by_name = LAYERS.get(args.config)
    if by_name and args.layers and by_name != args.layers:
        raise UsageError(f"--config {args.config} and --layers {args.layers} contradict each other: give one")
    args.layers = args.layers or by_name
    if args.init_from is not None:
        _complete_from(args, final_of(args.init_from))
    sizes = {flag: default for flag, (default, *_) in SIZES.items()}
    for name, value in (sizes | DEFAULTS[args.dataset]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.config = f"pure_ssm_{args.layers}_layer"
    if args.lr_scheduler != "constant" and args.min_lr > args.lr:
        raise UsageError(f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}: lower it")
    check_participation(args.participation, args.num_clients)
    return args


def final_of(run):
    """The folder of the model that a run ended with: RUN/final, or RUN itself."""
    return Path(run) / "final" if os.path.isdir(Path(run) / "final") else Path(run)  # also of a name that is too long


def _complete_from(args, folder):
    """The sizes of the model in `folder`, and its tokenizer where --tokenizer is not given."""
    from common.hub import read_config, reading  # numpy, which flags must not wait for

    with reading(f"--init-from {args.init_from} has no model", "give the folder of a finished run, or its final/"):
        description = read_config(folder / "config.json")
        sizes = {**description, **description.get("mamba_ssm", {})}
        there = {flag: sizes.get(ours, sizes.get(theirs)) for flag, (_, ours, theirs) in SIZES.items()}
        if odd := [flag for flag, size in there.items() if type(size) is not int or size < 1]:
            raise ValueError(f"{odd[0]} is {there[odd[0]]}")
    for flag, size in there.items():
        if getattr(args, flag) not in (None, size):
            name = f"--{flag.replace('_', '-')} {getattr(args, flag)}"
            raise UsageError(f"{name} contradicts --init-from {args.init_from}, which has {size}: drop {name}")
        setattr(args, flag, size)
    if args.tokenizer is None and (folder / "tokenizer.json").is_file():
        args.tokenizer = str(folder)


def footprint(args):
    """(clients that take part in a round, bytes that a process takes at a guess) of the flags."""
    weights = args.d_model * 50264 + args.layers * 7 * args.d_model**2  # the embedding and in_proj, out_proj
    logits = args.batch_size * args.sequence_length * 50264
    clients = per_round(args.participation, args.num_clients)
    return clients, 2**29 + 4 * (6 * weights + 3 * logits)


def run_name(command, args):
    """The source's name of a run; other server optimisers than the default, a start and the demo are marked."""
    updates = f"_lu_{args.local_updates}" if command != "central" else ""
    method = "federated" if command == "fed_avg" else command
    suffix = ("_init" if args.init_from else "") + ("_demo" if args.dataset == "demo" else "")
    if command == "fed_momentum" and (args.server_optimizer, args.momentum_form) != ("momentum", "heavy_ball"):
        form = args.momentum_form if args.server_optimizer == "momentum" else args.server_optimizer
        suffix = f"_{form}{suffix}"
    return f"{method}_config_{args.config}{updates}_seed_{args.seed}{suffix}"
