"""Equal parts with unequal labels: margins, extremes of alpha, the Dirichlet draw behind them."""

import numpy as np
import pytest
from scipy.stats import kstest

from common.cli import UsageError
from common.equal_parts import equal_parts, whole_numbers
from common.seeding import stream


def labels_of(parts, labels):
    """[clients, labels]: how many examples."""
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def test_equal_parts_go_from_one_topic_each_to_the_topics_shares():
    even, uneven = np.repeat([0, 1, 2, 3], 100), np.repeat([0, 1, 2], [400, 150, 57])
    for seed in range(3):
        # two clients' worth of each topic: the best assignment of clients to topics splits none
        one = labels_of(equal_parts(even, 8, 1e-3, stream(seed, "x")), even)
        assert (one.max(axis=1) == 50).all() and (one.sum(axis=0) == 100).all()
        few = labels_of(equal_parts(uneven, 10, 1e-3, stream(seed, "x")), uneven)
        assert ((few > 0).sum(axis=1) > 1).sum() <= 3 and set(few.sum(axis=1).tolist()) == {60, 61}
        alike = labels_of(equal_parts(uneven, 10, 1e6, stream(seed, "x")), uneven)
        assert np.abs(alike - 60.7 * np.array([400, 150, 57]) / 607).max() < 1.5
    assert not np.array_equal(few, labels_of(equal_parts(uneven, 10, 1e-3, stream(9, "x")), uneven))
    with pytest.raises(UsageError, match="--alpha inf"):
        equal_parts(even, 8, np.inf, stream(0, "x"))


def test_equal_parts_keep_what_the_dirichlet_draw_says_of_every_client():
    """Rows and columns are scaled only, so that ratios of ratios are those of q; the draw is Dirichlet's."""
    labels, k = np.repeat([0, 1, 2], [50_000, 30_000, 40_000]), 6
    counts = labels_of(equal_parts(labels, k, 1.0, stream(4, "x")), labels).astype(float)
    assert (counts.sum(axis=1) == 20_000).all() and (counts.sum(axis=0) == [50_000, 30_000, 40_000]).all()
    generator = stream(4, "x")
    q = generator.standard_gamma(2.0, (k, 3)) * (1 - generator.random((k, 3)))  # Gamma(1) each
    odds, wanted = (np.log(x[:, 1:] / x[:, :1]) for x in (counts, q))
    assert np.allclose(odds - odds[0], wanted - wanted[0], atol=0.05) and np.ptp(wanted) > 2
    big = stream(5, "x")
    draws = np.log(big.standard_gamma(1.2, 4000)) + np.log1p(-big.random(4000)) / 0.2
    assert kstest(np.exp(draws), "gamma", args=(0.2,)).pvalue > 0.01


def test_whole_numbers_have_the_margins_even_beside_a_matrix_that_has_not():
    rows, columns = np.array([7, 7, 6]), np.array([12, 8])
    for x in (np.array([[4.2, 2.8], [4.2, 2.8], [3.6, 2.4]]), np.array([[20.0, 0], [0, 0], [1, 30]]), np.zeros((3, 2))):
        counts = whole_numbers(x, rows, columns)
        assert counts.sum(axis=1).tolist() == [7, 7, 6] and counts.sum(axis=0).tolist() == [12, 8] and counts.min() >= 0
    x = np.array([[4.2, 2.8], [4.2, 2.8], [3.6, 2.4]])
    assert np.abs(whole_numbers(x, rows, columns) - x).max() < 1
