"""A client's local steps equal plain loops of torch; learning rates equal torch's and transformers' schedulers."""

import pytest
import torch
from quadratics import near
from torch.optim import lr_scheduler
from transformers import get_linear_schedule_with_warmup

from common.client_rows import ClientRows
from common.local import Moments, client_optimizer, local_steps, lr_at
from common.rounds import Round
from common.vector import Weights

KINDS = ("sgd", "sgdm", "adamw")


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batches(steps=6):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 4, generator=draw), torch.randint(3, (5,), generator=draw)) for _ in range(steps)]


def loss_of(model):
    return lambda x, y: torch.nn.functional.cross_entropy(model(x), y)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def run(kind="sgd", data=None, **options):
    """(theta after the steps, LocalResult)"""
    weights = Weights(model := net())
    optimizer = client_optimizer(kind, weights.parameters, 0.1, momentum=0.8, weight_decay=0.01)
    done = local_steps(loss_of(model), data or batches(), weights, optimizer, norms=True, **options)
    assert all(p.grad is None for p in weights.parameters.values())
    return weights.snapshot(), done


def raw_gradient(model, batch):
    model.zero_grad()
    value = loss_of(model)(*batch)
    value.backward()
    return value.item(), flat(p.grad for p in model.parameters())


def plain(kind, correction=0.0, mu=0.0, max_norm=0.0, lrs=None):
    """The same steps written with torch alone, unfused: (theta, losses, raw gradients [H, n])."""
    model = net()
    start = flat(model.parameters())
    options = {"lr": 0.1, "weight_decay": 0.01, "foreach": False}
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.8 if kind == "sgdm" else 0.0, **options)
    losses, seen = [], []
    for i, batch in enumerate(batches()):
        if lrs:
            optimizer.param_groups[0]["lr"] = lrs[i]
        value, raw = raw_gradient(model, batch)
        losses.append(value)
        seen.append(raw)
        g = raw + correction + mu * (flat(model.parameters()) - start)
        if max_norm and g.norm() > max_norm:
            g = g * max_norm / g.norm()
        for p, piece in zip(model.parameters(), g.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = piece.view(p.shape).clone()
        optimizer.step()
    return flat(model.parameters()), losses, torch.stack(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_correction_then_proximal_term_then_clipping_then_the_optimiser(kind):
    correction = 0.3 * torch.randn(67, generator=torch.Generator().manual_seed(5))
    options = {"correction": correction, "mu": 0.7, "max_norm": 0.5}
    for some, tolerance in (({}, 2e-6), (options, 1e-5)):
        expected, losses, seen = plain(kind, **some)
        ours, done = run(kind, **some, record=True)
        assert near(ours, expected, tolerance) and done.steps == 6
        assert done.loss.item() == pytest.approx(sum(losses) / 6, rel=1e-5)  # the task's, without the proximal term
        assert near(done.mean_gradient, seen.double().mean(0), 1e-5)  # of the raw gradients
        assert near(done.gradient_norms, seen.norm(dim=1), 1e-5) and max(done.gradient_norms) > 0.5
    for off in ({"mu": 0.0}, {"max_norm": 0.0}, {"correction": None}):  # each of the three does something here
        assert (run(kind, **{**options, **off})[0] - ours).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_off_changes_no_bit(kind):
    expected, done = run(kind)
    assert done.mean_gradient is None
    for name, off in {"record": True, "correction": torch.full((67,), -0.0), "lrs": [0.1] * 6, "max_norm": 1e9}.items():
        assert torch.equal(run(kind, **{name: off})[0].view(torch.int32), expected.view(torch.int32))


def test_learning_rates_by_step():
    lrs = [0.2, 0.1, 0.05, 0.02, 0.01, 0.0]
    assert near(run("sgdm", lrs=lrs)[0], plain("sgdm", lrs=lrs)[0], 2e-6)
    with pytest.raises(ValueError):
        run(lrs=lrs[:5])
    ticks = []
    assert run(data=iter(batches()), after_step=lambda: ticks.append(1))[1].steps == len(ticks) == 6  # read once
    with pytest.raises(ValueError, match="no batch"):
        run(data=iter(()))
    with pytest.raises(ValueError, match="is none of"):
        run("adam")


def test_scaled_gradients_of_fp16_give_the_same_steps():
    ours, done = run(record=True)
    scaled, other = run(record=True, amp=torch.float16)
    assert near(scaled, ours, 1e-6) and near(other.mean_gradient, done.mean_gradient, 1e-6)


def test_a_parameter_that_the_loss_does_not_reach_has_gradient_zero():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    weights = Weights(None, {"used": used, "unused": unused})
    optimizer = client_optimizer("sgd", weights.parameters, 0.1)
    options = {"correction": torch.tensor([0.0, 0.0, 0.5, 0.5]), "record": True}
    done = local_steps(lambda b: (used * b).sum(), [(1.0,), (3.0,)], weights, optimizer, **options)
    assert done.mean_gradient.tolist() == [2.0, 2.0, 0.0, 0.0]
    assert weights.theta[2:].tolist() == pytest.approx([0.9, 0.9])  # 1 - 2 * 0.1 * 0.5


def test_a_client_goes_on_with_its_own_moments(tmp_path):
    """Two clients in turn, through `Moments`, equal two optimisers of torch; without rows each turn starts anew."""
    for keeps in (True, False):
        weights, data = Weights(model := net()), batches(8)
        optimizer = client_optimizer("adamw", weights.parameters, 0.05, weight_decay=0.1, not_decayed=("bias",))
        moments = Moments(optimizer, weights, ClientRows(tmp_path, in_place=True) if keeps else None)
        mine, start = {}, weights.snapshot()
        for t in range(2):
            for k in Round([0, 1], followers=[moments.rows] if keeps else []):
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
                raw_gradient(other, batch)
                adamw.step()
            torch.testing.assert_close(mine[k], flat(other.parameters()), rtol=1e-5, atol=1e-6)


# ---- learning rates


def warm_then_cosine(optimizer):
    warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
    return lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])


@pytest.mark.parametrize(
    "kind, total, options, make",
    [
        ("cosine", 1, {}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=1)),
        ("cosine", 500, {"min_lr": 1e-6}, lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=500, eta_min=1e-6)),
        ("cosine", 20, {"warmup": 5}, warm_then_cosine),
        ("step", 10, {}, lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.1)),  # a third of the run
        ("linear", 11, {}, lambda o: get_linear_schedule_with_warmup(o, 0, 11)),
        ("none", 4, {"warmup": 2}, lambda o: lr_scheduler.LinearLR(o, start_factor=0.5, total_iters=1)),
    ],
)
def test_schedules_are_torchs_and_transformers(kind, total, options, make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    scheduler = make(optimizer)
    for t in range(total):
        assert lr_at(t, total, 0.2, kind, **options) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), t
        optimizer.step()
        scheduler.step()


def test_schedules_by_hand():
    assert lr_at(8, 9, 1.0, "step", min_lr=0.05) == 0.05
    assert lr_at(3, 4, 1.0, "linear", min_lr=0.2) == pytest.approx(0.4)
    # A run shorter than its warm-up only warms up.
    assert [lr_at(t, 2, 1.0, "cosine", warmup=5) for t in range(2)] == pytest.approx([0.2, 0.4])
    with pytest.raises(ValueError, match=r"not in 0\.\.9"):
        lr_at(10, 10, 0.1)
