"""Pooled moments: one client is central AdamW, and a plain fp64 loop of the formulas agrees."""

import pytest
import torch
from quadratics import Quadratics, near

from common.aggregation import WeightedMean
from common.client_rows import ClientRows
from common.local import local_steps
from common.rounds import Round
from common.shared_moments import PooledMoments
from common.vector import Weights

LR, DECAY, B1, B2, EPS = 0.05, 0.1, 0.9, 0.999, 1e-8
WEIGHTS = [3.0, 1.0, 2.0]


def draws(H, rounds, clients, seed=5):
    """What is added to a client's minimum in each step: [rounds, clients, H, 5]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rounds, clients, H, 5, generator=draw, dtype=torch.float64)


def federated(quadratics, noise, weights, optimizer=None, start=None, every=1):
    """(theta, moments) after the rounds of `noise`. start: the moments' state."""
    everything = quadratics.weights
    optimizer = optimizer or torch.optim.AdamW(everything.parameters.values(), LR, weight_decay=DECAY, fused=True)
    rows = ClientRows("unused", in_place=True) if every > 1 else None
    moments, theta = PooledMoments(optimizer, everything, rows, every), quadratics.start
    if start:
        moments.load_state_dict(start)
    for t, of_round in enumerate(noise):
        clients = Round(range(len(weights)), weights, followers=list(moments.lasting.values()), number=t)
        mean = WeightedMean(theta, clients)
        for k in clients:
            everything.load(theta)
            moments.load(k)
            local_steps(quadratics.loss(k), [(x,) for x in of_round[k]], everything, optimizer)
            moments.store(k)
            mean.add(everything.theta)
        theta = mean.result()
    return theta, moments


def test_one_client_is_central_adamw():
    quadratics, noise = Quadratics(1), draws(4, 6, 1)
    theta, moments = federated(quadratics, noise, [7.0])
    quadratics.weights.load(quadratics.start)
    central = torch.optim.AdamW(quadratics.weights.parameters.values(), LR, weight_decay=DECAY, fused=True)
    local_steps(quadratics.loss(0), [(x,) for x in noise.reshape(-1, 5)], quadratics.weights, central)
    assert moments.step == 24 and near(theta, quadratics.weights.theta, 1e-12)


def test_pooled_at_one_local_step_is_central_adamw_on_the_pooled_batch():
    quadratics, noise, b2 = Quadratics(3), draws(1, 20, 3), 1 - 1e-7
    everything = quadratics.weights
    start = {"m": torch.zeros(5), "v": torch.ones(5), "step": torch.tensor(10**7)}  # so that (1 - b2) g_k^2 is small
    optimizer = torch.optim.AdamW(everything.parameters.values(), LR, (B1, b2), weight_decay=DECAY, fused=True)
    theta, _ = federated(quadratics, noise, WEIGHTS, optimizer, start)

    central = torch.optim.AdamW([w := quadratics.start.clone()], LR, (B1, b2), weight_decay=DECAY)
    state = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.ones_like(w), "step": torch.tensor(1e7)}
    central.state[w] = state
    for of_round in noise:
        each = [p * quadratics.gradient(k, w - x[0]) for k, (p, x) in enumerate(zip(WEIGHTS, of_round, strict=True))]
        w.grad = sum(each) / sum(WEIGHTS)
        central.step()
    near(theta, w, 1e-6)


def plain(quadratics, noise, weights, every):
    """The formulas in plain fp64."""
    theta, m, v, t = quadratics.start, torch.zeros(5).double(), torch.zeros(5).double(), 0
    p, own = torch.tensor(weights).double() / sum(weights), [(m, v)] * len(weights)
    for i, of_round in enumerate(noise, start=1):
        H, ends = of_round.shape[1], []
        for k, steps in enumerate(of_round):
            x, (m_k, v_k) = theta, own[k]
            for n, added in enumerate(steps, start=1):
                g = quadratics.gradient(k, x - added)
                m_k, v_k = B1 * m_k + (1 - B1) * g, B2 * v_k + (1 - B2) * g * g
                m_hat = m_k / (1 - B1 ** (t + n))
                step = m_hat / ((v_k / (1 - B2 ** (t + n))).sqrt() + EPS)
                x = x - LR * (step + DECAY * x)
            ends.append((x, m_k, v_k))
        theta, m_, v_ = (sum(w * one for w, one in zip(p, column, strict=True)) for column in zip(*ends, strict=True))
        own, t = [(m_k, v_k) for _, m_k, v_k in ends], t + H
        if i % every == 0:
            m, v = pooled(m, v, m_, v_, every * H, (p * p).sum())
            own = [(m, v)] * len(weights)
    return theta


def pooled(m, v, m_, v_, H, q):
    B = ((m_ - B1**H * m) / (1 - B1**H)) ** 2
    A = (v_ - B2**H * v) / (1 - B2**H)
    weights = torch.tensor([B1 ** (H - i) for i in range(1, H + 1)]).double()
    variance = (A - B) / (1 - q * ((weights / weights.sum()) ** 2).sum())
    C = (A - variance + q * variance).clamp_min(0)  # the squared mean and the pooled batch's share of the variance
    return m_, B2**H * v + (1 - B2**H) * C


@pytest.mark.parametrize("H", [1, 8])
def test_pooled_has_the_second_moment_of_the_pooled_batch(H):
    """Gradients of mean 0.1 and variance 1: a mean over clients of mean square 0.1^2 + q, whatever H is."""
    n, p = 40_000, torch.tensor(WEIGHTS).double() / sum(WEIGHTS)
    draw, holder = torch.Generator().manual_seed(H), torch.nn.Module()
    holder.w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))
    moments = PooledMoments(torch.optim.AdamW(holder.parameters(), LR, fused=True), Weights(holder))
    for k in (clients := Round(range(3), WEIGHTS, followers=[moments])):
        moments.load(k)
        m, v = (vector.zero_() for vector in moments.finite(clients))
        for _ in range(H):
            g = 0.1 + torch.randn(n, generator=draw, dtype=torch.float64)
            m.lerp_(g, 1 - B1)
            v.lerp_(g * g, 1 - B2)
        moments.optimizer.state[holder.w]["step"].add_(H)
        clients.counts(True)
    pooled = moments.v / (1 - B2**H)
    assert pooled.mean().item() == pytest.approx(0.01 + (p * p).sum().item(), rel=0.01)


@pytest.mark.parametrize("H, every", [(1, 1), (4, 1), (2, 3)])
def test_a_plain_loop_agrees(H, every):
    quadratics, noise = Quadratics(3), draws(H, 7, 3)
    theta, moments = federated(quadratics, noise, WEIGHTS, every=every)
    near(theta, plain(quadratics, noise, WEIGHTS, every), 1e-10)
    assert [moments.bytes_of(t) for t in range(every)][-1][0] == 2 * 5 * 8 == moments.bytes_of(0)[1]


def test_a_checkpoint_goes_on_with_the_same_bits():
    quadratics, noise = Quadratics(3), draws(2, 4, 3)
    whole, _ = federated(quadratics, noise, WEIGHTS)
    half, moments = federated(quadratics, noise[:2], WEIGHTS)
    state = {name: tensor.clone() for name, tensor in moments.state_dict().items()}
    quadratics.start = half
    again, _ = federated(quadratics, noise[2:], WEIGHTS, start=state)
    assert torch.equal(whole, again)
