"""Clusters of clients: by hand, against scikit-learn's Rand index on made-up groups, degenerate cases."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from llm_noniid.clustering import cluster_labels, cluster_updates
from llm_noniid.diagnostics import cosine_matrix


def cosines_of(updates):
    return cosine_matrix(np.asarray(updates, dtype=float) @ np.asarray(updates, dtype=float).T)


def grouped(seed, m, groups, noise, size=2000, bare=0):
    """(true groups [m], updates [m, size]): shared direction + the group's + noise; the first `bare` are noise only."""
    draw = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(groups), draw.integers(0, groups, m - groups)])
    own = draw.standard_normal((groups, size))[truth]
    scale = draw.uniform(0.3, 1, (m, 1)) * noise
    signal = draw.standard_normal(size) + own
    signal[:bare] = 0
    return truth, signal + scale * draw.standard_normal((m, size))


def test_by_hand():
    """Two pairs and one between; labels follow the first member."""
    updates = [[0, 1.0], [1, 0.1], [0.1, 2], [5, 0], [0, -1]]
    assert cluster_updates(cosines_of(updates), 3).tolist() == [0, 1, 0, 1, 2]
    assert cluster_updates(cosines_of(updates[::-1]), 3).tolist() == [0, 1, 2, 1, 2]
    assert cluster_updates(cosines_of(updates), 1).tolist() == [0] * 5
    assert cluster_updates(cosines_of(updates), 5).tolist() == [0, 1, 2, 3, 4]
    assert cluster_updates(np.ones((1, 1)), 1).tolist() == [0]
    assert cluster_updates(cosines_of(updates), 3).dtype == np.int64


@pytest.mark.parametrize(("m", "groups", "noise", "bare", "least"), [(30, 3, 3, 0, 0.97), (20, 4, 3, 2, 0.85)])
def test_made_up_groups_are_found_beside_clients_of_mere_noise_too(m, groups, noise, bare, least):
    scores = []
    for seed in range(10):
        truth, updates = grouped(seed, m, groups, noise, bare=bare)
        labels = cluster_updates(cosines_of(updates), groups)
        scores.append(adjusted_rand_score(truth[bare:], labels[bare:]))
        assert len(set(labels.tolist())) == groups
    assert np.mean(scores) > least


def test_identical_clients_stay_together():
    almost = np.ones((4, 4)) - 4e-16 * (1 - np.eye(4))  # rounding
    assert cluster_updates(almost, 3).tolist() == cluster_updates(np.ones((4, 4)), 3).tolist() == [0, 0, 0, 0]
    updates = np.random.default_rng(0).standard_normal((2, 50))[[0, 1, 1, 0, 1]]
    for num_clusters in (2, 3, 5):
        assert cluster_updates(cosines_of(updates), num_clusters).tolist() == [0, 1, 1, 0, 1]
    assert cluster_updates(np.eye(4), 4).tolist() == [0, 1, 2, 3]


def test_cluster_labels():
    histograms = [[9, 1, 0], [0, 0, 5], [80, 20, 0], [1, 0, 60], [0, 4, 0], [9, 1, 0]]
    assert cluster_labels(histograms, 3).tolist() == [0, 1, 0, 1, 2, 0]
    assert cluster_labels([[1, 3], [2, 6], [10, 30]], 2).tolist() == [0, 0, 0]  # the same shares
    assert cluster_labels(np.eye(3), 3).tolist() == [0, 1, 2] and cluster_labels([[4, 4]], 1).tolist() == [0]
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 24)
    drawn = np.stack([draw.multinomial(200, (np.full(4, 0.1) + 0.6 * np.eye(4)[t])) for t in truth])
    assert adjusted_rand_score(truth, cluster_labels(drawn, 3)) == 1
