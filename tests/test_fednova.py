"""FedNova: effective steps by closed form and by real optimisers; its mean against FedAvg's and by hand."""

import pytest
import torch
from quadratics import Quadratics, near

from common.aggregation import NormalizedMean, WeightedMean, effective_steps
from common.local import client_optimizer, local_steps
from common.parallel import Round
from common.vector import Weights

N = [5.0, 1.0, 3.0, 2.0, 4.0]


def mean_of(theta, clients, a, n):
    mean = NormalizedMean(theta, round := Round(range(len(clients)), n))
    for k in round:
        mean.add(clients[k], a[k])
    return mean


# ---- effective steps


def test_closed_forms():
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


# ---- the mean


def test_equal_a_is_fedavg():
    problem = Quadratics(dtype=torch.float32)
    clients = [problem.local(problem.start, k, 4, 0.05)[0] for k in range(5)]
    plain = WeightedMean(problem.start, round := Round(range(5), N))
    for k in round:
        plain.add(clients[k])
    for a in (1.0, 4.0, 7.3):
        assert near(mean_of(problem.start, clients, [a] * 5, N).delta(), plain.delta(), 1e-15)
        # one client is local training, whatever it did
        assert near(mean_of(problem.start, clients[:1], [a], [3.0]).result(), clients[0], 1e-7)
    for a in (1.0, 4.0):  # powers of two round nothing: fp32 results have the same bits
        assert torch.equal(mean_of(problem.start, clients, [a] * 5, N).result(), plain.result())


def test_two_clients_by_hand():
    # p = 1/4, 3/4; a = 2, 5: tau = 17/4; delta = 17/4 (1/4 [2, 1] / 2 + 3/4 [0, 5] / 5) = 17/4 [1/4, 7/8]
    mean = mean_of(torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 1.0], [1.0, 5.0]]), [2.0, 5.0], [1.0, 3.0])
    assert near(mean.delta(), torch.tensor([17 / 16, 119 / 32]), 1e-15) and mean.result().dtype == torch.float32
    theta = torch.ones(3)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a .* finite number above 0"):
            mean_of(theta, [theta], [bad], [1.0])
