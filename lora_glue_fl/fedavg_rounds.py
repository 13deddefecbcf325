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
    add_final_flag,
    fraction,
    half_open_fraction,
    non_negative_float,
    only,
    positive_float,
    positive_int,
    unless,
)
from common.early import parsed
from lora_glue_fl import flags


def build_parser():
    parser, own = flags.make_parser(__doc__.split("\n")[0], "./out_fedavg", "--output-root", federated=True)

    svd = only(aggregate=("svd", None), skip_svd=False)
    own.add_argument("--aggregate", choices=RULES, help="the server's rule, see common/lowrank.py (default: svd)")
    own.add_argument("--skip-svd", action="store_true", help="the same as --aggregate naive", when=lambda a: False)
    own.add_argument("--svd-rank", type=positive_int, default=8, metavar="R", help="svd: rank it serves", when=svd)
    own.add_argument("--alpha", type=positive_float, metavar="X", help="svd: alpha it serves (default: R)", when=svd)
    flags.add_split_flag(own, when=svd)
    flags.add_rotation_flag(own, only(aggregate="rotate") | only(replay=True))
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
    own.add_argument(
        "--server-optimizer",
        choices=["none", "momentum", "adam", "yogi", "adagrad"],
        default="none",
        help="on the mean factors and head, for naive, ffa, rolora and rotate",
    )
    own.add_argument(
        "--server-lr",
        type=positive_float,
        metavar="X",
        help="the server's learning rate eta, of theta + eta (mean - theta) or its optimiser (default: 1, the plain "
        "mean; adam, yogi, adagrad: 0.01)",
        when=unless(server_optimizer="none", server_lr=1.0),
    )
    own.add_argument(
        "--server-beta",
        type=half_open_fraction,
        default=0.9,
        metavar="X",
        help="of momentum; off: 0",
        when=only(server_optimizer="momentum"),
    )
    federated = parser.add_argument_group("rounds")
    federated.add_argument("--shard-dir", required=True, metavar="DIR", help="manifests that sharding.py wrote")
    federated.add_argument("--rounds", "--num-rounds", type=positive_int, default=5, metavar="T", help="rounds")
    federated.add_argument(
        *("--participation", "--participation-rate"),
        type=fraction,
        default=1.0,
        metavar="X",
        help="share of the clients that trains in a round",
        when=unless(participation=1.0),
    )
    federated.add_argument(
        "--local-epochs", type=positive_float, default=1.0, metavar="X", help="passes over a client's examples a round"
    )
    federated.add_argument(
        "--client-weights", choices=["examples", "uniform"], default="examples", help="weight of a client in the mean"
    )
    flags.add_training_flags(parser, 2e-4)
    report = parser.add_argument_group("what is kept")
    report.add_argument("--eval-each-round", action="store_true", help="evaluate every round (else only the last)")
    text = "evaluate what the other rules would serve of the same clients (off: without)"
    report.add_argument("--replay", action="store_true", help=text, when=unless(replay=False))
    report.add_argument("--eval-clients", action="store_true", help="evaluate each client's adapter too")
    add_final_flag(report)
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


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(flags.complete_rounds, build_parser().parse_args())

from functools import partial

from common.aggregation import WeightedMean
from common.local import local_steps
from common.lowrank import AdapterMean
from common.processes import run_federated
from common.runlog import start_run
from lora_glue_fl import fed_core, replay
from lora_glue_fl.data_prep import adamw


def main(args):
    a = args
    with start_run("fedavg_rounds", a, a.run_name, unit="examples") as run:
        study = fed_core.load_study(a, run)
        n = study.client_weights
        theta = run.restore(study.theta, None, same_shapes=False, **study.lasting)
        study.folders.clean(run.start_round - 1)
        run.report(0, theta, partial(fed_core.evaluate, study, theta, 0))

        for t in run.rounds():
            up = partial(fed_core.bytes_up, study, t)
            clients = run.sample(n, a.participation, t, up=up, work=study.examples)
            starts = fed_core.begin_round(study, theta, t)
            pairs, scale = fed_core.factors(theta), study.served_scale(t)
            mean = AdapterMean(a.aggregate, pairs, scale, clients, t, a.seed, **study.served_as)
            heads = WeightedMean(theta["head"], clients)
            replayed = replay.begin(study, theta, starts, clients, t)
            for k in clients:
                weights, steps, lrs = fed_core.begin_client(study, theta, starts, k, t)
                optimizer = adamw(a, study.model.model, weights.parameters)
                options = {"amp": run.amp, "mu": a.mu, "max_norm": a.max_grad_norm, "lrs": lrs}
                done = local_steps(study.loss, steps, weights, optimizer, **options)
                factors_k, head_k = fed_core.end_client(study, weights, k, clients, done)
                if mean.add(factors_k, n[k], study.scale, finite=(head_k,)):
                    heads.add(head_k, n[k])
                    replay.add(replayed, factors_k, n[k], study.scale)
                    fed_core.keep_client(study, factors_k, head_k, k, t, clients)
            served = mean.result(study.step(mean.trained))
            theta = fed_core.serve(study, theta, served, heads)
            run.count(bytes_down=fed_core.bytes_down(study, clients, t))
            more = partial(replay.rows, study, replayed, theta["head"])
            run.report(t + 1, theta, partial(fed_core.publish, study, theta, served, clients, t, more))
            study.folders.prune(t)

        fed_core.finish(study, theta)


if __name__ == "__main__":
    run_federated(main, args, *fed_core.footprint(args))
