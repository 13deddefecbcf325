"""How far clients pull apart, how alike their models see the data, how fast a run got somewhere.

Updates are compared as what they do to the layers, never as factors: A and B are a gauge (B R and R^-1 A are the same
adapter for any invertible R). Client k's update of a layer is d_k = s (B_k A_k - B A) [d, k], and everything about m
clients' updates is in their Gram matrix G_ij = <d_i, d_j>, m x m, which `update_gram` computes without forming any
d x k matrix:

    gram = update_gram(named(theta), [named(theta_k) of the clients, by id], scale)
    row |= update_figures(gram, weights)

named(theta) is {"A.<layer>": [r, k], "B.<layer>": [d, r]}. Weights are the p_k of the round's mean, sum_k p_k d_k; they
are divided by their sum, and None means equal ones. Figures of updates are numbers without a unit; losses are in nats.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from common.products import one_thread
from common.seeding import stream

# Squared distances below this part of the squared norms are rounding of G: updates that differ by less than 1e-7 of
# their norm count as the same.
_ROUNDING = 1e-14


def update_gram(theta, clients, scale):
    """Inner products of the clients' updates of all layers together: G [m, m], fp64, numpy.

        d_k = s (B_k A_k - B A) = s U_k V_k,   U_k = [B_k - B, B] [d, 2r],   V_k = [A_k; A_k - A] [2r, k]
        <d_i, d_j> = s^2 tr((U_j^T U_i)(V_i V_j^T)) = s^2 sum_ab (U_i^T U_j)_ab (V_i V_j^T)_ab

    In this form B A itself never enters, so that a small update of a large adapter loses no digits, and a client that
    did not move has a row of exact zeros. O(m^2 r^2 (d + k)) a layer; on the CPU with one thread, so that the same
    clients in the same order (sort them by id) give the same bits everywhere. Memory: one layer of all m clients.

    Args:
        theta: {"A.<layer>": [r, k], "B.<layer>": [d, r]}, the factors that the clients started from.
        clients: list of such dicts, one a client, of theta's shapes; finite, at least one.
        scale: s = alpha/r.
    """
    gram = np.zeros((len(clients), len(clients)))
    with one_thread():
        for layer in (name[2:] for name in theta if name.startswith("A.")):
            pairs = [[_exact(f[f"{letter}.{layer}"]) for letter in "AB"] for f in (theta, *clients)]
            gram += scale**2 * _layer_gram(pairs[0], pairs[1:])
    np.fill_diagonal(gram, np.maximum(np.diag(gram), 0))  # of a change of gauge alone it can round to below
    return gram


def plain_gram(theta, clients):
    """Inner products of the updates theta_k - theta [n] themselves: G [m, m], fp64, numpy. clients: their theta_k."""
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    with one_thread():
        for pieces in zip(*(v.detach().cpu().split(2**18) for v in (theta, *clients)), strict=True):
            start, *ends = (piece.double() for piece in pieces)
            updates = torch.stack(ends) - start  # [m, piece]
            gram += updates @ updates.T
    return gram.numpy()


def _layer_gram(start, pairs):
    (A, B), m = start, len(pairs)
    r = 2 * len(A)
    left = torch.cat([torch.cat([B_k - B, B], dim=1) for _, B_k in pairs], dim=1)  # [d, m 2r]
    right = torch.cat([torch.cat([A_k, A_k - A]) for A_k, _ in pairs])  # [m 2r, k]
    gram = np.zeros((m, m))
    for i in range(m):
        these, rest = slice(i * r, (i + 1) * r), slice(i * r, None)
        products = (left[:, these].T @ left[:, rest]) * (right[these] @ right[rest].T)  # [2r, (m - i) 2r]
        gram[i, i:] = products.view(r, m - i, r).sum((0, 2)).numpy()  # [m - i]
        gram[i:, i] = gram[i, i:]
    return gram


def relative_drift(gram, weights=None):
    """||d_k - d|| / ||d|| of every client, d = sum_k p_k d_k; [m], nan where d = 0 (updates that cancel).

    m orthogonal updates of equal norm and weight have sqrt(m - 1): the figure grows with m, and says for itself only
    how much longer a client's own part is than the shared part.
    """
    p = _shares(gram, weights)
    mean, norms = _mean_square(gram, p), np.diag(gram)
    if mean == 0:
        return np.full(len(gram), np.nan)
    apart = norms[:, None] + norms[None] - 2 * gram  # [m, m]
    apart[apart < _ROUNDING * (norms[:, None] + norms[None])] = 0
    # Of distances between clients, not of norms: equal updates then have exactly 0.
    distances = apart @ p - 0.5 * (p @ apart @ p)  # [m]
    return np.sqrt(np.maximum(distances, 0) / mean)


def gradient_diversity(gram):
    """sum_k ||d_k||^2 / ||sum_k d_k||^2 (Yin et al. 2018): 1/m all alike, 1 orthogonal; None where the sum is 0."""
    total = len(gram) ** 2 * _mean_square(gram, _shares(gram))
    return float(np.trace(gram) / total) if total > 0 else None


def cosines_with_mean(gram, weights=None):
    """cos(d_k, sum_j p_j d_j) of every client; [m], nan where either is 0.

    A client is part of the mean: of m orthogonal updates each has 1/sqrt(m), not 0.
    """
    p = _shares(gram, weights)
    lengths = np.sqrt(np.diag(gram) * _mean_square(gram, p))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(np.where(lengths > 0, (gram @ p) / lengths, np.nan), -1, 1)


def cosine_matrix(gram):
    """cos(d_i, d_j) [m, m]; ones on the diagonal. A client that did not move has zeros, on the diagonal too."""
    lengths = np.sqrt(np.diag(gram))
    inverse = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosines = np.clip(gram * inverse[:, None] * inverse[None], -1, 1)
    np.fill_diagonal(cosines, lengths > 0)
    return cosines


def update_figures(gram, weights=None):
    """A round's figures, {name: float}, None where one is undefined.

    relative_drift: sqrt(sum_k p_k ||d_k - d||^2) / ||d||; relative_drift_max: the largest client's; gradient_diversity;
    mean_cosine, min_cosine: of the clients that moved with d; update_cosine: mean over the pairs of clients that moved;
    update_norm: ||d||; effective_clients: 1 / sum_k p_k^2, the m of whose equal weights have as much drift.
    """
    p = _shares(gram, weights)
    drift, cosines = relative_drift(gram, p), cosines_with_mean(gram, p)
    moved = np.flatnonzero(np.diag(gram) > 0)
    pairs = cosine_matrix(gram)[np.ix_(moved, moved)][np.triu_indices(len(moved), 1)]
    cosines = cosines[np.isfinite(cosines)]
    return {
        "relative_drift": _or_none(math.sqrt(p @ drift**2)),
        "relative_drift_max": _or_none(drift.max()),
        "gradient_diversity": gradient_diversity(gram),
        "mean_cosine": float(cosines.mean()) if len(cosines) else None,
        "min_cosine": float(cosines.min()) if len(cosines) else None,
        "update_cosine": float(pairs.mean()) if len(pairs) else None,
        "update_norm": math.sqrt(_mean_square(gram, p)),
        "effective_clients": float(1 / (p @ p)),
    }


def weight_cosine_drift(mean, clients):
    """The source's "weight cosine drift": 1 - the mean cosine of the clients' weights (A and B, not products) with the
    mean's. Nearly always 0, as weights share what they started from: use the figures of updates.

    Args: mean [n]; clients: list of vectors [n].
    """
    mean = _exact(mean)
    return 1 - float(np.mean([F.cosine_similarity(mean, _exact(theta_k), dim=0).item() for theta_k in clients]))


def gradient_norm_variance(norms):
    """The variance over clients (divided by m) of their mean gradient norms [m].

    None for fewer than two clients, and where a norm is not finite.
    """
    return float(np.var(norms)) if len(norms) > 1 and np.isfinite(norms).all() else None


def linear_cka(X, Y):
    """Linear centred kernel alignment of two models' hidden states of the same n tokens (Kornblith et al. 2019).

        ||Y_c^T X_c||_F^2 / (||X_c^T X_c||_F ||Y_c^T Y_c||_F),   columns centred; between 0 and 1

    1 where one is a rotation and a scaling of the other. Take n well above the widths p and q: representations that
    have nothing in common have about p/n. fp64 on the CPU, O(n p q), or for n below p or q the same by the n x n
    matrices: ||Y_c^T X_c||_F^2 = sum of (X_c X_c^T) (Y_c Y_c^T), element by element.

    Args: X [n, p], Y [n, q]: floating-point tensors, any device.
    Returns: a float, None where either is constant over the tokens.
    """
    X, Y = _exact(X), _exact(Y)
    if any(bool((M == M[:1]).all()) for M in (X, Y)):
        return None
    X, Y = (F.normalize(M - M.mean(0), dim=(0, 1), eps=0) for M in (X, Y))
    if len(X) >= max(X.shape[1], Y.shape[1]):
        both, *each = (torch.linalg.vector_norm(a.T @ b) for a, b in ((Y, X), (X, X), (Y, Y)))
        return float(both**2 / (each[0] * each[1]))
    K, L = X @ X.T, Y @ Y.T  # [n, n]
    return float((K * L).sum() / (torch.linalg.vector_norm(K) * torch.linalg.vector_norm(L)))


def cka_figures(served, clients, seed):
    """{client_cka: the clients' `linear_cka` with the served model, mean_cka: of those that have one, else None}.

    cka_chance: of the served model's states with themselves in another order of rows, which `seed` draws.

    Args: served: hidden states [n, p] under the served model; clients: of each client's, of the same tokens.
    """
    every = [linear_cka(served, states) for states in clients]
    known = [value for value in every if value is not None]
    chance = linear_cka(served, served[torch.from_numpy(stream(seed, "cka chance").permutation(len(served)))])
    return {"client_cka": every, "mean_cka": sum(known) / len(known) if known else None, "cka_chance": chance}


def generalization_gap(train_loss, val_loss):
    """Validation loss - loss on training texts, in nats, of one model; None where either is missing or not finite."""
    if train_loss is None or val_loss is None or not (math.isfinite(train_loss) and math.isfinite(val_loss)):
        return None
    return val_loss - train_loss


def _shares(gram, weights=None):
    """The p_k of the m clients, equal where there are no weights."""
    p = np.ones(len(gram)) if weights is None else np.array(weights, dtype=np.float64)
    return p / p.sum()


def _mean_square(gram, p):
    """||sum_k p_k d_k||^2; 0 where the updates cancel up to rounding."""
    square = float(p @ gram @ p)
    return square if square > _ROUNDING * float(p @ np.diag(gram)) else 0.0


def _exact(tensor):
    return tensor.detach().to("cpu", torch.float64)


def _or_none(value):
    return float(value) if math.isfinite(value) else None
