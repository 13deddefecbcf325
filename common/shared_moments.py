"""AdamW's moments that the clients of a round share, those of the pooled batch, beside each client's own.

A client's second moment is that of its own gradient, whose noise is larger than that of the pooled batch: with moments
of their own (`common.local.Moments`) clients take steps that are too short.
"""

import torch

from common.local import put_moments, steps_taken
from common.rounds import Follower, OrderedSum


class PooledMoments(Follower):
    """m, v [n] and the step count that every client begins a round with: those of one AdamW on the pooled batch.

    After H steps of each client, with m' = sum_k p_k m_k and v' = sum_k p_k v_k, p_k = w_k / sum w, in fp64 in the
    order of the clients:

        m <- m'
        g = (m' - b1^H m) / (1 - b1^H)      a mean gradient of the round, the later steps weighing more
        A = (v' - b2^H v) / (1 - b2^H)      mean square of the clients' batch gradients
        B = g^2                             of which the noise of the steps that g is a mean of is still in it
        C = max(0, A - (A - B) (1 - q) / (1 - q w)),  q = sum_k p_k^2,  w = (1 - b1)(1 + b1^H) / ((1 + b1)(1 - b1^H))
        v <- b2^H v + (1 - b2^H) C

    A client batch's gradient has variance s^2 about the common mean mu. g is a mean with weights (1 - b1) b1^(H - i) /
    (1 - b1^H) over the steps i, whose squares add up to w (1 at H = 1, 1/19 of many steps at b1 0.9): E A = mu^2 + s^2,
    E B = mu^2 + s^2 q w, hence s^2 = (A - B) / (1 - q w), and the batch of all clients has mu^2 + q s^2 = C. At H = 1
    that is B: the pooled gradient squared, and the mean of the clients' steps is central AdamW's up to (1 - b2) g_k^2
    in each v_k. Where clients differ, the differences of their mean gradients count as noise: v is too small by up to
    their spread.
    Ours: the pooled batch's second moment is estimated from the clients' averaged moments, without another gradient
    pass. Related: Mime and MimeLite (arXiv 2008.03606) keep server statistics of the averaged gradient for local
    steps; DES-LOC (arXiv 2505.22549) synchronises moments less often than weights; QSR (arXiv 2310.14423) chooses H by
    the rate.

    With every > 1 clients send their moments only at the end of every such round, and go on with their own in between:
    H counts all steps since the last time, as in DES-LOC.

    Args: optimizer: torch.optim.AdamW over the parameters of `weights`; weights: `common.vector.Weights`; rows:
        `ClientRows` (in_place), for clients' own moments where every > 1.
    """

    def __init__(self, optimizer, weights, rows=None, every=1):
        self.optimizer, self.weights, self.rows, self.every = optimizer, weights, rows, every
        self.lasting = {"moments": self} if rows is None else {"moments": self, "own_moments": rows}
        self.m, self.v, self.step = torch.zeros_like(weights.theta), torch.zeros_like(weights.theta), 0
        self._m_k, self._v_k = torch.empty_like(self.m), torch.empty_like(self.v)
        self._sum = None

    def bytes_of(self, t):
        """(up, down): what a client sends and receives beside theta in round t."""
        size = 2 * self.weights.bytes
        return size * ((t + 1) % self.every == 0), size * (t % self.every == 0)

    def open_round(self, clients, theta):
        self._due = (clients.number + 1) % self.every == 0
        self._sum = OrderedSum(clients, _weighted, self.m, sums=2, vectors=2) if self._due else None

    def load(self, k):
        """Puts what client k begins with into the optimiser: its own since the last pooling, else the pooled."""
        row = self.rows.get(k) if self.rows is not None else None
        if row and int(row["pooled_at"]) == self.step:
            self._m_k, self._v_k, step = row["m"], row["v"], row["step"]
        else:
            if self.rows is not None:  # a row keeps its vectors
                self._m_k, self._v_k = torch.empty_like(self.m), torch.empty_like(self.v)
            self._m_k.copy_(self.m)
            self._v_k.copy_(self.v)
            step = torch.tensor(float(self.step))
        put_moments(self.optimizer, self.weights, self._m_k, self._v_k, step)

    def store(self, k):
        """Keeps client k's moments until the next pooling, at which they are taken where they count."""
        if self.rows is not None and not self._due:
            step, pooled_at = steps_taken(self.optimizer, self.weights), torch.tensor(self.step)
            self.rows.put(k, {"m": self._m_k, "v": self._v_k, "step": step, "pooled_at": pooled_at})

    def finite(self, clients):
        return self._m_k, self._v_k

    def accept(self, clients, theta_k):
        if self._due:
            H = steps_taken(self.optimizer, self.weights).item() - self.step
            self._sum.add((clients.weight, H), self._m_k, self._v_k)

    def close_round(self, clients):
        if not self._due:
            return
        (m, v), numbers = self._sum.result()
        self._sum = None
        total = sum(weight for weight, _ in numbers)
        H = round(sum(weight * steps for weight, steps in numbers) / total)
        m, v, q = m.div_(total), v.div_(total), sum((weight / total) ** 2 for weight, _ in numbers)
        beta1, beta2 = self.optimizer.param_groups[0]["betas"]
        b1, b2 = beta1**H, beta2**H
        B = (m - b1 * self.m).div_(1 - b1).square_()
        A = v.sub_(b2 * self.v.double()).div_(1 - b2)
        w = (1 - beta1) * (1 + b1) / ((1 + beta1) * (1 - b1))
        noise = (1 - q) / (1 - q * w) if q < 1 else 0.0  # one client: its batch is the pooled one
        C = A.sub_((A - B).mul_(noise)).clamp_min_(0)
        self.v.copy_(C.mul_(1 - b2).add_(self.v.double(), alpha=b2))
        self.m.copy_(m)
        self.step += H

    def state_dict(self):
        return {"m": self.m, "v": self.v, "step": torch.tensor(self.step)}

    def load_state_dict(self, state):
        self.m.copy_(state["m"])
        self.v.copy_(state["v"])
        self.step = int(state["step"])


def _weighted(sums, theta, given, weight, steps):
    for total, vector in zip(sums, given, strict=True):
        total.add_(vector.to(torch.float64), alpha=weight)
