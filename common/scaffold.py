"""SCAFFOLD's control variates   (Karimireddy et al. 2020, Alg. 1): what corrects a client's gradients for its drift.

    for k in clients:
        done = local_steps(..., correction=variates.correction(k), record=True)        # y <- y - lr (g + c - c_k)
        variates.offer(k, done.mean_gradient)                                          # c_k+
        mean.add(theta_k)
    # the end of the loop over the clients: c += (1/K) sum_S (c_k+ - c_k)

c_k+ is the mean of the round's raw local gradients. Under plain SGD with a constant learning rate that is the paper's
option II, c_k - c + (theta - y) / (H lr); unlike it, it holds for any optimiser, schedule and clipping.
"""

import torch

from common.client_rows import ClientRows
from common.rounds import Follower, OrderedSum


class ControlVariates(Follower):
    """c and the c_k of K clients, all zero at first.

    After every round, at any participation: c = sum_k w_k c_k / sum_k w_k over all K clients, with w_k = 1 as
    published. Where the global weights are the mean by numbers of examples, give these as `weights`: the published c
    would lead to the minimum of the plain mean of the clients' losses, whatever the weights of theta's mean are.

    c is fp64; the c_k have theta's dtype and lie in `rows`. `variates` and `variates.rows` are `lasting` objects of a
    run. A client that is left out keeps its c_k.

    Args: theta [n]: for its size, dtype and device; total_clients: K, ids from 0; folder, on_disk: as for `ClientRows`;
        weights: K numbers of at least 0, their sum above 0.
    """

    def __init__(self, theta, total_clients, folder, on_disk=False, weights=None):
        self.weights = [1.0] * total_clients if weights is None else [float(w) for w in weights]
        self.c = torch.zeros_like(theta, dtype=torch.float64)  # [n]
        self.rows = ClientRows(folder, on_disk)
        self._like, self._change, self._offered = theta, None, None

    def open_round(self, clients, theta):
        self._change = OrderedSum(clients, _weighted_change, self._like, vectors=2)

    def correction(self, k):
        """c - c_k [n], what client k adds to its gradients, in theta's dtype and on its device.

        Zeros are -0.0, which added to a gradient changes no bit of it (0.0 would turn -0.0 into 0.0).
        """
        row = self.rows.get(k)
        held = torch.zeros_like(self.c) if row is None else row["c"].to(self.c, copy=True)
        return held.sub_(self.c).neg_().to(self._like.dtype)

    def offer(self, k, mean_gradient):
        """Client k's new c_k [n], the mean of the raw gradients of its steps. It counts from the end of the round, if
        the client counts: where it is not finite, the client is left out."""
        self._offered = k, mean_gradient.detach().to(self._like.dtype)

    def finite(self, clients):
        if self._offered is None or self._offered[0] != clients.current:
            raise RuntimeError(f"client {clients.current} has offered no control variate: offer() comes before add()")
        return self._offered[1:]

    def accept(self, clients, theta_k):
        (k, new), self._offered = self._offered, None
        row = self.rows.get(k)
        old = torch.zeros_like(new) if row is None else row["c"].to(new)
        self._change.add((self.weights[k],), new, old)
        self.rows.put(k, {"c": new.to("cpu", copy=True)})

    def close_round(self, clients):
        """c += sum_{k in S} w_k (c_k+ - c_k) / sum w over all K."""
        (change,), _ = self._change.result()
        self._change = self._offered = None
        self.c.add_(change.div_(sum(self.weights)))

    def state_dict(self):
        return {"c": self.c}

    def load_state_dict(self, state):
        self.c.copy_(state["c"])


def _weighted_change(sums, c, given, weight):
    new, old = given
    sums[0].add_(new.to(torch.float64, copy=True).sub_(old).mul_(weight))
