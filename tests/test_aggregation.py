"""Identities and hand-sized numbers of the means over clients: FedAvg, entropy and Fisher weighting, FedNova."""

import gc
import math
import weakref

import pytest
import torch
from quadratics import near

from common.aggregation import (
    NormalizedMean,
    PrecisionWeightedMean,
    ServerMomentum,
    WeightedMean,
    apply_delta,
    effective_steps,
)
from common.local import client_optimizer, local_steps
from common.lowrank import AdapterMean
from common.rounds import Follower, LeftOut, Round
from common.scaffold import ControlVariates
from common.vector import Weights, is_finite

N = [5.0, 1.0, 3.0, 2.0]  # example counts
SIZE = 70_001  # more than a piece of a sum, and odd


def vector(seed, dtype=torch.float32):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clients_of(theta, count=4, scale=0.1):
    return [theta + scale * vector(100 + k).to(theta) for k in range(count)]


def mean_of(theta, clients, weights=N, log_weights=None):
    mean = WeightedMean(theta, round := Round(range(len(clients)), weights))
    for k in round:
        mean.add(clients[k], log_weights[k] if log_weights else 0.0)
    return mean


def precise_mean_of(theta, clients, precisions, weights=N, **options):
    mean = PrecisionWeightedMean(theta, round := Round(range(len(clients)), weights), **options)
    for k in round:
        mean.add(clients[k], precisions[k])
    return mean


@pytest.fixture
def theta():
    return vector(0)


@pytest.fixture
def clients(theta):
    return clients_of(theta)


# ---- theta as one vector


def test_weights_are_one_vector_and_the_model_its_views():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False), torch.nn.Linear(2, 4))
    model[2].weight.requires_grad_(False)
    model.tied = model[0].weight
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = Weights(model)
    assert list(weights.parameters) == ["tied", "0.bias", "1.weight", "2.bias"] and weights.size == 12 + 4 + 8 + 4
    assert all(torch.equal(view, before[name]) for name, view in weights.named(weights.theta).items())
    start = weights.snapshot()
    model(torch.ones(2, 3)).sum().backward()
    torch.optim.AdamW(weights.parameters.values(), lr=0.1, fused=True).step()
    assert torch.equal(weights.vector({n: p.detach() for n, p in weights.parameters.items()}), weights.theta)
    assert not torch.equal(weights.theta, start)
    weights.load(start)
    assert torch.equal(model[0].bias, before["0.bias"]) and torch.equal(model[2].weight, before["2.weight"])
    with pytest.raises(ValueError, match="0.bias"):
        weights.vector({**weights.named(start), "0.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match="one dtype"):
        Weights(torch.nn.Linear(2, 2).requires_grad_(False))


def test_finite(theta):
    for bad in (math.nan, math.inf, -math.inf):
        assert is_finite(theta, theta[:0])
        assert not is_finite(theta, torch.tensor([0.0, bad]))


# ---- FedAvg


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_plain_loop_in_fp64_agrees(dtype):
    theta = vector(0, dtype)
    clients = clients_of(theta, 11)
    n = [float(k % 4) for k in range(11)]  # some count nothing
    kept = [c.clone() for c in (theta, *clients)]
    total = torch.zeros(SIZE, dtype=torch.float64)
    for c, w in zip(clients, n, strict=True):
        total += w * (c.double() - theta.double())
    mean = mean_of(theta, clients, n)
    near(mean.delta(), total / sum(n), 1e-14)
    assert torch.equal(mean.result(), (theta.double() + total / sum(n)).to(dtype))  # rounded once
    assert all(torch.equal(a, b) for a, b in zip(kept, (theta, *clients), strict=True))  # nothing given is changed


def test_the_servers_rate_scales_the_mean_difference_and_one_is_the_mean(theta, clients):
    mean = mean_of(theta, clients)
    for rate in (0.5, 1.0, 1.7):
        near(mean.result(server_lr=rate), theta.double() + rate * (mean.result().double() - theta.double()), 2e-6)
        assert torch.equal(mean.result(server_lr=rate), ServerMomentum(rate, 0.0).step(theta, mean.delta()))


def test_elements_that_no_client_changed_keep_their_bits(theta):
    theta[:3] = torch.tensor([-0.0, 1e-40, 3.4e38])
    clients = clients_of(theta)
    for c in clients:
        c[:1000] = theta[:1000]
    result = mean_of(theta, clients).result()
    assert torch.equal(result[:1000].view(torch.int32), theta[:1000].view(torch.int32))
    assert torch.equal(apply_delta(theta, torch.zeros(SIZE).double()).view(torch.int32), theta.view(torch.int32))


class Sends(Follower):
    """Clients send a number of their own: 1 of client 0, `second` of client 1."""

    def __init__(self, second):
        self.numbers, self.seen = [torch.ones(1), torch.tensor([second])], []
        self.open_round = lambda clients, theta: self.seen.append("open")
        self.finite = lambda clients: (self.numbers[clients.current],)
        self.accept = lambda clients, theta_k: self.seen.append(theta_k.sum())
        self.close_round = lambda clients: self.seen.append(clients.left_out)


def test_what_is_not_finite_is_left_out_and_named(theta, clients):
    expected = mean_of(theta, [clients[0], clients[1], clients[3]], [5.0, 1.0, 2.0]).result()
    clients[2][7] = math.nan
    mean = WeightedMean(theta, round := Round([3, 2, 1, 0], N))
    assert [mean.add(clients[k]) for k in round] == [True, True, False, True]
    assert round.left_out == [2] and torch.equal(mean.result(), expected)
    # so too for an entropy or a precision that is no number
    mean = WeightedMean(theta, round := Round([0, 1]))
    assert [mean.add(clients[k], log_weight=math.nan if k else 0.0) for k in round] == [True, False]
    precise = PrecisionWeightedMean(theta, round := Round([0, 1]))
    assert [precise.add(clients[k], theta.square() / (1 - k)) for k in round] == [True, False]
    # for what else a client sends, and in every mean: only who counts is handed on
    for sent, scale in ((-math.inf, 1.0), (1.0, math.nan)):
        follower = Sends(sent)
        first, second = (WeightedMean(theta, round) for round in [Round([0, 1], followers=[follower])] * 2)
        for k in first.clients:
            first.add(clients[k])
            second.add(clients[k] * (scale if k else 1.0))
        assert follower.seen == ["open", clients[0].sum(), [1]]
    with pytest.raises(LeftOut, match=r"round 3: updates of 2 of 3 clients are not finite \(clients 1, 2\): lower"):
        mean = WeightedMean(theta, round := Round([0, 1, 2], number=2))
        for k in round:
            mean.add(theta * (math.nan if k else 1.0))


def test_bad_clients_are_refused(theta, clients):
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight"):
            mean_of(theta, clients, [1.0, bad, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"\(70000,\)"):
        mean_of(theta, [clients[0][1:]])
    with pytest.raises(ValueError, match="undefined"):
        mean_of(theta, clients, [0.0] * 4).result()
    mean = WeightedMean(theta, round := Round([0, 1]))
    with pytest.raises(RuntimeError, match="belongs inside"):
        mean.add(clients[0])
    for k in round:
        mean.add(clients[k])
        with pytest.raises(RuntimeError, match="once a client"):
            mean.add(clients[k])
    with pytest.raises(ValueError, match="twice"):
        Round([1, 2, 1])


# ---- entropy weighting


@pytest.mark.parametrize("temperature, prior", [(1.0, [1.0] * 4), (0.3, N), (20.0, N)])
def test_entropy_weights_are_a_softmax(theta, clients, temperature, prior):
    entropies = [5.1, 4.9, 5.6, 5.0]
    alpha = torch.tensor(prior, dtype=torch.float64).log() - torch.tensor(entropies, dtype=torch.float64) / temperature
    alpha = alpha.softmax(0)
    expected = sum(a * (c.double() - theta.double()) for a, c in zip(alpha, clients, strict=True))
    logs = [-h / temperature for h in entropies]
    near(mean_of(theta, clients, prior, logs).delta(), expected, 1e-13)


def test_only_differences_of_exponents_count_however_large_they_are(theta, clients):
    assert torch.equal(mean_of(theta, clients, N, [0.0] * 4).result(), mean_of(theta, clients).result())
    assert torch.equal(mean_of(theta, clients[:2], [1, 0], [0.0, 1e4]).delta(), mean_of(theta, clients[:1]).delta())
    expected = mean_of(theta, clients, N, [0.0, 1.0, 2.0, -1.0]).delta()
    for shift in (5000.0, -5000.0):
        near(mean_of(theta, clients, N, [shift, shift + 1, shift + 2, shift - 1]).delta(), expected)


# ---- Fisher weighting


def fishers(count=4):
    return [vector(200 + k).square() for k in range(count)]


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_plain_loop_in_fp64_agrees_with_the_fisher_mean(theta, damping):
    clients, precisions = clients_of(theta, 11), fishers(11)
    n = [1.0 + k % 4 for k in range(11)]
    for f in precisions:
        f[20:40] = 0  # denominator zero where the damping is
    top, bottom = torch.zeros(SIZE).double(), torch.zeros(SIZE).double()
    for c, f, w in zip(clients, precisions, n, strict=True):
        damped = f.double() + damping * f.double().mean()
        top += w * damped * (c.double() - theta.double())
        bottom += w * damped
    expected = torch.where(bottom > 0, top / bottom, mean_of(theta, clients, n).delta())
    mean = precise_mean_of(theta, clients, precisions, n, damping=damping)
    near(mean.delta(), expected, 1e-13)
    stacked = torch.stack(clients)  # every coordinate lies within the clients' range
    assert (mean.result() >= stacked.amin(0)).all() and (mean.result() <= stacked.amax(0)).all()


# ---- FedNova


def test_effective_steps():
    for steps in (1, 2, 5, 40):
        assert effective_steps(steps, "sgd") == effective_steps(steps, "sgdm", 0.0) == steps
        for rho in (0.3, 0.9, 0.99):  # the steps' weights, summed one by one
            added = sum(sum(rho**i for i in range(j)) for j in range(1, steps + 1))
            assert effective_steps(steps, "sgdm", rho) == pytest.approx(added, rel=1e-11)
    assert effective_steps(2, "sgdm", 0.5) == 2.5  # by hand: 1, then 1 + 0.5
    with pytest.raises(ValueError, match="FedNova with adamw: a is defined for sgd and sgdm only"):
        effective_steps(3, "adamw")


@pytest.mark.parametrize("kind", ["sgd", "sgdm"])
def test_under_a_constant_gradient_the_weights_move_by_the_rate_times_a(kind):
    for steps in (1, 2, 7):
        weights = Weights(None, {"w": (w := torch.nn.Parameter(torch.zeros(1).double()))})
        local_steps(w.sum, [()] * steps, weights, client_optimizer(kind, weights.parameters, 0.1, 0.9))
        assert w.item() == pytest.approx(-0.1 * effective_steps(steps, kind, 0.9), rel=1e-12)


def test_fednova_by_hand():
    # p = 1/4, 3/4; a = 2, 5: tau = 17/4; delta = 17/4 (1/4 [2, 1] / 2 + 3/4 [0, 5] / 5) = 17/4 [1/4, 7/8]
    mean = NormalizedMean(torch.tensor([1.0, 0.0]), round := Round(range(2), [1.0, 3.0]))
    for k in round:
        mean.add(torch.tensor([[3.0, 1.0], [1.0, 5.0]])[k], [2.0, 5.0][k])
    assert near(mean.delta(), torch.tensor([17 / 16, 119 / 32]), 1e-15) and mean.result().dtype == torch.float32
    with pytest.raises(ValueError, match="a 0.0 is not a finite number above 0"):
        mean.add(torch.ones(2), 0.0)


# ---- memory


def test_what_a_round_held_is_freed_with_it_and_waits_for_no_garbage_collector(theta, clients, tmp_path):
    """A mean that a cycle keeps is six vectors [n] a round until Python looks for cycles: gigabytes, or a GPU's."""
    pair = {"layer": (vector(1)[:12].view(2, 6), vector(2)[:8].view(4, 2))}
    control = ControlVariates(theta, 2, tmp_path)
    gc.collect()
    gc.disable()
    try:
        round = Round(range(2), followers=[control])
        rules = [AdapterMean(name, pair, 1.0, round) for name in ("svd", "residual")]
        means = [WeightedMean(theta, round), PrecisionWeightedMean(theta, round), WeightedMean(theta, round)]
        for k in round:
            control.offer(k, theta)
            for mean, more in zip(means, ([], [theta.abs()], []), strict=True):
                mean.add(clients[k], *more)
            for rule in rules:
                rule.add(pair)
        for asked in (*means[:2], *rules):
            asked.result()
        gone = [weakref.ref(thing) for thing in (round, *means, *rules)]
        del round, rules, means, asked, mean, rule
        assert [ref() for ref in gone] == [None] * 6
    finally:
        gc.enable()
