"""The flags of this study's scripts and the keys of its yaml files: the source's names and defaults, and ours."""

import json
import sys

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
from common.config_file import apply_config
from common.local import CLIENT_OPTIMIZERS, SCAFFOLD_OPTIONS, check_scaffold
from common.runlog import NOT_COMPARED, add_machine_flags, add_run_flags
from llm_noniid.data import DATASETS
from llm_noniid.detectors import STOP_ON
from llm_noniid.partition import PARTITIONS, SKEW_TYPES, STYLE_CRITERIA

ALGORITHMS = ("fedavg", "fedprox", "scaffold", "fednova", "fedavgm", "fedadam", "local", "central")
CLUSTERS = ("none", "updates", "labels")
KEYS = {  # of a yaml file -> flag
    "name": "run_name",
    "model.name": "model",
    "model.lora_r": "lora_r",
    "model.lora_alpha": "lora_alpha",
    "model.lora_dropout": "lora_dropout",
    "model.use_quantization": None,
    "model.max_length": "max_length",
    "data.dataset": "dataset",
    "data.partition_strategy": "partition",
    "data.num_clients": "num_clients",
    "data.alpha": "alpha",
    "data.style_criteria": "style_criterion",
    "data.skew_type": "skew_type",
    "data.batch_size": "batch_size",
    "data.max_samples": "max_samples",
    "data.seed": "seed",
    "federated.algorithm": "algorithm",
    "federated.num_rounds": "num_rounds",
    "federated.participation_rate": "participation_rate",
    "federated.local_epochs": "local_epochs",
    "federated.learning_rate": "learning_rate",
    "federated.mu": "mu",
    "eval_every": "eval_every",
    "save_checkpoints": None,
    "checkpoint_dir": None,
    "results_dir": "output_dir",
    "seed": "seed",
    "device": "device",
}


def build_parser(description):
    """The parser of train.py."""
    parser = Parser(description)
    own = parser.add_argument_group("the method")
    own.add_argument("--algorithm", choices=ALGORITHMS, default="fedavg", help="how the clients are brought together")
    own.add_argument(
        "--mu", type=non_negative_float, default=0.01, metavar="X", help="FedProx's mu, only there; off: 0"
    )
    own.add_argument(
        "--client-optimizer", choices=CLIENT_OPTIMIZERS, default="adamw", help="of the clients; sgdm: momentum 0.9"
    )
    own.add_argument(
        "--scaffold-option",
        choices=SCAFFOLD_OPTIONS,
        default="mean_gradient",
        help="SCAFFOLD's new c_k: mean of the raw gradients, or the paper's formula II (not with adamw)",
    )
    own.add_argument("--server-lr", type=positive_float, metavar="X", help="of fedavgm (default: 1), fedadam (0.01)")
    own.add_argument("--server-momentum", type=half_open_fraction, default=0.9, metavar="X", help="of fedavgm; off: 0")
    own.add_argument(
        "--cluster",
        choices=CLUSTERS,
        default="none",
        help="FedAvg within groups of clients with like updates or topics",
    )
    own.add_argument("--num-clusters", type=positive_int, default=2, metavar="C", help="groups, for --cluster")
    own.add_argument(
        "--cluster-round",
        type=positive_int,
        default=1,
        metavar="T",
        help="round whose updates decide the groups; who is absent joins the largest",
    )
    own.add_argument(
        "--stop-on",
        choices=STOP_ON,
        default="never",
        help="end the run at a detector's alarm: of divergence, or of any",
    )
    add_data_flags(parser)
    add_model_flags(parser)
    add_federated_flags(parser)
    run = add_run_flags(parser, "--name")
    run.add_argument("--config", metavar="FILE", help="yaml file with defaults for the flags (configs/default.yaml)")
    run.add_argument("--output-dir", "--results-dir", default="results", metavar="DIR", help="where run folders go")
    add_machine_flags(run)
    run.add_argument("--compile", action="store_true", help="torch.compile, checked against eager at the first step")
    return parser


def add_data_flags(parser):
    """Texts and their partition."""
    data = parser.add_argument_group("the data")
    data.add_argument("--dataset", choices=DATASETS, default="ag_news", help="demo is built in and needs no network")
    data.add_argument("--max-samples", type=non_negative_int, default=0, metavar="N", help="training texts; 0: all")
    data.add_argument("--max-length", type=positive_int, default=128, metavar="N", help="tokens of a text, at most")
    data.add_argument(
        "--eval-samples", type=non_negative_int, default=500, metavar="N", help="validation and test texts; 0: all"
    )
    data.add_argument("--data-root", metavar="DIR", help="where the data are (default: $FEDQUARTET_DATA, else data)")
    data.add_argument("--cache-dir", metavar="DIR", help="tokens (default: $FEDQUARTET_CACHE, else ~/.cache)")
    data.add_argument("--partition", choices=PARTITIONS, default="topic_skew", help="how texts are dealt to clients")
    data.add_argument(
        "--alpha", type=positive_float, default=0.1, metavar="X", help="topic_skew: Dirichlet's concentration"
    )
    data.add_argument(
        "--style-criterion", choices=STYLE_CRITERIA, default="length", help="style_skew: what the texts are sorted by"
    )
    data.add_argument(
        "--skew-type", choices=SKEW_TYPES, default="frequency", help="token_skew: what the texts are sorted by"
    )
    data.add_argument("--num-clients", type=positive_int, default=10, metavar="K", help="clients")
    data.add_argument(
        "--min-samples", type=positive_int, default=10, metavar="N", help="texts of each client, at least"
    )
    return data


def add_model_flags(parser):
    """The model and its adapter."""
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model", default="distilgpt2", metavar="NAME", help="distilgpt2, gpt2, tinyllama, qwen-0.5b, tiny, a folder"
    )
    model.add_argument("--tokenizer", metavar="NAME", help="bpe:N, a folder (default: the model's; tiny: bpe:2048)")
    model.add_argument("--lora-r", type=positive_int, default=8, metavar="R", help="rank of the adapter")
    model.add_argument("--lora-alpha", type=positive_float, default=16, metavar="X", help="its scale is alpha / r")
    model.add_argument("--lora-dropout", type=half_open_fraction, default=0.05, metavar="X", help="dropout; off: 0")
    model.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers to adapt (default: attention's)")
    return model


def add_federated_flags(parser):
    """Rounds and local work."""
    train = parser.add_argument_group("training")
    train.add_argument("--num-rounds", "--rounds", type=positive_int, default=50, metavar="T", help="rounds")
    train.add_argument("--participation-rate", type=fraction, default=1.0, metavar="C", help="share of clients a round")
    train.add_argument(
        "--local-epochs", type=positive_float, default=1.0, metavar="X", help="passes over a client's texts a round"
    )
    train.add_argument(
        "--local-steps", type=non_negative_int, default=0, metavar="H", help="exactly so many steps instead; off: 0"
    )
    train.add_argument("--batch-size", type=positive_int, default=8, metavar="B", help="texts a step")
    train.add_argument("--learning-rate", type=positive_float, default=5e-5, metavar="X", help="of the clients")
    train.add_argument("--weight-decay", type=non_negative_float, default=0.0, metavar="X", help="off: 0")
    train.add_argument("--max-grad-norm", type=non_negative_float, default=0.0, metavar="X", help="clipping; off: 0")
    train.add_argument(
        "--client-weights",
        choices=["examples", "uniform"],
        default="examples",
        help="weight of a client in the mean, and of its control variate",
    )
    train.add_argument("--eval-every", type=positive_int, default=5, metavar="N", help="evaluate every N rounds")
    train.add_argument("--probe-samples", type=non_negative_int, default=32, metavar="N", help="texts for CKA; off: 0")
    return train


def parse(parser, argv=None):
    """The flags from the command line over those of --config; what depends on others is filled in and checked."""
    finder = Parser("", add_help=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(argv)[0].config
    if config:
        apply_config(parser, config, KEYS)
    return complete(parser.parse_args(argv), argv)


def complete(args, argv=None):
    """Raises UsageError for flags that contradict each other."""
    if args.algorithm == "scaffold":
        check_scaffold(args.client_optimizer, args.scaffold_option)
    if args.algorithm == "fednova" and args.client_optimizer == "adamw":
        raise UsageError(
            "--algorithm fednova with --client-optimizer adamw: its steps are not sums of gradients: take sgd or sgdm"
        )
    if args.algorithm != "fedprox" and any(str(w).startswith("--mu") for w in (argv or sys.argv[1:])):
        print(f"warning: --mu has no effect with --algorithm {args.algorithm}: it is fedprox's", file=sys.stderr)
    if args.cluster != "none" and args.algorithm != "fedavg":
        raise UsageError(f"--cluster {args.cluster} is FedAvg within groups: drop it, or --algorithm {args.algorithm}")
    if args.cluster != "none" and args.num_clusters > args.num_clients:
        raise UsageError(f"--num-clusters {args.num_clusters} is above --num-clients {args.num_clients}: lower it")
    if args.cluster == "updates" and args.cluster_round > args.num_rounds:
        raise UsageError(
            f"--cluster-round {args.cluster_round} is above --num-rounds {args.num_rounds}, so that no groups form: "
            "lower it"
        )
    if args.participation_rate * args.num_clients < 0.5:
        raise UsageError(
            f"--participation-rate {args.participation_rate:g} of {args.num_clients} clients samples nobody: raise it "
            f"to {1 / args.num_clients:g}"
        )
    if args.server_lr is None:
        args.server_lr = {"fedavgm": 1.0, "fedadam": 0.01}.get(args.algorithm, 1.0)
    return args


def compared(args):
    """The flags of a run of train.py that decide what is computed, as JSON values."""
    return {k: v for k, v in json.loads(json.dumps(vars(args), default=str)).items() if k not in NOT_COMPARED}


def refuse(words, names):
    """Raises UsageError where one of these flags is among the words: the script that starts the runs sets it."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in names:
            raise UsageError(f"--{name.replace('_', '-')} is set for each run by this script (see --help): drop it")


def run_name(args):
    """The run's folder where --run-name does not say: what distinguishes it."""
    from llm_noniid.models import label

    partition = {
        "iid": "iid",
        "topic_skew": f"topic_skew_alpha_{args.alpha:g}",
        "style_skew": f"style_skew_{args.style_criterion}",
        "token_skew": f"token_skew_{args.skew_type}",
    }[args.partition]
    cluster = "" if args.cluster == "none" else f"_{args.num_clusters}_clusters_by_{args.cluster}"
    rate = "" if args.participation_rate == 1 else f"_participation_{args.participation_rate:g}"
    return (
        f"{args.algorithm}{cluster}_{partition}_{args.dataset}_{label(args.model)}{rate}_lr_{args.learning_rate:g}"
        f"_seed_{args.seed}"
    )
