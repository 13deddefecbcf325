"""What the server does: means of the clients' weights, summed in one fixed order, and optimisers.

theta and theta_k are vectors [n] (`common.vector`). Clients stream through an accumulator, whose memory does not grow
with their number. All sums are in fp64 and on differences theta_k - theta, client after client (`common.parallel`),
rounded once at the end: an element that no client changed keeps its bits.

One policy for updates that are not finite: `add` leaves the client out, names it in the round and returns False.
"""

import math

import torch

from common.rounds import CHUNK, OrderedSum, chunks


def apply_delta(theta, delta):
    """theta + delta [n], computed in fp64 and rounded once to theta's dtype. A new vector."""
    result = theta.detach().clone()
    for new, d in chunks(result, delta):
        # Not new + 0: that would turn -0.0 into 0.0.
        new.copy_(torch.where(d == 0, new, (new.double() + d).to(new.dtype)))
    return result


def fp64_sum(vector, square=False):
    """The sum of a vector, or of its squares, in fp64: pieces so short that torch does not split them over threads."""
    total = 0.0
    for (piece,) in chunks(vector.detach(), size=CHUNK // 4):
        total += (piece.double().square() if square else piece).sum(dtype=torch.float64).item()
    return total


class _Mean:
    """A mean over the clients of a round: theta + delta(). Subclasses: `_fold` adds a client, `_mean` divides."""

    def __init__(self, theta, clients, sums=1, prepare=None, vectors=1):
        self.theta, self.clients = theta, clients
        self._sum = OrderedSum(clients, self._fold, theta, sums, prepare, vectors)
        self._delta = None

    def delta(self):
        """The mean difference from theta [n], fp64. Every process calls it.

        Raises: ValueError when the weights add up to 0.
        """
        if self._delta is None:
            sums, numbers = self._sum.result()
            if not any(weight > 0 for weight, *_ in numbers):
                raise ValueError("no client with a weight above 0 was added: the mean is undefined")
            self._delta = self._mean(sums, numbers)
        return self._delta

    def result(self, server_lr=1.0):
        """theta + server_lr delta() [n], rounded once to theta's dtype   (Reddi et al. 2021, Alg. 1, server SGD)."""
        return apply_delta(self.theta, self.delta() if server_lr == 1 else server_lr * self.delta())

    def _counts(self, theta_k, *others):
        """Whether the client counts; if not it is left out of the round: something is not finite."""
        if theta_k.shape != self.theta.shape:
            raise ValueError(f"the client's weights are {tuple(theta_k.shape)}, theta is {tuple(self.theta.shape)}")
        return self.clients.counts(theta_k, theta_k, *others)


class WeightedMean(_Mean):
    """FedAvg's mean   (McMahan et al. 2017, Alg. 1, in delta form):

        theta + sum_k w_k (theta_k - theta) / sum_k w_k

    w_k = n_k exp(log_weight_k), n_k what the round says that client k counts: the exponent serves weights that span
    orders of magnitude (softmax of entropies); only its differences between clients matter: it cannot overflow.

    Args: theta [n], not to be changed while clients are added; clients: `common.rounds.Round`.
    """

    def __init__(self, theta, clients):
        super().__init__(theta, clients, prepare=self._prepare)
        self._level = -math.inf  # sums are in units of exp(level), the largest log_weight so far

    def add(self, theta_k, log_weight=0.0):
        """Adds the client that the round is at. Returns False if it is left out: something is not finite.

        Args: theta_k [n]. Raises: ValueError for another length; RuntimeError outside of the loop over the clients.
        """
        if not self._counts(theta_k, torch.tensor(log_weight, dtype=torch.float64)):
            return False
        self._sum.add((self.clients.weight, log_weight), theta_k)
        return True

    def _prepare(self, sums, weight, log_weight):
        if weight > 0 and log_weight > self._level:
            if self._level > -math.inf:
                sums[0].mul_(math.exp(self._level - log_weight))
            self._level = log_weight
        return (weight * math.exp(log_weight - self._level) if weight > 0 else 0.0,)

    def _fold(self, sums, theta, given, weight):
        sums[0].add_(_difference(given[0], theta).mul_(weight))

    def _mean(self, sums, numbers):
        return sums[0].div_(sum(weight * math.exp(log - self._level) for weight, log in numbers if weight > 0))


class NormalizedMean(_Mean):
    """FedNova's mean   (Wang et al. 2020, eq. 9; tau_eff = sum_k p_k a_k):

        theta - (sum_k p_k a_k) sum_k p_k (theta - theta_k) / a_k        p_k = n_k / sum n

    Clients that do more local steps pull no harder than their weights say. Used as `WeightedMean`.
    """

    def add(self, theta_k, a):
        """As `WeightedMean.add`. Args: a: the client's `effective_steps`, above 0. Raises: ValueError for another a."""
        if not (a > 0 and math.isfinite(a)):
            raise ValueError(f"a {a} is not a finite number above 0")
        if not self._counts(theta_k):
            return False
        self._sum.add((self.clients.weight, a), theta_k)
        return True

    def _fold(self, sums, theta, given, weight, a):
        sums[0].add_(_difference(given[0], theta).mul_(weight / a))

    def _mean(self, sums, numbers):
        weight = sum(w for w, _ in numbers)
        return sums[0].mul_(sum(w * a for w, a in numbers) / weight / weight)


class PrecisionWeightedMean(_Mean):
    """Fisher-weighted mean, per coordinate j   (Matena & Raffel 2022, eq. 4, in delta form):

        theta_j + sum_k n_k F~_kj (theta_kj - theta_j) / sum_k n_k F~_kj
        F~_kj = F_kj + damping * mean_j(F_k)

    Where the denominator is zero: the example-weighted mean.

    Args: theta, clients: as for `WeightedMean`; damping: rho, at least 0.
    """

    def __init__(self, theta, clients, damping=0.1):
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(f"damping {damping} is not a finite number of at least 0")
        super().__init__(theta, clients, sums=3, vectors=2)
        self.damping = float(damping)

    def add(self, theta_k, precision):
        """As `WeightedMean.add`. Args: precision: F_k [n], every element at least 0.

        Raises: ValueError for a negative precision or one of another length, beside what `WeightedMean.add` does.
        """
        if not self._counts(theta_k, precision):
            return False
        if (lowest := precision.amin().item()) < 0:
            raise ValueError(f"the precision has elements below 0 ({lowest})")
        mean = fp64_sum(precision) / precision.numel()
        self._sum.add((self.clients.weight, self.damping * mean), theta_k, precision)
        return True

    def _fold(self, sums, theta, given, weight, shift):
        product, precision, plain = sums
        change = _difference(given[0], theta)
        f = given[1].to(torch.float64, copy=True).add_(shift).mul_(weight)
        precision.add_(f)
        product.add_(f.mul_(change))
        plain.add_(change.mul_(weight))

    def _mean(self, sums, numbers):
        weight = sum(number[0] for number in numbers)
        for top, bottom, mean in chunks(*sums):
            top.copy_(torch.where(bottom > 0, top / bottom, mean / weight))
        return sums[0]


def _difference(new, old):
    return new.to(torch.float64, copy=True).sub_(old)


def effective_steps(steps, kind, momentum=0.0):
    """FedNova's a: how far `steps` local steps go, in steps of plain SGD   (Wang et al. 2020, sec. 4):

        sgd: H      sgdm: [H - rho (1 - rho^H) / (1 - rho)] / (1 - rho)

    Under a gradient of 1 at every step the weights move by lr a. Momentum starts at zero in each round, lr is constant
    within it; weight decay is not counted. Args: momentum: rho in [0, 1), of "sgdm" only.
    Raises: ValueError for "adamw", whose steps are no sums of gradients, and any other kind.
    """
    if kind not in ("sgd", "sgdm"):
        raise ValueError(f"FedNova with {kind}: a is defined for sgd and sgdm only")
    rho = momentum if kind == "sgdm" else 0.0
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


class _ServerOptimizer:
    """What outlives a round: flat fp64 tensors by name, none before the first step."""

    def __init__(self):
        self.state = {}

    def state_dict(self):
        """The state as a flat dict of tensors (not copies)."""
        return self.state

    def load_state_dict(self, state):
        """Takes over (copies of) what `state_dict` returned."""
        self.state = {name: tensor.clone() for name, tensor in state.items()}


class ServerMomentum(_ServerOptimizer):
    """FedAvgM   (Hsu et al. 2019), on Delta = sum_k p_k delta_k:

        heavy_ball:  v <- beta v + Delta              theta <- theta + lr v
        ema:         v <- beta v + (1 - beta) Delta   theta <- theta + lr v     (steps smaller by 1 - beta)

    `nesterov`: theta <- theta + lr (g + beta v), g the term that was added to v, as in torch.optim.SGD.
    beta = 0 with lr = 1 is FedAvg, bit for bit. State: v [n], fp64.
    """

    def __init__(self, lr=1.0, beta=0.9, nesterov=False, form="heavy_ball"):
        if form not in ("heavy_ball", "ema"):
            raise ValueError(f"form {form!r} is neither 'heavy_ball' nor 'ema'")
        if not (lr > 0 and 0 <= beta < 1):
            raise ValueError(f"lr {lr} must be above 0 and beta {beta} in [0, 1)")
        super().__init__()
        self.lr, self.beta, self.nesterov, self.form = lr, beta, nesterov, form

    def step(self, theta, delta):
        """The new theta [n]. Args: delta [n], fp64: a mean's `delta()`."""
        gain = 1.0 if self.form == "heavy_ball" else 1.0 - self.beta
        self.state = self.state or {"v": torch.zeros_like(delta)}
        change = torch.empty_like(delta)
        for c, d, v in chunks(change, delta, self.state["v"]):
            g = d * gain
            v.mul_(self.beta).add_(g)
            c.copy_((g + self.beta * v if self.nesterov else v) * self.lr)
        return apply_delta(theta, change)


class ServerAdam(_ServerOptimizer):
    """FedAdam   (Reddi et al. 2021, Alg. 2), on Delta = sum_k p_k delta_k:

        m <- b1 m + (1 - b1) Delta        v <- b2 v + (1 - b2) Delta^2        theta <- theta + lr m / (sqrt(v) + tau)

    v starts at tau^2, m at 0; no bias correction, as published. With bias_correction v starts at 0 too and
    m / (1 - b1^t), v / (1 - b2^t) take their places: on one SGD step of the clients that is Adam on the pooled gradient
    (Kingma & Ba 2015, with tau as its epsilon). State: m, v [n], fp64, and with bias_correction t.
    """

    def __init__(self, lr=1e-2, b1=0.9, b2=0.99, tau=1e-3, bias_correction=False):
        if not (lr > 0 and tau > 0 and 0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError(f"lr {lr} and tau {tau} must be above 0, b1 {b1} and b2 {b2} in [0, 1)")
        super().__init__()
        self.lr, self.b1, self.b2, self.tau, self.bias_correction = lr, b1, b2, tau, bias_correction

    def step(self, theta, delta):
        """The new theta [n]. Args: delta [n], fp64: a mean's `delta()`."""
        if not self.state:
            start = 0.0 if self.bias_correction else self.tau**2
            self.state = {"m": torch.zeros_like(delta), "v": torch.full_like(delta, start)}
            self.state |= {"t": torch.zeros((), dtype=torch.float64)} if self.bias_correction else {}
        of_m = of_v = 1.0
        if self.bias_correction:
            self.state["t"] += 1
            of_m, of_v = (1 - b ** self.state["t"].item() for b in (self.b1, self.b2))
        change = torch.empty_like(delta)
        for c, d, m, v in chunks(change, delta, self.state["m"], self.state["v"]):
            m.mul_(self.b1).add_(d * (1 - self.b1))
            v.mul_(self.b2).add_(d * d * (1 - self.b2))
            c.copy_(m * (self.lr / of_m) / ((v / of_v).sqrt() + self.tau))
        return apply_delta(theta, change)
