"""Rotations that make clients' factors agree, coefficients that fit their mean product: identities, scipy's solvers."""

import math

import numpy as np
import pytest
import torch
from adapters import close, normal
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import minimize
from test_lowrank import N, S, adapter, dense_mean, local, mean_of, served_delta

from common.factors import combined, rotated, rotation

SIZES = [(24, 16), (12, 33)]  # d x k


def random_rotation(draw, r):
    Q, _ = torch.linalg.qr(normal(draw, r, r))
    Q[:, 0] *= torch.linalg.det(Q).sign()
    return Q


def pair(draw, r, d, k, dtype=torch.float64):
    return normal(draw, r, k, dtype=dtype), normal(draw, d, r, dtype=dtype)


# ---- one rotation


@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("d, k", SIZES)
def test_a_rotation_is_procrustes_and_leaves_the_product(letter, d, k):
    draw = np.random.default_rng(d)
    flips = 0
    for _ in range(8):
        (A, B), reference = pair(draw, 4, d, k), pair(draw, 4, d, k)
        new_A, new_B = rotated(A, B, reference, letter)
        close(new_B @ new_A, B @ A, 1e-14)
        R = torch.linalg.lstsq(B, new_B).solution
        close(R.T @ R, torch.eye(4).double(), 1e-12)
        assert torch.linalg.det(R).item() == pytest.approx(1)
        pairs = (A.T, reference[0].T) if letter == "A" else (B, reference[1])
        best, _ = orthogonal_procrustes(*(t.numpy() for t in pairs))
        flips += np.linalg.det(best) < 0
        if np.linalg.det(best) > 0:  # scipy's may be a reflection
            close(R, best, 1e-11)
        gap = torch.linalg.vector_norm(pairs[0] @ R - pairs[1])
        for _ in range(5):  # no rotation nearby is better
            turn = torch.matrix_exp(0.1 * (X := normal(draw, 4, 4)) - 0.1 * X.T)
            assert torch.linalg.vector_norm(pairs[0] @ R @ turn - pairs[1]) > gap
    assert 0 < flips < 8


def test_a_turn_of_the_plane_by_hand():
    """The reference is a quarter turn away: half of the way is an eighth."""
    A, B = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    close(rotated(A, B, (turn, B))[0], turn, 1e-7)
    eighth = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    for strength, expected in ((0.5, eighth), (0.0, torch.eye(2)), (1.0, turn)):
        new_A, new_B = rotated(A, B, (turn, B), strength=strength)
        close(new_A, expected, 1e-7), close(new_B, B @ expected.T, 1e-7)
        assert new_A.dtype == torch.float32


def test_where_several_rotations_are_best_it_is_the_one_next_to_none():
    assert torch.equal(rotation(torch.zeros(3, 3)), torch.eye(3).double())
    once = rotation(torch.tensor([[0.0, 2.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    close(once, torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double(), 1e-11)
    A, B = pair(np.random.default_rng(0), 4, 9, 7)
    close(rotated(A, B, (A, torch.zeros_like(B)), "B")[0], A, 1e-14)


# ---- the rule


@pytest.mark.parametrize("round", [0, 1])
def test_rotations_of_one_adapter_give_its_product_where_naive_does_not(round):
    draw, start, one = np.random.default_rng(1), adapter(0), local(adapter(0), 3)
    clients = []
    for _ in range(4):
        R = random_rotation(draw, 3)
        clients.append({name: (R.T @ A, B @ R) for name, (A, B) in one.items()})
    served = mean_of("rotate", start, clients, N, round=round).result()
    for name, (A, B) in one.items():
        close(served_delta(served, name), S * (B @ A).numpy(), 1e-13)
    assert served.error < 1e-13 and mean_of("naive", start, clients, N, round=round).result().error > 0.3


@pytest.mark.parametrize("round", [0, 1])
def test_rotate_is_the_mean_of_what_procrustes_rotates(round):
    start = adapter(0)
    clients = [local(start, k) for k in range(4)]
    served = mean_of("rotate", start, clients, N, round=round).result()
    for name, (A_0, B_0) in start.items():
        A, B = 0.0, 0.0
        for w, client in zip(N, clients, strict=True):
            A_k, B_k = (t.numpy() for t in client[name])
            turned = (A_k.T, A_0.numpy().T) if round == 0 else (B_k, B_0.numpy())
            R, _ = orthogonal_procrustes(*turned)
            assert np.linalg.det(R) > 0
            A, B = A + w * R.T @ A_k / sum(N), B + w * B_k @ R / sum(N)
        close(served.factors[name][0], A, 1e-12), close(served.factors[name][1], B, 1e-12)


def test_a_rotation_of_strength_0_and_clients_as_they_began_are_naive():
    start = adapter(0)
    clients = [local(start, k) for k in range(4)]
    naive = mean_of("naive", start, clients, N).result()
    for served, wanted in (
        (mean_of("rotate", start, clients, N, rotation=0.0).result(), naive.factors),
        (mean_of("rotate", start, [start] * 3, N[:3]).result(), start),
    ):
        for name in start:
            for a, b in zip(served.factors[name], wanted[name], strict=True):
                close(a, b, 1e-13)
    assert mean_of("rotate", start, clients, N, rotation=0.0).result().error == pytest.approx(naive.error)


# ---- coefficients


def clients_of(draw, r, n, d, k, apart):
    A, B = pair(draw, r, d, k)
    return [(A + apart * normal(draw, r, k), B + apart * normal(draw, d, r)) for _ in range(n)]


def error(A, B, clients, weights):
    target = sum(w * B_k @ A_k for w, (A_k, B_k) in zip(weights, clients, strict=True)) / sum(weights)
    return torch.linalg.vector_norm(B @ A - target).item(), target


@pytest.mark.parametrize("apart", [0.1, 1.0])
@pytest.mark.parametrize("r", [1, 4])
def test_the_fit_is_between_the_truncated_svd_and_the_mean_factors(r, apart):
    draw = np.random.default_rng(r)
    for d, k in SIZES:
        clients = clients_of(draw, r, 4, d, k, apart)
        missed, target = error(*combined(clients, N), clients, N)
        tail = np.linalg.svd(target.numpy(), compute_uv=False)[r:]
        best = math.sqrt(np.square(tail).sum())
        means = [sum(w * c[i] for w, c in zip(N, clients, strict=True)) / sum(N) for i in (0, 1)]
        naive, _ = error(*means, clients, N)
        assert best * (1 - 1e-9) <= missed < naive
        if r == 1:  # the leading pair of vectors lies in what the clients' factors span
            assert missed == pytest.approx(best, rel=1e-6)


def test_no_coefficients_are_better_by_scipys_minimiser():
    draw = np.random.default_rng(5)
    clients = clients_of(draw, 3, 3, 12, 10, 0.5)
    As, Bs = (torch.stack([c[i] for c in clients]).numpy() for i in (0, 1))
    missed, target = error(*combined(clients, N[:3]), clients, N[:3])

    def distance(x):
        fit = np.tensordot(x[3:], Bs, 1) @ np.tensordot(x[:3], As, 1)
        return np.square(fit - target.numpy()).sum()

    found = minimize(distance, np.tile(np.array(N[:3]) / sum(N[:3]), 2), tol=1e-12)
    assert missed == pytest.approx(math.sqrt(found.fun), rel=1e-5)


def test_equal_clients_and_none_that_moved_are_fitted_exactly():
    A, B = pair(np.random.default_rng(0), 3, 9, 7)
    new_A, new_B = combined([(A, B)] * 4, N)
    close(new_B @ new_A, B @ A, 1e-12)
    new_A, new_B = combined([(A, torch.zeros_like(B))] * 3, N[:3])
    assert not (new_B @ new_A).any() and torch.isfinite(new_A).all()


def test_the_row_of_the_replay_serves_the_fit():
    start = adapter(0)
    clients = [local(start, k) for k in range(4)]
    served = mean_of("florana", start, clients, N).result()
    for name, mean in dense_mean(clients, N).items():
        A, B = combined([c[name] for c in clients], N)
        close(served.factors[name][0], A, 1e-14), close(served.factors[name][1], B, 1e-14)
        assert mean.shape == (B @ A).shape
    errors = [mean_of(rule, start, clients, N).result().error for rule in ("svd", "naive")]
    assert errors[0] < served.error < errors[1]
