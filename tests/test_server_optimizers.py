"""Server optimisers against torch's own on the pooled batch; their state."""

import copy
from functools import partial

import pytest
import torch
from quadratics import near
from torch.nn import functional as F

from common.aggregation import ServerAdam, ServerMomentum, WeightedMean
from common.rounds import Round
from common.vector import Weights


def vector(seed):
    return torch.randn(36, generator=torch.Generator().manual_seed(seed))


def mean_of(theta, seed=1):
    mean = WeightedMean(theta, round := Round(range(4), [1, 2, 3, 4]))
    for k in round:
        mean.add(theta + 0.1 * vector(seed + k))
    return mean


def pooled_and_federated(server, optimizer, rounds=4, lr=0.3):
    """Weights after (a) one full-batch SGD step per client and round with `server`, (b) `optimizer` on the pool."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    pool, weights = copy.deepcopy(net), Weights(net)
    theta = weights.snapshot()
    x, y = torch.randn(22, 4, dtype=torch.float64), torch.randint(0, 3, (22,))
    shards = [range(0, 3), range(3, 12), range(12, 13), range(13, 22)]
    steps = optimizer(pool.parameters())
    for _ in range(rounds):
        mean = WeightedMean(theta, round := Round(range(4), list(map(len, shards))))
        for k in round:
            weights.load(theta)
            local = torch.optim.SGD(net.parameters(), lr=lr)
            local.zero_grad()
            F.cross_entropy(net(x[shards[k]]), y[shards[k]]).backward()
            local.step()
            mean.add(weights.theta)
        theta = server.step(theta, mean.delta())
        steps.zero_grad()
        F.cross_entropy(pool(x), y).backward()
        steps.step()
    return theta, torch.cat([p.detach().flatten() for p in pool.parameters()])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form, lr", [("heavy_ball", 0.7), ("ema", 7.0)])
def test_server_momentum_is_torch_sgd_with_momentum_on_the_pooled_batch(nesterov, form, lr):
    server = ServerMomentum(lr, 0.9, nesterov=nesterov, form=form)
    # lr of the pool: server times client
    pool = pooled_and_federated(server, lambda p: torch.optim.SGD(p, 0.21, momentum=0.9, nesterov=nesterov))
    assert near(*pool, 1e-11)


def test_server_adam_is_torch_adam_on_the_pooled_batch():
    # Delta = -lr_client g: Adam of g with tau / lr_client, v from its square
    server, tau = ServerAdam(0.05, 0.9, 0.99, 1e-3), 1e-3 / 0.3

    def long_run_adam(parameters):
        """torch's Adam as if it had run for long with squared gradients of tau^2: its bias correction is 1 then."""
        optimizer = torch.optim.Adam(parameters, lr=0.05, betas=(0.9, 0.99), eps=tau)
        for p in optimizer.param_groups[0]["params"]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.full_like(p, tau**2)}
            optimizer.state[p] = {"step": torch.tensor(1e6), **moments}
        return optimizer

    assert near(*pooled_and_federated(server, long_run_adam), 1e-11)


def test_server_adam_with_bias_correction_is_torch_adam_from_its_start():
    server = ServerAdam(0.05, 0.9, 0.99, 1e-3, bias_correction=True)
    assert near(*pooled_and_federated(server, lambda p: torch.optim.Adam(p, 0.05, (0.9, 0.99), eps=1e-3 / 0.3)), 1e-11)


# ---- state and settings


@pytest.mark.parametrize("make", [ServerMomentum, ServerAdam, partial(ServerAdam, bias_correction=True)])
def test_a_restored_server_goes_on_with_the_same_bits(make):
    deltas = [mean_of(vector(0), seed).delta() for seed in (1, 2, 3)]
    server, resumed, thetas = make(), make(), [vector(0)]
    resumed.load_state_dict(server.state_dict())  # nothing yet
    for i, d in enumerate(deltas):
        if i == 2:
            resumed.load_state_dict(server.state_dict())  # copies: the next step does not change them
        thetas.append(server.step(thetas[-1], d))
    assert torch.equal(resumed.step(thetas[2], deltas[2]), thetas[3])
    assert all(tensor.dtype == torch.float64 for tensor in server.state_dict().values())


def test_bad_settings_are_refused():
    for options in ({"lr": 0.0}, {"beta": 1.0}, {"beta": -0.1}, {"form": "other"}):
        with pytest.raises(ValueError):
            ServerMomentum(**options)
    for options in ({"lr": -1.0}, {"tau": 0.0}, {"b1": 1.0}, {"b2": 1.5}):
        with pytest.raises(ValueError):
            ServerAdam(**options)
