"""The diagonal Fisher equals a batch-1 loop, and leaves the model as it was."""

import copy

import pytest
import torch
from torch.nn import functional as F

from common import fisher as fisher_module
from common.vector import Weights


def diagonal_fisher(model, nll, samples, **options):
    """By name: {name: [shape]}."""
    weights = Weights(model)
    flat = fisher_module.diagonal_fisher(model, weights, nll, samples, **options)
    assert flat.dtype == torch.float32 and flat.dim() == 1
    return weights.named(flat)


class Tied(torch.nn.Module):
    """A small language model with tied embeddings, dropout, and a parameter that the loss does not use."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.mixer = torch.nn.Linear(6, 6)
        self.drop = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, ids):
        hidden = self.embedding(ids)  # [B, T, 6]
        return self.head(self.drop(torch.tanh(self.mixer(hidden.cumsum(1)))))  # [B, T, 11]

    def nll(self, ids, labels):
        return F.cross_entropy(self(ids).flatten(0, 1), labels.flatten(), reduction="sum")


def sequence_nll(model, sample):
    ids, labels = sample  # [T], [T]
    return model.nll(ids[None], labels[None])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, 11, (5, 7), generator=generator) for _ in range(2))


def batch_one_loop(model, samples):
    """By `.backward()` on each sample alone, in fp64."""
    model = copy.deepcopy(model).double().eval()
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for ids, labels in zip(*samples, strict=True):
        model.zero_grad()
        model.nll(ids[None], labels[None]).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                fisher[name] += p.grad**2 / len(samples[0])
    return fisher


METHODS = [("auto", None), ("vmap", None), ("vmap", 2), ("vmap", 99)]  # auto: the loop on a CPU


@pytest.mark.parametrize("method, chunk_size", METHODS)
def test_it_equals_the_batch_one_loop_for_every_parameter(model, samples, method, chunk_size):
    expected = batch_one_loop(model, samples)
    fisher = diagonal_fisher(model, sequence_nll, samples, method=method, chunk_size=chunk_size)
    assert list(fisher) == ["unused", "embedding.weight", "mixer.weight", "mixer.bias"]  # the tied one once
    for name, f in fisher.items():
        assert f.dtype == torch.float32 and not f.requires_grad
        torch.testing.assert_close(f.double(), expected[name], rtol=1e-5, atol=1e-9)
    assert not fisher["unused"].any() and fisher["embedding.weight"].all()


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_the_model_is_left_as_it_was(model, samples, method):
    model.train()
    model.mixer.eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    first, second = (diagonal_fisher(model, sequence_nll, samples, method=method) for _ in range(2))
    with pytest.raises(ZeroDivisionError):
        diagonal_fisher(model, lambda m, s: 1 / 0, samples)
    assert all(torch.equal(first[n], second[n]) for n in first)  # eval mode: no dropout
    assert [m.training for m in (model, model.embedding, model.mixer, model.drop)] == [True, True, False, True]
    assert all((p.grad == 7).all() and torch.equal(p, before[n]) for n, p in model.named_parameters())
