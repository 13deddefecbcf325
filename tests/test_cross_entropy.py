"""The fused cross-entropy against the plain one, in fp64 and under bf16, and what it must never do."""

import pytest
import torch
import torch.nn.functional as F

from mamba_fl import cross_entropy
from mamba_fl.cross_entropy import entropies, linear_cross_entropy, sample_labels

pytestmark = pytest.mark.usefixtures("one_thread")


def make(n=23, d=8, v=40, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v - 3, (n,))
    labels[[0, 7]] = -100
    return hidden, weight, labels


def plain(hidden, weight, labels, vocab_size):
    return F.cross_entropy(hidden @ weight[:vocab_size].T, labels, reduction="sum")


@pytest.fixture(params=[(2**20, 100), (1, 2**19), (7, 100)])
def cut(request, monkeypatch):
    """The logits of so many tokens at once, so many numbers in fp32 at once (100: two rows, cut by chunks)."""
    tokens, numbers = request.param
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens * 37 * 8)
    monkeypatch.setattr(cross_entropy, "BLOCK_NUMBERS", numbers)


def test_value_and_gradients_equal_the_plain_form(cut):
    hidden, weight, labels = make()
    ours = linear_cross_entropy(hidden, weight, labels, 37) * 0.3
    theirs = plain(hidden, weight, labels, 37) * 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(ours, (hidden, weight), retain_graph=True)
    for mine, expected in zip(gradients, torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)
    assert gradients[1][37:].abs().max() == 0  # cropped columns
    assert gradients[0][[0, 7]].abs().max() == 0  # rows that do not count
    again = torch.autograd.grad(ours, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # nothing was overwritten


def test_extreme_logits_stay_finite_and_no_counted_label_is_zero():
    hidden, weight, labels = make(n=400, v=101, dtype=torch.float32)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels, 101)
    assert all(torch.isfinite(t).all() for t in (loss, *torch.autograd.grad(loss, (hidden, weight))))
    loss = linear_cross_entropy(hidden, weight, labels.fill_(-100), 101)
    assert loss == 0 and all(g.abs().max() == 0 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_bf16_autocast_is_close_and_returns_fp32():
    hidden, weight, labels = make(n=64, d=32, v=500, dtype=torch.float32)
    weight = (weight.detach() * 0.2).requires_grad_()
    exact = plain(hidden, weight, labels, 490)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 490)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    expected = torch.autograd.grad(exact, (hidden, weight))
    for mine, reference in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        assert mine.dtype == torch.float32 and (mine - reference).norm() < 2e-2 * reference.norm()


def test_entropies_against_their_definition(cut):
    hidden, weight, _ = make()
    logp = torch.log_softmax(hidden @ weight[:37].T, -1)
    mine = entropies(hidden, weight, 37)
    torch.testing.assert_close(mine, -(logp.exp() * logp).sum(-1))
    assert mine.dtype == torch.float64 and not mine.requires_grad
    # Equal logits: the entropy of the uniform distribution, log V; one huge logit: zero, not NaN.
    assert entropies(torch.zeros(1, 8), torch.ones(37, 8), 37).item() == pytest.approx(3.610918, rel=1e-6)
    assert entropies(torch.full((1, 1), 1e6), torch.arange(3.0)[:, None], 3).item() == 0


def test_sampled_labels_follow_the_softmax_and_the_generator(monkeypatch):
    weight, hidden = torch.randn(12, 4), torch.randn(1, 4).expand(20_000, 4)
    draws = []
    for tokens in (20_000, 4096):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", tokens * 10 * 4)
        draws.append(sample_labels(hidden, weight, 10, torch.Generator().manual_seed(1)))
    assert torch.equal(*draws)  # one uniform number per row, whatever the chunks
    frequency = torch.bincount(draws[0], minlength=12).double() / 20_000
    expected = torch.softmax(hidden[0] @ weight[:10].T, -1).double()
    assert frequency[10:].sum() == 0
    assert (frequency[:10] - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5
