"""SCAFFOLD's control variates   (Karimireddy et al. 2020, Alg. 1): what corrects a client's gradients for its drift.

    variates = ControlVariates(theta, num_clients, run.folder / "clients" / "variates")
    for t in ...:
        clients = Round(...)
        mean = WeightedMean(theta, clients)
        variates.open_round(clients)
        for k in clients:
            done = local_steps(..., correction=variates.correction(k), record=True)    # y <- y - lr (g + c - c_k)
            if mean.add(theta_k, 1, finite=(done.mean_gradient,)):
                variates.offer(k, done.mean_gradient)                                  # c_k+
        theta = mean.result()
        variates.close_round()                                                         # c += (1/K) sum_S (c_k+ - c_k)

c_k+ is the mean of the round's raw local gradients. Under plain SGD with a constant learning rate that is the paper's
option II, c_k - c + (theta - y) / (H lr); unlike it, it holds for any optimiser, schedule and clipping.
"""

import math

import torch

from common.aggregation import effective_steps
from common.client_rows import ClientRows
from common.local import check_scaffold
from common.parallel import OrderedSum
from common.vector import is_finite


class ControlVariates:
    """c and the c_k of K clients, all zero at first.

    After every round, at any participation: c = sum_k w_k c_k / sum_k w_k over all K clients, with w_k = 1 as
    published. Where the global weights are the mean by numbers of examples, give these as `weights`: the published c
    would lead to the minimum of the plain mean of the clients' losses, whatever the weights of theta's mean are.

    c is fp64; the c_k have theta's dtype and lie in `rows`. Checkpoints hold both: `variates` and `variates.rows` are
    `lasting` objects of a run. A client that is left out offers nothing and keeps its c_k.

    Args: theta [n]: for its size, dtype and device; total_clients: K, ids from 0; folder, on_disk: as for `ClientRows`;
        weights: K numbers of at least 0, their sum above 0.
    """

    def __init__(self, theta, total_clients, folder, on_disk=False, weights=None):
        self.weights = [1.0] * total_clients if weights is None else [float(w) for w in weights]
        total = sum(self.weights)
        if len(self.weights) != total_clients or not all(w >= 0 for w in self.weights) or not 0 < total < math.inf:
            raise ValueError(f"weights must be {total_clients} finite numbers of at least 0, their sum above 0")
        self.total_clients, self._like = total_clients, theta.new_empty(0)
        self.c = torch.zeros_like(theta, dtype=torch.float64)  # [n]
        self.rows = ClientRows(folder, on_disk)
        self._change, self._offered = None, set()

    def open_round(self, clients):
        """Begins a round. Args: clients: its `Round`, before the loop over it."""
        self._change, self._offered = OrderedSum(clients, _weighted_change, like=self.c), set()

    def correction(self, k):
        """c - c_k [n], what client k adds to its gradients, in theta's dtype and on its device.

        Zeros are -0.0, which added to a gradient changes no bit of it (0.0 would turn -0.0 into 0.0).
        """
        if not 0 <= k < self.total_clients:
            raise ValueError(f"client {k} is none of 0 to {self.total_clients - 1}")
        row = self.rows.get(k)
        held = torch.zeros_like(self.c) if row is None else row["c"].to(self.c, copy=True)
        return held.sub_(self.c).neg_().to(self._like.dtype)

    def offer(self, k, mean_gradient):
        """Takes client k's new c_k [n], the mean of the raw gradients of its steps, which counts from the round's end.

        Raises: ValueError for a second offer in a round, another length, or values that are not finite.
        """
        if k in self._offered:
            raise ValueError(f"client {k} has offered its control variate in this round already")
        if mean_gradient.shape != self.c.shape:
            raise ValueError(f"client {k}'s mean gradient is {tuple(mean_gradient.shape)}, not {tuple(self.c.shape)}")
        if not is_finite(mean_gradient):
            raise ValueError(f"client {k}'s mean gradient is not finite: leave it out of the round")
        row = self.rows.get(k)
        new = mean_gradient.detach().to(self._like.dtype)
        old = torch.zeros_like(new) if row is None else row["c"].to(new)
        self._change.add((self.weights[k],), new, old)
        self.rows.put(k, {"c": new.to("cpu", copy=True)})
        self._offered.add(k)

    def close_round(self):
        """c += sum_{k in S} w_k (c_k+ - c_k) / sum w over all K. Every process calls it, after the loop."""
        (change,), _ = self._change.result()
        self.c.add_(change.div_(sum(self.weights)))

    def state_dict(self):
        """c, for a checkpoint."""
        return {"c": self.c}

    def load_state_dict(self, state):
        """Takes c back. Raises: ValueError for another length."""
        if state["c"].shape != self.c.shape:
            raise ValueError(f"a control variate of {tuple(state['c'].shape)} for {tuple(self.c.shape)} weights")
        self.c.copy_(state["c"])


def option_two(correction, theta, theta_k, steps, kind, lr, momentum=0.9):
    """The paper's option II: c_k+ = c_k - c + (theta - theta_k) / (a lr) [n], for `ControlVariates.offer`.

    a = H for "sgd"; for "sgdm", whose momentum starts at zero, `effective_steps`. Under a constant learning rate,
    without FedProx and clipping, it is for "sgd" the mean of the raw gradients (weight decay included); for "sgdm" a
    mean that weights early gradients more. Computed in fp64, but theta - theta_k is a difference of rounded weights:
    the recorded mean is the more precise.

    Args: correction: c - c_k [n] of this round; theta, theta_k [n]: before and after; steps: H, steps of the optimiser,
        not epochs; lr: what they were taken with.
    Raises: UsageError for "adamw", with the reason.
    """
    check_scaffold(kind, "II")
    scale = lr * effective_steps(steps, kind, momentum)
    return (theta.double() - theta_k.double()).div_(scale).sub_(correction).to(theta.dtype)


def _weighted_change(sums, fixed, given, weight):
    new, old = given
    sums[0].add_(new.to(torch.float64, copy=True).sub_(old).mul_(weight))
