"""AdamW's moments that the clients of a round share: what the server makes of them, beside each client's own.

    moments = PooledMoments(optimizer, weights)          # a `lasting` object of the run
    for t in ...:
        moments.open_round(clients)
        for k in clients:
            moments.load(k)                              # all clients of a round begin with the same m, v and step
            local_steps(...)
            if mean.add(theta_k, weight, finite=moments.of_client()):
                moments.offer(weight)
        theta = mean.result()
        moments.close_round(mean.delta(), lr)

A client's second moment is that of its own gradient, whose noise is larger than that of the pooled batch: with moments
of their own (`common.local.Moments`) clients take steps that are too short.
"""

from collections import defaultdict

import torch

from common.local import parameter_groups
from common.parallel import OrderedSum


class SharedMoments:
    """m, v [n] and the step count that every client begins a round with.

    After H steps from the same m, v the server has m' = sum_k p_k m_k and v' = sum_k p_k v_k, p_k = w_k / sum w, in
    fp64 in the order of the clients. Subclasses say what the next round begins with.

    Args: optimizer: torch.optim.AdamW over the parameters of `weights`; weights: `common.vector.Weights`.
    """

    def __init__(self, optimizer, weights):
        self.optimizer, self.weights = optimizer, weights
        self.m, self.v, self.step = torch.zeros_like(weights.theta), torch.zeros_like(weights.theta), 0
        self._m_k, self._v_k = torch.empty_like(self.m), torch.empty_like(self.v)
        self._sum, self.H = None, 0

    @property
    def bytes(self):
        """(up, down): what a client sends and receives beside theta in a round."""
        return 2 * self.weights.bytes, 2 * self.weights.bytes

    def open_round(self, clients):
        """Begins a round. Args: clients: its `Round`, before the loop over it."""
        self._sum = OrderedSum(clients, _weighted, self.m, sums=2)

    def load(self, k):
        """Puts what clients begin with into the optimiser."""
        self._m_k.copy_(self.m)
        self._v_k.copy_(self.v)
        m, v = self.weights.named(self._m_k), self.weights.named(self._v_k)
        self.optimizer.state = defaultdict(dict)
        for name, p in self.weights.parameters.items():
            step = torch.tensor(float(self.step), device=p.device)
            self.optimizer.state[p] = {"step": step, "exp_avg": m[name], "exp_avg_sq": v[name]}

    def store(self, k):
        """Nothing: what a client leaves is offered, once it is known to be finite."""

    def of_client(self):
        """(m_k, v_k) [n] of the client that has just worked, valid until the next."""
        return self._m_k, self._v_k

    def offer(self, weight):
        """Takes the moments of the client that has just worked. Args: weight: w_k, as in the mean of theta."""
        state = self.optimizer.state[next(iter(self.weights.parameters.values()))]
        self._sum.add((weight, state["step"].item() - self.step), *self.of_client())

    def close_round(self, delta, lr):
        """What the next round begins with. Every process calls it, after the loop.

        Args: delta [n], fp64: the `delta()` of the mean of theta; lr: mean rate of the round's steps.
        """
        (m, v), numbers = self._sum.result()
        self._sum = None
        total = sum(weight for weight, _ in numbers)
        # H: clients that pass over texts of their own may differ in their steps
        self.H = round(sum(weight * steps for weight, steps in numbers) / total)
        self._update(m.div_(total), v.div_(total), self.H, sum((weight / total) ** 2 for weight, _ in numbers))
        self.step += self.H
        self._turn(delta, lr)

    def _turn(self, delta, lr):
        pass

    def _update(self, m, v, H, q):
        raise NotImplementedError

    def state_dict(self):
        return {"m": self.m, "v": self.v, "step": torch.tensor(self.step)}

    def load_state_dict(self, state):
        self.m.copy_(state["m"])
        self.v.copy_(state["v"])
        self.step = int(state["step"])


class AverageMoments(SharedMoments):
    """m <- m', v <- v': the moments are averaged as theta is   (Local Adam's server; Cheng & Glasgow 2024)."""

    def _update(self, m, v, H, q):
        self.m.copy_(m)
        self.v.copy_(v)


class PooledMoments(SharedMoments):
    """m <- m', v <- the second moment that the pooled batch of all clients would have.

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
    Ours, with no source.
    """

    def _update(self, m, v, H, q):
        b1, b2 = (b**H for b in self.optimizer.param_groups[0]["betas"])
        B = (m - b1 * self.m).div_(1 - b1).square_()
        A = v.sub_(b2 * self.v.double()).div_(1 - b2)
        beta = self.optimizer.param_groups[0]["betas"][0]
        w = (1 - beta) * (1 + b1) / ((1 + beta) * (1 - b1))
        noise = (1 - q) / (1 - q * w) if q < 1 else 0.0  # one client: its batch is the pooled one
        C = A.sub_((A - B).mul_(noise)).clamp_min_(0)
        self.v.copy_(C.mul_(1 - b2).add_(self.v.double(), alpha=b2))
        self.m.copy_(m)


class FedAdamWMoments(SharedMoments):
    """FedAdamW   (Liu et al. 2025, arXiv 2510.27486, Alg. 2), with `FedAdamW` as the clients' optimiser:

        m <- 0;  v <- sum_k p_k blockmean(v_k);  Delta_G <- -sum_k p_k (theta_k - theta) / (H lr)

    A block is an output row of a matrix (a token of an embedding, a channel of a convolution) or a whole vector; the
    paper's blocks of queries and keys are whole heads. Clients send a number a block; they receive these and Delta_G.
    The authors' code averages whole v, corrects the reset m by the global step, too (which makes steps of few local
    steps up to 10 times too short), and divides Delta_G by the present round's rate.
    """

    def __init__(self, optimizer, weights):
        super().__init__(optimizer, weights)
        self._blocks = sum(shape[0] if len(shape) > 1 else 1 for shape in weights.shapes.values())

    @property
    def bytes(self):
        size = self.v.element_size()
        return size * self._blocks, size * self._blocks + self.weights.bytes

    def load(self, k):
        super().load(k)
        self.optimizer.begin(self.step)

    def _turn(self, delta, lr):
        self.optimizer.direction.copy_(delta / (-self.H * lr) if lr else delta * 0)

    def _update(self, m, v, H, q):
        for tensor in self.weights.named(v).values():
            rows = tensor.view(tensor.shape[0] if tensor.dim() > 1 else 1, -1)
            rows.copy_(rows.mean(1, keepdim=True).expand_as(rows))
        self.v.copy_(v)

    def state_dict(self):
        return super().state_dict() | {"direction": self.optimizer.direction}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.optimizer.direction.copy_(state["direction"])


class FedAdamW(torch.optim.AdamW):
    """The local steps of FedAdamW, k = 1..H of a round, t counted over all rounds   (Alg. 2):

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        x <- x - lr (m / (1 - b1^k) / (sqrt(v / (1 - b2^t)) + eps) + alpha Delta_G + wd x)

    The decay shrinks x; the paper's formula has the sign of wd x reversed.
    Args: weights: `common.vector.Weights` of what is trained; lr; weight_decay: wd; alpha; not_decayed: as for
        `common.local.parameter_groups`; betas: b1, b2.
    """

    def __init__(self, weights, lr, weight_decay=0.01, alpha=0.5, not_decayed=(), betas=(0.9, 0.999)):
        super().__init__(parameter_groups(weights.parameters, weight_decay, not_decayed), lr, betas, fused=True)
        self.alpha, self.direction = alpha, torch.zeros_like(weights.theta)
        self._theta = weights.theta
        self._first = self._k = 0

    def begin(self, step):
        """Begins a client's round. Args: step: t before it."""
        self._first, self._k = step, 0

    @torch.no_grad()
    def step(self, closure=None):
        self._k += 1
        b1 = self.defaults["betas"][0]
        # torch corrects m by t too: a rate that is larger by this ratio corrects it by k, a decay smaller by it stays
        ratio = (1 - b1 ** (self._first + self._k)) / (1 - b1**self._k)
        given = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        for group, (lr, decay) in zip(self.param_groups, given, strict=True):
            group.update(lr=lr * ratio, weight_decay=decay / ratio)
        super().step(closure)
        for group, (lr, decay) in zip(self.param_groups, given, strict=True):
            group.update(lr=lr, weight_decay=decay)
        self._theta.add_(self.direction, alpha=-self.alpha * given[0][0])


def _weighted(sums, theta, given, weight, steps):
    for total, vector in zip(sums, given, strict=True):
        total.add_(vector.to(torch.float64), alpha=weight)
