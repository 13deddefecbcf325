"""Identities and hand-sized numbers of the means: FedAvg, entropy weighting, Fisher weighting."""

import copy
import math

import pytest
import torch
from comparing import near, same_bits

from common.before.aggregation import (
    PrecisionWeightedMean,
    ServerAdam,
    ServerMomentum,
    WeightedMean,
    apply_delta,
    entropy_log_weight,
    finite,
)
from common.parallel import Lanes

N = [5.0, 1.0, 3.0, 2.0]  # example counts


def make(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (7, 5), "b": (5,), "scalar": (), "none": (0, 3)}
    return {n: (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for n, s in shapes.items()}


def clients_of(theta, count=4, scale=0.1):
    return [
        {n: t + scale * d for (n, t), d in zip(theta.items(), make(100 + k).values(), strict=True)}
        for k in range(count)
    ]


def mean_of(theta, clients, weights=N, log_weights=None, ids=None):
    mean = WeightedMean(theta, lanes := Lanes(ids or range(len(clients))))
    for k in lanes:
        mean.add(clients[k], weights[k], log_weights[k] if log_weights else 0.0)
    return mean


def precise_mean_of(theta, clients, precisions, weights=N, **options):
    mean = PrecisionWeightedMean(theta, lanes := Lanes(range(len(clients))), **options)
    for k in lanes:
        mean.add(clients[k], weights[k], precisions[k])
    return mean


@pytest.fixture
def theta():
    return make(0)


@pytest.fixture
def clients(theta):
    return clients_of(theta)


# ---- FedAvg


def test_one_client_is_local_training(theta, clients):
    for weight in (1.0, 3.0, 0.1, 1e9):
        assert same_bits(mean_of(theta, clients[2:3], [weight]).result(), clients[2])


def test_equal_clients_are_that_client(theta, clients):
    assert same_bits(mean_of(theta, [clients[1]] * 11, [0.3 * k + 0.1 for k in range(11)]).result(), clients[1])


def test_a_plain_loop_in_fp64_agrees(theta):
    clients = clients_of(theta, 19)
    n = [1.0 + 3 * (k % 5) for k in range(19)]
    mean = mean_of(theta, clients, n)
    plain = {
        name: sum(w * (c[name].double() - t.double()) for c, w in zip(clients, n, strict=True)) / sum(n)
        for name, t in theta.items()
    }
    assert near(mean.delta(), plain, 1e-14)
    assert same_bits(mean.result(), {name: (t.double() + mean.delta()[name]).float() for name, t in theta.items()})
    assert all(t.dtype == torch.float64 for t in mean.delta().values())


def test_the_order_of_clients_changes_nothing(theta):
    clients, n = clients_of(theta, 11, scale=100.0), [1.0 + k / 3 for k in range(11)]
    a = mean_of(theta, clients, n).delta()
    assert same_bits(a, mean_of(theta, clients, n, ids=[4, 10, 0, 7, 1, 9, 3, 2, 8, 6, 5]).delta())


def test_entries_that_no_client_changed_keep_their_bits():
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3.4e38, 1 / 3, -1.0])
    theta = {"odd": odd, "w": torch.ones(3)}
    clients = [{"odd": odd.clone(), "w": torch.rand(3)} for _ in range(4)]
    result = mean_of(theta, clients).result()
    assert same_bits({"odd": result["odd"]}, {"odd": odd})
    assert not torch.equal(result["w"], theta["w"])
    weighted = precise_mean_of(theta, clients, [{"odd": torch.rand(7), "w": torch.rand(3)}] * 4).result()
    assert same_bits({"odd": weighted["odd"]}, {"odd": odd})
    for server in (ServerMomentum(0.7, 0.9, nesterov=True), ServerAdam()):
        stepped = server.step(theta, mean_of(theta, clients).delta())
        assert same_bits({"odd": stepped["odd"]}, {"odd": odd})


def test_integer_buffers_are_copied_and_float_buffers_averaged():
    theta = {"running_mean": torch.zeros(2), "batches": torch.tensor(7), "mask": torch.tensor([True, False])}
    clients = [
        {
            "running_mean": torch.full((2,), float(k)),
            "batches": torch.tensor(10 + k),
            "mask": torch.tensor([k > 0, True]),
        }
        for k in range(4)
    ]
    for mean in (mean_of(theta, clients, [1.0] * 4), precise_mean_of(theta, clients, [{}] * 4, [1.0] * 4)):
        expected = {**clients[0], "running_mean": torch.full((2,), 1.5)}
        assert same_bits(mean.result(), expected)
        assert same_bits(ServerMomentum(1.0, 0.0).step(theta, mean.delta()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_averaged_in_fp64_and_rounded_once(dtype):
    theta = make(0, dtype=dtype)
    clients = [make(k, dtype=dtype) for k in (1, 2, 3, 4)]
    exact = {n: sum(p * c[n].double() for p, c in zip(N, clients, strict=True)) / sum(N) for n in theta}
    result = mean_of(theta, clients).result()
    assert near(result, {n: t.to(dtype) for n, t in exact.items()}, 1e-14 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_that_is_given_is_changed(dtype):
    theta = make(0, dtype=dtype)
    clients = [{n: t + 1 for n, t in theta.items()} for _ in range(4)]
    precisions = [{n: t.square() for n, t in theta.items()} for _ in range(4)]
    given = (theta, clients, precisions)
    before = copy.deepcopy(given)
    delta = mean_of(theta, clients).delta()
    precise_mean_of(theta, clients, precisions, normalize=True).result()
    for server in (ServerMomentum(), ServerAdam()):
        kept = copy.deepcopy(delta)
        new = server.step(theta, delta)
        assert same_bits(kept, delta)
        state = copy.deepcopy(server.state_dict())
        for t in new.values():
            t.add_(1)  # the new theta shares memory with nothing
        assert same_bits(server.state_dict(), state)
    for a, b in zip(given[1] + given[2] + [theta], before[1] + before[2] + [before[0]], strict=True):
        assert same_bits(a, b)


def test_non_contiguous_weights(theta, clients):
    turned = [{**c, "w": c["w"].T.contiguous().T} for c in clients]
    assert not turned[0]["w"].is_contiguous()
    expected = mean_of(theta, clients).result()
    assert same_bits(mean_of({**theta, "w": theta["w"].T.contiguous().T}, turned).result(), expected)


def test_a_client_of_weight_zero_counts_for_nothing(theta, clients):
    with_zero = mean_of(theta, clients, [5.0, 0.0, 3.0, 2.0], log_weights=[0.0, 1e6, 0.0, 0.0]).delta()
    without = mean_of(theta, [clients[k] for k in (0, 2, 3)], [5.0, 3.0, 2.0]).delta()
    assert near(with_zero, without, 1e-15)


def test_bad_clients_are_refused(theta, clients):
    for weight, log_weight in [(-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.inf), (1.0, math.nan)]:
        with pytest.raises(ValueError, match="weight"):
            mean_of(theta, clients[:1], [weight], [log_weight])
    with pytest.raises(ValueError, match="entries differ.*: w$"):
        mean_of(theta, [{n: t for n, t in clients[0].items() if n != "w"}])
    with pytest.raises(ValueError, match="shape"):
        mean_of(theta, [{**clients[0], "w": torch.zeros(5, 7)}])
    with pytest.raises(ValueError, match="no client"):
        mean_of(theta, []).delta()
    with pytest.raises(ValueError, match="no client"):
        mean_of(theta, clients, [0.0] * 4).result()


def test_training_the_global_weights_in_place_is_noticed():
    model = torch.nn.Linear(3, 2)
    theta = {n: p.detach() for n, p in model.named_parameters()}  # shares memory with the model
    mean = WeightedMean(theta, lanes := Lanes([0]))
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(ValueError, match="in place"):
        for _ in lanes:
            mean.add({n: p.detach() for n, p in model.named_parameters()}, 1.0)


def test_finite(theta):
    assert finite({**theta, "steps": torch.tensor(3), "mask": torch.tensor([True])})
    for bad in (math.nan, math.inf, -math.inf):
        theta["w"][3, 2] = bad
        assert not finite(theta)
    assert not finite({"half": torch.tensor([1.0, math.nan], dtype=torch.bfloat16)})


# ---- entropy weighting


def test_log_weights_of_zero_are_the_plain_weights_bit_for_bit(theta):
    clients, n = clients_of(theta, 19), [1.0 + k / 3 for k in range(19)]
    plain = mean_of(theta, clients, n).delta()
    assert same_bits(plain, mean_of(theta, clients, n, log_weights=[0.0] * 19).delta())
    # equal entropies are FedAvg with the prior as weights
    assert same_bits(plain, mean_of(theta, clients, n, log_weights=[entropy_log_weight(3.7, 0.3)] * 19).delta())


@pytest.mark.parametrize("temperature", [1.0, 0.3, 10.0])
@pytest.mark.parametrize("prior", ["none", "examples"])
def test_entropy_weights_are_a_softmax(theta, temperature, prior):
    clients = clients_of(theta, 11)
    entropies = torch.linspace(5.1, 4.2, 11, dtype=torch.float64).roll(4)
    n = torch.arange(1.0, 12.0, dtype=torch.float64) if prior == "examples" else torch.ones(11, dtype=torch.float64)
    alpha = torch.softmax(-entropies / temperature + n.log(), 0)  # n_k exp(-H_k / T), normalised
    logs = [entropy_log_weight(h, temperature) for h in entropies]
    expected = mean_of(theta, clients, alpha.tolist()).delta()
    assert near(mean_of(theta, clients, n.tolist(), logs).delta(), expected, 1e-14)


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-300])
def test_a_temperature_towards_zero_picks_the_lowest_entropy(theta, temperature):
    clients = clients_of(theta, 11)
    entropies = [4.0 + ((7 * k) % 11) / 10 for k in range(11)]
    best = entropies.index(min(entropies))
    logs = [entropy_log_weight(h, temperature) for h in entropies]
    delta = mean_of(theta, clients, [1.0 + k for k in range(11)], logs).result()
    assert same_bits(delta, clients[best])


def test_large_log_weights_neither_overflow_nor_underflow(theta, clients):
    expected = mean_of(theta, clients, N, [0.0, 1.0, 2.0, -1.0]).delta()
    for shift in (5000.0, -5000.0):
        assert near(mean_of(theta, clients, N, [shift, shift + 1, shift + 2, shift - 1]).delta(), expected, 1e-14)
    with pytest.raises(ValueError, match="temperature"):
        entropy_log_weight(3.0, 0.0)


# ---- Fisher weighting


def fishers(theta, count=4, dtype=torch.float32):
    return [{n: t.to(dtype).square() for n, t in make(200 + k).items()} for k in range(count)]


def test_equal_precisions_are_fedavg(theta, clients):
    expected = mean_of(theta, clients).delta()
    for options in ({}, {"damping": 0.0}, {"damping": 5.0, "normalize": True}):
        same = [fishers(theta)[0]] * 4
        assert near(precise_mean_of(theta, clients, same, **options).delta(), expected, 1e-14)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_precisions_of_zero_are_fedavg(theta, clients, damping):
    zero = [{n: torch.zeros_like(t) for n, t in theta.items()}] * 4
    expected = mean_of(theta, clients).delta()
    assert near(precise_mean_of(theta, clients, zero, damping=damping).delta(), expected, 1e-14)
    assert near(precise_mean_of(theta, clients, zero, damping=damping, normalize=True).delta(), expected, 1e-14)


def test_a_one_hot_precision_picks_that_client(theta, clients):
    precisions = [{n: torch.zeros_like(t) for n, t in theta.items()} for _ in clients]
    owner = torch.arange(35).view(7, 5) % 4
    for k, f in enumerate(precisions):
        f["w"] = (owner == k).float() * (k + 0.3)
        f["b"] = torch.full((5,), float(k == 2))
    result = precise_mean_of(theta, clients, precisions, damping=0.0).result()
    picked = torch.stack([c["w"] for c in clients]).gather(0, owner[None])[0]  # [7, 5]
    assert same_bits({"w": result["w"], "b": result["b"]}, {"w": picked, "b": clients[2]["b"]})
    # where no client has any precision: the example-weighted mean
    assert torch.equal(result["scalar"], mean_of(theta, clients).result()["scalar"])


@pytest.mark.parametrize("damping, normalize", [(0.0, False), (0.1, False), (0.1, True), (0.0, True)])
def test_a_plain_loop_in_fp64_agrees_with_the_fisher_mean(theta, damping, normalize):
    clients, precisions = clients_of(theta, 11), fishers(theta, 11)
    n = [1.0 + k % 4 for k in range(11)]
    for f in precisions:
        f["w"][2, :3] = 0  # denominator zero where the damping is
    top = {name: 0.0 for name in theta}
    bottom = dict(top)
    for c, f, w in zip(clients, precisions, n, strict=True):
        flat = torch.cat([t.double().flatten() for t in f.values()])
        scale = 1 / flat.norm() if normalize else 1.0
        for name, t in theta.items():
            damped = scale * (f[name].double() + damping * flat.mean())
            top[name] = top[name] + w * damped * (c[name].double() - t.double())
            bottom[name] = bottom[name] + w * damped
    plain = mean_of(theta, clients, n).delta()
    expected = {name: torch.where(bottom[name] > 0, top[name] / bottom[name], plain[name]) for name in theta}
    mean = precise_mean_of(theta, clients, precisions, n, damping=damping, normalize=normalize)
    assert near(mean.delta(), expected, 1e-13)
    # every coordinate lies within the clients' range
    for name, new in mean.result().items():
        stacked = torch.stack([c[name] for c in clients])  # [K, ...]
        assert (new >= stacked.amin(0)).all() and (new <= stacked.amax(0)).all()


def test_a_large_damping_weights_clients_by_their_mean_precision(theta, clients):
    precisions = fishers(theta)
    means = [torch.cat([t.double().flatten() for t in f.values()]).mean().item() for f in precisions]
    limit = mean_of(theta, clients, [n * m for n, m in zip(N, means, strict=True)]).delta()
    assert near(precise_mean_of(theta, clients, precisions, damping=1e12).delta(), limit, 1e-10)
    # ... which is not FedAvg in general
    assert (limit["w"] - mean_of(theta, clients).delta()["w"]).abs().max() > 1e-3


def test_scaling_all_precisions_alike_changes_nothing(theta, clients):
    precisions = fishers(theta)
    expected = precise_mean_of(theta, clients, precisions).delta()
    for factor in (2.0**-60, 2.0**40):
        scaled = [{n: t * factor for n, t in f.items()} for f in precisions]
        assert near(precise_mean_of(theta, clients, scaled).delta(), expected, 1e-14)
    # normalize: also where each client has its own scale
    own = [{n: t * 4.0**k for n, t in f.items()} for k, f in enumerate(precisions)]
    normal = [precise_mean_of(theta, clients, f, normalize=True).delta() for f in (precisions, own)]
    assert near(*normal, 1e-14)
    assert (precise_mean_of(theta, clients, own).delta()["w"] - expected["w"]).abs().max() > 1e-3


def test_entries_without_a_precision_get_the_example_weighted_mean(theta, clients):
    precisions = [{n: t for n, t in f.items() if n != "b"} for f in fishers(theta)]
    delta = precise_mean_of(theta, clients, precisions).delta()
    assert same_bits({"b": delta["b"]}, {"b": mean_of(theta, clients).delta()["b"]})


@pytest.mark.parametrize("silent", [(0,), (3,), (1, 2)])
def test_a_client_without_precision_does_not_pull(theta, clients, silent):
    precisions = fishers(theta)
    for k in silent:
        precisions[k] = {n: torch.zeros_like(t) for n, t in theta.items()}
    others = [k for k in range(4) if k not in silent]
    expected = precise_mean_of(
        theta, [clients[k] for k in others], [precisions[k] for k in others], [N[k] for k in others]
    )
    assert near(precise_mean_of(theta, clients, precisions).delta(), expected.delta(), 1e-14)


def test_two_clients_by_hand():
    theta = {"a": torch.tensor([1.0, 1.0])}
    clients = [{"a": torch.tensor([2.0, 1.0])}, {"a": torch.tensor([1.0, 5.0])}]
    precisions = [{"a": torch.tensor([4.0, 0.0])}, {"a": torch.tensor([0.0, 2.0])}]
    # damped by 0.5 * mean: [5, 1] and [0.5, 2.5]; n = 1, 2: deltas 5/6 * 1 and 2*2.5 / (1 + 5) * 4
    result = precise_mean_of(theta, clients, precisions, [1.0, 2.0], damping=0.5).result()
    assert torch.allclose(result["a"], torch.tensor([1 + 5 / 6, 1 + 20 / 6]), rtol=1e-7)


def test_bad_precisions_are_refused(theta, clients):
    for bad in (-1e-9, math.nan, math.inf):
        broken = fishers(theta)
        broken[0]["w"][1, 1] = bad
        with pytest.raises(ValueError, match="precision of w"):
            precise_mean_of(theta, clients, broken)
    with pytest.raises(ValueError, match="precision of b"):
        precise_mean_of(theta, clients, [{"b": torch.ones(4)}] * 4)
    for damping in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            PrecisionWeightedMean(theta, Lanes([0]), damping=damping)


def test_apply_delta_copies_what_it_is_not_told_about(theta):
    result = apply_delta(theta, {"b": torch.ones(5, dtype=torch.float64)})
    assert same_bits({n: t for n, t in result.items() if n != "b"}, {n: t for n, t in theta.items() if n != "b"})
    assert torch.equal(result["b"], theta["b"] + 1)
    assert result["w"].data_ptr() != theta["w"].data_ptr()
