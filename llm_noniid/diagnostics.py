"""How far clients pull apart, how alike their models see the data, which of them fit together, and the alarm.

Updates are compared as what they do to the layers, never as factors: A and B are a gauge (B R and R^-1 A are the same
adapter for any invertible R). Client k's update of a layer is d_k = s (B_k A_k - B A) [d, k], and everything about m
clients' updates is in their Gram matrix G_ij = <d_i, d_j> [m, m], fp64.
"""

import math

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import jensenshannon, squareform
from torch.nn import functional as F

from common.products import one_thread

_ROUNDING = 1e-14  # a squared norm below this part of what it is the sum of is 0 up to rounding
_SAME = 1e-6  # rounding of a distance: clients nearer than this are the same
JUMP = 1.0  # nats in a window
WINDOW = 10  # evaluations; a third of the planned ones where that is less, but at least 3
RATIO, HOLD = 1.3, 3  # losses in a row that are so many times the best: one bad evaluation is no divergence


# ---- updates


def update_gram(theta, clients, scale):
    """Inner products of the clients' updates of all layers together: G [m, m], fp64, numpy.

        d_k = s (B_k A_k - B A) = s U_k V_k,   U_k = [B_k - B, B] [d, 2r],   V_k = [A_k; A_k - A] [2r, k]
        <d_i, d_j> = s^2 tr((U_j^T U_i)(V_i V_j^T)) = s^2 sum_ab (U_i^T U_j)_ab (V_i V_j^T)_ab

    No d x k matrix is formed. On one thread: the same clients in the same order give the same bits everywhere.

    Args:
        theta: {"A.<layer>": [r, k], "B.<layer>": [d, r]}, the factors that the clients started from.
        clients: list of such dicts, one a client, of theta's shapes.
        scale: s = alpha/r.
    """
    gram = np.zeros((len(clients), len(clients)))
    with one_thread():
        for layer in (name[2:] for name in theta if name.startswith("A.")):
            (A, B), *pairs = ([_exact(f[f"{letter}.{layer}"]) for letter in "AB"] for f in (theta, *clients))
            U = torch.stack([torch.cat([B_k - B, B], dim=1) for _, B_k in pairs])  # [m, d, 2r]
            V = torch.stack([torch.cat([A_k, A_k - A]) for A_k, _ in pairs])  # [m, 2r, k]
            products = torch.einsum("ida,jdb->ijab", U, U) * torch.einsum("iak,jbk->ijab", V, V)  # [m, m, 2r, 2r]
            gram += scale**2 * products.sum((2, 3)).numpy()
    np.fill_diagonal(gram, np.maximum(np.diag(gram), 0))  # of a change of gauge alone it can round to below
    return (gram + gram.T) / 2


def plain_gram(theta, clients):
    """Inner products of the updates theta_k - theta [n] themselves: G [m, m], fp64, numpy. clients: their theta_k."""
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    with one_thread():
        for pieces in zip(*(v.detach().cpu().split(2**18) for v in (theta, *clients)), strict=True):
            start, *ends = (piece.double() for piece in pieces)
            updates = torch.stack(ends) - start  # [m, piece]
            gram += updates @ updates.T
    return gram.numpy()


def update_figures(gram, weights):
    """A round's figures, {name: float}, None where one is undefined; d = sum_k p_k d_k.

    relative_drift: sqrt(sum_k p_k ||d_k - d||^2) / ||d||, of m orthogonal updates of equal norm and weight
    sqrt(m - 1); update_cosine: mean over the pairs of clients that moved.

    Args: weights: of the clients in the mean, p_k times any number.
    """
    p, norms = np.array(weights, dtype=np.float64) / np.sum(weights), np.diag(gram)
    square, moved = float(p @ gram @ p), np.flatnonzero(norms > 0)
    figures = dict.fromkeys(("relative_drift", "update_cosine"))
    if square > _ROUNDING * float(p @ norms):
        figures["relative_drift"] = math.sqrt(max(float(p @ norms) / square - 1, 0))
    if len(moved) > 1:
        inverse = 1 / np.sqrt(norms[moved])
        cosines = np.clip(gram[np.ix_(moved, moved)] * inverse[:, None] * inverse, -1, 1)  # [moved, moved]
        figures["update_cosine"] = float(cosines[np.triu_indices(len(moved), 1)].mean())
    return figures


# ---- weights, gradients, hidden states


def weight_cosine_drift(mean, clients):
    """The source's "weight cosine drift": 1 - the mean cosine of the clients' weights (A and B, not products) with the
    mean's. Nearly always 0, as weights share what they started from.

    Args: mean [n]; clients: list of vectors [n].
    """
    mean = _exact(mean)
    return 1 - float(np.mean([F.cosine_similarity(mean, _exact(theta_k), dim=0).item() for theta_k in clients]))


def gradient_norm_variance(norms):
    """The variance over clients (divided by m) of their mean gradient norms [m]; None of one, or if one is infinite."""
    return float(np.var(norms)) if len(norms) > 1 and np.isfinite(norms).all() else None


def linear_cka(X, Y):
    """Linear centred kernel alignment of two models' hidden states of the same n tokens (Kornblith et al. 2019).

        ||Y_c^T X_c||_F^2 / (||X_c^T X_c||_F ||Y_c^T Y_c||_F),   columns centred; between 0 and 1

    1 where one is a rotation and a scaling of the other; about p/n for representations with nothing in common.

    Args: X [n, p], Y [n, q]: floating-point tensors, any device.
    Returns: a float, None where either is constant over the tokens.
    """
    X, Y = _exact(X), _exact(Y)
    if any(bool((M == M[:1]).all()) for M in (X, Y)):
        return None
    X, Y = (F.normalize(M - M.mean(0), dim=(0, 1), eps=0) for M in (X, Y))
    both, *each = (torch.linalg.vector_norm(a.T @ b) for a, b in ((Y, X), (X, X), (Y, Y)))
    return float(both**2 / (each[0] * each[1]))


def mean_cka(served, clients):
    """Mean `linear_cka` of the clients' hidden states with the served model's; None where none has one."""
    known = [value for value in (linear_cka(served, states) for states in clients) if value is not None]
    return sum(known) / len(known) if known else None


# ---- groups of clients


def cluster_labels(histograms, num_clusters):
    """Groups of clients by their label histograms: Ward's tree of them is cut, without any draw.

    Distance: the square root of the Jensen-Shannon divergence in bits (Lin 1991), between 0 (equal shares of labels)
    and 1 (no label in common); a metric, and one of a Euclidean space, as Ward's linkage wants. Clients nearer than
    `_SAME` are never apart: there are fewer groups where fewer clients differ.

    Args: histograms: [m, C], how many examples of each label a client has; num_clusters: 1 to m.
    Returns: int64 [m], from 0 in the order of each group's first client.
    """
    if len(histograms) == 1:
        return np.zeros(1, dtype=np.int64)
    counts = np.asarray(histograms)
    distances = np.nan_to_num(jensenshannon(counts[:, None], counts[None], base=2, axis=-1))  # nan: root of a rounded 0
    tree = hierarchy.linkage(squareform((distances + distances.T) / 2, checks=False), "ward")
    different = 1 + int((tree[:, 2] > _SAME).sum())
    labels = hierarchy.cut_tree(tree, n_clusters=min(num_clusters, different))[:, 0]
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]


# ---- the alarm


def alarms_of(lines, planned):
    """[{"detector": "diverged", "round", "message"}] of the first alarm, [] without. It forecasts nothing.

    The loss is nan or inf, rose by more than `JUMP` nats in `WINDOW` evaluations (FedProx, Li et al. 2020, appendix, in
    rounds), or stays above `RATIO` times its best.

    Args: lines: of metrics.jsonl, rounds rising; planned: how many evaluations the whole run has.
    """
    losses = [float(line["val_loss"]) for line in lines]  # "nan" and "inf" too
    window, best = max(3, min(WINDOW, planned // 3)), math.inf
    for i, (line, loss) in enumerate(zip(lines, losses, strict=True)):
        t, best, words = line["round"], min(best, loss), ""
        if not math.isfinite(loss):
            words = f"the loss is {loss}"
        elif i >= window and loss - losses[i - window] > JUMP:
            rounds = t - lines[i - window]["round"]
            words = f"the loss rose by {loss - losses[i - window]:.3g} nats in {rounds} rounds (limit {JUMP:g})"
        elif i + 1 >= HOLD and min(losses[i + 1 - HOLD : i + 1]) > RATIO * best:
            words = f"{HOLD} losses in a row are above {RATIO:g} times the best ({best:.3g})"
        if words:
            message = f"round {t}: {words}: lower --learning-rate or --local-steps"
            return [{"detector": "diverged", "round": t, "message": message}]
    return []


def _exact(tensor):
    return tensor.detach().to("cpu", torch.float64)
