"""Federated LoRA fine-tuning of a language model on clients whose texts differ.

    python llm_noniid/train.py --algorithm fedavg --partition topic_skew --num-rounds 50
    python llm_noniid/train.py --model tiny --dataset demo --num-rounds 10 --learning-rate 3e-3     # offline, a CPU

theta [n]: LoRA factors A, B of all layers, or all parameters (--train full). --algorithm says what a client and the
server do with it: formulas and sources are in `algorithms.py`.
"""

from common.cli import checked
from common.participation import per_round
from common.processes import run_federated
from common.runlog import start_run
from llm_noniid import algorithms, flags
from llm_noniid.fed_core import Drift, describe_clients, finish, load_study
from llm_noniid.models import memory


def build_parser():
    return flags.build_parser(__doc__.split("\n")[0])


def main(args):
    with start_run("train", args, flags.run_name(args)) as run:
        study = load_study(args, run)
        algorithm = algorithms.ALGORITHMS[args.algorithm](study)
        run.plan(args.num_rounds, args.eval_every, clients=len(study.trained))
        start = study.weights.snapshot().repeat(study.models, 1)  # [models, n]
        thetas = run.restore(start, study.names, **study.lasting, **algorithm.lasting)
        describe_clients(run, study)
        if study.models == 1 and len(study.trained) > 1:
            run.watch(Drift(study))
        run.report(0, thetas, study.evaluate)

        for t in run.rounds():
            clients = run.sample(algorithm, t)
            means = algorithm.means(thetas, clients)
            for k in clients:
                g = study.group[k]
                theta_k, more = algorithm.client(thetas[g], k, t)
                means[g].add(theta_k, **more)
            thetas = algorithm.server(thetas, means)
            run.report(t + 1, thetas, study.evaluate)

        finish(study, thetas)


if __name__ == "__main__":
    args = checked(flags.parse, build_parser())
    clients = 1 if args.algorithm == "central" else per_round(args.participation_rate, args.num_clients)
    run_federated(main, args, clients, memory(args))
