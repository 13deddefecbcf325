"""Groups of clients that fit together: by the directions of their updates, or by their labels.

Both cut a tree of clients, built from the bottom by joining the two nearest groups: the same clients in the same order
give the same groups, without any draw. Labels count from 0 in the order of each group's first client.
"""

import numpy as np

from common.cli import UsageError
from llm_noniid.partition import js_divergence

LINKAGES = ("ward", "average", "single", "complete")
# Rounding of a distance: clients nearer than this are the same. (Square roots make 1e-8 of the 1e-16 before them.)
_SAME = 1e-6


def cluster_updates(cosine_matrix, num_clusters, linkage="ward"):
    """Groups by the cosines of the clients' updates (Sattler et al. 2020, clustered federated learning): [m] labels.

    Distance ||u_i - u_j|| = sqrt(2 - 2 cos), u_i the update over its norm. Sattler's rule splits clients in two so that
    the largest cosine across is smallest: linkage "single" with 2 groups (with more it is the same rule). The default
    is Ward's, least squares within groups: with the others one client of mere noise becomes a group of its own and
    real groups stay together (20 clients in 4 groups, 2 of them mere noise, the others with a noise of up to 3 times
    the groups' differences: adjusted Rand index 0.94 against 0.2, 0.3, 0.4).

    A client that did not move has no direction, which its 0 on the diagonal says (`diagnostics.cosine_matrix`): it
    joins the largest group.

    Args: cosine_matrix: [m, m], symmetric, finite; num_clusters: 1 to m; linkage: one of `LINKAGES`.
    Returns: int64 array [m]; fewer groups than asked where fewer clients differ.
    Raises: UsageError for num_clusters outside 1 to m; ValueError for a bad matrix or linkage.
    """
    cosines = np.asarray(cosine_matrix, dtype=np.float64)
    if cosines.ndim != 2 or cosines.shape[0] != cosines.shape[1] or not np.isfinite(cosines).all():
        raise ValueError(f"cosines of m clients are a finite matrix m x m, not {cosines.shape}")
    if not np.allclose(cosines, cosines.T) or np.abs(cosines).max(initial=0) > 1 + _SAME:
        raise ValueError("the matrix is not one of cosines: take diagnostics.cosine_matrix")
    _check(len(cosines), num_clusters, linkage)
    moved = np.flatnonzero(np.diag(cosines) > 0)
    labels = np.zeros(len(cosines), dtype=np.int64)
    if len(moved):
        apart = np.sqrt(2 - 2 * np.clip(cosines[np.ix_(moved, moved)], -1, 1))  # [moved, moved]
        found = _cut(apart, min(num_clusters, len(moved)), linkage)
        labels[:] = np.bincount(found).argmax()
        labels[moved] = found
    return _by_first_member(labels)


def cluster_labels(histograms, num_clusters, linkage="ward"):
    """Groups by the clients' label histograms: [m] labels.

    Distance: the square root of the Jensen-Shannon divergence in bits, between 0 (equal shares of labels) and 1 (no
    label in common); a metric (Endres and Schindelin 2003), and one of a Euclidean space, as Ward's linkage wants.

    Args: histograms: [m, C], how many examples of each label a client has; num_clusters, linkage: as above.
    Returns: as `cluster_updates`.
    Raises: UsageError for num_clusters outside 1 to m, or a client without an example; ValueError for no histograms.
    """
    counts = np.asarray(histograms, dtype=np.float64)
    if counts.ndim != 2 or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"histograms {counts.shape} must be [m, C], counts of at least 0")
    empty = np.flatnonzero(counts.sum(axis=1) == 0)
    if len(empty):
        raise UsageError(f"client {empty[0]} has no example: its labels cannot be compared; raise --min-samples")
    _check(len(counts), num_clusters, linkage)
    return _by_first_member(_cut(label_distances(counts), num_clusters, linkage))


def label_distances(histograms):
    """sqrt(JSD(p_i, p_j)) in bits [m, m], p_i the i-th histogram over its sum."""
    counts = np.asarray(histograms, dtype=np.float64)
    return np.sqrt(js_divergence(counts[:, None], counts[None]))


def _check(m, num_clusters, linkage):
    if linkage not in LINKAGES:
        raise ValueError(f"linkage {linkage!r} is not one of {', '.join(LINKAGES)}")
    if not 1 <= num_clusters <= m:
        raise UsageError(f"--num-clusters {num_clusters} of {m} clients: give 1 to {m}")


def _cut(distances, num_clusters, linkage):
    """Labels of at most `num_clusters` groups; clients of distance 0 are never apart."""
    from scipy.cluster import hierarchy  # only here: it takes a while to import
    from scipy.spatial.distance import squareform

    if len(distances) == 1:
        return np.zeros(1, dtype=np.int64)
    distances = (distances + distances.T) / 2
    np.fill_diagonal(distances, 0)
    tree = hierarchy.linkage(squareform(distances, checks=False), linkage)
    different = 1 + int((tree[:, 2] > _SAME).sum())
    return hierarchy.cut_tree(tree, n_clusters=min(num_clusters, different))[:, 0]


def _by_first_member(labels):
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[labels.reshape(-1)]
