"""Products of LoRA factors: hand-sized numbers, dense matrices and SVD in numpy, peft."""

import math

import numpy as np
import pytest
import torch
from adapters import close, dense, parts_of, peft_model, product_of

from common.products import Product, add_to_weight, distance, fit_rank, truncate
from common.seeding import torch_stream


@pytest.mark.parametrize("ranks", [[2], [1, 4, 2], [5, 5, 5, 5]], ids=str)
@pytest.mark.parametrize(("d", "k"), [(31, 13), (13, 31)])
def test_sums_norms_and_distances_against_dense_matrices(d, k, ranks):
    parts = parts_of(1, d, k, ranks)
    total, plain = product_of(parts), dense(parts)
    assert (total.columns is None) == (sum(ranks) > min(d, k))
    close(total.full(), plain)
    assert total.norm() == pytest.approx(np.linalg.norm(plain), rel=1e-13)
    close(product_of(parts).divide_(3.0).full(), plain / 3)
    other = parts_of(2, d, k, [2])
    expected = np.linalg.norm(plain - dense(other))
    assert distance(total, product_of(other)) == pytest.approx(expected, rel=1e-12)
    assert distance(total, total) < 1e-14 * total.norm()


def test_hand_sized_numbers():
    A, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0], [2.0]])
    total = product_of([(1, 2.0, A, B), (3, 1.0, 2 * A, B)])  # 2 BA + 6 BA
    assert torch.equal(total.full(), 8 * torch.tensor([[3.0, 4.0], [0, 0], [6, 8]]).double())
    assert total.norm() == pytest.approx(8 * math.sqrt(5) * 5)
    assert torch.equal(product_of([(1, 2.0, A, B), (3, 1.0, 2 * A, B)]).divide_(4).full(), total.full() / 4)
    A, B = truncate(total, 1, new_scale=4.0)
    torch.testing.assert_close(B @ A, total.full() / 4)


def test_a_small_difference_of_large_products_is_measured():
    """Gram matrices would give 0 or NaN here: the difference is 1e-12 of the products."""
    parts = parts_of(3, 300, 200, [8, 8])
    _, _, A, B = parts_of(4, 300, 200, [1])[0]
    size = product_of(parts).norm() / product_of([(1, 1, A, B)]).norm()
    total = product_of(parts)
    gap = distance(product_of([*parts, (1e-12, size, A, B)]), total)
    assert gap / total.norm() == pytest.approx(1e-12, rel=1e-2)


# ---- truncation


@pytest.mark.parametrize("split", ["us", "balanced", "sv"])
@pytest.mark.parametrize(("d", "k", "ranks"), [(160, 160, [8] * 10), (300, 96, [4, 8, 16]), (20, 34, [8] * 5)])
def test_truncation_is_the_dense_svd(d, k, ranks, split):
    parts = parts_of(5, d, k, ranks)
    U, sigma, Vh = np.linalg.svd(dense(parts), full_matrices=False)
    A, B = truncate(product_of(parts), 8, 0.7, split)
    best = (U[:, :8] * sigma[:8]) @ Vh[:8]
    assert np.linalg.norm(0.7 * (B @ A).numpy() - best) <= 5e-14 * np.linalg.norm(best)
    # rows of A and columns of B: one of them orthonormal, or as long as each other
    S, one = sigma[:8] / 0.7, np.ones(8)
    rows, columns = {"us": (one, S), "balanced": (np.sqrt(S), np.sqrt(S)), "sv": (S, one)}[split]
    np.testing.assert_allclose(np.linalg.norm(A.numpy(), axis=1), rows, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(B.numpy(), axis=0), columns, rtol=1e-12)


def test_missing_directions_have_a_zero_b_and_a_random_a():
    (_, _, A, B), *_ = parts_of(6, 10, 7, [2])
    cases = {
        "rank 2 twice": (product_of([(1, 1, A, B), (2, 1, A, B)]), 5, 3),
        "nothing": (Product(10, 7), 5, 5),
        "dense, rank 2": (product_of([(1, 1, A, B)] * 9), 5, 3),
        "more than the layer has": (product_of(parts_of(7, 10, 7, [6, 6])), 9, 2),
    }
    for name, (total, rank, missing) in cases.items():
        new_A, new_B = truncate(total, rank, 1.0, generator=torch_stream(0, name))
        assert new_B[:, :-missing].any(dim=0).all(), name
        assert torch.isfinite(new_A).all() and torch.isfinite(new_B).all()
        assert new_A.shape == (rank, 7) and new_B.shape == (10, rank)
        assert not new_B[:, -missing:].any() and (new_A[-missing:].std(dim=1) > 0.05).all()
        assert (new_A[-missing:].abs() <= 1 / math.sqrt(7)).all()
        np.testing.assert_allclose((new_B @ new_A).numpy(), total.full().numpy(), atol=1e-12)


def test_another_rank_keeps_the_product_or_its_leading_part():
    parts = parts_of(8, 12, 9, [6])
    A, B = truncate(product_of(parts), 6, 1.0)
    more_A, more_B = fit_rank(A, B, 8, torch_stream(0, "more"), ratio=2.0)
    assert more_A.shape == (8, 9)
    close(0.5 * more_B @ more_A, dense(parts))
    less_A, less_B = fit_rank(A, B, 2)
    best_A, best_B = truncate(product_of(parts), 2, 1.0)
    close(less_B @ less_A, best_B @ best_A)
    assert all(t.data_ptr() != u.data_ptr() for t, u in zip(fit_rank(A, B, 6), (A, B), strict=True))


def test_base_weights_linear_and_conv1d():
    total = product_of(parts_of(9, 6, 4, [2]))
    weight = torch.randn(6, 4, generator=torch_stream(0, "weight"))
    expected = (weight.double() + total.full()).float()
    assert torch.equal(add_to_weight(weight, total), expected)
    assert torch.equal(add_to_weight(weight.T, total, fan_in_fan_out=True), expected.T)
    weight[0, 0] = -0.0
    same = add_to_weight(weight, Product(6, 4))
    assert torch.equal(same.view(torch.int32), weight.view(torch.int32))


# ---- peft


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_peft_adds_the_same_weighted_adapters(kind):
    ranks, alphas, weights = [2, 3, 4], [4, 3, 2], [0.5, 0.3, 0.2]
    model = peft_model(ranks, alphas)
    model.add_weighted_adapter(list("012"), weights, "fused", combination_type=kind, svd_rank=4)
    for name, fan_in_fan_out in [("linear", False), ("conv", True)]:
        layer = getattr(model.base_model.model, name)
        parts = [
            (w, a / r, layer.lora_A[i].weight, layer.lora_B[i].weight)
            for i, w, a, r in zip("012", weights, alphas, ranks, strict=True)
        ]
        total = product_of(parts)
        if kind == "svd":
            A, B = truncate(total, 4, new_scale=1.0)
            total = product_of([(1, 1, A, B)])
        base = layer.base_layer.weight
        ours = add_to_weight(torch.zeros_like(base), total, fan_in_fan_out)
        torch.testing.assert_close(ours, layer.get_delta_weight("fused"), rtol=1e-4, atol=1e-5)
        assert layer.fan_in_fan_out == fan_in_fan_out
