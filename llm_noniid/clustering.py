"""Groups of clients that fit together: by the directions of their updates, or by their labels.

Both cut Ward's tree of clients, without any draw. (With average, single or complete linkage one client of mere noise
becomes a group of its own.) Labels count from 0 in the order of each group's first client; there are fewer groups than
asked for where fewer clients differ.
"""

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import jensenshannon, squareform

_SAME = 1e-6  # rounding of a distance: clients nearer than this are the same


def cluster_updates(cosines, num_clusters):
    """Groups by the cosines of the clients' updates (Sattler et al. 2020, clustered federated learning).

    Distance ||u_i - u_j|| = sqrt(2 - 2 cos), u_i the update over its norm.

    Args: cosines: [m, m]; num_clusters: 1 or more. Returns: int64 [m].
    """
    return _groups(np.sqrt(np.maximum(2 - 2 * cosines, 0)), num_clusters)


def cluster_labels(histograms, num_clusters):
    """Groups by the clients' label histograms.

    Distance: the square root of the Jensen-Shannon divergence in bits (Lin 1991), between 0 (equal shares of labels)
    and 1 (no label in common); a metric, and one of a Euclidean space, as Ward's linkage wants.

    Args: histograms: [m, C], how many examples of each label a client has; num_clusters: 1 to m. Returns: int64 [m].
    """
    counts = np.asarray(histograms)
    distances = jensenshannon(counts[:, None], counts[None], base=2, axis=-1)  # [m, m]
    return _groups(np.nan_to_num(distances), num_clusters)  # nan: the root of a rounded 0


def _groups(distances, num_clusters):
    """At most `num_clusters` groups; clients of distance 0 are never apart."""
    if len(distances) == 1:
        return np.zeros(1, dtype=np.int64)
    tree = hierarchy.linkage(squareform((distances + distances.T) / 2, checks=False), "ward")
    different = 1 + int((tree[:, 2] > _SAME).sum())
    labels = hierarchy.cut_tree(tree, n_clusters=min(num_clusters, different))[:, 0]
    _, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]
