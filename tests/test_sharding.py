"""Partitions: disjoint, complete, no client empty, and distributed as their rules say."""

import itertools

import numpy as np
import pytest
from comparing import check_partition

from common.cli import UsageError
from common.seeding import stream
from common.sharding import (
    category,
    class_counts,
    classes,
    contiguous,
    dirichlet,
    equal_parts,
    iid,
    overlap,
    stratified,
)


def rising(parts):
    """Strictly: without duplicates."""
    return all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)


def partition(parts, n):
    check_partition(parts, n)
    assert rising(parts)


@pytest.mark.parametrize("n, k", [(1, 1), (4, 4), (10, 3), (100, 7), (33, 32)])
def test_partitions_are_disjoint_complete_and_even(n, k):
    generator = stream(0, "sharding")
    for parts in (contiguous(n, k), iid(n, k, generator), contiguous(n, k, sizes=[1] * n)):
        partition(parts, n)
        counts = [len(part) for part in parts]
        assert len(parts) == k and max(counts) - min(counts) <= 1


def test_contiguous_is_in_order_and_iid_is_random_and_repeatable():
    assert [part.tolist() for part in contiguous(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    first, again, other = (iid(1000, 4, stream(seed, "sharding")) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert all(abs(part.mean() - 499.5) < 75 for part in first)  # 4 standard errors


def test_documents_are_cut_where_the_tokens_are_most_even():
    sizes = [10, 1, 1, 1, 1, 10, 2, 2, 2, 10]  # a quarter is 10: cuts after 10, 24 (nearer to 20 than 14) and 30
    assert [part.tolist() for part in contiguous(10, 4, sizes)] == [[0], [1, 2, 3, 4, 5], [6, 7, 8], [9]]
    draw = np.random.default_rng(0)
    for _ in range(30):
        sizes, k = draw.integers(1, 50, 40), 4
        parts = contiguous(40, k, sizes)
        check_partition(parts, 40)
        before = np.concatenate([[0], np.cumsum(sizes)])
        for i, part in enumerate(parts[1:], 1):
            off = np.abs(before - before[-1] * i / k)
            assert off[part[0]] == off.min()  # no other boundary is nearer to i/k of the tokens
    for sizes in itertools.permutations([100, 1, 1, 1, 1]):  # every client gets a document, however uneven they are
        check_partition(contiguous(5, 4, sizes), 5)


# ------------------------------------------------------------------------------------------- by label


def make_labels(n_classes, each):
    """`each` samples of every class, in random order."""
    return stream(0, "labels").permutation(np.repeat(np.arange(n_classes), each))


@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_stratified_deals_every_label_evenly(k):
    labels = stream(1, "labels").choice(5, size=203, p=[0.5, 0.3, 0.1, 0.05, 0.05])
    parts = stratified(labels, k, stream(0, "sharding"))
    partition(parts, 203)
    assert len(parts) == k and np.ptp([len(part) for part in parts]) <= 1
    counts = class_counts(parts, labels, 5)
    assert (np.ptp(counts, axis=0) <= 1).all() and (counts.sum(axis=0) == np.bincount(labels)).all()


def test_stratified_by_sizes_gives_each_part_its_share_of_a_label():
    labels = make_labels(100, 500)
    parts = stratified(labels, [45_000, 5_000], stream(0, "sharding"))
    check_partition(parts, 50_000)
    assert (class_counts(parts, labels, 100) == [[450], [50]]).all()
    uneven = np.repeat([0, 1, 2], [7, 2, 1])  # 3 of 10: shares 2.1, 0.6, 0.3
    parts = stratified(uneven, [3, 7], stream(0, "sharding"))
    assert rising(parts)
    assert class_counts(parts, uneven, 3).tolist() == [[2, 1, 0], [5, 1, 1]]
    for wrong in ([3, 8], [0, 10]):
        with pytest.raises(ValueError, match="sum to 10"):
            stratified(uneven, wrong, stream(0, "sharding"))
    with pytest.raises(UsageError, match="10 samples .* 11 clients"):
        stratified(uneven, 11, stream(0, "sharding"))


def test_classes_have_equally_many_clients_up_to_one():
    for n_classes, k in ((3, 4), (7, 9), (10, 5), (10, 10), (10, 13), (2, 1)):
        for nc in range(-(-n_classes // k), n_classes + 1):
            labels = make_labels(n_classes, 31)
            parts = classes(labels, k, nc, stream(nc, "sharding"))
            partition(parts, len(labels))
            counts = class_counts(parts, labels, n_classes)
            assert ((counts > 0).sum(axis=1) == nc).all()  # none twice at the seam of two permutations
            assert np.ptp((counts > 0).sum(axis=0)) <= (k * nc % n_classes > 0)
            dealt = [column[column > 0] for column in counts.T]
            assert all(np.ptp(column) <= 1 for column in dealt)


def test_classes_that_cannot_be_dealt():
    labels = make_labels(10, 8)
    generator = stream(0, "sharding")
    for nc in (0, -1, 11):
        with pytest.raises(UsageError, match=rf"--nc {nc} is outside 1 to 10"):
            classes(labels, 5, nc, generator)
    with pytest.raises(UsageError, match=r"class \d has 8 samples for 9 clients: lower --nc \(9\) or --num-clients"):
        classes(labels, 10, 9, generator)
    with pytest.raises(
        UsageError, match=r"--num-clients 3 x --nc 2 is 6: 4 of 10 classes have no client: \d, \d, \d, \d;"
    ):
        classes(labels, 3, 2, stream(4, "sharding"))
    with pytest.raises(UsageError, match="18 of 20 classes have no client: .* and 8 more;"):
        classes(make_labels(20, 2), 2, 1, generator)


def test_dirichlet_keeps_the_best_draw_and_takes_from_the_largest():
    """A plain loop over the same draws; and a class's samples are dealt in random order, not in the corpus'."""
    labels, k, least = np.repeat(np.arange(4), 100), 10, 12
    parts, notes = dirichlet(labels, k, 0.05, stream(0, "sharding"), least)
    generator, draws = stream(0, "sharding"), []
    for _ in range(20):
        counts = np.zeros((4, k), dtype=int)
        for row, ideal in zip(counts, 100 * generator.dirichlet([0.05] * k, size=4), strict=True):
            row += ideal.astype(int)
            for client in sorted(range(k), key=lambda c: ideal[c].astype(int) - ideal[c])[: 100 - row.sum()]:
                row[client] += 1
        draws.append((sum(max(0, least - n) for n in counts.sum(axis=0)), counts.sum(axis=0).tolist()))
    lacking, sizes = min(draws, key=lambda draw: draw[0])
    assert 0 < lacking < max(draw[0] for draw in draws) and f"; {lacking} moved" in notes[0]
    while min(sizes) < least:
        to, giver = sizes.index(min(sizes)), sizes.index(max(sizes))
        sizes[to] += 1
        sizes[giver] -= 1
    assert [len(part) for part in parts] == sizes
    even = np.concatenate(dirichlet(labels, 2, 1e9, stream(0, "sharding"))[0][:1])
    assert ((even % 100 < 50).sum() - 100) ** 2 < 30**2  # 200 of 400: about 100 from the classes' first halves


def test_dirichlet_is_as_skewed_as_alpha_says():
    labels = make_labels(20, 1000)
    for alpha in (1e-6, 0.1, 1.0, 10.0):
        parts, _ = dirichlet(labels, 10, alpha, stream(0, "sharding"))
        partition(parts, 20_000)
        shares = class_counts(parts, labels, 20) / 1000
        # Var of a coordinate of Dirichlet(alpha x 10): (1/10)(9/10) / (10 alpha + 1)
        assert shares.var() == pytest.approx(0.09 / (10 * alpha + 1), rel=0.25)
    even = class_counts(dirichlet(labels, 10, 1e9, stream(0, "sharding"))[0], labels, 20)
    assert np.ptp(even) <= 1


# ------------------------------------------------------------------------------------ overlap, category


@pytest.mark.parametrize("k, rho", [(1, 0.5), (5, 0.0), (5, 0.2), (5, 1.0)])
def test_overlap_shares_what_rho_says(k, rho):
    n = 1000
    parts, notes = overlap(np.zeros(n), k, rho, stream(0, "sharding"))
    assert rising(parts)
    assert [len(part) for part in parts] == [n // k] * k
    holders = np.bincount(np.concatenate(parts), minlength=n)
    # (1 - rho) n samples are kept by one client each, so every sample that nobody holds was given up.
    assert (holders > 0).sum() >= round((1 - rho) * n) and (holders == 0).sum() <= rho * n
    if rho == 0 or k == 1:
        check_partition(parts, n)
        assert notes == []
        return
    shared, nowhere = (holders > 1).sum(), (holders == 0).sum()
    assert notes == [f"--overlap-ratio {rho}: {shared} of {n} samples are with several clients, {nowhere} with none"]
    middle = np.flatnonzero(holders == 0).mean()
    assert middle == pytest.approx(n / 2, abs=4 * 289 / np.sqrt(nowhere))  # no place favoured
    # A given-up sample stays without a client when none of k draws of rho n/k from n - (1 - rho) n/k takes it.
    missed = (1 - rho * n / k / (n - (1 - rho) * n / k)) ** k
    assert nowhere == pytest.approx(rho * n * missed, abs=4 * np.sqrt(rho * n * missed))


def test_categories_go_round_the_clients_whole():
    names = np.array(["a", "b", "c", "d", "e"])[make_labels(5, 20)]
    parts, notes = category(names, 2, stream(0, "sharding"))
    check_partition(parts, 100)
    held = [sorted(set(names[part])) for part in parts]
    assert [len(h) for h in held] == [3, 2] and not set(held[0]) & set(held[1]) and notes == []
    assert rising(parts)
    seen = {tuple(sorted(set(names[category(names, 2, stream(s, "sharding"))[0][0]]))) for s in range(20)}
    assert len(seen) > 3  # the order is random


def test_more_clients_than_categories_split_them_evenly():
    labels = np.repeat([0, 1], [30, 61])
    parts, notes = category(labels, 5, stream(0, "sharding"))
    check_partition(parts, 91)
    owned = [set(labels[part]) for part in parts]
    assert all(len(o) == 1 for o in owned)
    for label, count in ((0, 30), (1, 61)):
        sizes = [len(part) for part in parts if labels[part[0]] == label]
        assert len(sizes) in (2, 3) and sum(sizes) == count and max(sizes) - min(sizes) <= 1
    assert notes == ["5 clients share 2 categories: each is split evenly among its clients"]
    # One sample of "1": a single client can have it, the other six share the rest.
    parts, _ = category(np.array([0] * 9 + [1]), 7, stream(0, "sharding"))
    check_partition(parts, 10)
    assert sorted(len(part) for part in parts) == [1, 1, 1, 1, 2, 2, 2]
    check_partition(category(np.array([0] * 9 + [1]), 10, stream(0, "sharding"))[0], 10)
    with pytest.raises(UsageError, match="10 samples .* 11 clients"):
        category(np.array([0] * 9 + [1]), 11, stream(0, "sharding"))


# ---- equal sizes, as Dirichlet says


def test_equal_parts_go_from_one_topic_each_to_the_topics_shares():
    even, uneven = np.repeat([0, 1, 2, 3], 100), np.repeat([0, 1, 2], [400, 150, 57])
    drawn = []
    for seed in range(2):
        # two clients' worth of each topic: the best assignment of clients to topics splits none
        one = class_counts(equal_parts(even, 8, 1e-3, stream(seed, "x")), even, 4)
        assert (one.max(axis=1) == 50).all() and (one.sum(axis=0) == 100).all()
        few = class_counts(equal_parts(uneven, 10, 1e-3, stream(seed, "x")), uneven, 3)
        drawn.append(few.tolist())
        assert ((few > 0).sum(axis=1) > 1).sum() <= 3 and set(few.sum(axis=1).tolist()) == {60, 61}
        alike = class_counts(equal_parts(uneven, 10, 1e6, stream(seed, "x")), uneven, 3)
        assert np.abs(alike - 60.7 * np.array([400, 150, 57]) / 607).max() < 1.5
    assert drawn[0] != drawn[1]
    with pytest.raises(UsageError, match="--alpha inf"):
        equal_parts(even, 8, np.inf, stream(0, "x"))


def test_equal_parts_keep_what_the_dirichlet_draw_says_of_every_client():
    """Rows and columns are scaled only, so that ratios of ratios are those of q."""
    labels, k = np.repeat([0, 1, 2], [50_000, 30_000, 40_000]), 6
    counts = class_counts(equal_parts(labels, k, 1.0, stream(4, "x")), labels, 3).astype(float)
    assert (counts.sum(axis=1) == 20_000).all() and (counts.sum(axis=0) == [50_000, 30_000, 40_000]).all()
    generator = stream(4, "x")
    q = generator.standard_gamma(2.0, (k, 3)) * (1 - generator.random((k, 3)))  # Gamma(1) each
    odds, wanted = (np.log(x[:, 1:] / x[:, :1]) for x in (counts, q))
    assert np.allclose(odds - odds[0], wanted - wanted[0], atol=0.05) and np.ptp(wanted) > 2
