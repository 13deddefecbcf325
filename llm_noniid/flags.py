"""The flags of this study's scripts and the keys of its yaml files: the source's names and defaults, and ours."""

from pathlib import Path

from common.cli import (
    CLIENT_OPTIMIZERS,
    RARE,
    SIZES,
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

ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fednova", "fedavgm", "fedadam", "local", "central")
CLUSTERS = ("none", "labels")
DATASETS = ("ag_news", "wikitext", "demo")
PARTITIONS = ("iid", "topic_skew", "style_skew", "token_skew")
STYLE_CRITERIA = ("length", "formality", "complexity")
SKEW_TYPES = ("frequency", "truncation", "vocabulary")
TOPICS = {"ag_news": 4, "wikitext": 8, "demo": 4}  # of a data set
TARGETS = ("text", "label")
TRAINED = ("lora", "full")
ALIKE = {  # section of a yaml file -> keys that are called as their flag
    "model": "lora_r lora_alpha lora_dropout max_length",
    "data": "dataset num_clients alpha skew_type batch_size max_samples seed",
    "federated": "algorithm num_rounds participation_rate local_epochs learning_rate mu",
}
KEYS = {  # of a yaml file -> flag
    "name": "run_name",
    "model.name": "model",
    "data.partition_strategy": "partition",
    "data.style_criteria": "style_criterion",
    "eval_every": "eval_every",
    "results_dir": "output_dir",
    "seed": "seed",
    "device": "device",
    **{f"{section}.{name}": name for section, names in ALIKE.items() for name in names.split()},
    **dict.fromkeys(("model.use_quantization", "save_checkpoints", "checkpoint_dir")),  # no effect
}


def build_parser(description):
    """The parser of train.py."""
    parser = Parser(description)
    method, data, model, train = map(parser.add_argument_group, ("the method", "the data", "the model", "training"))
    rare = parser.group(RARE)

    choice(method, "--algorithm", ALGORITHMS, "fedavg", "how the clients are brought together")
    number(method, "--mu", non_negative_float, 0.01, "FedProx's mu, only there; off: 0")
    choice(method, "--cluster", CLUSTERS, "none", "FedAvg within groups of clients with like topics")
    text = "groups, for --cluster (default: as many as the data set has topics)"
    number(rare, "--num-clusters", positive_int, None, text, "C")
    choice(rare, "--client-optimizer", CLIENT_OPTIMIZERS, "adamw", "of the clients; sgdm: momentum 0.9")
    text = "factor of the server's step; 1: the mean (default: 1; fedadam: 0.01)"
    number(rare, "--server-lr", positive_float, None, text)
    number(rare, "--server-momentum", half_open_fraction, 0.9, "of fedavgm; off: 0")

    choice(data, "--dataset", DATASETS, "ag_news", "demo is built in and needs no network")
    text = "what is predicted: all of a text (losses in nats a token), or after it its label (nats a text)"
    choice(data, "--target", TARGETS, "text", text)
    number(data, "--max-samples", non_negative_int, 0, "training texts; 0: all", "N")
    number(rare, "--max-length", positive_int, 128, "tokens of a text, at most", "N")
    number(rare, "--eval-samples", non_negative_int, 500, "validation and test texts; 0: all", "N")
    number(rare, "--test-samples", non_negative_int, None, "test texts; 0: all (default: --eval-samples)", "N")
    rare.add_argument("--data-root", metavar="DIR", help="where the data are (default: $FEDQUARTET_DATA, else data)")
    choice(data, "--partition", PARTITIONS, "topic_skew", "how texts are dealt to clients")
    number(data, "--alpha", positive_float, 0.1, "topic_skew: Dirichlet's concentration")
    text = "topic_skew: all clients have as many texts (equal), or what alpha draws"
    choice(rare, "--sizes", SIZES, "dirichlet", text)
    choice(data, "--style-criterion", STYLE_CRITERIA, "length", "style_skew: what the texts are sorted by")
    choice(data, "--skew-type", SKEW_TYPES, "frequency", "token_skew: what the texts are sorted by")
    number(data, "--num-clients", positive_int, 10, "clients", "K")
    number(rare, "--min-samples", positive_int, 10, "texts of each client, at least", "N")

    text = "distilgpt2, gpt2, tinyllama, qwen-0.5b, tiny, a folder"
    model.add_argument("--model", default="distilgpt2", metavar="NAME", help=text)
    rare.add_argument("--tokenizer", metavar="NAME", help="bpe:N, a folder (default: the model's; tiny: bpe:2048)")
    choice(model, "--train", TRAINED, "lora", "what is trained and sent: an adapter, or all parameters")
    number(rare, "--dropout", half_open_fraction, None, "of the model's own layers; off: 0 (default: its config's)")
    number(rare, "--lora-r", positive_int, 8, "rank of the adapter", "R")
    number(rare, "--lora-alpha", positive_float, 16, "its scale is alpha / r")
    number(rare, "--lora-dropout", half_open_fraction, 0.05, "dropout; off: 0")
    rare.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers to adapt (default: attention's)")

    number(train, "--num-rounds", positive_int, 50, "rounds", "T", "--rounds")
    number(train, "--participation-rate", fraction, 1.0, "share of clients a round", "C", "--participation")
    number(train, "--local-epochs", positive_float, 1.0, "passes over a client's texts a round")
    number(train, "--local-steps", non_negative_int, 0, "exactly so many steps instead; off: 0", "H")
    number(train, "--batch-size", positive_int, 8, "texts a step", "B")
    number(train, "--learning-rate", positive_float, 5e-5, "of the clients", "X", "--lr")
    number(rare, "--eval-every", positive_int, 5, "evaluate every N rounds", "N")
    number(rare, "--probe-samples", non_negative_int, 32, "texts for CKA; off: 0", "N")

    add_run_flags(parser, federated=True, names=["--name"], folders=["--results-dir"])
    text = "yaml file with defaults for the flags (configs/default.yaml)"
    parser.group("the run").add_argument("--config", metavar="FILE", help=text)
    return parser


def number(group, flag, kind, default, text, letter="X", *spellings):
    """A flag that takes a number."""
    group.add_argument(flag, *spellings, type=kind, default=default, metavar=letter, help=text)


def choice(group, flag, choices, default, text):
    """A flag that takes one of several words."""
    group.add_argument(flag, choices=choices, default=default, help=text)


def parse(parser, argv=None):
    """The flags from the command line over those of --config; what depends on others is filled in and checked."""
    finder = Parser("", add_help=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(argv)[0].config
    if config:
        apply_config(parser, config, KEYS)
    return complete(parser.parse_args(argv))


def complete(args):
    """Raises UsageError for flags that contradict each other."""
    if args.algorithm == "fednova" and args.client_optimizer == "adamw":
        raise UsageError(
            "--algorithm fednova with --client-optimizer adamw: its steps are not sums of gradients: take sgd or sgdm"
        )
    if args.cluster != "none" and args.algorithm != "fedavg":
        raise UsageError(f"--cluster {args.cluster} is FedAvg within groups: drop it, or --algorithm {args.algorithm}")
    if args.cluster != "none":
        args.num_clusters = args.num_clusters or min(TOPICS[args.dataset], args.num_clients)
        if args.num_clusters > args.num_clients:
            raise UsageError(f"--num-clusters {args.num_clusters} is above --num-clients {args.num_clients}: lower it")
    check_participation(args.participation_rate, args.num_clients)
    if args.server_lr is None:
        args.server_lr = 0.01 if args.algorithm == "fedadam" else 1.0
    if args.algorithm == "central" and not args.threads:
        import torch

        args.threads = torch.get_num_threads()  # all cores: there is one client
    return args


def run_name(args):
    """The run's folder where --run-name does not say: what distinguishes it."""
    partition = {
        "iid": "iid",
        "topic_skew": f"topic_skew_alpha_{args.alpha:g}" + "_equal_sizes" * (args.sizes == "equal"),
        "style_skew": f"style_skew_{args.style_criterion}",
        "token_skew": f"token_skew_{args.skew_type}",
    }[args.partition]
    cluster = "" if args.cluster == "none" else f"_{args.num_clusters}_clusters_by_{args.cluster}"
    rate = "" if args.participation_rate == 1 else f"_participation_{args.participation_rate:g}"
    return (
        f"{args.algorithm}{cluster}_{partition}_{args.dataset}_{Path(args.model).name}{rate}_lr_{args.learning_rate:g}"
        f"_seed_{args.seed}"
    )
