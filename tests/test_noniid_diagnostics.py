"""Figures of updates against dense matrices in numpy, by hand; linear CKA by its other formula."""

import json
import math

import numpy as np
import pytest
import torch

from llm_noniid.diagnostics import (
    cka_figures,
    cosine_matrix,
    cosines_with_mean,
    generalization_gap,
    gradient_diversity,
    gradient_norm_variance,
    linear_cka,
    relative_drift,
    update_figures,
    update_gram,
    weight_cosine_drift,
)

SHAPES = {"h.0.attn": (12, 7, 3), "h.0.proj": (7, 7, 2), "h.1.attn": (5, 20, 4)}  # d, k, r


def factors(*seed, size=1.0):
    draw = np.random.default_rng(seed)
    theta = {}
    for layer, (d, k, r) in SHAPES.items():
        theta[f"A.{layer}"] = size * torch.from_numpy(draw.standard_normal((r, k))).float()
        theta[f"B.{layer}"] = size * torch.from_numpy(draw.standard_normal((d, r))).float()
    return theta


def moved(theta, *seed, size=0.1):
    return {name: t + step for (name, t), step in zip(theta.items(), factors(*seed, size=size).values(), strict=True)}


def dense(theta, clients, scale):
    """[m, all weights]: every client's update as one vector."""

    def product(factors):
        layers = [factors[f"B.{n}"].double() @ factors[f"A.{n}"].double() for n in SHAPES]
        return scale * torch.cat([layer.flatten() for layer in layers])

    return torch.stack([product(f) - product(theta) for f in clients]).numpy()  # [m, weights]


def flat(factors):
    return torch.cat([t.flatten() for t in factors.values()])


def gram_of(updates):
    updates = np.asarray(updates, dtype=np.float64)
    return updates @ updates.T


# ---- the Gram matrix


@pytest.mark.parametrize("m", [1, 2, 6])
def test_gram_is_that_of_the_dense_updates(m):
    theta = factors(0)
    clients = [moved(theta, 1, k) for k in range(m)]
    gram = update_gram(theta, clients, 2.0)
    np.testing.assert_allclose(gram, gram_of(dense(theta, clients, 2.0)), rtol=1e-11, atol=1e-12)
    assert gram.dtype == np.float64 and (gram == gram.T).all()


def test_gram_by_hand():
    """Rank 1: (2, 0) x (1, 1) - (1, 0) x (1, 0) = [[1, 2], [0, 0]]; scale 3: norm^2 9 * 5."""
    theta = {"A.w": torch.tensor([[1.0, 0.0]]), "B.w": torch.tensor([[1.0], [0.0]])}
    one = {"A.w": torch.tensor([[1.0, 1.0]]), "B.w": torch.tensor([[2.0], [0.0]])}
    other = {"A.w": torch.tensor([[1.0, 0.0]]), "B.w": torch.tensor([[1.0], [4.0]])}  # [[0, 0], [4, 0]]
    half = {"A.w": torch.tensor([[1.0, 0.0]]), "B.w": torch.tensor([[3.0], [1.0]])}  # [[2, 0], [1, 0]]
    assert update_gram(theta, [one, other, half], 3.0).tolist() == [[45, 0, 18], [0, 144, 36], [18, 36, 45]]


def test_small_updates_of_large_adapters_lose_no_digits():
    theta = {name: t.double() for name, t in factors(0, size=100.0).items()}
    steps = [factors(1, k, size=1e-6) for k in range(3)]
    clients = [{name: t + s[name] for name, t in theta.items()} for s in steps]
    exact = []
    for theta_k in clients:
        delta = {name: theta_k[name] - theta[name] for name in theta}
        parts = [
            delta[f"B.{n}"] @ theta[f"A.{n}"] + theta[f"B.{n}"] @ delta[f"A.{n}"] + delta[f"B.{n}"] @ delta[f"A.{n}"]
            for n in SHAPES
        ]
        exact.append(torch.cat([part.flatten() for part in parts]).numpy())
    np.testing.assert_allclose(update_gram(theta, clients, 1.0), gram_of(exact), rtol=1e-12)


def test_another_gauge_is_no_update_and_no_move_is_exactly_zero():
    theta = factors(0)
    turned = {}
    for layer, (_, _, r) in SHAPES.items():
        R = torch.diag(torch.tensor([4.0, 0.5, 2.0, 8.0][:r]))  # exact in binary
        turned[f"A.{layer}"], turned[f"B.{layer}"] = torch.linalg.inv(R) @ theta[f"A.{layer}"], theta[f"B.{layer}"] @ R
    gram = update_gram(theta, [turned, dict(theta), moved(theta, 1, size=1.0)], 1.0)
    assert abs(gram[0, 0]) < 1e-12 * gram[2, 2] and not gram[1].any() and not gram[:, 1].any()
    assert weight_cosine_drift(flat(theta), [flat(turned)]) > 0.3  # what factors would have said
    assert math.isfinite(update_figures(gram)["relative_drift"])


# ---- figures


@pytest.mark.parametrize("weights", [None, [1.0, 5.0, 0.0, 2.0, 2.0]], ids=["equal", "weighted"])
def test_figures_equal_numpy_on_the_updates(weights):
    draw = np.random.default_rng(3)
    d = draw.standard_normal((5, 40)) + 0.7 * draw.standard_normal(40)
    p = np.ones(5) / 5 if weights is None else np.array(weights) / sum(weights)
    mean, gram = p @ d, gram_of(d)
    drift = np.linalg.norm(d - mean, axis=1) / np.linalg.norm(mean)
    cosines = d @ mean / np.linalg.norm(d, axis=1) / np.linalg.norm(mean)
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    np.testing.assert_allclose(relative_drift(gram, weights), drift, rtol=1e-10)
    np.testing.assert_allclose(cosines_with_mean(gram, weights), cosines, rtol=1e-10)
    np.testing.assert_allclose(cosine_matrix(gram), unit @ unit.T, atol=1e-12)
    assert update_figures(gram, weights) == pytest.approx(
        {
            "relative_drift": math.sqrt(p @ drift**2),
            "relative_drift_max": drift.max(),
            "gradient_diversity": (d**2).sum() / (d.sum(0) ** 2).sum(),
            "mean_cosine": cosines.mean(),
            "min_cosine": cosines.min(),
            "update_cosine": (unit @ unit.T)[np.triu_indices(5, 1)].mean(),
            "effective_clients": 5 if weights is None else 100 / 34,
            "update_norm": np.linalg.norm(mean),
        }
    )
    if weights is None:  # of equal weights, root mean square drift and diversity are one figure
        expected = math.sqrt(5 * gradient_diversity(gram) - 1)
        assert update_figures(gram)["relative_drift"] == pytest.approx(expected)


def test_figures_by_hand():
    """(3, 0) and (0, 4): the mean (1.5, 2), each 2.5 away from it."""
    gram = gram_of([[3.0, 0], [0, 4.0]])
    assert relative_drift(gram).tolist() == pytest.approx([1, 1])
    assert cosines_with_mean(gram).tolist() == pytest.approx([0.6, 0.8])
    assert gradient_diversity(gram) == 1 and cosine_matrix(gram).tolist() == [[1, 0], [0, 1]]
    assert relative_drift(gram, [1, 0]).tolist() == pytest.approx([0, 5 / 3])
    for m in (2, 5, 10):
        assert relative_drift(np.eye(m)).tolist() == pytest.approx([math.sqrt(m - 1)] * m)
        assert cosines_with_mean(np.eye(m)).tolist() == pytest.approx([m**-0.5] * m)


def test_clients_that_are_alike_have_no_drift_at_all():
    theta = factors(0)
    gram = update_gram(theta, [moved(theta, 1)] * 4, 2.0)
    assert relative_drift(gram).tolist() == [0] * 4 and relative_drift(gram, [1, 2, 3, 4]).tolist() == [0] * 4
    assert gradient_diversity(gram) == pytest.approx(0.25) and update_figures(gram)["mean_cosine"] == pytest.approx(1)
    one = update_figures(gram[:1, :1])
    assert one["relative_drift"] == 0 and one["update_cosine"] is None and one["gradient_diversity"] == 1


@pytest.mark.parametrize(
    "gram", [gram_of([[1.0, 2.0], [-1, -2]]), np.zeros((3, 3))], ids=["updates that cancel", "nobody moved"]
)
def test_undefined_figures_are_none_and_json(gram):
    assert np.isnan(relative_drift(gram)).all() and np.isnan(cosines_with_mean(gram)).all()
    figures = update_figures(gram)
    assert figures["relative_drift"] is figures["gradient_diversity"] is figures["mean_cosine"] is None
    assert figures["update_norm"] == 0 and figures["update_cosine"] == (None if not gram.any() else pytest.approx(-1))
    json.dumps(figures, allow_nan=False)


def test_a_client_that_did_not_move():
    gram = gram_of([[1.0, 0], [0, 0], [2.0, 0]])
    assert cosine_matrix(gram).tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert np.isnan(cosines_with_mean(gram)).tolist() == [False, True, False]
    assert update_figures(gram)["update_cosine"] == update_figures(gram)["mean_cosine"] == 1
    assert relative_drift(gram).tolist() == pytest.approx([0, 1, 1], abs=1e-7)  # rounding of squares


@pytest.mark.filterwarnings("error")
def test_rounding_of_the_gram_matrix_is_no_figure():
    almost = np.full((3, 3), 1 - 4e-16)
    np.fill_diagonal(almost, 1)
    assert relative_drift(almost).tolist() == [0, 0, 0]
    a, b = np.random.default_rng(0).standard_normal((2, 50)) / 3
    cancels = gram_of([a, b, -a - b])
    assert np.ones(3) @ cancels @ np.ones(3) != 0  # rounding
    assert gradient_diversity(cancels) is None and update_figures(cancels)["relative_drift"] is None


# ---- weights and gradients


def test_weight_cosines_are_near_one_where_updates_are_opposed():
    theta, step = factors(0), factors(1, size=0.01)
    clients = [{n: t + sign * step[n] for n, t in theta.items()} for sign in (1, -1)]
    vectors = [flat(f).double().numpy() for f in (theta, *clients)]
    cosines = [vectors[0] @ v / np.linalg.norm(vectors[0]) / np.linalg.norm(v) for v in vectors[1:]]
    drift = weight_cosine_drift(flat(theta), [flat(f) for f in clients])
    assert drift == pytest.approx(1 - np.mean(cosines), rel=1e-9) and 0 < drift < 1e-3
    assert cosine_matrix(update_gram(theta, clients, 2.0))[0, 1] < -0.99


def test_gradient_norm_variance_by_hand():
    assert gradient_norm_variance([2.0, 4.0, 6.0]) == pytest.approx(8 / 3)
    assert gradient_norm_variance([]) is gradient_norm_variance([5.0]) is gradient_norm_variance([1, math.inf]) is None


# ---- representations


@pytest.mark.parametrize(("n", "p", "q"), [(60, 8, 5), (10, 30, 4), (6, 3, 40)])
def test_linear_cka_equals_its_form_in_features(n, p, q):
    draw = np.random.default_rng(n)
    X = draw.standard_normal((n, p)) + 3
    Y = X[:, : min(p, 2)] @ draw.standard_normal((min(p, 2), q)) + draw.standard_normal((n, q)) - 5
    x, y = X - X.mean(0), Y - Y.mean(0)
    expected = np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert 0.05 < expected < 0.99
    X, Y = torch.tensor(X), torch.tensor(Y)
    assert linear_cka(X, Y) == pytest.approx(expected, rel=1e-10) == linear_cka(Y, X)
    assert linear_cka(X.float(), Y) == pytest.approx(expected, rel=1e-5)


def test_linear_cka_sees_no_rotation_scale_or_shift():
    generator = torch.Generator().manual_seed(0)
    X, Y, square = (torch.randn(*size, generator=generator).double() for size in ((50, 6), (50, 4), (6, 6)))
    Q = torch.linalg.qr(square).Q
    assert linear_cka(X, -1e-6 * X @ Q + 7) == pytest.approx(1, rel=1e-8)
    assert linear_cka(1e9 * X @ Q, Y) == pytest.approx(linear_cka(X, Y), rel=1e-10)
    stretched = X * torch.tensor([30.0, 1, 1, 1, 1, 1])  # not invariant to other linear maps
    assert linear_cka(X, stretched) < 0.6
    apart = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([[0.0], [1], [0], [1]])
    assert linear_cka(*apart) == pytest.approx(0, abs=1e-15)


def test_linear_cka_of_many_rows_equals_its_form_in_rows_and_of_permuted_rows_is_small():
    draw = np.random.default_rng(0)
    X, Y = draw.standard_normal((300, 12)) * np.arange(1, 13), draw.standard_normal((300, 7)) + 2
    Y[:, :5] += X[:, :5]
    x, y = X - X.mean(0), Y - Y.mean(0)
    K, L = x @ x.T, y @ y.T
    expected = (K * L).sum() / np.linalg.norm(K) / np.linalg.norm(L)
    assert linear_cka(torch.tensor(X), torch.tensor(Y)) == pytest.approx(expected, rel=1e-10)
    states = torch.randn(2000, 40, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(1))).Q
    row = cka_figures(states, [states, states @ Q, states[:, :1].expand(-1, 3) * 0], 5)
    assert row["client_cka"] == [pytest.approx(1), pytest.approx(1, rel=1e-5), None] and 0.9 < row["mean_cka"] <= 1.01
    assert row["cka_chance"] == pytest.approx(40 / 2000, rel=0.2)
    assert cka_figures(states, [states], 5)["cka_chance"] == row["cka_chance"]
    assert cka_figures(states, [states], 6)["cka_chance"] != row["cka_chance"]


def test_linear_cka_of_what_is_constant_is_undefined():
    assert linear_cka(torch.randn(5, 2), torch.full((5, 3), 0.1)) is None


# ---- curves


def test_generalization_gap():
    assert generalization_gap(2.5, 3.0) == 0.5
    assert generalization_gap(None, 3.0) is None and generalization_gap(2.0, math.nan) is None
