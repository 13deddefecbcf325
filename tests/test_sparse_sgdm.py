"""SparseSGDM is torch.optim.SGD on the kept weights, bit for bit, and touches no other bit."""

import pytest
import torch

from common.vector import Weights
from vit_sparse_fl.masks import SparseSGDM

SHAPES = {"a": (37, 11), "b": (7,), "c": (), "d": (5, 3, 2, 2)}
SIZE = 37 * 11 + 7 + 1 + 60
SETTINGS = [{"lr": 0.1, "weight_decay": 0.01}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}]


def made(seed=0):
    draw = torch.Generator().manual_seed(seed)
    module = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.randn(s, generator=draw)) for n, s in SHAPES.items()})
    return Weights(module)


def gradient(seed):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1000 + seed))


def random_mask(seed=0, kept=0.3):
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(2000 + seed)) < kept


def sparse(weights, mask, **setting):
    return SparseSGDM(weights, mask.nonzero().view(-1), **setting)


def run(optimizer, weights, steps, first=0, change=lambda g: g):
    for step in range(first, first + steps):
        for name, g in weights.named(change(gradient(step))).items():
            weights.parameters[name].grad = g
        optimizer.step()
    return weights.snapshot()


def by_torch(steps, **setting):
    weights = made()
    return run(torch.optim.SGD(weights.parameters.values(), **setting), weights, steps)


def same(a, b, where=slice(None)):
    assert torch.equal(a.view(torch.int32)[where], b.view(torch.int32)[where])
    return True


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("setting", SETTINGS)
def test_kept_weights_go_as_in_torch_sgd_and_masked_ones_stay(setting, kept):
    """Every update is per weight, so that the kept weights cannot know of the mask."""
    weights, mask = made(), random_mask(kept=kept)
    ours = run(sparse(weights, mask, **setting), weights, 5)
    assert same(ours, by_torch(5, **setting), mask) and same(ours, made().theta, ~mask)
    assert (ours != made().theta)[mask].all()


def test_masked_places_keep_special_values():
    """-0.0 is not turned into 0.0, a NaN gradient is not let through, weight decay does not leak in."""
    weights, mask = made(), random_mask()
    weights.theta[~mask] = -0.0
    weights.theta[-60:][~mask[-60:]] = torch.inf
    before = weights.snapshot()
    optimizer = sparse(weights, mask, lr=0.1, momentum=0.9, weight_decay=0.5)
    after = run(optimizer, weights, 4, change=lambda g: torch.where(mask, g, torch.nan))
    assert same(after, before, ~mask) and torch.isfinite(after[mask]).all()
