"""Learning rates by step against torch's schedulers, and transformers'."""

import pytest
import torch
from torch.optim import lr_scheduler
from transformers import get_linear_schedule_with_warmup

from common.local import lr_at


def torch_rates(make, steps, base):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=base)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("total, base, min_lr", [(1, 0.1, 0.0), (7, 0.1, 0.0), (500, 0.01, 1e-6)])
def test_cosine_is_torchs(total, base, min_lr):
    wanted = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=total, eta_min=min_lr), total, base)
    assert [lr_at(t, total, base, "cosine", min_lr=min_lr) for t in range(total)] == pytest.approx(wanted, rel=1e-9)


def test_step_is_torchs_with_a_third_of_the_run():
    wanted = torch_rates(lambda o: lr_scheduler.StepLR(o, step_size=4, gamma=0.1), 10, 0.2)
    assert [lr_at(t, 10, 0.2, "step") for t in range(10)] == pytest.approx(wanted)


def test_warm_up_then_cosine_is_torchs_sequence():
    def make(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=15)
        return lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])

    wanted = torch_rates(make, 20, 0.3)
    assert [lr_at(t, 20, 0.3, "cosine", warmup=5) for t in range(20)] == pytest.approx(wanted, rel=1e-9)


def test_linear_from_zero_is_transformers():
    wanted = torch_rates(lambda o: get_linear_schedule_with_warmup(o, 3, 11), 11, 0.2)
    assert [lr_at(t, 11, 0.2, "linear", warmup=3, from_zero=True) for t in range(11)] == pytest.approx(wanted)


def test_by_hand():
    assert lr_at(5, 10, 1.0, "cosine", min_lr=0.2) == pytest.approx(0.6)
    assert [lr_at(t, 4, 0.5, "none", warmup=2) for t in range(4)] == [0.25, 0.5, 0.5, 0.5]
    assert [lr_at(t, 9, 1.0, "step") for t in (0, 2, 3, 6)] == pytest.approx([1.0, 1.0, 0.1, 0.01])
    assert lr_at(8, 9, 1.0, "step", min_lr=0.05) == 0.05
    assert [lr_at(t, 4, 0.5, "constant") for t in range(2)] == [0.5, 0.5]
    assert lr_at(3, 4, 1.0, "linear", min_lr=0.2) == pytest.approx(0.4)
    # A run shorter than its warm-up only warms up.
    assert [lr_at(t, 2, 1.0, "cosine", warmup=5) for t in range(2)] == pytest.approx([0.2, 0.4])
    for step in (-1, 10):
        with pytest.raises(ValueError, match=r"not in 0\.\.9"):
            lr_at(step, 10, 0.1)
    with pytest.raises(ValueError, match="polynomial"):
        lr_at(5, 10, 1.0, "polynomial")
