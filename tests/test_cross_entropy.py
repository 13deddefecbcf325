"""The fused cross-entropy against the plain one, in fp64 and under bf16, and what it must never do."""

import pytest
import torch
import torch.nn.functional as F

from mamba_fl import cross_entropy
from mamba_fl.cross_entropy import linear_cross_entropy, sample_labels, token_statistics

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


@pytest.mark.parametrize("chunk, blocks", [(None, 2**19), (None, 100), (1, 100), (7, 100), (23, 2**19), (100, 2**19)])
def test_value_and_gradients_equal_the_plain_form(chunk, blocks, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_NUMBERS", blocks)  # 100: blocks of two rows, cut by chunks
    hidden, weight, labels = make()
    ours = linear_cross_entropy(hidden, weight, labels, vocab_size=37, chunk=chunk) * 0.3
    theirs = plain(hidden, weight, labels, 37) * 0.3
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(ours, (hidden, weight))
    for mine, expected in zip(gradients, torch.autograd.grad(theirs, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)
    assert gradients[1][37:].abs().max() == 0  # cropped columns
    assert gradients[0][[0, 7]].abs().max() == 0  # rows that do not count


def test_only_one_of_the_two_needs_a_gradient():
    hidden, weight, labels = make()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    only_hidden = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), labels), hidden)
    only_weight = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels), weight)
    assert torch.equal(both[0], only_hidden[0]) and torch.equal(both[1], only_weight[0])
    assert not linear_cross_entropy(hidden.detach(), weight.detach(), labels).requires_grad
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels) == linear_cross_entropy(hidden, weight, labels)


def test_the_forward_may_be_backpropagated_twice():
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss * 0.5, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss * 0.5, (hidden, weight))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_sum_in_fp32_matches_fp64_and_extreme_logits_stay_finite():
    hidden, weight, labels = make(n=400, v=101, dtype=torch.float32)
    exact = plain(hidden.double(), weight.double(), labels, 101)
    assert linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(exact.item(), rel=1e-6)
    assert linear_cross_entropy(hidden, weight, labels).dtype == torch.float32
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.isfinite(t).all() for t in (loss, *gradients))


def test_no_counted_label_is_zero_with_zero_gradients():
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels.fill_(-100))
    assert loss == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_shapes_that_do_not_fit_are_named():
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match=r"\[23, 8\], \[40, 7\]"):
        linear_cross_entropy(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match=r"labels \[22\]"):
        linear_cross_entropy(hidden, weight, labels[1:])


def test_bf16_autocast_is_close_repeatable_and_returns_fp32():
    hidden, weight, labels = make(n=64, d=32, v=500, dtype=torch.float32)
    weight = (weight.detach() * 0.2).requires_grad_()
    exact = plain(hidden, weight, labels, 490)
    expected = torch.autograd.grad(exact, (hidden, weight))
    runs = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, labels, vocab_size=490)
        runs.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(t.dtype == torch.float32 for t in runs[0])
    assert runs[0][0].item() == pytest.approx(exact.item(), rel=2e-3)
    for mine, reference in zip(runs[0][1:], expected, strict=True):
        assert (mine - reference).norm() < 2e-2 * reference.norm()


def test_vmap_of_grad_gives_each_samples_own_gradient():
    hidden, weight, labels = make(n=24)
    batch = hidden.detach().view(4, 6, 8), labels.view(4, 6)

    def loss(w, h, y):
        return linear_cross_entropy(h, w, y, vocab_size=37)

    together = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight.detach(), *batch)
    for i in range(4):
        (alone,) = torch.autograd.grad(loss(weight, batch[0][i], batch[1][i]), weight)
        torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 5])
def test_token_statistics_against_their_definitions(chunk):
    hidden, weight, labels = make()
    logp = torch.log_softmax(hidden @ weight[:37].T, -1)
    counted = labels != -100
    nll = F.cross_entropy(hidden @ weight[:37].T, labels, reduction="none")
    entropy = -(logp.exp() * logp).sum(-1) * counted
    got = token_statistics(hidden, weight, labels, vocab_size=37, chunk=chunk, per_token=True)
    torch.testing.assert_close(got[0], nll)
    torch.testing.assert_close(got[1], entropy)
    nll_sum, entropy_sum, tokens = token_statistics(hidden, weight, labels, vocab_size=37, chunk=chunk)
    torch.testing.assert_close(nll_sum, nll.sum())
    torch.testing.assert_close(entropy_sum, entropy.sum())
    assert tokens == 21 and nll_sum.dtype == torch.float64 and not nll_sum.requires_grad
    # Equal logits: the entropy of the uniform distribution, log V; one huge logit: zero, not NaN.
    assert token_statistics(torch.zeros(1, 8), torch.ones(37, 8), torch.tensor([3]))[1] == pytest.approx(
        3.610918, rel=1e-6
    )
    certain = token_statistics(torch.full((1, 8), 1e6), torch.eye(8)[:3], torch.tensor([0]))
    assert certain[1].isfinite()


def test_sampled_labels_follow_the_softmax_and_the_generator():
    torch.manual_seed(0)
    weight = torch.randn(12, 4)
    hidden = torch.randn(1, 4).expand(20_000, 4)
    draws = [
        sample_labels(hidden, weight, vocab_size=10, generator=torch.Generator().manual_seed(1), chunk=chunk)
        for chunk in (None, 4096)
    ]
    assert torch.equal(*draws)  # one uniform number per row, whatever the chunks
    frequency = torch.bincount(draws[0], minlength=12).double() / 20_000
    expected = torch.softmax(hidden[0] @ weight[:10].T, -1).double()
    assert frequency[10:].sum() == 0
    assert (frequency[:10] - expected).abs().max() < 4 * (0.25 / 20_000) ** 0.5
