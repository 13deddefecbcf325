"""Federated LoRA fine-tuning of a language model on clients whose texts differ.

    python llm_noniid/train.py --algorithm fedavg --partition topic_skew --num-rounds 50
    python llm_noniid/train.py --model tiny --dataset demo --num-rounds 10 --learning-rate 3e-3     # offline, a CPU

theta [n]: LoRA factors A, B of all layers; p_k = n_k / sum_j n_j (--client-weights uniform: 1 / |S|); eta_g: server lr
fedavg    theta <- theta + eta_g sum_k p_k (theta_k - theta)                             (McMahan et al. 2017: eta_g 1)
fedprox   the same; clients add mu (w - theta) to their gradients                        (Li et al. 2020)
scaffold  clients add c - c_k; c_k <- mean of client k's raw gradients, c <- their mean  (Karimireddy et al. 2020)
fednova   theta - eta_g (sum p_k a_k) sum p_k (theta - theta_k) / a_k                    (Wang et al. 2020)
fedavgm, fedadam    the server's momentum or Adam on sum_k p_k (theta_k - theta)         (Hsu et al. 2019; Reddi 2021)
fedadamw  block means of the clients' second moments last, each step adds alpha Delta_G  (Liu et al. 2025)
local     each client for itself; central: one client with all texts, as many steps (--local-epochs: as many epochs)
          with one optimiser from the first round to the last, where clients begin each round with a new one
--cluster fedavg within groups of clients with like updates or topics                    (Sattler et al. 2020)
--personal last    the last block stays with its client, all else is averaged            (Arivazhagan et al. 2019)
"""

from common.early import parsed
from llm_noniid import flags


def build_parser():
    return flags.build_parser(__doc__.split("\n")[0])


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parsed(flags.parse, build_parser())

from functools import partial

import numpy as np

from common.aggregation import NormalizedMean, ServerAdam, ServerMomentum, WeightedMean, effective_steps
from common.best import Best
from common.client_rows import rows_on_disk
from common.local import OptimizerState, client_optimizer, local_steps
from common.participation import per_round
from common.processes import run_federated
from common.runlog import start_run
from common.scaffold import ControlVariates, option_two
from common.seeding import seed_torch
from common.shared_moments import FedAdamW, FedAdamWMoments
from llm_noniid import drift
from llm_noniid.clustering import cluster_labels
from llm_noniid.data import training_batches
from llm_noniid.fed_core import (
    Groups,
    compare,
    describe_clients,
    evaluate,
    finish,
    group_by_updates,
    judge,
    load_study,
    probe,
    watched,
)
from llm_noniid.models import memory


def new_optimizer(study):
    """A client's optimiser, without state."""
    a, parameters = study.args, study.model.weights.parameters
    return client_optimizer(a.client_optimizer, parameters, a.learning_rate, weight_decay=a.weight_decay)


def client_update(study, theta, batches, k, t, moments=None, kept=None, **method):
    """Client k's steps from theta [n]; theta_k is then in the model. Returns `common.local.LocalResult`.

    moments: `common.shared_moments` that it begins with; kept: its optimiser; by default a new one.
    """
    a, model = study.args, study.model
    model.weights.load(theta)
    model.module.train()
    seed_torch(a.seed, "dropout", t, k)
    if moments:
        moments.load(k)
        optimizer = moments.optimizer
    else:
        optimizer = kept or new_optimizer(study)
    steps = ((model.batch("train", rows),) for rows in batches)
    options = {"amp": model.amp, "max_norm": a.max_grad_norm, "norms": True}
    return local_steps(study.loss, steps, model.weights, optimizer, **options, **method)


def batches_in(a, rows, steps, t, k):
    """The rows of client k's batches in round t, each int64."""
    batches = training_batches(len(rows[k]), a.batch_size, a.local_epochs, a.seed, t, k, steps or None)
    return [rows[k][batch] for batch in batches]


def main(args):
    a = args
    with start_run("train", a, flags.run_name(a)) as run:
        study = load_study(a, run)
        weights, rows, steps = study.model.weights, study.rows, a.local_steps
        together = per_round(a.participation_rate, a.num_clients)
        n, personal = study.client_weights, study.personal
        up = down = weights.bytes - personal.bytes
        models, groups = 1, Groups(np.zeros(len(rows)))
        server, variates, moments, kept, optimizer = None, None, None, None, (a.client_optimizer, a.learning_rate)
        match a.algorithm:
            case "scaffold":
                on_disk = rows_on_disk(len(n), together, weights.bytes)
                variates = ControlVariates(weights.theta, len(n), run.folder / "control_variates", on_disk, n)
                up = down = 2 * weights.bytes
            case "fedavgm":
                server = ServerMomentum(a.server_lr, a.server_momentum)
            case "fedadam":
                server = ServerAdam("adam", a.server_lr)
            case "fedadamw":
                moments = FedAdamWMoments(FedAdamW(weights, a.learning_rate, a.weight_decay, a.alpha_global), weights)
                up, down = up + moments.bytes[0], down + moments.bytes[1]
            case "local":
                up, down, models, groups = 0, 0, len(rows), Groups(np.arange(len(rows)))
            case "central":
                up, down, n, rows, steps = 0, 0, [1], [np.sort(np.concatenate(rows))], steps * together
                kept = new_optimizer(study)
        if a.cluster != "none":
            models = a.num_clusters
        if a.cluster == "labels":
            groups = Groups(cluster_labels(study.topic_counts(), models))

        best = Best() if a.final == "best" else None
        lasting = {"groups": groups, "server": server, "moments": moments, "best": best}
        lasting |= {"optimizer": kept and OptimizerState(kept, weights.parameters)}
        lasting |= {"variates": variates, "control": variates and variates.rows, "personal": personal.rows}
        lasting = {name: thing for name, thing in lasting.items() if thing is not None}
        run.plan(a.num_rounds, a.eval_every, clients=len(n))
        thetas = run.restore(weights.snapshot().repeat(models, 1), study.names, **lasting)  # [models, n]
        describe_clients(run, study)
        start = partial(evaluate, study, thetas[:1], 0 * groups.of)
        run.report(0, thetas, start, lambda row: judge(run, 0, row, thetas, best))
        for t in run.rounds():
            work = None if steps else list(map(len, rows))
            clients = run.sample(n, a.participation_rate, t, up=up, down=down, work=work)
            mean_of = NormalizedMean if a.algorithm == "fednova" else WeightedMean
            means = {g: mean_of(thetas[g], clients) for g in sorted({groups.of[k] for k in clients.clients})}
            for shared in filter(None, (variates, moments)):
                shared.open_round(clients)
            regroups = a.cluster == "updates" and t + 1 == a.cluster_round
            # Several models pull apart by intention, and one client has nobody to pull apart from.
            compares = run.due(t + 1) and flags.is_compared(a)
            wanted = clients.clients if regroups else watched(a.seed, clients, t) if compares else ()
            batches_of = partial(batches_in, a, rows, steps, t)
            drawn = drift.draw(study, wanted, batches_of, t) if compares and a.drift_samples else None
            seen, pulls = {}, {}  # client: (theta_k, hidden states of the probed texts), of `drift.measured`
            for k in clients:
                theta, mean = thetas[groups.of[k]], means[groups.of[k]]
                batches, correction = batches_of(k), variates and variates.correction(k)
                clients.work(study.model.tokens["train"].scored(np.concatenate(batches)).sum())
                update = partial(client_update, study, personal.own(theta, k), batches, k, t)
                match a.algorithm:
                    case "fedprox":
                        done = update(mu=a.mu)
                        counts = mean.add(weights.theta, n[k])
                    case "scaffold":
                        done = update(correction=correction, record=True)
                        c_k = done.mean_gradient
                        if a.scaffold_option == "II":
                            c_k = option_two(correction, theta, weights.theta, done.steps, *optimizer)
                        counts = mean.add(weights.theta, n[k], finite=(c_k,))
                        if counts:
                            variates.offer(k, c_k)
                    case "fednova":
                        done = update()
                        a_k = effective_steps(done.steps, a.client_optimizer, momentum=0.9)
                        counts = mean.add(weights.theta, n[k], a=a_k)
                    case "fedadamw":
                        done = update(moments=moments)
                        counts = mean.add(weights.theta, n[k], finite=moments.of_client())
                        if counts:
                            moments.offer(n[k])
                    case _:
                        done = update(kept=kept)
                        personal.keep(k, weights.theta)
                        counts = mean.add(personal.sent(weights.theta, theta), n[k])
                clients.note(k, train_loss=done.loss, gradient_norm=done.gradient_norms.double().mean())
                if counts and k in wanted:
                    theta_k = personal.sent(weights.theta, theta)
                    seen[k] = theta_k.to("cpu", copy=True), probe(study) if compares else None
                    if drawn:
                        pulls[k] = drift.measured(study.model, theta, drawn, k, correction, done.mean_gradient)
            if variates:
                variates.close_round()
            if moments:
                moments.close_round(means[0].delta(), a.learning_rate)

            before, thetas = thetas, thetas.clone()
            for g in sorted({groups.of[k] for k in clients.clients if k not in clients.left_out}):
                thetas[g] = server.step(before[g], means[g].delta()) if server else means[g].result(a.server_lr)
            seen, pulls = clients.gather(seen), clients.gather(pulls) if drawn else {}
            if regroups:
                groups.of = group_by_updates(run, study, before[0], seen, models)
                thetas = thetas[:1].repeat(models, 1)  # every group begins with the mean

            served = study.served(thetas) if run.due(t + 1) else thetas

            def measure():
                apart = compare(study, before[0], thetas[0], seen, n) if compares else {}
                apart |= drift.figures(pulls, n, drawn[-1]) if drawn else {}
                return evaluate(study, served, groups.of) | apart

            run.report(t + 1, thetas, measure, lambda row: judge(run, t + 1, row, served, best))
        finish(run, study, thetas, groups.of, best)


if __name__ == "__main__":
    clients = 1 if args.algorithm == "central" else per_round(args.participation_rate, args.num_clients)
    run_federated(main, args, clients, memory(args))
