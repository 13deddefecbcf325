"""What the server does: means of the clients' weights, summed in one fixed order, and optimisers.

A model is a dict name -> tensor with one entry per storage (tied weights once). Clients stream through an
accumulator, which holds one lane and the total whatever the number of clients. All sums are in fp64 and on
differences theta_k - theta, rounded once at the end: an entry that no client changed keeps its bits.
"""

import math

import torch

from common.cli import UsageError
from common.parallel import CHUNK, LaneSum, chunks


def finite(theta):
    """Whether every floating-point entry of the dict `theta` is finite. One pass, nothing allocated."""
    for tensor in theta.values():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # both are NaN when any element is
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return False
    return True


def entropy_log_weight(entropy, temperature=1.0):
    """The logarithm of a client's unnormalised weight exp(-H_k / T), for `WeightedMean.add(log_weight=...)`.

    Args: entropy: H_k, the mean token entropy in nats; temperature: T, above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not above 0")
    return -float(entropy) / float(temperature)


def apply_delta(theta, delta):
    """theta + delta, computed in fp64 and rounded once to theta's dtype.

    Gives new tensors. Entries that `delta` lacks are copied from theta; its integer entries replace theta's.
    """
    result = {}
    for name, old in theta.items():
        result[name] = new = old.detach().clone(memory_format=torch.contiguous_format)
        if name not in delta:
            continue
        if not old.is_floating_point():
            new.copy_(delta[name])
            continue
        for n, d in chunks(new, delta[name]):
            # Not n + 0: that would turn -0.0 into 0.0.
            n.copy_(torch.where(d == 0, n, (n.double() + d).to(n.dtype)))
    return result


class WeightedMean:
    """FedAvg's mean   (McMahan et al. 2017, Alg. 1, in delta form):

        theta + sum_k w_k (theta_k - theta) / sum_k w_k

    w_k = weight_k * exp(log_weight_k): the exponent serves weights that span orders of magnitude (softmax of
    entropies); only its differences between clients matter, so that it cannot overflow.

        mean = WeightedMean(theta, lanes)
        for k in lanes:
            mean.add(theta_k, weight=n_k)
        theta = mean.result()

    Float entries (float buffers too) are averaged. Integer entries are copied from the first client, in lane
    order. The result has the same bits for 1 to 8 processes and for any order of the ids in `Lanes(...)`.

    Args: theta: dict of tensors, not to be changed while clients are added; lanes: `common.parallel.Lanes`.
    """

    def __init__(self, theta, lanes):
        self.theta = theta
        self._sum = LaneSum(lanes)
        self._delta = None
        self._versions = _versions(theta)

    def add(self, theta_k, weight, log_weight=0.0):
        """Adds the client that `lanes` is at.

        Args: theta_k: its weights (theta's names and shapes); weight: at least 0, e.g. its number of
        examples; log_weight: finite.
        Raises: ValueError for another weight, for names or shapes that differ, or when theta was changed in
        place; RuntimeError outside of the loop.
        """
        _check_client(self.theta, self._versions, theta_k)
        lane = self._sum.begin(weight, log_weight)
        lane.add_number("weight", lane.weight)
        for name, old in self.theta.items():
            if old.is_floating_point():
                lane.add(name, (theta_k[name], old), _weighted_difference, lane.weight)
            else:
                lane.keep(name, theta_k[name])

    def delta(self):
        """sum_k p_k (theta_k - theta), p_k = w_k / sum w: dict of fp64 tensors.

        The tensors are the accumulator's; integer entries hold their new values. With several processes every
        one must call it. Raises: ValueError when the weights add up to 0.
        """
        total = self._sum.total()
        weight = total.numbers.get("weight", 0.0)
        if not weight > 0:
            raise ValueError("no client with a weight above 0 was added: the mean is undefined")
        if self._delta is None:
            for part in total.sums.values():
                part.div_(weight)
            self._delta = {name: (total.kept if name in total.kept else total.sums)[name] for name in self.theta}
        return dict(self._delta)

    def result(self):
        """theta + delta(), rounded once to theta's dtype. New tensors."""
        return apply_delta(self.theta, self.delta())


def effective_steps(steps, kind, momentum=0.0, lr=None, mu=0.0):
    """FedNova's a: how far `steps` local steps go, in steps of plain SGD   (Wang et al. 2020, sec. 4):

        sgd: H      sgdm: [H - rho (1 - rho^H) / (1 - rho)] / (1 - rho)      sgd, FedProx: [1 - (1 - lr mu)^H] / (lr mu)

    By the recursion behind these three, which serves momentum and FedProx together too: under a gradient of 1 at
    every step the weights move by lr a. Momentum starts at zero in each round, lr is constant within it; weight
    decay is not counted.

    Args: steps: H, at least 1; kind: "sgd" or "sgdm"; momentum: rho in [0, 1), of "sgdm" only; lr: needed with mu;
        mu: FedProx's, at least 0.
    Raises: UsageError for "adamw", whose steps do not add up from gradients; ValueError otherwise.
    """
    if kind == "adamw":
        raise UsageError(
            "FedNova with adamw: its steps are not sums of gradients, so that a is undefined: use sgd or sgdm"
        )
    if kind not in ("sgd", "sgdm"):
        raise ValueError(f"kind {kind!r} is not 'sgd', 'sgdm' or 'adamw'")
    if steps < 1 or not 0 <= momentum < 1 or not mu >= 0 or (mu > 0 and not (lr or 0) > 0):
        raise ValueError(f"steps {steps} of at least 1, momentum {momentum} in [0, 1), mu {mu} >= 0, with lr {lr} > 0")
    rho, pull = (momentum if kind == "sgdm" else 0.0), (lr * mu if mu else 0.0)
    moved = velocity = 0.0
    for _ in range(steps):
        velocity = rho * velocity + 1.0 - pull * moved
        moved += velocity
    return moved


class NormalizedMean:
    """FedNova's mean   (Wang et al. 2020, eq. 9; tau_eff = sum_k p_k a_k):

        theta - (sum_k p_k a_k) sum_k p_k (theta - theta_k) / a_k        p_k = weight_k / sum weight

    Clients that do more local steps pull no harder than their weights say. Used as `WeightedMean`, with which it
    agrees where all a_k are equal, but for the rounding of fp64 (a relative 1e-15 of delta()): in fp32 weights that
    shows in the last bit, seldom. Float buffers are normalised as well; integer entries come from the first client.

    Args: theta, lanes: as for `WeightedMean`.
    """

    def __init__(self, theta, lanes):
        self.theta = theta
        self._sum = LaneSum(lanes)
        self._delta = None
        self._versions = _versions(theta)

    def add(self, theta_k, weight, a):
        """Adds the client that `lanes` is at.

        Args: theta_k, weight: as for `WeightedMean.add`; a: its `effective_steps`, above 0.
        Raises: as `WeightedMean.add`; ValueError for another a.
        """
        if not (a > 0 and math.isfinite(a)):
            raise ValueError(f"a {a} is not a finite number above 0")
        _check_client(self.theta, self._versions, theta_k)
        lane = self._sum.begin(weight)
        lane.add_number("weight", lane.weight)
        lane.add_number("steps", lane.weight * a)
        for name, old in self.theta.items():
            if old.is_floating_point():
                lane.add(name, (theta_k[name], old), _weighted_difference, lane.weight / a)
            else:
                lane.keep(name, theta_k[name])

    def delta(self):
        """(sum_k p_k a_k) sum_k p_k (theta_k - theta) / a_k: dict of fp64 tensors.

        As `WeightedMean.delta`: the accumulator's own; every process must call it. Raises: ValueError when the
        weights add up to 0.
        """
        total = self._sum.total()
        weight = total.numbers.get("weight", 0.0)
        if not weight > 0:
            raise ValueError("no client with a weight above 0 was added: the mean is undefined")
        if self._delta is None:
            factor = total.numbers["steps"] / weight / weight
            for part in total.sums.values():
                part.mul_(factor)
            self._delta = {name: (total.kept if name in total.kept else total.sums)[name] for name in self.theta}
        return dict(self._delta)

    def result(self):
        """theta + delta(), rounded once to theta's dtype. New tensors."""
        return apply_delta(self.theta, self.delta())


class PrecisionWeightedMean:
    """Fisher-weighted mean, per coordinate j   (Matena & Raffel 2022, eq. 4, in delta form):

        theta_j + sum_k n_k F~_kj (theta_kj - theta_j) / sum_k n_k F~_kj
        F~_kj = F_kj + damping * mean_j(F_k)

    Where the denominator is zero: the example-weighted mean. So too for float entries without a precision
    (buffers, frozen parameters). `normalize` divides each F_k by its L2 norm over all coordinates, as the
    authors' code does (which has a floor of 1e-6 on F where we have the damping).

    Args: theta, lanes: as for `WeightedMean`; damping: rho, at least 0.
    """

    def __init__(self, theta, lanes, damping=0.1, normalize=False):
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(f"damping {damping} is not a finite number of at least 0")
        self.theta = theta
        self.damping = float(damping)
        self.normalize = normalize
        self._sum = LaneSum(lanes)
        self._delta = None
        self._versions = _versions(theta)

    def add(self, theta_k, weight, precision):
        """Adds the client that `lanes` is at.

        Args: theta_k, weight: as for `WeightedMean.add`; precision: F_k, dict name -> tensor of theta's
        shape, every element at least 0; names may be missing, the same ones for every client.
        Raises: as `WeightedMean.add`; ValueError when the precision is negative, not finite or has another
        shape.
        """
        _check_client(self.theta, self._versions, theta_k)
        mean, scale = self._statistics(precision)
        lane = self._sum.begin(weight)
        lane.add_number("weight", lane.weight)
        shift = self.damping * mean * scale
        for name, old in self.theta.items():
            new = theta_k[name]
            if not old.is_floating_point():
                lane.keep(name, new)
                continue
            if name in precision and mean > 0:
                f = precision[name].detach()
                factors = (lane.weight, scale, shift)
                lane.add(("precision", name), (f,), _weighted_precision, *factors)
                lane.add(("product", name), (new, old, f), _precise_difference, *factors)
            # With damping, one client that has a positive F makes every denominator positive: the plain mean
            # then serves only a round in which all clients' F are zero.
            if name not in precision or self.damping == 0 or mean == 0:
                lane.add(("plain", name), (new, old), _weighted_difference, lane.weight)

    def delta(self):
        """The weighted mean difference: dict of fp64 tensors.

        The tensors are the accumulator's; integer entries hold their new values. With several processes every
        one must call it. Raises: ValueError when the weights add up to 0.
        """
        total = self._sum.total()
        weight = total.numbers.get("weight", 0.0)
        if not weight > 0:
            raise ValueError("no client with a weight above 0 was added: the mean is undefined")
        if self._delta is None:
            self._delta = {name: self._entry(total, name, weight) for name in self.theta}
        return dict(self._delta)

    def result(self):
        """theta + delta(), rounded once to theta's dtype. New tensors."""
        return apply_delta(self.theta, self.delta())

    def _entry(self, total, name, weight):
        if name in total.kept:
            return total.kept[name]
        plain = total.sums.pop(("plain", name), None)
        if ("product", name) not in total.sums:
            return plain.div_(weight)
        product, precision = total.sums.pop(("product", name)), total.sums.pop(("precision", name))
        if plain is None:
            return product.div_(precision)
        return torch.where(precision > 0, product / precision, plain / weight)

    def _statistics(self, precision):
        """mean_j(F_k) over all coordinates, and 1 or 1 / ||F_k||, in fp64, whatever the number of threads."""
        total, squares, count = 0.0, 0.0, 0
        for name in self.theta:
            if name not in precision:
                continue
            f, shape = precision[name].detach(), self.theta[name].shape
            if f.shape != shape:
                raise ValueError(f"the precision of {name} is {tuple(f.shape)}, not {tuple(shape)}")
            if not f.numel():
                continue
            low, high = torch.aminmax(f)
            if not (low >= 0 and torch.isfinite(high)):
                raise ValueError(f"the precision of {name} is {low.item()} to {high.item()}: not finite, >= 0")
            count += f.numel()
            for (c,) in chunks(f, size=CHUNK // 4):  # short enough that torch does not split it over threads
                total += c.sum(dtype=torch.float64).item()
                if self.normalize:
                    squares += c.double().square().sum().item()
        mean = total / count if count else 0.0
        return mean, (1 / math.sqrt(squares) if squares > 0 else 1.0)


class ServerMomentum:
    """FedAvgM   (Hsu et al. 2019), on Delta = sum_k p_k delta_k:

        heavy_ball:  v <- beta v + Delta              theta <- theta + lr v
        ema:         v <- beta v + (1 - beta) Delta   theta <- theta + lr v     (steps smaller by 1 - beta)

    `nesterov`: theta <- theta + lr (g + beta v), g the term that was added to v, as in torch.optim.SGD.
    beta = 0 with lr = 1 is FedAvg, bit for bit. State: fp64, `v.<name>`.
    """

    def __init__(self, lr=1.0, beta=0.9, nesterov=False, form="heavy_ball"):
        if form not in ("heavy_ball", "ema"):
            raise ValueError(f"form {form!r} is neither 'heavy_ball' nor 'ema'")
        if not (lr > 0 and 0 <= beta < 1):
            raise ValueError(f"lr {lr} must be above 0 and beta {beta} in [0, 1)")
        self.lr, self.beta, self.nesterov, self.form = lr, beta, nesterov, form
        self.v = {}

    def step(self, theta, delta):
        """The new theta (new tensors). Args: delta: `WeightedMean.delta()`."""
        gain = 1.0 if self.form == "heavy_ball" else 1.0 - self.beta

        def update(d, v):
            g = d * gain
            v.mul_(self.beta).add_(g)
            return (g + self.beta * v if self.nesterov else v) * self.lr

        return _stepped(theta, delta, update, (self.v, 0.0))

    def state_dict(self):
        """The state as a flat dict of tensors (not copies)."""
        return {f"v.{name}": tensor for name, tensor in self.v.items()}

    def load_state_dict(self, state):
        """Takes over (copies of) what `state_dict` returned."""
        self.v = _unflattened(state, ("v",))["v"]


class ServerAdam:
    """FedAdam, FedYogi, FedAdagrad   (Reddi et al. 2021, Alg. 2), on Delta = sum_k p_k delta_k:

        m <- b1 m + (1 - b1) Delta        theta <- theta + lr m / (sqrt(v) + tau)
        adam:     v <- b2 v + (1 - b2) Delta^2
        yogi:     v <- v - (1 - b2) Delta^2 sign(v - Delta^2)
        adagrad:  v <- v + Delta^2

    v starts at tau^2, m at 0; no bias correction, as published. State: fp64, `m.<name>`, `v.<name>`.
    """

    def __init__(self, kind="adam", lr=1e-2, b1=0.9, b2=0.99, tau=1e-3):
        if kind not in ("adam", "yogi", "adagrad"):
            raise ValueError(f"kind {kind!r} is not 'adam', 'yogi' or 'adagrad'")
        if not (lr > 0 and tau > 0 and 0 <= b1 < 1 and 0 <= b2 < 1):
            raise ValueError(f"lr {lr} and tau {tau} must be above 0, b1 {b1} and b2 {b2} in [0, 1)")
        self.kind, self.lr, self.b1, self.b2, self.tau = kind, lr, b1, b2, tau
        self.m, self.v = {}, {}

    def step(self, theta, delta):
        """The new theta (new tensors). Args: delta: `WeightedMean.delta()`."""

        def update(d, m, v):
            m.mul_(self.b1).add_(d * (1 - self.b1))
            squared = d * d
            if self.kind == "adam":
                v.mul_(self.b2).add_(squared * (1 - self.b2))
            elif self.kind == "yogi":
                v.sub_(squared * torch.sign(v - squared) * (1 - self.b2))
            else:
                v.add_(squared)
            return m * self.lr / (v.sqrt() + self.tau)

        return _stepped(theta, delta, update, (self.m, 0.0), (self.v, self.tau**2))

    def state_dict(self):
        """The state as a flat dict of tensors (not copies)."""
        parts = (("m", self.m), ("v", self.v))
        return {f"{key}.{name}": tensor for key, part in parts for name, tensor in part.items()}

    def load_state_dict(self, state):
        """Takes over (copies of) what `state_dict` returned."""
        parts = _unflattened(state, ("m", "v"))
        self.m, self.v = parts["m"], parts["v"]


def _weighted_difference(new, old, weight):
    return _difference(new, old).mul_(weight)


def _weighted_precision(f, weight, scale, shift):
    return f.to(torch.float64, copy=True).mul_(scale).add_(shift).mul_(weight)


def _precise_difference(new, old, f, weight, scale, shift):
    return _weighted_precision(f, weight, scale, shift).mul_(_difference(new, old))


def _difference(new, old):
    return new.to(torch.float64, copy=True).sub_(old)


def _stepped(theta, delta, update, *states):
    """theta + update(delta, *state) per float entry; `states` are (dict, initial value), changed in place."""
    change = {}
    for name, d in delta.items():
        if not d.is_floating_point():
            change[name] = d
            continue
        for state, initial in states:
            if name not in state:
                state[name] = torch.full(d.shape, initial, dtype=torch.float64, device=d.device)
        change[name] = torch.empty(d.shape, dtype=torch.float64, device=d.device)
        for c, *parts in chunks(change[name], d.double(), *(state[name] for state, _ in states)):
            c.copy_(update(*parts))
    return apply_delta(theta, change)


def _unflattened(state, keys):
    parts = {key: {} for key in keys}
    for name, tensor in state.items():
        key, _, rest = name.partition(".")
        if key not in parts or not rest:
            raise ValueError(f"{name!r} is no entry of this optimiser's state ({', '.join(keys)})")
        parts[key][rest] = tensor.detach().double().clone(memory_format=torch.contiguous_format)
    return parts


def _versions(theta):
    return {name: None if t.is_inference() else t._version for name, t in theta.items()}


def _check_client(theta, versions, theta_k):
    if _versions(theta) != versions:
        raise ValueError("theta was changed in place since the round began: clients must train a copy")
    if theta_k.keys() != theta.keys():
        odd = sorted(theta_k.keys() ^ theta.keys())
        raise ValueError(f"the client's entries differ from theta's: {', '.join(odd[:5])}")
    for name, tensor in theta.items():
        shape = theta_k[name].shape
        if shape != tensor.shape:
            raise ValueError(f"{name}: the client has shape {tuple(shape)}, theta {tuple(tensor.shape)}")
