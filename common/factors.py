"""LoRA factors before they are averaged: rotations that agree with a reference, coefficients that fit the mean product.

An adapter (A [r, k], B [d, r]) and (R^T A, B R) with R orthogonal [r, r] are one product B A. Means of factors are not
the same: what two clients have learnt alike may cancel where it lies in other rows of A.

All is computed in fp64 on the CPU, with one thread, as in `common.products`.
"""

import torch

from common.products import one_thread

NEAR = 1e-12  # of a correlation's norm: which rotation where several are best
SWEEPS, GAIN = 500, 1e-12


def rotation(correlation, strength=1.0):
    """The rotation R [r, r] that maximises tr(R^T M), M = `correlation` [r, r]: R^T R = I, det R = 1   (Kabsch 1976).

        M = U S V^T,  R = U diag(1, ..., 1, det(U V^T)) V^T

    Where several are best (M has no full rank) it is the one next to I. strength: lambda in 0..1 of a softer one, the
    orthogonal matrix next to (1 - lambda) I + lambda R (its polar factor): 0 is I, 1 is R.
    """
    M = correlation.detach().to("cpu", torch.float64)
    one = torch.eye(len(M), dtype=torch.float64)
    norm = torch.linalg.vector_norm(M)
    with one_thread():
        U, _, Vh = torch.linalg.svd((M / norm if norm else M) + NEAR * one)
        signs = torch.ones(len(M), dtype=torch.float64)
        signs[-1] = torch.linalg.det(U @ Vh).sign()
        R = U * signs @ Vh
        if strength != 1:
            U, _, Vh = torch.linalg.svd((1 - strength) * one + strength * R)
            R = U @ Vh
    return R


def rotated(A, B, reference, letter="A", strength=1.0):
    """(R^T A, B R), R the `rotation` that takes the factor `letter` nearest to the reference's, in A's and B's dtype.

        A:  min_R ||R^T A - A_ref||_F,  M = A A_ref^T          B:  min_R ||B R - B_ref||_F,  M = B^T B_ref

    FedRot-LoRA (Zhang et al. 2026, arXiv 2602.23638, from summaries of the paper and its public code): the reference
    are the factors that the server sent, rounds align A and B in turn (`common.lowrank`), and a soft rotation
    (lambda 0.4 to 0.6 was best there) may take the place of the whole one.

    Args: A [r, k], B [d, r]; reference: (A_ref [r, k], B_ref [d, r]); letter: "A" or "B"; strength: as `rotation`.
    """
    a, b, ref_a, ref_b = (t.detach().to("cpu", torch.float64) for t in (A, B, *reference))
    with one_thread():
        R = rotation(a @ ref_a.T if letter == "A" else b.T @ ref_b, strength)
        return (R.T @ a).to(A), (b @ R).to(B)


def combined(adapters, weights):
    """(sum_u p_u A_u, sum_u q_u B_u), fp64, with the coefficients p, q [K] that minimise the distance of their product

        || (sum_u q_u B_u) (sum_u p_u A_u) - sum_u w_u B_u A_u ||_F,   sum w = 1,

    FLoRA-NA's server (Nguyen et al. 2025, arXiv 2509.26399, known from its abstract and reviews, which say that two
    vectors P and Q combine the clients' factors linearly but not how they are found). Here: for each layer, by
    alternating least squares, whose normal equations need only the r x r products of the clients' factors, from
    p = q = w, the mean factors, until a sweep gains less than 1e-12 of the norm, so that the distance is never above
    theirs. Nor below that of the truncated SVD, the best of all A [r, k] and B [d, r]; at r = 1 the two are one
    problem.

    Args: adapters: list of K (A [r, k], B [d, r]); weights: K numbers of at least 0, not all 0.
    """
    As, Bs = (torch.stack([pair[i].detach().to("cpu", torch.float64) for pair in adapters]) for i in (0, 1))
    w = torch.tensor(weights, dtype=torch.float64)
    p = q = w = w / w.sum()
    with one_thread():
        rows = torch.einsum("uik,vjk->uvij", As, As)  # A_u A_v^T: [K, K, r, r]
        columns = torch.einsum("udi,vdj->uvij", Bs, Bs)  # B_u^T B_v: [K, K, r, r]
        norm, before = torch.einsum("u,v,uvij,uvij->", w, w, rows, columns), -1.0
        for _ in range(SWEEPS):
            q, _ = _least_squares(columns, rows, p, w)
            p, fits = _least_squares(rows, columns, q, w)
            if fits - before <= GAIN * norm:
                break
            before = fits
        return torch.einsum("u,uik->ik", p, As), torch.einsum("u,udi->di", q, Bs)


def _least_squares(own, others, fixed, w):
    """The best coefficients of one factor, where those of the other are `fixed`, and the squared norm that they fit."""
    mixed = torch.einsum("v,wvij->wij", fixed, others)  # [K, r, r]
    square = torch.einsum("w,wij->ij", fixed, mixed)  # [r, r]
    normal = torch.einsum("uvij,ij->uv", own, square)
    wanted = torch.einsum("w,uwij,wji->u", w, own, mixed)
    found = torch.linalg.pinv(normal, hermitian=True) @ wanted
    return found, (found @ wanted).item()
