"""Tensors of theta that stay with their client from round to round, while all others are averaged.

    personal = make_personal(weights, names, folder, K)      # personal.rows: a `lasting` object of the run
    for t in ...:
        for k in clients:
            weights.load(personal.own(theta, k))             # theta with client k's own tensors
            local_steps(...)
            personal.keep(k, theta_k)
            mean.add(personal.sent(theta_k, theta), ...)     # its own are not sent: there the difference is 0
        theta = mean.result()
    evaluate(personal.served(theta, client_weights))         # theta with the mean of all clients' own

FedPer (Arivazhagan et al. 2019) with a model's last layers as `names`. The server never steps on what is personal,
whatever its optimiser: theta keeps there what the clients began with. Without names a function returns its argument.
"""

import torch

from common import parallel
from common.aggregation import apply_delta
from common.client_rows import ClientRows, rows_on_disk
from common.vector import is_finite


class Personal:
    """The own tensors of every client, a row {name: tensor} each.

    A client that never took part has those that the live vector holds now, at the start. One that is left out of a
    round keeps what it had before it.

    Args: weights: `common.vector.Weights`; names: of its parameters; rows: `ClientRows`, see `make_personal`.
    """

    def __init__(self, weights, names=(), rows=None):
        self.weights, self.names, self.rows = weights, tuple(names), rows
        self._start = self._of(weights.theta)

    @property
    def size(self):
        """Elements of theta that are personal."""
        return sum(t.numel() for t in self._start.values())

    @property
    def bytes(self):
        """What a client neither sends nor receives of theta."""
        return self.size * self.weights.theta.element_size()

    def own(self, theta, k):
        """theta [n] with client k's own tensors."""
        return self._with(theta, self.rows.get(k) or self._start) if self.names else theta

    def keep(self, k, theta_k):
        """Takes client k's own tensors from theta_k [n]; they count from the end of the round."""
        if self.names:
            self.rows.put(k, self._of(theta_k))

    def sent(self, theta_k, theta):
        """theta_k [n] with theta's tensors in the place of its own; not finite, as it is: to be left out."""
        return self._with(theta_k, self._of(theta)) if self.names and is_finite(theta_k) else theta_k

    def without(self, vector):
        """vector [n] with zeros in the place of what is personal."""
        return self._with(vector, {name: torch.zeros_like(t) for name, t in self._start.items()})

    def served(self, theta, client_weights):
        """theta [n] with the mean of all K clients' own tensors, sum_k w_k own_k / sum_k w_k, as if they were averaged.

        In fp64, client after client, rounded once; what no client changed keeps its bits.
        """
        if not self.names:
            return theta
        sums = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._start.items()}
        for k, weight in enumerate(client_weights):
            for name, t in (self.rows.get(k) or {}).items():
                sums[name].add_(t.double() - self._start[name], alpha=weight)
        total = sum(client_weights)
        return self._with(theta, {name: apply_delta(t, sums[name] / total) for name, t in self._start.items()})

    def _of(self, vector):
        named = self.weights.named(vector)
        return {name: named[name].clone() for name in self.names}

    def _with(self, vector, tensors):
        if not self.names:
            return vector
        changed = vector.clone()
        named = self.weights.named(changed)
        for name, t in tensors.items():
            named[name].copy_(t)
        return changed


def make_personal(weights, names, folder, total_clients, device="cpu"):
    """The `Personal` of a run, with rows if there are names. Args: folder, device: as for `ClientRows`."""
    personal = Personal(weights, names)
    if personal.names:  # every process reads every client's own: several have them in files
        on_disk = parallel.world().size > 1 or rows_on_disk(total_clients, total_clients, personal.bytes)
        personal.rows = ClientRows(folder, on_disk, device=device)
    return personal
