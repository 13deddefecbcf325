"""A client's local steps equal plain loops of torch, in the order that the methods prescribe."""

import math

import pytest
import torch
from comparing import near, same_bits
from quadratics import Quadratics, flat, unflat

from common.before.local import check_scaffold, client_optimizer, local_steps
from common.cli import UsageError

KINDS = ("sgd", "sgdm", "adamw")


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batches(steps=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 4, generator=draw), torch.randint(3, (5,), generator=draw)) for _ in range(steps)]


def loss_of(model):
    return lambda batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def run(kind="sgd", seed=0, data=None, lr=0.1, **options):
    """(weights after the steps, LocalResult)"""
    model = net(seed)
    parameters = dict(model.named_parameters())
    optimizer = client_optimizer(kind, parameters, lr, momentum=0.8, weight_decay=0.01)
    done = local_steps(loss_of(model), data or batches(), parameters, optimizer, **options)
    assert all(p.grad is None for p in parameters.values())
    return {name: p.detach() for name, p in parameters.items()}, done


def raw_gradients(model, batch):
    model.zero_grad()
    value = loss_of(model)(batch)
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def plain(kind, change=lambda g, w, start: g, max_norm=0.0, lrs=None):
    """The same steps written with torch alone, unfused: (weights, losses, raw gradients)."""
    model = net()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"lr": 0.1, "weight_decay": 0.01, "foreach": False}
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.8 if kind == "sgdm" else 0.0, **options)
    losses, seen = [], []
    for i, batch in enumerate(batches()):
        if lrs:
            optimizer.param_groups[0]["lr"] = lrs[i]
        value, raw = raw_gradients(model, batch)
        losses.append(value)
        seen.append(raw)
        for name, p in model.named_parameters():
            p.grad = change({name: raw[name]}, {name: p.detach()}, start)[name]
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        if max_norm and norm > max_norm:
            for p in model.parameters():
                p.grad.mul_(max_norm / norm)
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, losses, seen


@pytest.mark.parametrize("kind", KINDS)
def test_plain_steps_are_torchs_and_the_record_is_the_mean_raw_gradient(kind):
    weights, losses, seen = plain(kind)
    ours, done = run(kind, record=True)
    assert near(ours, weights, 2e-6)
    assert done.steps == 6 and done.loss.item() == pytest.approx(sum(losses) / 6, rel=1e-6)
    assert near(done.mean_gradient, {n: sum(g[n].double() for g in seen) / 6 for n in ours}, 1e-6)
    norms = [math.sqrt(sum(t.double().square().sum().item() for t in g.values())) for g in seen]
    assert done.gradient_norms.tolist() == pytest.approx(norms, rel=1e-6)
    unrecorded, without = run(kind)
    assert without.mean_gradient is None and same_bits(unrecorded, ours)  # recording changes nothing


@pytest.mark.parametrize("kind", KINDS)
def test_correction_then_proximal_term_then_clipping_then_the_optimiser(kind):
    draw = torch.Generator().manual_seed(5)
    correction = {n: 0.3 * torch.randn(p.shape, generator=draw) for n, p in net().named_parameters()}

    def change(g, w, start):
        return {n: g[n] + correction[n] + 0.7 * (w[n] - start[n]) for n in g}

    expected, losses, seen = plain(kind, change, max_norm=0.5)
    ours, done = run(kind, correction=correction, mu=0.7, max_norm=0.5, record=True)
    assert near(ours, expected, 1e-5)
    assert done.loss.item() == pytest.approx(sum(losses) / 6, rel=1e-5)  # the task's, without the proximal term
    assert near(done.mean_gradient, {n: sum(g[n].double() for g in seen) / 6 for n in ours}, 1e-5)  # raw
    assert max(done.gradient_norms) > 0.5
    # each of the three does something here
    for one_less in ({"mu": 0.0}, {"max_norm": 0.0}, {"correction": None}):
        other, _ = run(kind, **{"correction": correction, "mu": 0.7, "max_norm": 0.5, **one_less})
        assert max((other[n] - ours[n]).abs().max() for n in ours) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_off_changes_no_bit(kind):
    expected, _ = run(kind)
    zeros = {n: torch.full_like(p, -0.0) for n, p in net().named_parameters()}
    for options in ({"correction": zeros}, {"mu": 0.0, "anchors": zeros}, {"lrs": [0.1] * 6}, {"max_norm": 1e9}):
        assert same_bits(run(kind, **options)[0], expected)


def test_anchors_are_where_the_parameters_came_in_unless_given():
    here = {n: p.detach().clone() for n, p in net().named_parameters()}
    away = {n: p + 1 for n, p in here.items()}
    assert same_bits(run(mu=0.5, anchors=here)[0], run(mu=0.5)[0])
    assert (run(mu=0.5, anchors=away)[0]["0.weight"] - run(mu=0.5)[0]["0.weight"]).abs().max() > 1e-2


def test_learning_rates_by_step():
    lrs = [0.2, 0.1, 0.05, 0.02, 0.01, 0.0]
    assert near(run("sgdm", lrs=lrs)[0], plain("sgdm", lrs=lrs)[0], 2e-6)
    with pytest.raises(ValueError):
        run(lrs=lrs[:5])
    assert run(data=iter(batches()))[1].steps == 6  # batches may be read once only
    with pytest.raises(ValueError, match="no batch"):
        run(data=iter(()))


def test_scaled_gradients_of_fp16_give_the_same_steps():
    ours, done = run(record=True)
    scaled, other = run(record=True, amp=torch.float16)
    assert near(scaled, ours, 1e-6) and near(other.mean_gradient, done.mean_gradient, 1e-6)


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    parameters = {"used": used, "unused": unused}
    correction = {"used": torch.zeros(2), "unused": torch.full((2,), 0.5)}
    optimizer = client_optimizer("sgd", parameters, 0.1)
    done = local_steps(
        lambda b: (used * b).sum(), [1.0, 3.0], parameters, optimizer, correction=correction, record=True
    )
    assert near(done.mean_gradient, {"used": torch.full((2,), 2.0), "unused": torch.zeros(2)})
    assert near({"u": unused.detach()}, {"u": torch.full((2,), 0.9)}, 1e-6)  # 1 - 2 * 0.1 * 0.5


def test_three_steps_with_momentum_by_hand():
    # gradient 1 - 0.5 (correction): u = 0.5, 0.75, 0.875; w = 0 - 0.1 (0.5 + 0.75 + 0.875)
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = client_optimizer("sgdm", {"w": w}, 0.1, momentum=0.5)
    done = local_steps(
        lambda batch: w.sum(), range(3), {"w": w}, optimizer, correction={"w": torch.tensor([-0.5])}, record=True
    )
    assert w.item() == pytest.approx(-0.2125) and done.mean_gradient["w"].item() == 1.0
    assert done.gradient_norms.tolist() == [1.0, 1.0, 1.0] and done.loss.item() == pytest.approx(-0.175 / 3)


def test_fedprox_ends_at_the_minimum_of_its_own_objective():
    problem = Quadratics(seed=3)
    theta = unflat(torch.linspace(-1, 1, 5, dtype=torch.float64))
    for mu in (0.5, 5.0):
        theta_k, _ = problem.local(theta, 2, 600, 0.1, mu=mu)
        # (A + mu I) y = A w + mu theta
        one = Quadratics(seed=3)
        one.A, one.target = one.A[2:3], one.target[2:3]
        assert torch.allclose(flat(theta_k), one.optimum(mu=mu, anchor=flat(theta)), atol=1e-12)
    free, _ = problem.local(theta, 2, 600, 0.1)
    assert torch.allclose(flat(free), problem.target[2], atol=1e-6) and not torch.allclose(flat(free), flat(theta_k))


def test_scaffold_refuses_option_two_with_adamw():
    for kind in KINDS:
        assert check_scaffold(kind) is None
    assert check_scaffold("sgd", "II") is check_scaffold("sgdm", "II") is None
    with pytest.raises(UsageError, match="option II with adamw.*1 / eps.*mean_gradient"):
        check_scaffold("adamw", "II")
    for kind, option in (("adam", "II"), ("sgd", "III")):
        with pytest.raises(ValueError, match="is none of"):
            check_scaffold(kind, option)
    with pytest.raises(ValueError, match="is none of"):
        client_optimizer("adam", {}, 0.1)
