"""The flags of this study's scripts: the source's names and defaults, and ours."""

from common.cli import (
    Parser,
    UsageError,
    add_machine_flags,
    add_run_flags,
    fraction,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
)
from common.participation import per_round
from mamba_fl.ssm_config import CONFIGS

# What a flag that was not given means, by data set. The demo's need no download.
DEFAULTS = {
    "wikitext2": {"tokenizer": "gpt2", "d_model": 512, "sequence_length": 256, "n_epochs": 1.0, "val_freq": 30},
    "demo": {"tokenizer": "bpe:1024", "d_model": 128, "sequence_length": 128, "n_epochs": 3.0, "val_freq": 10},
}


def make_parser(description, *, federated=True):
    """The parser of one script: the source's flags and ours. Returns (parser, group for the method's own flags)."""
    parser = Parser(description)
    method = parser.add_argument_group("the method") if federated else None

    model = parser.add_argument_group("the model")
    model.add_argument("--layers", type=positive_int, metavar="N", help="Mamba-2 layers (default: 1)")
    model.add_argument("--config", choices=sorted(CONFIGS), help="the same by name: pure_ssm_1_layer is --layers 1")
    model.add_argument("--d-model", type=positive_int, metavar="N", help="width (default: 512; demo: 128)")
    model.add_argument("--d-state", type=positive_int, default=128, metavar="N", help="state size per head")
    model.add_argument("--headdim", type=positive_int, default=64, metavar="N", help="channels per head")
    model.add_argument("--expand", type=positive_int, default=2, metavar="N", help="inner width over width")
    model.add_argument("--chunk", type=_chunk, default="auto", help="tokens per chunk of the recurrence, or auto")
    model.add_argument(
        "--kernel",
        choices=["auto", "torch", "mamba_ssm"],
        default="auto",
        help="auto: mamba-ssm's where it is installed and the device is CUDA",
    )

    data = parser.add_argument_group("the data")
    data.add_argument("--dataset", default="wikitext2", metavar="NAME", help="wikitext2, or demo (needs no network)")
    data.add_argument(
        "--tokenizer",
        help="gpt2, bpe:N (trained on the training text) or a path (default: gpt2; demo: bpe:1024)",
    )
    data.add_argument("--sequence-length", type=positive_int, metavar="T", help="tokens (default: 256; demo: 128)")
    data.add_argument(
        "--data-root",
        "--cache-dir",
        metavar="DIR",
        help="where the data sets are (default: $FEDQUARTET_DATA, else data)",
    )
    data.add_argument(
        "--num-clients",
        type=positive_int,
        default=4,
        metavar="K",
        help="clients that the text is dealt to"
        if federated
        else "shards whose union is trained on: the federated runs' tokens exactly",
    )
    data.add_argument(
        "--sharding",
        choices=["contiguous", "iid"],
        default="contiguous",
        help="documents to clients: in corpus order, or at random",
    )

    train = parser.add_argument_group("training")
    train.add_argument(
        "--n-epochs", type=positive_float, metavar="X", help="passes over the text (default: 1; demo: 3)"
    )
    train.add_argument(
        "--batch-size",
        type=positive_int,
        default=4 if federated else 16,
        metavar="B",
        help="sequences a step" + (" and client" if federated else ""),
    )
    train.add_argument(
        "--lr",
        type=non_negative_float,
        default=5e-4,
        metavar="X",
        help="learning rate of the clients" if federated else "learning rate",
    )
    train.add_argument(
        "--weight-decay",
        type=non_negative_float,
        default=0.01,
        metavar="X",
        help="decoupled weight decay (not on dt_bias, A_log, D); off: 0",
    )
    if federated:
        train.add_argument(
            "--local-updates", type=positive_int, default=1, metavar="H", help="steps a client and round"
        )
        train.add_argument(
            "--rounds",
            "--num-rounds",
            type=positive_int,
            metavar="R",
            help="rounds (default: as many as --n-epochs needs)",
        )
        train.add_argument("--participation", type=fraction, default=1.0, metavar="C", help="share of clients a round")
        train.add_argument(
            "--client-weights",
            choices=["examples", "uniform"],
            help="weight of a client in the mean (default: examples; fed_entropy: as --entropy-prior)",
        )
        train.add_argument("--client-optimizer", choices=["adamw", "sgd"], default="adamw", help="local optimiser")
        train.add_argument(
            "--client-state",
            choices=["keep", "reset"],
            default="keep",
            when=lambda a: a.client_optimizer == "adamw",
            help="a client's AdamW moments from round to round",
        )
        train.add_argument(
            "--sync",
            choices=["round", "epoch"],
            default="round",
            help="when clients get the averaged model; epoch: the source's schedule",
        )
        train.add_argument(
            "--budget",
            choices=["equal", "source"],
            default="equal",
            help="equal: central's tokens; source: its 2.5 epochs with replacement",
        )
    else:
        train.add_argument(
            "--rounds",
            "--steps",
            type=positive_int,
            metavar="N",
            help="steps (default: as many as --n-epochs needs)",
        )
        # central training is one client with all of the text, one step a round
        parser.set_defaults(
            local_updates=1,
            participation=1.0,
            client_weights="examples",
            client_optimizer="adamw",
            client_state="keep",
            sync="round",
            budget="equal",
            client_val_sequences=0,
        )

    report = parser.add_argument_group("what is measured")
    report.add_argument(
        "--val-freq",
        type=positive_int,
        default=None if federated else 10,
        metavar="N",
        help="evaluate every N " + ("rounds (default: 30; demo: 10)" if federated else "steps"),
    )
    report.add_argument(
        "--save-freq",
        type=positive_int,
        default=None if federated else 100,
        metavar="N",
        help="save a checkpoint every N " + ("rounds (default: as --val-freq)" if federated else "steps"),
    )
    report.add_argument(
        "--val-sequences",
        type=non_negative_int,
        default=256,
        metavar="N",
        help="validation sequences used while training (the end uses all); 0: all",
    )
    if federated:
        report.add_argument(
            "--client-val-sequences",
            type=non_negative_int,
            default=32,
            metavar="N",
            help="validation sequences for each client's own model; off: 0",
        )
    report.add_argument("--save-deltas", action="store_true", help="store the updates of the state-space parameters")
    report.add_argument("--prompt", default="Once upon a time,", help="text that the samples go on from; off: ''")

    run = add_run_flags(parser)
    run.add_argument("--output-dir", "--data-dir", default="results", metavar="DIR", help="where run folders go")
    add_machine_flags(run, 0, federated)
    run.add_argument("--compile", action="store_true", help="torch.compile, checked against eager at the first step")
    return parser, method


def _chunk(text):
    return text if text == "auto" else positive_int(text)


def complete_flags(args):
    """Fills in the defaults that depend on other flags. Raises UsageError where two flags contradict each other."""
    if args.dataset not in DEFAULTS:
        raise UsageError(f"unknown dataset {args.dataset!r}: choose {' or '.join(DEFAULTS)}")
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    by_name = CONFIGS[args.config].n_layer if args.config else None
    if by_name and args.layers and by_name != args.layers:
        raise UsageError(f"--config {args.config} and --layers {args.layers} contradict each other: give one")
    args.layers = args.layers or by_name or 1
    args.config = f"pure_ssm_{args.layers}_layer"
    prior = {"none": "uniform", "examples": "examples"}.get(getattr(args, "entropy_prior", None))
    if prior and args.client_weights not in (None, prior):
        raise UsageError(
            f"--client-weights {args.client_weights} and --entropy-prior {args.entropy_prior} contradict each other: "
            "give one"
        )
    if hasattr(args, "entropy_prior"):
        args.client_weights = args.client_weights or prior or "uniform"
        args.entropy_prior = {"uniform": "none", "examples": "examples"}[args.client_weights]
    args.client_weights = args.client_weights or "examples"
    if args.sync == "epoch" and args.participation < 1:
        raise UsageError(f"--sync epoch needs every client in every round: --participation {args.participation} -> 1")
    return args


def footprint(args):
    """(clients that take part in a round, bytes that a process takes at a guess) of the flags."""
    weights = args.d_model * 50264 + args.layers * 7 * args.d_model**2  # the embedding and in_proj, out_proj
    logits = args.batch_size * args.sequence_length * 50264
    clients = per_round(args.participation, args.num_clients)
    return clients, 2**29 + 4 * (6 * weights + 3 * logits)


def run_name(command, args):
    """The source's name of a run; other server optimisers than the default, and the demo, are marked."""
    updates = f"_lu_{args.local_updates}" if command != "central" else ""
    method = "federated" if command == "fed_avg" else command
    suffix = "_demo" if args.dataset == "demo" else ""
    if command == "fed_momentum" and (args.server_optimizer, args.momentum_form) != ("momentum", "heavy_ball"):
        form = args.momentum_form if args.server_optimizer == "momentum" else args.server_optimizer
        suffix = f"_{form}{suffix}"
    return f"{method}_config_{args.config}{updates}_seed_{args.seed}{suffix}"
