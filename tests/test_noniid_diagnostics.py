"""Figures of updates against dense matrices in numpy, by hand; linear CKA by its other formula; groups of clients
by hand and as drawn; the alarm on hand-made losses."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from llm_noniid.diagnostics import (
    alarms_of,
    cluster_labels,
    gradient_norm_variance,
    linear_cka,
    mean_cka,
    plain_gram,
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


def test_gram_is_that_of_the_dense_updates(m=6):
    theta = factors(0)
    clients = [moved(theta, 1, k) for k in range(m)]
    gram = update_gram(theta, clients, 2.0)
    np.testing.assert_allclose(gram, gram_of(dense(theta, clients, 2.0)), rtol=1e-11, atol=1e-12)
    assert gram.dtype == np.float64 and (gram == gram.T).all()


def test_another_gauge_is_no_update_and_no_move_is_exactly_zero():
    theta = factors(0)
    turned = {}
    for layer, (_, _, r) in SHAPES.items():
        R = torch.diag(torch.tensor([4.0, 0.5, 2.0, 8.0][:r]))  # exact in binary
        turned[f"A.{layer}"], turned[f"B.{layer}"] = torch.linalg.inv(R) @ theta[f"A.{layer}"], theta[f"B.{layer}"] @ R
    gram = update_gram(theta, [turned, dict(theta), moved(theta, 1, size=1.0)], 1.0)
    assert abs(gram[0, 0]) < 1e-12 * gram[2, 2] and not gram[1].any() and not gram[:, 1].any()
    assert weight_cosine_drift(flat(theta), [flat(turned)]) > 0.3  # what factors would have said
    assert math.isfinite(update_figures(gram, [1, 1, 1])["relative_drift"])


# ---- figures


@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0, 5.0, 0.0, 2.0, 2.0]], ids=["equal", "weighted"])
def test_figures_equal_numpy_on_the_updates(weights):
    draw = np.random.default_rng(3)
    d = draw.standard_normal((5, 40)) + 0.7 * draw.standard_normal(40)
    p = np.array(weights) / sum(weights)
    mean, gram = p @ d, gram_of(d)
    drift = np.linalg.norm(d - mean, axis=1) / np.linalg.norm(mean)
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    assert update_figures(gram, weights) == pytest.approx(
        {
            "relative_drift": math.sqrt(p @ drift**2),
            "update_cosine": (unit @ unit.T)[np.triu_indices(5, 1)].mean(),
        }
    )


def test_figures_by_hand():
    """(3, 0) and (0, 4): the mean (1.5, 2), each 2.5 away from it."""
    wanted = {"relative_drift": 1, "update_cosine": 0}
    assert update_figures(gram_of([[3.0, 0], [0, 4.0]]), [1, 1]) == pytest.approx(wanted)
    for m in (2, 5, 10):
        assert update_figures(np.eye(m), [3] * m)["relative_drift"] == pytest.approx(math.sqrt(m - 1))


def test_clients_that_are_alike_did_not_move_or_cancel():
    theta = factors(0)
    alike = update_figures(update_gram(theta, [moved(theta, 1)] * 4, 2.0), [1, 2, 3, 4])
    assert alike == pytest.approx({"relative_drift": 0, "update_cosine": 1}, abs=1e-6)
    still = gram_of([[1.0, 0], [0, 0], [2.0, 0]])
    assert update_figures(still, [1] * 3)["update_cosine"] == 1
    a, b = np.random.default_rng(0).standard_normal((2, 50)) / 3
    for gram in (np.zeros((3, 3)), gram_of([a, b, -a - b])):  # the latter's sum is rounding
        assert update_figures(gram, [1] * 3)["relative_drift"] is None


def test_plain_gram_is_that_of_the_differences():
    theta, *clients = torch.randn(4, 300_000, generator=torch.Generator().manual_seed(0))
    updates = np.stack([(theta_k.double() - theta.double()).numpy() for theta_k in clients])
    np.testing.assert_allclose(plain_gram(theta, clients), updates @ updates.T, rtol=1e-12)


# ---- weights and gradients


def test_weight_cosines_are_near_one_where_updates_are_opposed():
    theta, step = factors(0), factors(1, size=0.01)
    clients = [{n: t + sign * step[n] for n, t in theta.items()} for sign in (1, -1)]
    vectors = [flat(f).double().numpy() for f in (theta, *clients)]
    cosines = [vectors[0] @ v / np.linalg.norm(vectors[0]) / np.linalg.norm(v) for v in vectors[1:]]
    drift = weight_cosine_drift(flat(theta), [flat(f) for f in clients])
    assert drift == pytest.approx(1 - np.mean(cosines), rel=1e-9) and 0 < drift < 1e-3
    assert update_figures(update_gram(theta, clients, 2.0), [1, 1])["update_cosine"] < -0.99


def test_gradient_norm_variance_by_hand():
    assert gradient_norm_variance([2.0, 4.0, 6.0]) == pytest.approx(8 / 3)
    assert gradient_norm_variance([]) is gradient_norm_variance([5.0]) is gradient_norm_variance([1, math.inf]) is None


# ---- representations


@pytest.mark.parametrize(("n", "p", "q"), [(60, 8, 5), (10, 30, 4)])
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


def test_linear_cka_of_other_texts_is_small_and_of_what_is_constant_undefined():
    states = torch.randn(2000, 40, generator=torch.Generator().manual_seed(0))
    shuffled = states[torch.randperm(2000, generator=torch.Generator().manual_seed(1))]
    assert linear_cka(states, shuffled) == pytest.approx(40 / 2000, rel=0.2)
    assert linear_cka(torch.randn(5, 2), torch.full((5, 3), 0.1)) is None
    Q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(2))).Q
    assert linear_cka(states, 7 - 1e-3 * states @ Q) == pytest.approx(1, rel=1e-5)  # rotated, scaled, shifted
    assert mean_cka(states, [states, shuffled, 0 * states]) == pytest.approx((1 + linear_cka(states, shuffled)) / 2)
    assert mean_cka(states, [0 * states]) is None


# ---- groups of clients


def test_cluster_labels():
    histograms = [[9, 1, 0], [0, 0, 5], [80, 20, 0], [1, 0, 60], [0, 4, 0], [9, 1, 0]]
    assert cluster_labels(histograms, 3).tolist() == [0, 1, 0, 1, 2, 0]
    assert cluster_labels([[1, 3], [2, 6], [10, 30]], 2).tolist() == [0, 0, 0]  # the same shares
    assert cluster_labels(np.eye(3), 3).tolist() == [0, 1, 2] and cluster_labels([[4, 4]], 1).tolist() == [0]
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 24)
    drawn = np.stack([draw.multinomial(200, (np.full(4, 0.1) + 0.6 * np.eye(4)[t])) for t in truth])
    assert adjusted_rand_score(truth, cluster_labels(drawn, 3)) == 1


# ---- the alarm


def first(losses, planned=31):
    """The first alarm of `diverged` on a validation loss in rounds 0, 1, ...; None without one."""
    lines = [{"round": t, "val_loss": loss} for t, loss in enumerate(losses)]
    return next(iter(alarms_of(lines, planned)), None)


@pytest.mark.parametrize("value", [math.nan, "nan", "inf"])
def test_a_loss_that_is_not_finite_alarms(value):
    found = first([3.0, 2.9, value, 2.8])
    assert (found["detector"], found["round"]) == ("diverged", 2)
    assert str(float(value)) in found["message"] and "--learning-rate" in found["message"]
    json.dumps(found, allow_nan=False)


def test_a_rise_of_more_than_one_nat_in_ten_evaluations():
    assert first([3.0, 3.0, 4.1]) is None and first([3.0] * 10 + [4.1])["round"] == 10
    assert first([30 + 0.099 * t for t in range(31)]) is None
    assert "1.1 nats in 10 rounds (limit 1)" in first([30 + 0.11 * t for t in range(31)])["message"]


def test_windows_are_a_third_of_the_run_and_never_longer():
    """A rise of 0.3 nats a round from round 0 on is above 1 nat after 4 rounds: seen as soon as the window allows."""
    seen = {n: first([30 + 0.3 * t for t in range(n)], n) for n in (3, 9, 12, 15, 31, 51)}
    assert {n: a and a["round"] for n, a in seen.items()} == {3: None, 9: None, 12: 4, 15: 5, 31: 10, 51: 10}


def test_staying_above_the_best():
    assert first([3.0, 2.0, 2.7, 2.7, 2.5]) is None  # the third is not above 1.3 x 2
    found = first([3.0, 2.0, 2.7, 2.9, 2.65, 9.0])
    assert found["round"] == 4 and "above 1.3 times the best (2)" in found["message"]
