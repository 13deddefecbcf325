"""Federated LoRA fine-tuning of a language model on clients whose texts differ.

    python llm_noniid/train.py --algorithm fedavg --partition topic_skew --num-rounds 50
    python llm_noniid/train.py --model tiny --dataset demo --num-rounds 10 --learning-rate 3e-3     # offline, a CPU

theta: LoRA factors A, B of all layers; p_k = n_k / sum_j n_j (--client-weights uniform: 1 / |S|)
fedavg    theta <- theta + sum_k p_k (theta_k - theta)                                   (McMahan et al. 2017)
fedprox   the same; clients add mu (w - theta) to their gradients                        (Li et al. 2020)
scaffold  clients add c - c_k; c_k <- mean of client k's raw gradients, c <- their mean  (Karimireddy et al. 2020)
fednova   theta - (sum p_k a_k) sum p_k (theta - theta_k) / a_k                          (Wang et al. 2020)
fedavgm, fedadam    the server's momentum or Adam on sum_k p_k (theta_k - theta)         (Hsu et al. 2019; Reddi 2021)
local     each client for itself; central: one client with all texts, as many steps (--local-epochs: as many epochs)
"""

from common import parallel
from common.cli import run_main
from common.evaluation import pick_device
from common.runlog import start_run
from llm_noniid import flags
from llm_noniid.fed_core import Study


def train(args):
    with start_run("train", args, flags.run_name(args)) as run:
        study = Study(args, run)
        lasting = study.lasting
        thetas = study.unpacked(run.restore(study.packed(study.initial_weights()), lasting))
        ending = study.ended()

        for round in run.rounds(0 if ending else args.num_rounds):
            clients = study.sample_clients(round)
            means = study.means(thetas)
            for k in clients:
                theta = thetas[study.group[k]]
                theta_k, n_k, done = study.local_update(theta, k, round)
                if study.left_out(k, theta_k, done):
                    continue
                if args.algorithm == "fednova":
                    means[study.group[k]].add(theta_k, weight=n_k, a=study.effective_steps(done))
                else:
                    means[study.group[k]].add(theta_k, weight=n_k)
                if study.variates:
                    study.variates.offer(k, study.control_variate(theta, theta_k, k, done))
                study.observe(k, theta_k, done)
            study.close_round(round)
            if study.variates:
                study.variates.close_round(clients)
            before, thetas = thetas, study.server_update(thetas, means)
            thetas = study.regroup(before, thetas, round)
            if study.evaluated(round):
                ending = study.report(before, thetas, round)
                run.save(round, study.packed(thetas), lasting)
            if ending:
                break

        study.finish(thetas, ending)


def main(args):
    parallel.init_parallel(pick_device(args.device))
    train(args)


def build_parser():
    return flags.build_parser(__doc__.split("\n")[0])


if __name__ == "__main__":
    run_main(lambda parser: main(flags.parse(parser)), build_parser())
