"""FedNova: effective steps by closed form and by real optimisers; its mean against FedAvg's, on quadratics."""

import hashlib

import numpy as np
import pytest
import torch
from comparing import near, same_bits
from processes import answers_of, as_rank
from quadratics import Quadratics, flat, unflat

from common import parallel
from common.before.aggregation import NormalizedMean, WeightedMean, effective_steps
from common.before.local import client_optimizer, local_steps
from common.cli import UsageError
from common.parallel import Lanes

H = [1, 4, 10, 25, 2]  # unequal local work
N = [5.0, 1.0, 3.0, 2.0, 4.0]


def mean_of(theta, clients, a, n, ids=None):
    mean = NormalizedMean(theta, lanes := Lanes(ids or range(len(clients))))
    for k in lanes:
        mean.add(clients[k], n[k], a[k])
    return mean


def trained(problem, theta, lr, kind="sgd", mu=0.0):
    return [problem.local(theta, k, H[k], lr, kind, mu=mu)[0] for k in range(len(problem))]


# ---- effective steps


def test_closed_forms():
    for steps in (1, 2, 5, 40):
        assert effective_steps(steps, "sgd") == effective_steps(steps, "sgd", 0.9) == steps
        assert effective_steps(steps, "sgdm", 0.0) == steps
        for rho in (0.3, 0.9, 0.99):
            closed = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
            assert effective_steps(steps, "sgdm", rho) == pytest.approx(closed, rel=1e-13)
        for lr, mu in ((0.1, 1.0), (0.5, 0.01)):
            closed = (1 - (1 - lr * mu) ** steps) / (lr * mu)
            assert effective_steps(steps, "sgd", lr=lr, mu=mu) == pytest.approx(closed, rel=1e-13)
    # two steps by hand: 1, then 1 + 0.5; with a pull of 0.1 * 2 back: 1, then 1 + 0.5 - 0.2
    assert effective_steps(2, "sgdm", 0.5) == 2.5
    assert effective_steps(2, "sgdm", 0.5, lr=0.1, mu=2.0) == pytest.approx(2.3)


@pytest.mark.parametrize("kind", ["sgd", "sgdm"])
@pytest.mark.parametrize("mu", [0.0, 1.5])
def test_a_constant_gradient_moves_the_weights_by_lr_times_a(kind, mu):
    lr = 0.05
    for steps in (1, 3, 20):
        w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = client_optimizer(kind, {"w": w}, lr, momentum=0.8)
        local_steps(lambda batch, w=w: w.sum(), range(steps), {"w": w}, optimizer, mu=mu)
        assert -w.item() / lr == pytest.approx(effective_steps(steps, kind, 0.8, lr, mu), rel=1e-13)


def test_what_has_no_effective_steps_is_refused():
    with pytest.raises(UsageError, match="FedNova with adamw.*use sgd or sgdm"):
        effective_steps(3, "adamw")
    for bad in (
        (0, "sgd"),
        (3, "adam"),
        (3, "sgdm", 1.0),
        (3, "sgdm", -0.1),
        (3, "sgd", 0.0, None, 0.1),
        (3, "sgd", 0.0, 0.1, -1.0),
    ):
        with pytest.raises(ValueError):
            effective_steps(*bad)


# ---- the mean


def test_equal_a_is_fedavg():
    problem = Quadratics(dtype=torch.float32)
    theta = problem.start()
    clients = [problem.local(theta, k, 4, 0.05)[0] for k in range(5)]
    plain = WeightedMean(theta, lanes := Lanes(range(5)))
    for k in lanes:
        plain.add(clients[k], N[k])
    for a in (1.0, 4.0, 7.3):
        assert near(mean_of(theta, clients, [a] * 5, N).delta(), plain.delta(), 1e-15)
    for a in (1.0, 4.0):  # powers of two round nothing: fp32 results have the same bits
        assert same_bits(mean_of(theta, clients, [a] * 5, N).result(), plain.result())
    # one client is local training, whatever it did
    for a in (1.0, 4.0, 7.3):
        assert near(mean_of(theta, clients[:1], [a], [3.0]).result(), clients[0], 1e-7)


def test_two_clients_by_hand():
    theta = {"w": torch.tensor([1.0, 0.0]), "steps": torch.tensor(0)}
    clients = [
        {"w": torch.tensor([3.0, 1.0]), "steps": torch.tensor(2)},
        {"w": torch.tensor([1.0, 5.0]), "steps": torch.tensor(5)},
    ]
    # p = 1/4, 3/4; a = 2, 5: tau = 17/4; delta = 17/4 (1/4 [2, 1] / 2 + 3/4 [0, 5] / 5) = 17/4 [1/4, 7/8]
    mean = mean_of(theta, clients, [2.0, 5.0], [1.0, 3.0])
    assert torch.allclose(mean.delta()["w"], torch.tensor([17 / 16, 119 / 32], dtype=torch.float64), rtol=1e-15)
    assert mean.delta()["steps"] == 2 and mean.result()["w"].dtype == torch.float32


def test_a_plain_loop_agrees_in_any_order():
    draw = torch.Generator().manual_seed(0)
    theta = {"w": torch.randn(7, 5, generator=draw), "b": torch.randn((), generator=draw)}
    clients = [{n: t + torch.randn(t.shape, generator=draw) for n, t in theta.items()} for _ in range(19)]
    n, a = [1.0 + k % 4 for k in range(19)], [1.0 + k * 0.7 for k in range(19)]
    p = [w / sum(n) for w in n]
    tau = sum(x * y for x, y in zip(p, a, strict=True))
    expected = {
        name: tau * sum(p[k] / a[k] * (c[name].double() - t.double()) for k, c in enumerate(clients))
        for name, t in theta.items()
    }
    mean = mean_of(theta, clients, a, n)
    assert near(mean.delta(), expected, 1e-14)
    assert same_bits(mean.delta(), mean_of(theta, clients, a, n, ids=list(range(19))[::-1]).delta())


@pytest.mark.parametrize("kind", ["sgd", "sgdm"])
def test_unequal_work_leads_to_the_optimum_where_fedavg_is_drawn_to_who_works_most(kind):
    # Exact in the limit of small steps only: its distance goes with the learning rate, FedAvg's stays.
    problem, best, rho = Quadratics(), Quadratics().optimum(N), 0.9 if kind == "sgdm" else 0.0
    one = torch.eye(5, dtype=torch.float64)
    away = {"fedavg": [], "fednova": []}
    for lr in (0.004, 0.002):
        lr *= 1.0 if kind == "sgd" else 0.2
        a = [effective_steps(h, kind, rho) for h in H]
        # (w - w_k, momentum) after H_k steps is linear in where it started: thousands of rounds at once
        powers = []
        for k, h in enumerate(H):
            rows = [torch.cat([one - lr * problem.A[k], -lr * rho * one], 1), torch.cat([problem.A[k], rho * one], 1)]
            powers.append(torch.linalg.matrix_power(torch.cat(rows), h)[:5, :5])

        def clients_from(theta, powers=powers):
            return [unflat(w + power @ (flat(theta) - w)) for w, power in zip(problem.target, powers, strict=True)]

        start = unflat(best + 1)
        for ours, real in zip(clients_from(start), trained(problem, start, lr, kind), strict=True):
            assert near(ours, real, 1e-12)
        for method in away:
            theta = problem.start()
            for _ in range(round(12 / lr / (sum(a) / 5))):
                clients = clients_from(theta)
                theta = mean_of(theta, clients, a if method == "fednova" else [1.0] * 5, N).result()
            away[method].append((flat(theta) - best).norm().item())
    assert min(away["fedavg"]) > 0.2 and away["fedavg"][1] > 0.9 * away["fedavg"][0]
    assert away["fednova"][0] < 0.2 * away["fedavg"][0] and away["fednova"][1] < 0.6 * away["fednova"][0]


def test_proximal_terms_count_as_less_work():
    # Under strong proximal terms 25 steps are hardly more than 10: a says so.
    a = [effective_steps(h, "sgd", lr=0.1, mu=5.0) for h in H]
    assert a[3] - a[2] < 0.01 < a[2] - a[1]
    problem = Quadratics()
    clients = trained(problem, problem.start(), 1e-3, mu=2.0)
    exact = [effective_steps(h, "sgd", lr=1e-3, mu=2.0) for h in H]
    gradients = [flat(problem.gradient(k, problem.start())) for k in range(5)]
    for k in range(5):  # to first order, a client has moved by lr a along its gradient
        assert torch.allclose(-flat(clients[k]) / (1e-3 * exact[k]), gradients[k], rtol=0.05, atol=0.02)


def test_bad_clients_are_refused():
    theta = {"w": torch.zeros(2)}
    for a in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a .* finite number above 0"):
            mean_of(theta, [theta], [a], [1.0])
    with pytest.raises(ValueError, match="entries differ"):
        mean_of(theta, [{"b": torch.zeros(2)}], [1.0], [1.0])
    with pytest.raises(ValueError, match="weight"):
        mean_of(theta, [theta], [1.0], [-1.0])
    with pytest.raises(ValueError, match="no client"):
        mean_of(theta, [theta], [1.0], [0.0]).result()


# ---- processes

IDS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23, 6]


def digests():
    def tensors(k):
        draw = np.random.default_rng(k)
        shapes = {"w": (37, 5), "long": (parallel.CHUNK + 77,)}
        return {
            n: torch.tensor(draw.standard_normal(s) * 10 ** draw.uniform(-4, 4, s)).float() for n, s in shapes.items()
        }

    found = []
    for ids in (IDS, IDS[::-1], IDS[:6]):
        mean = mean_of(
            tensors(0), {k: tensors(k) for k in ids}, {k: 1.0 + k / 3 for k in ids}, {k: k for k in ids}, ids
        )
        hashed = hashlib.sha256()
        for t in mean.delta().values():
            hashed.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(hashed.hexdigest())
    return found


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        answers.put((rank, digests()))


def test_processes_and_order_change_no_bit():
    alone = digests()
    assert alone[0] == alone[1] != alone[2]
    for size in (2, 3, 8):
        assert answers_of(size, process) == {rank: alone for rank in range(size)}
