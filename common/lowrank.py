"""Rules to average the clients' LoRA adapters, each with its error measured.

Client k's adapter adds Delta_k = s_k B_k A_k to a layer (see `common.products`). `factors` is a dict
{layer name: (A [r, k], B [d, r])}. The mean of products is not the product of means; what each rule serves:

    svd        Delta = sum p_k s_k B_k A_k, truncated to rank r           the best of rank r (FlexLoRA, Bai et al. 2024)
    naive      mean A, mean B                                             inexact (FedIT, Zhang et al. 2024)
    ffa        A drawn once and never trained, mean B                     exact (FFA-LoRA, Sun et al. 2024)
    stack      base += Delta, then a fresh adapter (A random, B zero)     exact (FLoRA, Wang et al. 2024)
    residual   mean A, mean B, base += Delta - s mean B mean A            exact (FedEx-LoRA, Singhal et al. 2024)
    rolora     trains B in one round and A in the next, the other fixed   exact (RoLoRA, Chen et al. 2024)
    rotate     each client's factors rotated to agree with those that the round began with, then mean A, mean B
                                                                          inexact (FedRot-LoRA, Zhang et al. 2026)
    head       A and B stay as they are, only the head trains             exact; a control

FedRot-LoRA's R_k leaves B_k R_k R_k^T A_k as it is (`common.lowrank.rotated`): the first, third, ... round takes A
nearest to the round's start, the others B. (Its public code counts rounds from 0 and rotates none in the first. Here a
first round aligns A, so that a round from a given adapter is the rule's.)

svd chooses how B A = U S V^T is split between B and A: `common.products.truncate`. naive, residual and rotate serve the
means as they are or, with a split, the same product B A in svd's form.

svd and stack take clients of different ranks. residual could serve their mean exactly too, of zero-padded factors, but
a client of a smaller rank would then begin with another product than the one that the base was corrected for.
"""

import math
from dataclasses import dataclass

import torch

from common import parallel
from common.aggregation import WeightedMean
from common.products import Product, distance, fresh_A, one_thread, truncate
from common.seeding import torch_stream

NEAR = 1e-12  # of a correlation's norm: which rotation where several are best


def rotation(correlation):
    """The rotation R [r, r] that maximises tr(R^T M), M = `correlation` [r, r]: R^T R = I, det R = 1   (Kabsch 1976).

        M = U S V^T,  R = U diag(1, ..., 1, det(U V^T)) V^T

    Where several are best (M has no full rank) it is the one next to I.
    """
    M = correlation.detach().to("cpu", torch.float64)
    one = torch.eye(len(M), dtype=torch.float64)
    norm = torch.linalg.vector_norm(M)
    with one_thread():
        U, _, Vh = torch.linalg.svd((M / norm if norm else M) + NEAR * one)
        signs = torch.ones(len(M), dtype=torch.float64)
        signs[-1] = torch.linalg.det(U @ Vh).sign()
        return U * signs @ Vh


def rotated(A, B, reference, letter="A"):
    """(R^T A, B R), R the `rotation` that takes the factor `letter` nearest to the reference's, in A's and B's dtype.

        A:  min_R ||R^T A - A_ref||_F,  M = A A_ref^T          B:  min_R ||B R - B_ref||_F,  M = B^T B_ref

    FedRot-LoRA (Zhang et al. 2026, arXiv 2602.23638, from summaries of the paper and its public code): the reference
    are the factors that the server sent, rounds align A and B in turn (`common.lowrank`).

    Args: A [r, k], B [d, r]; reference: (A_ref [r, k], B_ref [d, r]); letter: "A" or "B".
    """
    a, b, ref_a, ref_b = (t.detach().to("cpu", torch.float64) for t in (A, B, *reference))
    with one_thread():
        R = rotation(a @ ref_a.T if letter == "A" else b.T @ ref_b)
        return (R.T @ a).to(A), (b @ R).to(B)


MIXED_RANKS = ("svd", "stack")  # the rules that take clients of different ranks and scales


def trained_factors(rule, round):
    """Which factors a round (from 0) trains: "A", "B", both or none.

    rolora begins with B: at B = 0 the gradient of A is zero, and a round of A would be lost.
    """
    if rule == "rolora":
        return ("B",) if round % 2 == 0 else ("A",)
    return {"head": (), "ffa": ("B",)}.get(rule, ("A", "B"))


@dataclass
class Served:
    """What a rule serves after a round.

    factors: {layer: (A, B)}; head [h], where the round has one; updates: {layer: `Product`} to add to the base weights
    (stack and residual; else empty); error: ||served - mean(BA)|| / ||mean(BA)|| over all layers, of the factors as
    they are rounded and of `updates` before they are; norm: ||mean(BA)|| over all layers.
    """

    factors: dict
    head: torch.Tensor | None
    updates: dict
    error: float
    norm: float


class AdapterMean:
    """One round's adapters, averaged by one of the rules (see the top of this module).

        mean = AdapterMean("svd", factors, scale, clients, seed)
        for k in clients:
            mean.add(train(k))
        served = mean.result()

    The same bits for any number of processes. Memory: of the clients' factors at most min(d, k) columns for each layer
    (see `Product`), whatever their number.

    Args:
        rule: one of `common.cli.RULES`.
        factors: {layer: (A, B)} that the round began with, not to be changed while clients are added.
        scale: their s, and of what is served where `new_scale` is not given.
        clients: `common.rounds.Round`.
        seed: for the random rows that a rule may need.
        rank, new_scale: of the adapter that svd serves (rank: of stack's fresh one too; default: of `factors`).
        split: of the singular values that svd serves (default: "us") and the rules of `common.cli.RESPLIT` (none).
        head: the vector [h] of the head's weights that the round began with, whose mean is served beside the adapter.
        largest: rank of a client, with several processes; by default that of `factors`.
    """

    def __init__(
        self, rule, factors, scale, clients, seed=0, rank=None, new_scale=None, split=None, head=None, largest=None
    ):
        self.rule, self.factors, self.scale, self.clients = rule, dict(factors), scale, clients
        self.seed, self.split, self.new_scale = seed, split, scale if new_scale is None else new_scale
        begun = max(len(A) for A, _ in self.factors.values())
        self.rank = rank or begun
        self._mean = None if rule in MIXED_RANKS else WeightedMean(_vector(self.factors), clients)
        self._head = None if head is None else WeightedMean(head, clients)
        self._products = _ProductMeans(clients, self.factors, largest or begun)

    def add(self, factors, head=None, scale=None):
        """Adds the client that the round is at. Returns False if it is left out: something is not finite.

        Args: factors: {layer: (A, B)}, what the rule does not train as the round began with it; head: its vector [h],
            where the round has one; scale: its s (default: what the round began with), one for all clients but for
            the rules of `MIXED_RANKS`.
        """
        heads = () if self._head is None else (head,)
        if not self.clients.counts((factors, head), *(t for pair in factors.values() for t in pair), *heads):
            return False
        if self._mean is not None:
            self._mean.add(_vector(self._aligned(factors) if self.rule == "rotate" else factors))
        for head in heads:
            self._head.add(head)
        self._products.add(factors, self.scale if scale is None else scale)
        return True

    def result(self):
        """What is served: a `Served`. With several processes every one must call it.

        Raises: ValueError when no client with a weight above 0 was added.
        """
        mean = None if self._mean is None else self._paired(self._mean.result())
        mine = {name: self._layer(name, target, mean) for name, target in self._products.result().items()}
        merged = {name: layer for part in parallel.all_gather(mine) for name, layer in part.items()}
        pairs, updates, missed, norms = zip(*(merged[name] for name in self.factors), strict=True)
        norm = math.hypot(*norms)
        return Served(
            factors={
                name: tuple(t.to(A.device) for t in pair)
                for (name, (A, _)), pair in zip(self.factors.items(), pairs, strict=True)
            },
            head=None if self._head is None else self._head.result(),
            updates={name: update for name, update in zip(self.factors, updates, strict=True) if update is not None},
            error=math.hypot(*missed) / norm if norm else 0.0,
            norm=norm,
        )

    def _aligned(self, factors):
        """The factors, each layer's rotated to agree with those that the round began with."""
        letter, starts = "AB"[self.clients.number % 2], self.factors
        return {name: rotated(*pair, starts[name], letter) for name, pair in factors.items()}

    def _paired(self, mean):
        """{layer: (A, B)} of a mean of vectors."""
        pieces = iter(mean.split([t.numel() for pair in self.factors.values() for t in pair]))
        return {name: tuple(next(pieces).view(t.shape).clone() for t in pair) for name, pair in self.factors.items()}

    def _layer(self, name, target, mean):
        """What a layer serves in the place of its mean of products `target`: (A, B) on the CPU, the `Product` that is
        added to the base or None, ||served - target||, ||target||."""
        (A, B), update = self.factors[name], None
        if self.rule == "svd":
            draws = self._stream("missing directions", name)
            new_A, new_B = truncate(target, self.rank, self.new_scale, self.split or "us", draws)
        elif self.rule == "stack":
            new_A = fresh_A(self.rank, A.shape[1], self._stream("fresh adapter", name))
            new_B, update = torch.zeros(len(B), self.rank), target
        else:
            new_A, new_B = mean[name]
            if self.split:
                product, draws = Product(*target.shape).add(new_A, new_B, self.new_scale), self._stream("split", name)
                new_A, new_B = truncate(product, len(A), self.new_scale, self.split, draws)
        pair = tuple(new.to("cpu", old.dtype).contiguous() for new, old in ((new_A, A), (new_B, B)))
        served = Product(*target.shape).add(*pair, self.new_scale)
        if self.rule == "residual":
            update = Product(*target.shape).add_product(target).add(*pair, -self.new_scale)
        if update is not None:
            served.add_product(update)
        return pair, update, distance(served, target), target.norm()

    def _stream(self, purpose, name):
        return torch_stream(self.seed, f"lowrank: {purpose} of {name}", self.clients.number)


class _ProductMeans:
    """{layer: weighted mean of the clients' products}, added in the order of the clients; every layer has one process.

    An accumulator of the round's exchanges, as `common.rounds.OrderedSum`. Args: rank: the largest of a client.
    """

    vectors, dtype = 1, torch.float32

    def __init__(self, clients, factors, rank):
        self._clients, self._rank, self._weight, size = clients, rank, 0.0, clients.world.size
        self._sizes = {name: (len(B), A.shape[1]) for name, (A, B) in factors.items()}  # (d, k)
        self._room = {name: rank * (d + k) for name, (d, k) in self._sizes.items()}
        self._layers = [list(factors)[j::size] for j in range(size)]  # of each process
        self.lengths = [sum(self._room[name] for name in layers) for layers in self._layers]
        self._mine = self._layers[clients.world.rank]
        self._products = {name: Product(*self._sizes[name]) for name in self._mine}
        clients.register(self)

    def add(self, factors, scale):
        self._clients.take_turn(self)
        if self._clients.world.size == 1:
            self._add(factors, self._clients.weight, scale)
            return
        rank = len(next(iter(factors.values()))[0])
        if rank > self._rank:
            raise ValueError(f"a client's rank {rank} is above the largest, {self._rank}")
        message, end = torch.zeros(sum(self.lengths)), 0
        for name in (name for layers in self._layers for name in layers):
            flat = torch.cat([t.detach().reshape(-1) for t in factors[name]])
            message[end : end + len(flat)] = flat
            end += self._room[name]
        self._clients.exchange(self, (self._clients.weight, scale, rank), [message])

    def take(self, numbers, pieces):
        weight, scale, r = numbers
        factors = {}
        for name, piece in zip(self._mine, pieces[0].split([self._room[name] for name in self._mine]), strict=True):
            d, k = self._sizes[name]
            A, B, _ = piece.split([int(r) * k, int(r) * d, self._room[name] - int(r) * (d + k)])
            factors[name] = A.view(-1, k), B.view(d, -1)
        self._add(factors, weight, scale)

    def _add(self, factors, weight, scale):
        self._weight += weight
        for name, product in self._products.items():
            if weight > 0:
                product.add(*factors[name], weight * scale)

    def close(self):
        """Nothing to let go of."""

    def result(self):
        """This process's layers. Raises: ValueError for no weight."""
        if not self._weight > 0:
            raise ValueError("no client with a weight above 0 was added: the mean is undefined")
        return {name: product.divide_(self._weight) for name, product in self._products.items()}


def _vector(factors):
    return torch.cat([t.detach().reshape(-1) for pair in factors.values() for t in pair])
