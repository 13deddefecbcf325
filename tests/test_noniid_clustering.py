"""Clusters of clients: by brute force, against scikit-learn's Rand index on made-up groups, degenerate cases."""

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import adjusted_rand_score

from common.cli import UsageError
from llm_noniid.clustering import LINKAGES, cluster_labels, cluster_updates, label_distances
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
    for linkage in LINKAGES:
        assert cluster_updates(cosines_of(updates), 3, linkage).tolist() == [0, 1, 0, 1, 2]
    assert cluster_updates(cosines_of(updates[::-1]), 3).tolist() == [0, 1, 2, 1, 2]
    assert cluster_updates(cosines_of(updates), 1).tolist() == [0] * 5
    assert cluster_updates(cosines_of(updates), 5).tolist() == [0, 1, 2, 3, 4]
    assert cluster_updates([[1.0]], 1).tolist() == [0]
    assert cluster_updates(cosines_of(updates), 3).dtype == np.int64


@pytest.mark.parametrize("num_clusters", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_single_linkage_is_sattlers_optimal_split(seed, num_clusters):
    """Of all splits into so many groups, the one whose largest cosine across groups is smallest."""
    cosines = cosines_of(np.random.default_rng(seed).standard_normal((7, 5)))

    def across(labels):
        return cosines[labels[:, None] != labels[None]].max()

    splits = (np.array((0, *rest)) for rest in itertools.product(range(num_clusters), repeat=6))
    best = min(across(labels) for labels in splits if len(set(labels.tolist())) == num_clusters)
    found = cluster_updates(cosines, num_clusters, "single")
    assert len(set(found.tolist())) == num_clusters and across(found) == best


@pytest.mark.parametrize(("m", "groups", "noise"), [(10, 2, 1), (20, 4, 3), (30, 3, 3)])
def test_made_up_groups_are_found(m, groups, noise):
    scores = []
    for seed in range(10):
        truth, updates = grouped(seed, m, groups, noise)
        found = cluster_updates(cosines_of(updates), groups)
        scores.append(adjusted_rand_score(truth, found))
        assert len(set(found.tolist())) == groups
    assert np.mean(scores) > 0.97


def test_clients_of_mere_noise_spoil_the_other_linkages_only():
    scores = {linkage: [] for linkage in LINKAGES}
    for seed in range(10):
        truth, updates = grouped(seed, 20, 4, 3, bare=2)
        for linkage in LINKAGES:
            found = cluster_updates(cosines_of(updates), 4, linkage)
            scores[linkage].append(adjusted_rand_score(truth[2:], found[2:]))
    means = {linkage: np.mean(values) for linkage, values in scores.items()}
    assert means["ward"] > 0.85 and max(means[n] for n in LINKAGES if n != "ward") < 0.7


def test_identical_clients_stay_together():
    almost = np.ones((4, 4)) - 4e-16 * (1 - np.eye(4))  # rounding
    assert cluster_updates(almost, 3).tolist() == cluster_updates(np.ones((4, 4)), 3).tolist() == [0, 0, 0, 0]
    updates = np.random.default_rng(0).standard_normal((2, 50))[[0, 1, 1, 0, 1]]
    for num_clusters in (2, 3, 5):
        assert cluster_updates(cosines_of(updates), num_clusters).tolist() == [0, 1, 1, 0, 1]
    assert cluster_updates(np.eye(4), 4).tolist() == [0, 1, 2, 3]
    assert len(set(cluster_updates(np.eye(4), 2).tolist())) == 2  # all alike in their difference: still two groups


def test_clients_that_did_not_move_join_the_largest_group():
    updates = np.array([[0.0, 0], [1, 0], [0, 1], [0, 2], [0, 0], [0, 3]])
    assert cluster_updates(cosines_of(updates), 2).tolist() == [0, 1, 0, 0, 0, 0]
    assert cluster_updates(np.zeros((3, 3)), 2).tolist() == [0, 0, 0]
    assert cluster_updates(cosines_of(updates), 6).tolist() == [0, 1, 0, 0, 0, 0]


# ---- labels


def test_label_distances_are_scipys():
    histograms = np.random.default_rng(0).integers(0, 30, (6, 4))
    histograms[0] = [5, 0, 0, 0]
    found = label_distances(histograms)
    for i, j in itertools.product(range(6), repeat=2):
        expected = jensenshannon(histograms[i], histograms[j], base=2)
        assert found[i, j] == pytest.approx(np.nan_to_num(expected), abs=2e-8)
    assert label_distances([[1, 0], [0, 7]])[0, 1] == 1
    assert label_distances([[1, 1], [2, 0]])[0, 1] ** 2 == pytest.approx(1.5 - 0.75 * np.log2(3))


def test_cluster_labels():
    histograms = [[9, 1, 0], [0, 0, 5], [80, 20, 0], [1, 0, 60], [0, 4, 0], [9, 1, 0]]
    for linkage in LINKAGES:
        assert cluster_labels(histograms, 3, linkage).tolist() == [0, 1, 0, 1, 2, 0]
    assert cluster_labels([[1, 3], [2, 6], [10, 30]], 2).tolist() == [0, 0, 0]  # the same shares
    assert cluster_labels(np.eye(3), 3).tolist() == [0, 1, 2] and cluster_labels([[4, 4]], 1).tolist() == [0]
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 24)
    drawn = np.stack([draw.multinomial(200, (np.full(4, 0.1) + 0.6 * np.eye(4)[t])) for t in truth])
    assert adjusted_rand_score(truth, cluster_labels(drawn, 3)) == 1


@pytest.mark.parametrize("num_clusters", [0, 4, -1])
def test_impossible_numbers(num_clusters):
    with pytest.raises(UsageError, match=f"--num-clusters {num_clusters} of 3 clients: give 1 to 3"):
        cluster_updates(np.eye(3), num_clusters)
    with pytest.raises(UsageError, match="give 1 to 3"):
        cluster_labels(np.ones((3, 2)), num_clusters)


def test_bad_input():
    for bad in (np.ones((2, 3)), np.array([[1, np.nan], [np.nan, 1]]), [[1, 0.5], [0.2, 1]], [[1, 3.0], [3.0, 1]]):
        with pytest.raises(ValueError, match="cosines"):
            cluster_updates(bad, 1)
    with pytest.raises(ValueError, match="linkage"):
        cluster_updates(np.eye(2), 1, "median")
    with pytest.raises(UsageError, match="client 1 has no example"):
        cluster_labels([[1, 0], [0, 0]], 1)
    for bad in ([1, 2], [[1, -1]], [[np.nan, 1]]):
        with pytest.raises(ValueError, match="histograms"):
            cluster_labels(bad, 1)
