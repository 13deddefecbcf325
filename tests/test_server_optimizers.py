"""Server optimisers: steps by hand, and torch's own optimisers on the pooled batch."""

import copy
import math

import pytest
import torch
from comparing import near, same_bits
from torch.nn import functional as F

from common.before.aggregation import ServerAdam, ServerMomentum, WeightedMean
from common.parallel import Lanes


def make(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(7, 5, generator=generator), "scalar": torch.randn((), generator=generator)}


def mean_of(theta, seed=1):
    mean = WeightedMean(theta, lanes := Lanes(range(4)))
    for k in lanes:
        mean.add({n: t + 0.1 * d for (n, t), d in zip(theta.items(), make(seed + k).values(), strict=True)}, k + 1)
    return mean


@pytest.fixture
def theta():
    return make(0)


def test_no_momentum_and_a_step_of_one_is_fedavg(theta):
    expected = mean_of(theta).result()
    for options in ({}, {"nesterov": True}, {"form": "ema"}):
        server = ServerMomentum(lr=1.0, beta=0.0, **options)
        for _ in range(2):
            assert same_bits(server.step(theta, mean_of(theta).delta()), expected)


D = [0.5, -0.25, 1.0]  # three rounds' deltas of a model of one weight, which starts at 2


def three_steps(server):
    theta, path = {"x": torch.tensor([2.0], dtype=torch.float64)}, []
    for d in D:
        theta = server.step(theta, {"x": torch.tensor([d], dtype=torch.float64)})
        path.append(theta["x"].item())
    return path


@pytest.mark.parametrize(
    "server, expected",
    [
        # v: .5, .2, 1.18
        (ServerMomentum(0.5, 0.9), [2.25, 2.35, 2.94]),
        # ema v: .05, .02, .118
        (ServerMomentum(0.5, 0.9, form="ema"), [2.025, 2.035, 2.094]),
        # Delta + .9 v: .95, -.07, 2.062
        (ServerMomentum(0.5, 0.9, nesterov=True), [2.475, 2.44, 3.471]),
        # .1 Delta + .9 v of ema
        (ServerMomentum(0.5, 0.9, nesterov=True, form="ema"), [2.0475, 2.044, 2.1471]),
    ],
)
def test_three_steps_of_momentum_by_hand(server, expected):
    assert three_steps(server) == pytest.approx(expected, rel=1e-14)


def test_three_steps_of_adam_yogi_and_adagrad_by_hand():
    # b1 = b2 = .5, tau = .5 (v starts at .25), lr = 1; m: .25, 0, .5
    # adam v: .5*.25 + .5*.25 = .25, .125 + .03125 = .15625, .078125 + .5 = .578125
    steps = [0.25 / (0.5 + 0.5), 0.0, 0.5 / (math.sqrt(0.578125) + 0.5)]
    assert three_steps(ServerAdam("adam", 1.0, 0.5, 0.5, 0.5)) == pytest.approx(
        [2 + sum(steps[: i + 1]) for i in range(3)]
    )
    # yogi v: sign(.25 - .25) = 0: .25; .25 - .5*.0625 = .21875; sign(.21875 - 1) = -1: .71875
    steps[2] = 0.5 / (math.sqrt(0.71875) + 0.5)
    assert three_steps(ServerAdam("yogi", 1.0, 0.5, 0.5, 0.5)) == pytest.approx(
        [2 + sum(steps[: i + 1]) for i in range(3)]
    )
    # adagrad v: .5, .5625, 1.5625
    steps = [0.25 / (math.sqrt(0.5) + 0.5), 0.0, 0.5 / (1.25 + 0.5)]
    path = three_steps(ServerAdam("adagrad", 1.0, 0.5, 0.5, 0.5))
    assert path == pytest.approx([2 + sum(steps[: i + 1]) for i in range(3)])


def test_the_ema_form_is_heavy_ball_with_a_smaller_step():
    assert three_steps(ServerMomentum(0.3, 0.8, form="ema")) == pytest.approx(three_steps(ServerMomentum(0.06, 0.8)))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def pooled_and_federated(server, optimizer, rounds=4, lr=0.3):
    """Weights after (a) one full-batch SGD step per client and round with `server`, (b) `optimizer` on the pool."""
    torch.manual_seed(0)
    net = Net().double()
    pool, theta = copy.deepcopy(net), {n: p.detach().clone() for n, p in net.named_parameters()}
    x, y = torch.randn(22, 4, dtype=torch.float64), torch.randint(0, 3, (22,))
    shards = [range(0, 3), range(3, 12), range(12, 13), range(13, 22)]
    steps = optimizer(pool.parameters())
    for _ in range(rounds):
        mean = WeightedMean(theta, lanes := Lanes(range(4)))
        for k in lanes:
            net.load_state_dict(theta)
            local = torch.optim.SGD(net.parameters(), lr=lr)
            local.zero_grad()
            F.cross_entropy(net(x[shards[k]]), y[shards[k]]).backward()
            local.step()
            mean.add({n: p.detach() for n, p in net.named_parameters()}, weight=len(shards[k]))
        theta = server.step(theta, mean.delta()) if server else mean.result()
        steps.zero_grad()
        F.cross_entropy(pool(x), y).backward()
        steps.step()
    return theta, {n: p.detach() for n, p in pool.named_parameters()}


def test_one_full_step_per_client_is_a_step_on_the_pooled_batch():
    assert near(*pooled_and_federated(None, lambda p: torch.optim.SGD(p, lr=0.3)))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form, lr", [("heavy_ball", 0.7), ("ema", 7.0)])
def test_server_momentum_is_torch_sgd_with_momentum_on_the_pooled_batch(nesterov, form, lr):
    server = ServerMomentum(lr, 0.9, nesterov=nesterov, form=form)
    # lr of the pool: server times client
    assert near(
        *pooled_and_federated(server, lambda p: torch.optim.SGD(p, 0.21, momentum=0.9, nesterov=nesterov)), 1e-11
    )


def long_run_adam(parameters, lr, betas, eps, start):
    """torch's Adam as if it had run for long with squared gradients of `start`: its bias correction is 1 then."""
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas, eps=eps)
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.tensor(1e6),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.full_like(p, start),
            }
    return optimizer


def test_server_adam_is_torch_adam_on_the_pooled_batch():
    # Delta = -lr_client g: Adam of g with tau / lr_client, v from its square
    server, lr_client = ServerAdam("adam", 0.05, 0.9, 0.99, 1e-3), 0.3
    tau = 1e-3 / lr_client
    theta, pool = pooled_and_federated(server, lambda p: long_run_adam(p, 0.05, (0.9, 0.99), tau, tau**2))
    assert near(theta, pool, 1e-11)


def test_server_adagrad_without_momentum_is_torch_adagrad():
    server, tau = ServerAdam("adagrad", 0.05, b1=0.0, tau=1e-2), 1e-2 / 0.3
    theta, pool = pooled_and_federated(
        server, lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=tau**2, eps=tau)
    )
    assert near(theta, pool, 1e-11)


def test_yogi_is_adam_while_second_moments_fall_short_and_moves_slowly_when_they_are_large():
    # v > Delta^2: yogi takes off (1 - b2) Delta^2, adam (1 - b2)(v - Delta^2)
    deltas, v = torch.tensor([1e-3], dtype=torch.float64), {}
    for kind in ("adam", "yogi"):
        server = ServerAdam(kind, tau=1.0)
        server.step({"x": torch.zeros(1)}, {"x": deltas})
        v[kind] = server.v["x"].item()
    assert v["yogi"] == pytest.approx(1 - 0.01 * 1e-6, rel=1e-14)
    assert v["adam"] == pytest.approx(0.99 + 0.01 * 1e-6, rel=1e-14)


SERVERS = [lambda: ServerMomentum(0.7, 0.9, nesterov=True)] + [
    lambda kind=kind: ServerAdam(kind) for kind in ("adam", "yogi", "adagrad")
]


@pytest.mark.parametrize("make_server", SERVERS)
def test_a_restored_server_goes_on_with_the_same_bits(theta, make_server):
    deltas = [mean_of(theta, seed).delta() for seed in (1, 2, 3)]
    server, unbroken = make_server(), [theta]
    for i, d in enumerate(deltas):
        if i == 2:
            state = copy.deepcopy(server.state_dict())
        unbroken.append(server.step(unbroken[-1], d))
    assert all(t.dtype == torch.float64 for t in state.values())
    resumed = make_server()
    resumed.load_state_dict(state)
    assert same_bits(resumed.step(unbroken[2], deltas[2]), unbroken[3])
    assert same_bits(resumed.state_dict(), server.state_dict())
    with pytest.raises(ValueError, match="no entry"):
        resumed.load_state_dict({"other.w": torch.zeros(1)})


def test_bad_settings_are_refused():
    for options in ({"lr": 0.0}, {"beta": 1.0}, {"beta": -0.1}, {"form": "other"}):
        with pytest.raises(ValueError):
            ServerMomentum(**options)
    for options in ({"lr": -1.0}, {"tau": 0.0}, {"b1": 1.0}, {"b2": 1.5}, {"kind": "adamw"}):
        with pytest.raises(ValueError):
            ServerAdam(**options)
