"""FedAvg on CIFAR-100: the clients' ViTs averaged by their number of images.

    python vit_sparse_fl/train_federated.py --sharding non_iid --nc 5
    python vit_sparse_fl/train_federated.py --dataset demo --model tiny --num-rounds 50      # offline, a CPU, a minute

theta <- theta + sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)

theta_k: J steps of SGD with momentum on client k's images; K clients, of which C K take part in a round.
"""

from common import parallel
from common.before.aggregation import WeightedMean
from common.cli import run_main
from common.evaluation import pick_device
from common.runlog import start_run
from vit_sparse_fl.experiments import federated_settings, repeated, run_each
from vit_sparse_fl.fed_core import Study
from vit_sparse_fl.flags import add_experiment_flags, make_parser, parse
from vit_sparse_fl.interference import Interference


def train(args):
    with start_run("train_federated", args, args.run_name, unit="images") as run:
        study = Study(args, run)
        lasting = study.lasting
        theta = run.restore(study.initial_weights(), lasting)

        for round in run.rounds(args.num_rounds):
            if study.stopped(round):
                break
            clients = study.sample_clients(round)
            mean = WeightedMean(theta, clients)
            pull = Interference(theta, clients) if study.evaluated(round) else None
            for k in clients:
                theta_k, n_k = study.local_update(theta, k, round)
                if study.left_out(k, theta_k):
                    continue
                mean.add(theta_k, weight=n_k)
                if pull:
                    pull.add(theta_k)
            study.close_round(round, sent=study.changing())
            theta = mean.result()
            if pull:
                study.report(theta, round, study.lr(round), **pull.result())
            if study.saved(round):
                run.save(round, theta, lasting)

        study.finish(theta)


def main(args):
    parallel.init_parallel(pick_device(args.device))
    run_each("train_federated", train, repeated(args, federated_settings(args)))


def build_parser():
    parser, own = make_parser(__doc__.split("\n")[0])
    add_experiment_flags(own)
    return parser


if __name__ == "__main__":
    run_main(lambda parser: main(parse(parser)), build_parser())
