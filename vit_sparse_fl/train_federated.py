"""FedAvg on CIFAR-100: the clients' ViTs averaged by their number of images.

    python vit_sparse_fl/train_federated.py --sharding non_iid --nc 5
    python vit_sparse_fl/train_federated.py --dataset demo --model tiny --num-rounds 50      # offline, a CPU, a minute

theta <- theta + sum_k p_k (theta_k - theta),  p_k = n_k / sum_j n_j     (McMahan et al. 2017, algorithm 1)

theta_k: J steps of SGD with momentum on client k's images; K clients, of which C K take part in a round.
"""

from common.aggregation import WeightedMean
from common.cli import checked
from common.participation import per_round
from common.processes import run_federated
from common.runlog import start_run
from vit_sparse_fl import flags
from vit_sparse_fl.experiments import federated_settings, repeated, run_each
from vit_sparse_fl.study import Study, client_update, finish, probes


def build_parser():
    return flags.make_parser(__doc__.split("\n")[0])


def train(args):
    with start_run("train_federated", args, args.run_name, unit="images") as run:
        study = Study(args, run)
        theta = run.restore(study.first, study.weights.named, **study.lasting)
        run.watch(*probes(study))
        run.report(0, theta, study.evaluate)

        for t in run.rounds():
            clients = run.sample(study, t)
            mean = WeightedMean(theta, clients)
            for k in clients:
                theta_k = client_update(study, theta, k, t)
                mean.add(theta_k)
            theta = mean.result()
            run.report(t + 1, theta, study.evaluate)

        finish(study, theta)


def main(args):
    run_each(train, repeated(args, federated_settings(args)))


if __name__ == "__main__":
    args = checked(flags.parse, build_parser())
    run_federated(main, args, per_round(args.participation_rate, args.num_clients), flags.process_memory(args))
