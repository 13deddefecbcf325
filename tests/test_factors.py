"""Rotations that make clients' factors agree: identities, scipy's solver."""

import numpy as np
import pytest
import torch
from adapters import close, normal
from scipy.linalg import orthogonal_procrustes
from test_lowrank import N, S, adapter, local, mean_of, served_delta

from common.lowrank import rotated, rotation

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
    """The reference is a quarter turn away."""
    A, B = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    new_A, new_B = rotated(A, B, (turn, B))
    close(new_A, turn, 1e-7), close(new_B, B @ turn.T, 1e-7)
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
