"""LoRA factors before they are averaged: rotations that agree with a reference.

An adapter (A [r, k], B [d, r]) and (R^T A, B R) with R orthogonal [r, r] are one product B A. Means of factors are not
the same: what two clients have learnt alike may cancel where it lies in other rows of A.

All is computed in fp64 on the CPU, with one thread, as in `common.products`.
"""

import torch

from common.products import one_thread

NEAR = 1e-12  # of a correlation's norm: which rotation where several are best


def rotation(correlation):
    """The rotation R [r, r] that maximises tr(R^T M), M = `correlation` [r, r]: R^T R = I, det R = 1   (Kabsch 1976).

        M = U S V^T,  R = U diag(1, ..., 1, det(U V^T)) V^T

    Where several are best (M has no full rank) it is the one next to I.
    """
    M = correlation.detach().to("cpu", torch.float64)
    one = torch.eye(len(M), dtype=torch.float64)
    norm = torch.linalg.vector_norm(M)
    with one_thread():
        U, _, Vh = torch.linalg.svd((M / norm if norm else M) + NEAR * one)
        signs = torch.ones(len(M), dtype=torch.float64)
        signs[-1] = torch.linalg.det(U @ Vh).sign()
        return U * signs @ Vh


def rotated(A, B, reference, letter="A"):
    """(R^T A, B R), R the `rotation` that takes the factor `letter` nearest to the reference's, in A's and B's dtype.

        A:  min_R ||R^T A - A_ref||_F,  M = A A_ref^T          B:  min_R ||B R - B_ref||_F,  M = B^T B_ref

    FedRot-LoRA (Zhang et al. 2026, arXiv 2602.23638, from summaries of the paper and its public code): the reference
    are the factors that the server sent, rounds align A and B in turn (`common.lowrank`).

    Args: A [r, k], B [d, r]; reference: (A_ref [r, k], B_ref [d, r]); letter: "A" or "B".
    """
    a, b, ref_a, ref_b = (t.detach().to("cpu", torch.float64) for t in (A, B, *reference))
    with one_thread():
        R = rotation(a @ ref_a.T if letter == "A" else b.T @ ref_b)
        return (R.T @ a).to(A), (b @ R).to(B)
