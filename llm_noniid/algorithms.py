"""The algorithms of `train.py`: what a client does, what the server makes of it, what lasts from round to round.

A run has one or more models, thetas [G, n]; `study.group[k]` says which of them client k trains. p_k = n_k / sum n.
"""

from common.aggregation import NormalizedMean, ServerAdam, ServerMomentum, WeightedMean, effective_steps
from common.client_rows import rows_on_disk
from common.local import OptimizerState
from common.participation import per_round
from common.scaffold import ControlVariates
from llm_noniid.fed_core import client_update, new_optimizer


class FedAvg:
    """theta <- theta + eta_g sum_k p_k (theta_k - theta), eta_g: --server-lr     (McMahan et al. 2017: eta_g = 1)

    vectors: of theta's length that a client sends, and receives, in a round; lasting: what outlives a round.
    """

    vectors = 1
    Mean = WeightedMean

    def __init__(self, study):
        self.study, self.lasting = study, {}

    @property
    def client_weights(self):
        """n_k of each client."""
        return [len(rows) for rows in self.study.trained]

    @property
    def work(self):
        """Sizes of the clients' work in a round: their texts; with --local-steps all alike."""
        return None if self.study.args.local_steps else self.client_weights

    def bytes_of(self, t):
        """(up, down): what a client sends and receives in round t."""
        return 2 * (self.vectors * self.study.weights.bytes,)

    def means(self, thetas, clients):
        """{g: the mean of the clients of model g}."""
        return {g: self.Mean(thetas[g], clients) for g in sorted({self.study.group[k] for k in clients.clients})}

    def client(self, theta, k, t):
        """Client k's work in round t from theta [n]: (theta_k [n], what else its mean is told)."""
        client_update(self.study, theta, k, t)
        return self.study.weights.theta, {}

    def server(self, thetas, means):
        """The models after the round [G, n]; one whose clients were all left out stays as it was."""
        after = thetas.clone()
        for g, mean in means.items():
            if any(self.study.group[k] == g for k in mean.clients.clients if k not in mean.clients.left_out):
                after[g] = self.step(thetas[g], mean)
        return after

    def step(self, theta, mean):
        """One model after the round [n]."""
        return mean.result(self.study.args.server_lr)


class FedProx(FedAvg):
    """FedAvg whose clients add mu (w - theta) to their gradients     (Li et al. 2020)"""

    def client(self, theta, k, t):
        client_update(self.study, theta, k, t, mu=self.study.args.mu)
        return self.study.weights.theta, {}


class Scaffold(FedAvg):
    """FedAvg whose clients add c - c_k to their gradients; c_k <- the mean of client k's raw gradients, c <- their mean
    over all clients     (Karimireddy et al. 2020; see `common.scaffold`)"""

    vectors = 2

    def __init__(self, study):
        super().__init__(study)
        a, n, theta = study.args, self.client_weights, study.weights.theta
        on_disk = rows_on_disk(len(n), per_round(a.participation_rate, len(n)), study.weights.bytes)
        self.variates = ControlVariates(theta, len(n), study.run.folder / "control_variates", on_disk, n)
        self.lasting = {"variates": self.variates, "control": self.variates.rows}

    def client(self, theta, k, t):
        done = client_update(self.study, theta, k, t, correction=self.variates.correction(k), record=True)
        self.variates.offer(k, done.mean_gradient)
        return self.study.weights.theta, {}


class FedNova(FedAvg):
    """theta <- theta - eta_g (sum_k p_k a_k) sum_k p_k (theta - theta_k) / a_k     (Wang et al. 2020)

    a_k: client k's effective steps, see `common.aggregation.effective_steps`.
    """

    Mean = NormalizedMean

    def client(self, theta, k, t):
        done = client_update(self.study, theta, k, t)
        a_k = effective_steps(done.steps, self.study.args.client_optimizer, momentum=0.9)
        return self.study.weights.theta, {"a": a_k}


class FedAvgM(FedAvg):
    """v <- beta v + sum_k p_k (theta_k - theta), theta <- theta + eta_g v     (Hsu et al. 2019)"""

    def __init__(self, study):
        super().__init__(study)
        self.lasting = {"server": self.optimizer(study.args)}

    def optimizer(self, args):
        """The server's."""
        return ServerMomentum(args.server_lr, args.server_momentum)

    def step(self, theta, mean):
        return self.lasting["server"].step(theta, mean.delta())


class FedAdam(FedAvgM):
    """Adam of the server on sum_k p_k (theta_k - theta)     (Reddi et al. 2021, algorithm 2)"""

    def optimizer(self, args):
        return ServerAdam(args.server_lr)


class Local(FedAvg):
    """Each client for itself, from the same start; nothing is sent."""

    vectors = 0


class Central(FedAvg):
    """One client with all texts and as many steps as a round's clients have together, with one optimiser from the first
    round to the last."""

    vectors = 0

    def __init__(self, study):
        super().__init__(study)
        self.optimizer = new_optimizer(study)
        self.lasting = {"optimizer": OptimizerState(self.optimizer, study.weights.parameters)}

    def client(self, theta, k, t):
        client_update(self.study, theta, k, t, optimizer=self.optimizer)
        return self.study.weights.theta, {}


ALGORITHMS = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "local": Local,
    "central": Central,
}
