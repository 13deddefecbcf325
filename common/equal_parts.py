"""Clients of equal size whose labels differ as Dirichlet's draw says."""

import numpy as np
from scipy.special import logsumexp

from common.cli import UsageError


def equal_parts(labels, k, alpha, generator, flag="--alpha"):
    """Parts of equal size (to one example) whose labels differ: k sorted int64 arrays, disjoint and complete.

    Client i's proportions are q_i ~ Dirichlet(alpha, ..., alpha), as of Hsu, Qi and Brown 2019, section 3. They deal
    client after client and renormalise q_i when a label is used up, so that the last clients have what is left over,
    whatever their q_i. Here all are dealt to at once: of the matrices with the margins n / k and the labels' sizes the
    one nearest to q in relative entropy, x_ij = u_i q_ij v_j (iterative proportional fitting, Deming and Stephan 1940),
    and whole numbers beside it. No client's place in the order matters. A large alpha gives every client the labels'
    shares of all examples; a small one that assignment of clients to labels that q likes best, in which at most
    labels - 1 clients have more than one label.

    Args: labels: whole numbers [n], n at least k; alpha: > 0; generator: a `numpy.random.Generator`; flag: what
        messages call alpha.
    Raises: UsageError for an alpha that is not positive and finite.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise UsageError(f"{flag} {alpha} must be a positive number")
    names, columns = np.unique(labels, return_counts=True)
    rows = np.full(k, len(labels) // k)
    rows[: len(labels) % k] += 1
    # Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha) (Marsaglia and Tsang 2000): its logarithm, as it itself may be 0
    draw = generator.standard_gamma(alpha + 1, (k, len(names)))
    log_q = np.log(draw) + np.log1p(-generator.random(draw.shape)) / alpha  # [clients, labels]
    counts = whole_numbers(fitted(log_q, rows, columns), rows, columns)
    pieces = []
    for name, column in zip(names, counts.T, strict=True):
        pieces.append(np.split(generator.permutation(np.flatnonzero(labels == name)), np.cumsum(column)[:-1]))
    return [np.sort(np.concatenate(share)) for share in zip(*pieces, strict=True)]


def fitted(log_q, rows, columns, most=10_000):
    """u_i q_ij v_j whose sums are `rows` [k] and `columns` [C]: to 0.01, or as near as `most` iterations come."""
    log_v = np.zeros(len(columns))
    for _ in range(most):
        log_u = np.log(rows) - logsumexp(log_q + log_v, axis=1)
        log_x = log_q + log_u[:, None]  # [k, C]
        log_v = np.log(columns) - logsumexp(log_x, axis=0)
        x = np.exp(log_x + log_v)
        if np.abs(x.sum(axis=1) - rows).max() < 0.01:
            break
    return x


def whole_numbers(x, rows, columns):
    """int64 beside x [k, C], of sums exactly `rows` and `columns` (which have one total)."""
    x = x * (rows / np.maximum(rows, x.sum(axis=1)))[:, None]
    x *= columns / np.maximum(columns, x.sum(axis=0))
    counts = np.floor(x).astype(np.int64)
    lack, left = rows - counts.sum(axis=1), columns - counts.sum(axis=0)
    for most in (1, len(rows) * rows.max()):  # one a cell, by the largest remainder; then whatever is left
        for i, j in zip(*np.unravel_index(np.argsort(counts - x, axis=None, kind="stable"), x.shape), strict=True):
            given = min(most, lack[i], left[j])
            counts[i, j] += given
            lack[i] -= given
            left[j] -= given
    return counts
