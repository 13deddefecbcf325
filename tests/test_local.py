"""A client's local steps equal plain loops of torch, in the order that the methods prescribe."""

import math
from dataclasses import replace

import pytest
import torch
from comparing import near, same_bits

from common.cli import UsageError
from common.client_rows import ClientRows
from common.local import Moments, OptimizerState, check_scaffold, client_optimizer, local_steps
from common.parallel import Round
from common.vector import Weights

KINDS = ("sgd", "sgdm", "adamw")


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batches(steps=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 4, generator=draw), torch.randint(3, (5,), generator=draw)) for _ in range(steps)]


def loss_of(model):
    return lambda x, y: torch.nn.functional.cross_entropy(model(x), y)


def run(kind="sgd", seed=0, data=None, lr=0.1, **options):
    """(weights after the steps, LocalResult with its mean gradient by name)"""
    model = net(seed)
    weights = Weights(model)
    for name in options.keys() & {"correction", "anchor"}:
        options[name] = None if options[name] is None else weights.vector(options[name])
    optimizer = client_optimizer(kind, weights.parameters, lr, momentum=0.8, weight_decay=0.01)
    done = local_steps(loss_of(model), data or batches(), weights, optimizer, norms=True, **options)
    assert all(p.grad is None for p in weights.parameters.values())
    if done.mean_gradient is not None:
        done = replace(done, mean_gradient=weights.named(done.mean_gradient))
    return {name: p.detach() for name, p in weights.parameters.items()}, done


def raw_gradients(model, batch):
    model.zero_grad()
    value = loss_of(model)(*batch)
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
    for options in ({"correction": zeros}, {"mu": 0.0, "anchor": zeros}, {"lrs": [0.1] * 6}, {"max_norm": 1e9}):
        assert same_bits(run(kind, **options)[0], expected)


def test_anchors_are_where_the_parameters_came_in_unless_given():
    here = {n: p.detach().clone() for n, p in net().named_parameters()}
    away = {n: p + 1 for n, p in here.items()}
    assert same_bits(run(mu=0.5, anchor=here)[0], run(mu=0.5)[0])
    assert (run(mu=0.5, anchor=away)[0]["0.weight"] - run(mu=0.5)[0]["0.weight"]).abs().max() > 1e-2


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


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero():
    weights = Weights(two := Two())
    optimizer = client_optimizer("sgd", weights.parameters, 0.1)
    correction = torch.tensor([0.0, 0.0, 0.5, 0.5])
    done = local_steps(
        lambda b: (two.used * b).sum(), [(1.0,), (3.0,)], weights, optimizer, correction=correction, record=True
    )
    assert done.mean_gradient.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert weights.theta[2:].tolist() == pytest.approx([0.9, 0.9])  # 1 - 2 * 0.1 * 0.5


def test_three_steps_with_momentum_by_hand():
    # gradient 1 - 0.5 (correction): u = 0.5, 0.75, 0.875; w = 0 - 0.1 (0.5 + 0.75 + 0.875)
    weights = Weights(torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(1))}))
    w = weights.parameters["w"]
    optimizer = client_optimizer("sgdm", weights.parameters, 0.1, momentum=0.5)
    correction = torch.tensor([-0.5])
    done = local_steps(w.sum, [()] * 3, weights, optimizer, correction=correction, record=True, norms=True)
    assert w.item() == pytest.approx(-0.2125) and done.mean_gradient.item() == 1.0
    assert done.gradient_norms.tolist() == [1.0, 1.0, 1.0] and done.loss.item() == pytest.approx(-0.175 / 3)


def test_fedprox_ends_at_the_minimum_of_its_own_objective():
    for mu, minimum in ((0.0, 1.0), (0.5, (3.0 + 0.5 * -2.0) / 3.5), (5.0, (3.0 + 5.0 * -2.0) / 8.0)):
        weights = Weights(torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.full((1,), -2.0).double())}))
        w = weights.parameters["w"]  # f = 3/2 (w - 1)^2, pulled to -2
        optimizer = client_optimizer("sgd", weights.parameters, 0.1)
        local_steps(lambda w=w: 1.5 * (w - 1).square().sum(), [()] * 300, weights, optimizer, mu=mu)
        assert w.item() == pytest.approx(minimum, abs=1e-12)


def test_micro_batches_are_one_step_of_the_mean_over_their_examples():
    whole = batches(2)
    parts = [[(2, (x[:2], y[:2])), (3, (x[2:], y[2:]))] for x, y in whole]
    ours, done = run("adamw", data=parts, mu=0.3, max_norm=0.4, record=True)
    expected, other = run("adamw", data=whole, mu=0.3, max_norm=0.4, record=True)
    assert near(ours, expected, 1e-5) and near(done.mean_gradient, other.mean_gradient, 1e-6)
    assert done.loss.item() == pytest.approx(other.loss.item(), rel=1e-6) and done.steps == 2
    # steps of different sizes: the loss is the mean over examples
    uneven, _ = [(5, whole[0])], None
    _, done = run(data=[uneven, [(1, (whole[1][0][:1], whole[1][1][:1]))]])
    first, second = (run(data=[step], lr=0.1)[1].loss.item() for step in (whole[0], whole[0]))
    assert first == second and done.loss.item() != pytest.approx(first)


def test_a_client_goes_on_with_its_own_moments(tmp_path):
    """Two clients in turn, through `Moments`, equal two optimisers of torch; without rows each turn starts anew."""
    for keeps in (True, False):
        weights, data = Weights(model := net()), batches(8)
        optimizer = client_optimizer("adamw", weights.parameters, 0.05, weight_decay=0.1, not_decayed=("bias",))
        moments = Moments(optimizer, weights, ClientRows(tmp_path, in_place=True) if keeps else None)
        mine, start = {}, weights.snapshot()
        for t in range(2):
            closers = [moments.rows.close_round] if keeps else []
            for k in Round([0, 1], closers=closers):
                weights.load(mine.get(k, start))
                moments.load(k)
                local_steps(loss_of(model), data[4 * k + 2 * t : 4 * k + 2 * t + 2], weights, optimizer)
                moments.store(k)
                mine[k] = weights.snapshot()
        for k in range(2):
            other = net()
            groups = [
                {"params": [p for n, p in other.named_parameters() if n.endswith("weight")], "weight_decay": 0.1},
                {"params": [p for n, p in other.named_parameters() if n.endswith("bias")], "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW(groups, lr=0.05, foreach=False)
            for i, batch in enumerate(data[4 * k : 4 * k + 4]):
                if i == 2 and not keeps:
                    adamw = torch.optim.AdamW(groups, lr=0.05, foreach=False)
                raw_gradients(other, batch)
                adamw.step()
            expected = torch.cat([p.detach().flatten() for p in other.parameters()])
            torch.testing.assert_close(mine[k], expected, rtol=1e-5, atol=1e-6)


def test_an_optimisers_state_goes_through_a_checkpoint():
    for kind in ("adamw", "sgdm"):
        answers = []
        for resumed in (False, True):
            weights = Weights(model := net())
            optimizer = client_optimizer(kind, weights.parameters, 0.1)
            local_steps(loss_of(model), batches(2), weights, optimizer)
            if resumed:
                state = {
                    name: t.clone() for name, t in OptimizerState(optimizer, weights.parameters).state_dict().items()
                }
                optimizer = client_optimizer(kind, weights.parameters, 0.1)
                OptimizerState(optimizer, weights.parameters).load_state_dict(state)
            local_steps(loss_of(model), batches(2), weights, optimizer)
            answers.append(weights.snapshot())
        assert torch.equal(*answers)


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
