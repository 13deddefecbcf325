"""The flags of this study's scripts: the source's names and defaults, and ours."""

import argparse

from common import cli
from common.participation import check_participation, per_round

LAYERS = {f"pure_ssm_{n}_layer": n for n in (1, 2, 4)}  # the source's configurations
GROUPS = {  # of parameters, for --average-every: what their names have in them
    "embedding": ("embedding",),
    "projections": ("in_proj", "out_proj"),
    "conv": ("conv1d",),
    "recurrence": ("A_log", "dt_bias", ".D"),
    "norms": ("norm",),
}
# What a flag that was not given means, by data set. The demo's need no download.
DEFAULTS = {
    "wikitext2": {"tokenizer": "gpt2", "d_model": 512, "sequence_length": 256, "n_epochs": 1.0, "val_freq": 30},
    "demo": {"tokenizer": "bpe:1024", "d_model": 128, "sequence_length": 128, "n_epochs": 3.0, "val_freq": 10},
}


def make_parser(doc, add_method=None):
    """The parser of one script. doc: its docstring; add_method: adds a method's own flags; None: central training."""
    parser, federated = cli.Parser(doc.split("\n")[0]), add_method is not None
    if federated:
        add_method(parser)
    rare = parser.group(cli.RARE).add_argument

    add = parser.group("the model").add_mutually_exclusive_group().add_argument
    add("--layers", type=cli.positive_int, metavar="N", help="Mamba-2 layers (default: 1)")
    add("--config", choices=LAYERS, help="the same by name: pure_ssm_1_layer is --layers 1")
    rare("--d-model", type=cli.positive_int, metavar="N", help="width (default: 512; demo: 128)")
    rare("--d-state", type=cli.positive_int, default=128, metavar="N", help="state size per head")
    rare("--headdim", type=cli.positive_int, default=64, metavar="N", help="channels per head")
    rare("--kernel", choices=["auto", "torch", "mamba_ssm"], default="auto", help="auto: mamba_ssm on CUDA if there")

    add = parser.group("the data").add_argument
    add("--dataset", choices=DEFAULTS, default="wikitext2", help="demo needs no network")
    add("--data-root", "--cache-dir", metavar="DIR", help="folder of the data (default: $FEDQUARTET_DATA, else data)")
    add("--sequence-length", type=cli.positive_int, metavar="T", help="tokens (default: 256; demo: 128)")
    shards = "clients that the text is dealt to" if federated else "shards that are trained on together"
    add("--num-clients", type=cli.positive_int, default=4, metavar="K", help=shards)
    rare("--tokenizer", help="gpt2, bpe:N (trained on the training text) or a path (default: gpt2; demo: bpe:1024)")
    dealt = "documents in corpus order, or shuffled"
    rare("--sharding", choices=["contiguous", "iid"], default="contiguous", help=dealt)

    add = parser.group("training").add_argument
    add("--n-epochs", type=cli.positive_float, metavar="X", help="passes over the text (default: 1; demo: 3)")
    add("--lr", type=cli.non_negative_float, default=5e-4, metavar="X", help="learning rate")
    decayed = "not on dt_bias, A_log, D; off: 0"
    add("--weight-decay", type=cli.non_negative_float, default=0.01, metavar="X", help=decayed)
    rare("--lr-scheduler", choices=["constant", "cosine"], default="constant", help="of the rate, after the warm-up")
    rise = "steps in which it rises to --lr; off: 0"
    rare("--warmup-steps", type=cli.non_negative_int, default=0, metavar="N", help=rise)
    rare("--beta1", type=cli.half_open_fraction, default=0.9, metavar="X", help="b1 of AdamW; off: 0")
    rare("--beta2", type=cli.half_open_fraction, default=0.999, metavar="X", help="b2 of AdamW")
    if federated:
        add("--batch-size", type=cli.positive_int, default=4, metavar="B", help="sequences a step and client")
        add("--local-updates", type=cli.positive_int, default=1, metavar="H", help="steps a client and round")
        add("--rounds", "--num-rounds", type=cli.positive_int, metavar="R", help="default: what --n-epochs needs")
        share, words = ("--participation", "--participation-rate"), "share of clients a round"
        rare(*share, type=cli.fraction, default=1.0, metavar="C", help=words)
        add("--client-optimizer", choices=["adamw", "sgd"], default="adamw", help="local optimiser")
        states = "AdamW's moments from round to round: a client's own, none, or sent: as of the pooled batch"
        add("--client-state", choices=["keep", "reset", "pooled"], default="keep", help=states)
    else:
        add("--batch-size", type=cli.positive_int, default=16, metavar="B", help="sequences a step")
        add("--rounds", "--steps", type=cli.positive_int, metavar="N", help="steps (default: what --n-epochs needs)")
        # central training is one client with all of the text, one step a round
        parser.set_defaults(client_optimizer="adamw", client_state="keep", local_updates=1, participation=1.0)

    add = parser.group("what is measured").add_argument
    evaluated = "evaluate every N " + ("rounds (default: 30; demo: 10)" if federated else "steps")
    add("--val-freq", type=cli.positive_int, default=None if federated else 10, metavar="N", help=evaluated)
    saved = "checkpoint every N " + ("rounds (default: as --val-freq)" if federated else "steps")
    rare("--save-freq", type=cli.positive_int, default=None if federated else 100, metavar="N", help=saved)
    if federated:
        own = "validation sequences for each client's own model; off: 0"
        rare("--client-val-sequences", type=cli.non_negative_int, default=32, metavar="N", help=own)
    while_training = "validation sequences used while training (the end uses all); 0: all"
    rare("--val-sequences", type=cli.non_negative_int, default=256, metavar="N", help=while_training)
    add("--save-deltas", action="store_true", help="store the updates of the state-space parameters")
    rare("--prompt", type=str, default="Once upon a time,", help="text that the samples go on from; off: ''")

    cli.add_run_flags(parser, 0, federated, folders=["--data-dir"])
    return parser


# ---- of one method


def average_flags(parser):
    """The server's rate, of all methods whose server only averages."""
    add = parser.group("the method").add_argument
    rate = "eta_s, of the mean update; the plain mean: 1"
    add("--server-lr", type=cli.positive_float, default=1.0, metavar="X", help=rate)


def fed_avg_flags(parser):
    """And when it averages what."""
    average_flags(parser)
    rare = parser.group(cli.RARE).add_argument
    text = "rounds of H steps, or as many in each of which the squared rates have the same sum"
    rare("--rounds-by", choices=["steps", "drift"], default="steps", help=text)
    text = "average a group only every H / --local-updates rounds (off: without): " + ", ".join(GROUPS)
    rare("--average-every", type=group_every, nargs="+", default=[], metavar="GROUP=H", help=text)
    rare("--moments-every", type=cli.positive_int, default=1, metavar="N", help="pooled: send them every N rounds")


def group_every(text):
    """(group, H) of GROUP=H."""
    group, _, steps = text.partition("=")
    if group not in GROUPS or not steps.isdecimal() or not int(steps):
        raise argparse.ArgumentTypeError(f"{text!r} is not GROUP=H with a group of {', '.join(GROUPS)} and H steps")
    return group, int(steps)


def check_averages(args):
    """Raises UsageError where what is averaged when does not fit the rounds."""
    names = [group for group, _ in args.average_every]
    if twice := {group for group in names if names.count(group) > 1}:
        raise cli.UsageError(f"--average-every has {', '.join(twice)} twice: give each group once")
    for group, steps in args.average_every:
        if steps % args.local_updates:
            raise cli.UsageError(
                f"--average-every {group}={steps} is no multiple of --local-updates {args.local_updates}: give "
                f"{group}={-(-steps // args.local_updates) * args.local_updates}"
            )
    asked = {"--rounds-by drift": args.rounds_by == "drift", "--average-every": names}
    asked["--moments-every"] = args.moments_every > 1
    for flag in (flag for flag, given in asked.items() if given and args.participation < 1):
        raise cli.UsageError(f"{flag} is for all clients in every round: drop --participation {args.participation:g}")
    if args.moments_every > 1 and args.client_state != "pooled":
        raise cli.UsageError(f"--moments-every {args.moments_every} needs --client-state pooled")


def entropy_flags(parser):
    add = parser.group("the method").add_argument
    add("--temperature", type=cli.positive_float, default=1.0, metavar="T", help="T, in nats; small: the surest client")
    average_flags(parser)


def fisher_flags(parser):
    add, rare = parser.group("the method").add_argument, parser.group(cli.RARE).add_argument
    add("--fisher-samples", type=cli.positive_int, default=8, metavar="N", help="training sequences for a client's F_k")
    rare("--fisher-damping", type=cli.non_negative_float, default=0.1, metavar="RHO", help="adds rho mean(F_k); off: 0")
    rare("--fisher-labels", choices=["model", "data"], default="model", help="model: the Fisher; data: the empirical")
    average_flags(parser)


def momentum_flags(parser):
    add, rare = parser.group("the method").add_argument, parser.group(cli.RARE).add_argument
    kinds = ["momentum", "nesterov", "adam"]
    add("--server-optimizer", choices=kinds, default="momentum", help="what the server does with the mean update")
    add("--server-lr", type=cli.positive_float, metavar="X", help="eta_s (default: 1; adam: 0.01)")
    add("--server-momentum", type=cli.half_open_fraction, default=0.9, metavar="X", help="beta; Adam's b1; off: 0")
    add("--momentum-form", choices=["heavy_ball", "ema"], default="heavy_ball", help="ema: the source's average")
    rare("--server-beta2", type=cli.half_open_fraction, default=0.99, metavar="X", help="Adam's b2")
    rare("--server-tau", type=cli.positive_float, default=1e-3, metavar="X", help="Adam's tau")
    corrected = "Adam's m and v over 1 - b^t, as in Adam; Reddi's has none"
    rare("--server-bias-correction", action="store_true", help=corrected)
    whose = "whose rate --lr-scheduler and --warmup-steps change, as --lr's share"
    rare("--scheduled", choices=["clients", "server"], default="clients", help=whose)


# ---- what follows from the flags


def complete_flags(args):
    """Fills in the defaults that depend on other flags. Raises UsageError for a share of clients that is nobody."""
    args.layers = args.layers or LAYERS.get(args.config, 1)
    args.config = f"pure_ssm_{args.layers}_layer"
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if vars(args).get("server_lr", 1) is None:
        args.server_lr = 0.01 if args.server_optimizer == "adam" else 1.0
    check_participation(args.participation, args.num_clients)
    if "average_every" in vars(args):
        check_averages(args)
    return args


def footprint(args):
    """(clients that take part in a round, bytes that a process takes at a guess) of the flags."""
    weights = args.d_model * 50264 + args.layers * 7 * args.d_model**2  # the embedding and in_proj, out_proj
    logits = args.batch_size * args.sequence_length * 50264
    clients = per_round(args.participation, args.num_clients)
    return clients, 2**29 + 4 * (6 * weights + 3 * logits)


def run_name(command, args):
    """The source's name of a run; other server optimisers than the default and the demo are marked."""
    updates = f"_lu_{args.local_updates}" if command != "central" else ""
    method = "federated" if command == "fed_avg" else command
    suffix = "_demo" if args.dataset == "demo" else ""
    if command == "fed_momentum" and (args.server_optimizer, args.momentum_form) != ("momentum", "heavy_ball"):
        form = args.momentum_form if args.server_optimizer == "momentum" else args.server_optimizer
        suffix = f"_{form}{suffix}"
    return f"{method}_config_{args.config}{updates}_seed_{args.seed}{suffix}"
