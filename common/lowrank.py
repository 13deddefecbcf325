"""Six rules to average the clients' LoRA adapters, each with its error measured.

Client k's adapter adds Delta_k = s_k B_k A_k to a layer (see `common.products`). `factors` is a dict
{layer name: (A [r, k], B [d, r])}. The mean of products is not the product of means; what each rule serves:

    svd        Delta = sum p_k s_k B_k A_k, truncated to rank r           the best of rank r (FlexLoRA, Bai et al. 2024)
    naive      mean A, mean B                                             inexact (FedIT, Zhang et al. 2024)
    ffa        A drawn once and never trained, mean B                     exact (FFA-LoRA, Sun et al. 2024)
    stack      base += Delta, then a fresh adapter (A random, B zero)     exact (FLoRA, Wang et al. 2024)
    residual   mean A, mean B, base += Delta - s mean B mean A            exact (FedEx-LoRA, Singhal et al. 2024)
    rolora     trains B in one round and A in the next, the other fixed   exact (RoLoRA, Chen et al. 2024)

svd and stack take clients of different ranks. residual could serve their mean exactly too, of zero-padded factors, but
a client of a smaller rank would then begin with another product than the one that the base was corrected for.
"""

import math
from dataclasses import dataclass

import torch

from common import parallel
from common.aggregation import WeightedMean
from common.cli import UsageError
from common.parallel import all_to_all
from common.products import Product, check_truncation, distance, fresh_A, quotient, truncate
from common.seeding import torch_stream
from common.vector import is_finite

RULES = ("svd", "naive", "ffa", "stack", "residual", "rolora")
MIXED_RANKS = ("svd", "stack")  # the rules that take clients of different ranks and scales


def trained_factors(rule, round):
    """Which factors a round (from 0) trains: "A", "B" or both.

    rolora begins with B: at B = 0 the gradient of A is zero, and a round of A would be lost.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if rule == "ffa":
        return ("B",)
    if rule == "rolora":
        return ("B",) if round % 2 == 0 else ("A",)
    return ("A", "B")


# ---- the mean over a round's clients


@dataclass
class Served:
    """What a rule serves after a round.

    factors: {layer: (A, B)}, with the scale `scale`; updates: {layer: `Product`} to add to the base weights (stack and
    residual; else empty); error, errors: ||served - mean(BA)|| / ||mean(BA)|| over all layers and by layer, of the
    factors as they are rounded and of `updates` before they are, without a server optimiser's step; norm: ||mean(BA)||
    over all layers; discarded, discards: the share of Delta's energy (squared norm) that svd cut off, else 0; missing:
    directions of all layers that svd had to draw.
    """

    factors: dict
    scale: float
    updates: dict
    error: float
    errors: dict
    norm: float
    discarded: float
    discards: dict
    missing: int


class AdapterMean:
    """One round's adapters, averaged by one of the six rules (see the top of this module).

        mean = AdapterMean("svd", factors, scale, clients, t, seed)
        for k in clients:
            mean.add(train(k), weight=n_k)
        served = mean.result()

    The same bits for any number of processes. Memory: of the clients' factors at most min(d, k) columns for each layer
    (see `Product`), whatever their number.

    Args:
        rule: one of `RULES`.
        factors: {layer: (A, B)} that the round began with, not to be changed while clients are added.
        scale: their s, and the clients' unless `add` names another.
        clients: `common.parallel.Round`.
        round, seed: for what the round trains (`trained_factors`) and for the random rows that it may need.
        rank, new_scale, split: of the adapter that svd serves (rank and new_scale of stack's fresh one too); rank and
            scale default to those of `factors`.
    Raises: UsageError for a rule, rank or split that does not exist.
    """

    def __init__(self, rule, factors, scale, clients, round=0, seed=0, rank=None, new_scale=None, split="us"):
        if rule not in RULES:
            raise UsageError(f"rule {rule!r} does not exist: take one of {', '.join(RULES)}")
        self.rule, self.factors, self.scale, self.round, self.seed = rule, dict(factors), scale, round, seed
        ranks = {A.shape[0] for A, _ in self.factors.values()}
        self.rank = max(ranks) if rank is None else rank
        self.new_scale = scale if new_scale is None else new_scale
        self.split = split
        check_truncation(self.rank, self.new_scale, split)
        if rule not in MIXED_RANKS and (self.new_scale != scale or ranks != {self.rank}):
            raise UsageError(
                f"rule {rule} serves rank {sorted(ranks)} at scale {scale}, as its clients train, not rank {self.rank} "
                f"at scale {self.new_scale}: take {' or '.join(MIXED_RANKS)}"
            )
        self.trained = trained_factors(rule, round)
        self.clients = clients
        self._mean = None if rule in MIXED_RANKS else WeightedMean(self._vector(self.factors), clients)
        self._products = _ProductMeans(clients, self.factors)

    def add(self, factors, weight, scale=None, finite=()):
        """Adds the client that the round is at. Returns False if it is left out: something is not finite.

        Args: factors: {layer: (A, B)}; weight: at least 0, e.g. its number of examples; scale: its s; finite: other
            tensors that must be finite, such as its head.
        Raises: UsageError for other layers or layer sizes, or a rank or scale that the rule does not take; ValueError
            for a weight below 0, or a changed factor that this round does not train.
        """
        scale = self.scale if scale is None else scale
        self._check_sizes(factors, scale)
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight {weight} is not a finite number of at least 0")
        if not is_finite(*(t for pair in factors.values() for t in pair), *finite):
            self.clients.leave_out(self.clients.current)
            return False
        self._check_frozen(factors)
        if self._mean is not None:
            self._mean.add(self._vector(factors), weight)
        self._products.add(factors, weight, scale)
        return True

    def result(self, step=None):
        """What is served: a `Served`. With several processes every one must call it.

        Args: step: a server optimiser's step(theta, delta) on the mean factors, for naive, ffa and rolora (the others
            change the base, or define their factors up to a rotation only, and moments would mean nothing).
        """
        if step is not None and self.rule not in ("naive", "ffa", "rolora"):
            raise UsageError(f"rule {self.rule} takes no server optimiser: take naive, ffa or rolora, or plain fedavg")
        targets = self._products.result()
        updates, infos = {}, {}
        if self.rule == "svd":
            served, infos = self._truncated(targets)
        elif self.rule == "stack":
            served = {name: self._fresh(name) for name in self.factors}
            updates = targets
        else:
            served = self._paired(self._mean.result())
        if self.rule == "residual":
            updates = {
                name: Product(*target.shape).add_product(target).add(*served[name], -self.new_scale)
                for name, target in targets.items()
            }
        result = self._served(served, updates, targets, infos)
        if step is not None:
            result.factors = self._paired(step(self._mean.theta, self._mean.delta()))
        return result

    def _vector(self, factors):
        """The factors that the round trains as one vector."""
        return torch.cat([t.detach().reshape(-1) for _, letter, t in _entries(factors) if letter in self.trained])

    def _check_sizes(self, factors, scale):
        if factors.keys() != self.factors.keys():
            odd = sorted(factors.keys() ^ self.factors.keys())
            raise UsageError(
                f"the adapters differ in their layers ({', '.join(odd[:3])}): average adapters with the same targets"
            )
        for name, (A, B) in factors.items():
            (r, k), (d, _) = self.factors[name][0].shape, self.factors[name][1].shape
            if (B.shape[0], A.shape[1]) != (d, k):
                raise UsageError(
                    f"{name}: an adapter is for a layer of {B.shape[0]} x {A.shape[1]}, not {d} x {k}: average "
                    "adapters of one base model only"
                )
            if self.rule in MIXED_RANKS:
                continue
            if (A.shape[0], scale) != (r, self.scale):
                raise UsageError(
                    f"rule {self.rule}: an adapter has rank {A.shape[0]} and scale {scale:g}, the others {r} and "
                    f"{self.scale:g}: only {' and '.join(MIXED_RANKS)} take different ranks or scales"
                )

    def _check_frozen(self, factors):
        if self.rule in MIXED_RANKS:
            return
        for name, pair in factors.items():
            for letter, new, old in zip("AB", pair, self.factors[name], strict=True):
                if letter not in self.trained and not torch.equal(new.to(old.device), old):
                    raise ValueError(f"{name}.{letter} was changed, but {self.rule} trains {self.trained} this round")

    def _truncated(self, targets):
        """Each process truncates every size-th layer and sends it to the others: one answer, and less time."""
        world, done = parallel.world(), {}
        for i, name in enumerate(targets):
            if i % world.size == world.rank:
                A, B, info = truncate(
                    targets[name], self.rank, self.new_scale, self.split, self._stream(name, "missing directions")
                )
                done[name] = (_as(A, self.factors[name][0]), _as(B, self.factors[name][1]), info)
        infos = {}
        for part in parallel.all_gather({name: info for name, (_, _, info) in done.items()}):
            infos.update(part)
        served = {}
        for i, (name, (A, B)) in enumerate(self.factors.items()):
            if name in done:
                served[name] = done[name][:2]
            else:
                served[name] = A.new_empty(self.rank, A.shape[1]), B.new_empty(len(B), self.rank)
            for tensor in served[name]:
                parallel.broadcast_tensor_(tensor.reshape(-1).view(torch.uint8), i % world.size)
        return served, {name: infos[name] for name in self.factors}

    def _paired(self, mean):
        """{layer: (A, B)} of a mean of the trained factors, a vector; the others as they were."""
        sizes = [t.numel() for _, letter, t in _entries(self.factors) if letter in self.trained]
        pieces = iter(mean.split(sizes))

        def served(letter, t):
            return next(pieces).view(t.shape).clone() if letter in self.trained else t.detach().clone()

        return {
            name: tuple(served(letter, t) for letter, t in zip("AB", pair, strict=True))
            for name, pair in self.factors.items()
        }

    def _fresh(self, name):
        A, B = self.factors[name]
        rows = fresh_A(self.rank, A.shape[1], self._stream(name, "fresh adapter"))
        return _as(rows, A), B.new_zeros(len(B), self.rank)

    def _served(self, factors, updates, targets, infos):
        errors, differences, norms = {}, [], []
        for name, target in targets.items():
            served = Product(*target.shape).add(*factors[name], self.new_scale)
            if name in updates:
                served.add_product(updates[name])
            differences.append(distance(served, target))
            norms.append(target.norm())
            errors[name] = quotient(differences[-1], norms[-1])
        energy = {name: info["kept"] + info["discarded"] for name, info in infos.items()}
        discards = {name: info["discarded"] / energy[name] if energy[name] else 0.0 for name, info in infos.items()}
        total = sum(energy[name] for name in targets if name in energy)
        return Served(
            factors=factors,
            scale=self.new_scale,
            updates=updates,
            error=quotient(math.hypot(*differences), math.hypot(*norms)),
            errors=errors,
            norm=math.hypot(*norms),
            discarded=sum(infos[name]["discarded"] for name in targets) / total if total else 0.0,
            discards=discards,
            missing=sum(info["missing"] for info in infos.values()),
        )

    def _stream(self, name, purpose):
        return torch_stream(self.seed, f"lowrank: {purpose} of {name}", self.round)


class _ProductMeans:
    """{layer: weighted mean of the clients' products}, added in the order of the clients; a layer has one owner.

    Made with a round, it exchanges between its clients as `common.parallel.OrderedSum` does.
    """

    def __init__(self, clients, factors):
        self._clients, self._world = clients, clients.world
        self._sizes = {name: (B.shape[0], A.shape[1]) for name, (A, B) in factors.items()}
        self._mine = {
            name: Product(*size) for name, size in self._sizes.items() if self._owner(name) == self._world.rank
        }
        self._weight, self._given, self._result = 0.0, None, None
        clients.register(self)

    def add(self, factors, weight, scale):
        if self._clients.current is None or self._given is not None or self._result is not None:
            raise RuntimeError("add() belongs inside `for k in clients:`, once a client")
        self._given = (weight, scale, {name: A.shape[0] for name, (A, _) in factors.items()}), factors
        if self._world.size == 1:
            self._add(weight, scale, factors)

    def head(self):
        return None if self._given is None else self._given[0]

    def clear(self):
        self._given = None

    def exchange(self, every):
        """Sends each layer's factors to its owner, who adds them in the order of the clients."""
        sent, sizes = torch.empty(0), [0] * self._world.size
        if self._given is not None:
            parts = []
            for owner in range(self._world.size):
                here = [t for name, pair in self._given[1].items() if self._owner(name) == owner for t in pair]
                parts += [t.detach().to("cpu", torch.float32).reshape(-1) for t in here]
                sizes[owner] = sum(t.numel() for t in here)
            sent = torch.cat(parts)
        coming = [0 if one is None else sum(d * k for d, k in self._shapes(one[2])) for one in every]
        received = torch.empty(sum(coming))
        all_to_all(received, sent, coming, sizes)
        for one, part in zip(every, received.split(coming), strict=True):
            if one is not None:
                pieces = iter(part.split([d * k for d, k in self._shapes(one[2])]))
                shapes = iter(self._shapes(one[2]))
                pairs = {name: tuple(next(pieces).view(next(shapes)) for _ in "AB") for name in self._mine}
                self._add(one[0], one[1], pairs)

    def result(self):
        """The means, the same bits on every process; each of them calls it. Raises: ValueError for no weight."""
        if self._result is None:
            weights = parallel.all_gather(self._weight)
            if not max(weights) > 0:
                raise ValueError("no client with a weight above 0 was added: the mean is undefined")
            for product in self._mine.values():
                product.divide_(max(weights))
            self._result = {name: self._shared(name) for name in self._sizes}
        return self._result

    def _owner(self, name):
        return list(self._sizes).index(name) % self._world.size

    def _shapes(self, ranks):
        """Of the factors that this process owns, in order, from a client with these ranks."""
        return [shape for name in self._mine for shape in self._pair(name, ranks[name])]

    def _pair(self, name, r):
        d, k = self._sizes[name]
        return (r, k), (d, r)

    def _add(self, weight, scale, factors):
        self._weight += weight
        for name, product in self._mine.items():
            if weight > 0:
                product.add(*factors[name], weight * scale)

    def _shared(self, name):
        """The owner's product, on every process."""
        if self._world.size == 1:
            return self._mine[name]
        owner, (d, k) = self._owner(name), self._sizes[name]
        columns = parallel.broadcast(self._mine[name].columns if name in self._mine else None, owner)
        if name in self._mine:
            tensors = {key: t.contiguous() for key, t in self._mine[name].tensors().items()}
        else:
            shapes = {"full": (d, k)} if columns is None else {"A": (columns, k), "B": (d, columns)}
            tensors = {key: torch.empty(shape, dtype=torch.float64) for key, shape in shapes.items()}
        for key in tensors:
            parallel.broadcast_tensor_(tensors[key], owner)
        return Product.of(tensors)


def _entries(factors):
    return [(name, letter, t) for name, pair in factors.items() for letter, t in zip("AB", pair, strict=True)]


def _as(tensor, like):
    return tensor.to(like.device, like.dtype).contiguous()
