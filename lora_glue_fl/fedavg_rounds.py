"""Federated LoRA on a GLUE task: rounds of local AdamW, the clients' adapters averaged by one of several rules.

    python lora_glue_fl/fedavg_rounds.py --model_size base --task_name sst2 --shard_dir out/sst2_base/shards_iid_k3
    python lora_glue_fl/sharding.py --task_name sst2 --k 3 --out_dir shards --dataset demo        # offline, a CPU:
    python lora_glue_fl/fedavg_rounds.py --model tiny --dataset demo --task_name sst2 --shard_dir shards --rounds 3

Delta_k = s_k B_k A_k,  p_k = n_k / sum_j n_j;  svd serves the best rank-r approximation of sum_k p_k Delta_k (FlexLoRA,
Bai et al. 2024), the other rules are in common/lowrank.py. The head is averaged by p_k too.
"""

import argparse

from common.cli import RARE, RULES, SPLITS, fraction, parse, positive_float, positive_int
from common.processes import run_federated
from common.runlog import start_run
from lora_glue_fl import flags
from lora_glue_fl.fed_core import client_update, finish, footprint, load_study, serve
from lora_glue_fl.replay import Replay


def build_parser():
    parser = flags.make_parser(__doc__.split("\n")[0], "./out_fedavg", "--output-root", federated=True)
    add = parser.group("the method").add_argument
    add("--aggregate", choices=RULES, help="the server's rule, see common/lowrank.py (default: svd)")
    add("--skip-svd", action="store_true", help="the same as --aggregate naive")
    add("--svd-rank", type=positive_int, default=8, metavar="R", help="svd: rank it serves")
    add("--alpha", type=positive_float, metavar="X", help="svd: alpha it serves (default: R)")
    flags.add_lora_flags(parser)
    add = parser.group("rounds").add_argument
    add("--shard-dir", required=True, metavar="DIR", help="manifests that sharding.py wrote")
    add("--rounds", "--num-rounds", type=positive_int, default=5, metavar="T", help="rounds")
    text = "share of the clients that trains in a round"
    add("--participation", "--participation-rate", type=fraction, default=1.0, metavar="X", help=text)
    text = "passes over a client's examples a round"
    add("--local-epochs", type=positive_float, default=1.0, metavar="X", help=text)
    flags.add_training_flags(parser, 2e-4)
    add = parser.group("what is measured").add_argument
    add("--eval-each-round", action="store_true", help="evaluate every round (else only the last)")
    add("--eval-clients", action="store_true", help="evaluate each client's adapter too")
    text = "evaluate what the other rules would serve of the same clients (off: without)"
    add("--replay", action="store_true", help=text)
    add = parser.group(RARE).add_argument
    text = "how B A = U S V^T is served: us: B = U S; balanced; sv: A = S V^T (default: svd us, else as it is averaged)"
    add("--split", choices=SPLITS, help=text)
    text = "svd, stack: rank of each client, repeated in turn (default: --lora-r)"
    add("--client-ranks", type=positive_int, nargs="+", metavar="R", help=text)
    add("--keep", choices=["last", "all"], default="last", help="folders of rounds that stay")
    text = "write the clients' adapters too"
    add("--save-clients", action=argparse.BooleanOptionalAction, default=True, help=text)
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
                mean.add(factors_k, head_k, scale=study.scale)
            theta = serve(study, theta, mean)
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


if __name__ == "__main__":
    args = parse(build_parser(), flags.complete_rounds)
    run_federated(main, args, *footprint(args))
