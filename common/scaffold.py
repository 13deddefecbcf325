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
        theta = mean.result(server_lr)                             # theta + eta_g mean_S(theta_k - theta), line 17
        variates.close_round()                                                         # c += (1/K) sum_S (c_k+ - c_k)

c_k+ is the mean of the round's raw local gradients. Under plain SGD with a constant learning rate that is the paper's
option II, c_k - c + (theta - y) / (H lr); unlike it, it holds for any optimiser, schedule and clipping.
"""

import torch

from common.aggregation import effective_steps
from common.cli import UsageError
from common.client_rows import ClientRows
from common.parallel import OrderedSum


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
        self.c = torch.zeros_like(theta, dtype=torch.float64)  # [n]
        self.rows = ClientRows(folder, on_disk)
        self._dtype, self._change = theta.dtype, None

    def open_round(self, clients):
        """Begins a round. Args: clients: its `Round`, before the loop over it."""
        self._change = OrderedSum(clients, _weighted_change, self.c)

    def correction(self, k):
        """c - c_k [n], what client k adds to its gradients, in theta's dtype and on its device.

        Zeros are -0.0, which added to a gradient changes no bit of it (0.0 would turn -0.0 into 0.0).
        """
        row = self.rows.get(k)
        held = torch.zeros_like(self.c) if row is None else row["c"].to(self.c, copy=True)
        return held.sub_(self.c).neg_().to(self._dtype)

    def offer(self, k, mean_gradient):
        """Takes client k's new c_k [n], the mean of the raw gradients of its steps, which counts from the round's end.

        It must be finite (`finite` of the mean's `add`). Raises: RuntimeError as `OrderedSum.add`.
        """
        row = self.rows.get(k)
        new = mean_gradient.detach().to(self._dtype)
        old = torch.zeros_like(new) if row is None else row["c"].to(new)
        self._change.add((self.weights[k],), new, old)
        self.rows.put(k, {"c": new.to("cpu", copy=True)})

    def close_round(self):
        """c += sum_{k in S} w_k (c_k+ - c_k) / sum w over all K. Every process calls it, after the loop."""
        (change,), _ = self._change.result()
        self._change = None
        self.c.add_(change.div_(sum(self.weights)))

    def state_dict(self):
        """c, for a checkpoint."""
        return {"c": self.c}

    def load_state_dict(self, state):
        """Takes c back."""
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


def check_scaffold(kind, option):
    """Refuses what SCAFFOLD cannot do: option II, (theta - y) / (H lr), with AdamW.

    AdamW's steps are normalised, so (theta - y) / (H lr) is near 1 however small the gradients are: a control variate
    larger than they by 1 / (sqrt(v) + eps), at most 1 / eps, which is 1e4 for gradients of 1e-4.

    Args: kind: of `common.local.client_optimizer`; option: one of `common.choices.SCAFFOLD_OPTIONS`.
    Raises: UsageError.
    """
    if option == "II" and kind == "adamw":
        raise UsageError(
            "SCAFFOLD's option II with adamw: Adam's steps are normalised, so (theta - y) / (H lr) is no gradient but "
            "larger by 1 / (sqrt(v) + eps), up to 1 / eps: use option mean_gradient, or sgd or sgdm"
        )


def _weighted_change(sums, c, given, weight):
    new, old = given
    sums[0].add_(new.to(torch.float64, copy=True).sub_(old).mul_(weight))
