"""Interference replay: from the same weights the same clients train one round by every method, at several rates.

    python vit_sparse_fl/replay.py --sharding non_iid --nc 5 --local-steps 16 --num-rounds 21 --lr 0.03
    python vit_sparse_fl/replay.py --dataset demo --model tiny --num-rounds 3 --replay-every 2  # offline, minutes

The run itself is FedAvg of all weights that a mask may cover, and does not change by a bit. Before rounds 1, 1 + N, ...
(--replay-every N) its clients also train by dense SGD, under each mask, and send their top-k; a line of metrics.jsonl
has of each method and rate, client by client:

    gain_j = -M_jj,  others_j = mean of M_ij over i != j,  M_ij = L_i(theta + delta_j) - L_i(theta)   (interference.py)

so that what an update costs the others is compared at one gain within a client: same weights, batches and augmentation.
`shorter` is dense training's update at the run's rate times a factor: what a step's length alone does. Masks are those
of training: calibrated once, at the first weights.
"""

import math

import numpy as np

from common import parallel
from common.aggregation import WeightedMean, fp64_sum
from common.cli import checked, positive_float, positive_int
from common.participation import per_round
from common.processes import run_federated
from common.rounds import Follower
from common.runlog import start_run
from vit_sparse_fl import flags
from vit_sparse_fl.experiments import federated_settings, repeated, run_each, variant
from vit_sparse_fl.interference import held_losses, held_rows
from vit_sparse_fl.masks import new_mask
from vit_sparse_fl.study import Study, client_update, finish, local_work
from vit_sparse_fl.train_federated_sparse import add_calibration_flags
from vit_sparse_fl.train_federated_topk import top_k, top_k_size

# a method's rate, which --factors multiply: about the best of results/tuning at five classes a client
RATES = {"dense": 0.03, "topk": 0.03, "least_sensitive": 1.0, "least_per_layer": 1.0, "most_sensitive": 0.1}
RATES |= {"lowest_magnitude": 0.1, "highest_magnitude": 0.3, "random": 1.0}
SHORTER = "shorter"


def build_parser():
    parser = flags.make_parser(__doc__.split("\n")[0], sparse=True)
    own, factors = parser.group("the method"), [1 / 27, 1 / 9, 1 / 3, 1, 3]
    flags.number(own, "--replay-every", positive_int, 10, "N", "replay every N rounds, from the first on")
    text = "what each method's rate is multiplied by; of shorter the length"
    flags.number(own, "--factors", positive_float, factors, "X", text, nargs="+")
    add_calibration_flags(parser)
    return parser


class Replay(Follower):
    """The probe: replays a round from the weights that it began with."""

    def __init__(self, study):
        self.study, self.kept = study, {method: kept_by(study, method) for method in (*RATES, SHORTER)}

    def open_round(self, clients, theta):
        self.t, self.ids, self.theta = clients.number, sorted(clients.clients), theta

    def result(self, clients, theta):
        """{"replay": {method: [{"factor", "gain" [S], "others" [S], "drift" [S]} of each factor]}} of a due round."""
        if self.t % self.study.args.replay_every:
            return {}
        return {"replay": replayed(self.study, self.theta, self.t, self.ids, self.kept)}


def replayed(study, theta, t, ids, kept):
    """{method: rows} of these clients' round t from theta [n], kept: {method: where it trains}; None for what is not
    finite."""
    found, held = {}, [held_rows(study, k) for k in ids]
    study.weights.load(theta)
    before, length = np.array(held_losses(study, held)), math.sqrt(fp64_sum(theta, square=True))
    for method in kept:
        mine = {}
        for k in parallel.my_share(ids):
            mine[k] = []
            for theta_k in updates(study, theta, t, k, method, kept[method]):
                study.weights.load(theta_k)
                drift = math.sqrt(fp64_sum(theta_k - theta, square=True)) / length
                mine[k].append((held_losses(study, held), drift))
        of = {k: one for part in parallel.all_gather(mine) for k, one in part.items()}
        found[method] = []
        for i, factor in enumerate(study.args.factors):
            change = np.array([of[k][i][0] for k in ids]).T - before[:, None]  # [S, S], row: whose images
            gain = -change.diagonal()
            others = (change.sum(0) + gain) / max(1, len(ids) - 1)
            values = {"gain": gain, "others": others, "drift": [of[k][i][1] for k in ids]}
            rounded = {n: [round(x, 6) if math.isfinite(x) else None for x in map(float, v)] for n, v in values.items()}
            found[method].append({"factor": factor} | rounded)
    return found


def updates(study, theta, t, k, method, kept):
    """theta_k [n] of client k's round t at each factor, one after another, each before the next is trained."""
    args, weights = study.args, study.weights
    if method == SHORTER:
        local_work(study, theta, k, t, kept, args.lr)
        step = weights.theta - theta
        yield from (theta + factor * step for factor in args.factors)
        return
    size = top_k_size(args.sparsity_ratio, weights.size)
    for factor in args.factors:
        local_work(study, theta, k, t, kept, factor * RATES[method])
        yield top_k(theta, weights.theta, size) if method == "topk" else weights.theta.clone()


def kept_by(study, method):
    """Where a method trains, int64 [kept]; None for everywhere."""
    if method in ("dense", "topk", SHORTER):
        return None
    strategy, scope = ("least_sensitive", "layer") if method == "least_per_layer" else (method, "global")
    args = variant(study.args, mask_strategy=strategy, mask_scope=scope)
    return new_mask(study, args, study.first).nonzero().view(-1)


def train(args):
    with start_run("replay", args, args.run_name, unit="images") as run:
        study = Study(args, run, sparse=True)
        theta = run.restore(study.first, study.weights.named, **study.lasting)
        run.watch(Replay(study))
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
    run_each(train, repeated(args, federated_settings(args, "replay")))


if __name__ == "__main__":
    args = checked(flags.parse, build_parser())
    run_federated(main, args, per_round(args.participation_rate, args.num_clients), flags.process_memory(args))
