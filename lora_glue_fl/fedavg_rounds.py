"""Federated LoRA on a GLUE task: rounds of local AdamW, the clients' adapters averaged by one of several rules.

    python lora_glue_fl/fedavg_rounds.py --model_size base --task_name sst2 --shard_dir out/sst2_base/shards_iid_k3
    python lora_glue_fl/sharding.py --task_name sst2 --k 3 --out_dir shards --dataset demo        # offline, a CPU:
    python lora_glue_fl/fedavg_rounds.py --model tiny --dataset demo --task_name sst2 --shard_dir shards --rounds 3

Delta_k = s_k B_k A_k,  p_k = n_k / sum_j n_j;  svd serves the best rank-r approximation of sum_k p_k Delta_k (FlexLoRA,
Bai et al. 2024), the other rules are in common/lowrank.py. The head is averaged by p_k too.
"""

import argparse

from common.choices import RULES
from common.cli import (
    fraction,
    non_negative_float,
    parse,
    positive_float,
    positive_int,
)
from common.processes import run_federated
from common.runlog import start_run
from lora_glue_fl import flags
from lora_glue_fl.fed_core import client_update, finish, footprint, load_study, serve
from lora_glue_fl.replay import Replay


def build_parser():
    parser, own = flags.make_parser(__doc__.split("\n")[0], "./out_fedavg", "--output-root", federated=True)

    own.add_argument("--aggregate", choices=RULES, help="the server's rule, see common/lowrank.py (default: svd)")
    own.add_argument("--skip-svd", action="store_true", help="the same as --aggregate naive")
    own.add_argument("--svd-rank", type=positive_int, default=8, metavar="R", help="svd: rank it serves")
    own.add_argument("--alpha", type=positive_float, metavar="X", help="svd: alpha it serves (default: R)")
    flags.add_split_flag(own)
    flags.add_lora_flags(own)
    own.add_argument(
        "--client-ranks",
        type=positive_int,
        nargs="+",
        metavar="R",
        help="svd, stack: rank of each client, repeated in turn (default: --lora-r)",
    )
    flags.add_init_flag(own)
    own.add_argument("--mu", type=non_negative_float, default=0.0, metavar="X", help="FedProx's mu; off: 0")
    eta = {"default": 1.0, "metavar": "X", "help": "eta of theta + eta (mean - theta) (off: 1, the plain mean)"}
    own.add_argument("--server-lr", type=positive_float, **eta)
    federated = parser.add_argument_group("rounds")
    federated.add_argument("--shard-dir", required=True, metavar="DIR", help="manifests that sharding.py wrote")
    federated.add_argument("--rounds", "--num-rounds", type=positive_int, default=5, metavar="T", help="rounds")
    federated.add_argument(
        *("--participation", "--participation-rate"),
        type=fraction,
        default=1.0,
        metavar="X",
        help="share of the clients that trains in a round",
    )
    federated.add_argument(
        "--local-epochs", type=positive_float, default=1.0, metavar="X", help="passes over a client's examples a round"
    )
    flags.add_training_flags(parser, 2e-4)
    report = parser.add_argument_group("what is kept")
    report.add_argument("--eval-each-round", action="store_true", help="evaluate every round (else only the last)")
    text = "evaluate what the other rules would serve of the same clients (off: without)"
    report.add_argument("--replay", action="store_true", help=text)
    report.add_argument("--eval-clients", action="store_true", help="evaluate each client's adapter too")
    report.add_argument(
        "--keep",
        nargs="+",
        choices=["all", "last", "best"],
        default=["last", "best"],
        metavar="WHICH",
        help="folders of rounds that stay: all, last, best (default: last best)",
    )
    report.add_argument(
        "--save-clients", action=argparse.BooleanOptionalAction, default=True, help="write the clients' adapters too"
    )
    return parser


def main(args):
    with start_run("fedavg_rounds", args, args.run_name or flags.run_name(args), unit="examples") as run:
        study = load_study(args, run)
        theta = run.restore(study.theta, None, same_shapes=False, **study.lasting)
        study.folders.clean(run.start_round - 1)
        run.watch(*[Replay(study)] * args.replay)
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = study.mean(theta, clients)
            for k in clients:
                factors_k, head_k = client_update(study, theta, k, t)
                mean.add(factors_k, head_k)
            theta = serve(study, theta, mean)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), flags.complete_rounds)
    run_federated(main, args, *footprint(args))
