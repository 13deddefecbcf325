"""Partitions of texts: complete and never empty, ordered by their scores."""

import json

import numpy as np
import pytest

from common.cli import UsageError
from llm_noniid import data, flags, partition, train

EVERY = [
    ("iid", {}),
    *(("topic_skew", {"alpha": alpha}) for alpha in (0.01, 100.0)),
    *(("topic_skew", {"alpha": alpha, "sizes": "equal"}) for alpha in (0.01, 100.0)),
    *(("style_skew", {"style_criterion": criterion}) for criterion in flags.STYLE_CRITERIA),
    *(("token_skew", {"skew_type": kind}) for kind in flags.SKEW_TYPES),
]


def make(items, labels=None, n_labels=2):
    labels = np.zeros(len(items), dtype=np.int64) if labels is None else np.asarray(labels)
    return data.Texts("made", {"train": list(items)}, {"train": labels}, tuple("abcd"[:n_labels]), {"source": "t"})


def dealt(texts, strategy, clients, seed, least=1, **flagged):
    """The parts that the flags give."""
    args = flags.parse(train.build_parser(), ["--partition", strategy])
    vars(args).update(num_clients=clients, seed=seed, min_samples=least, **flagged)
    parts, notes = partition.partition(args, texts)
    assert all(isinstance(note, str) for note in notes)
    return parts


@pytest.fixture(scope="module")
def many():
    """300 texts of three topics whose words overlap in part; topic after topic, as some files are."""
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], 100)
    letters = ["abcdefgh", "efghijkl", "ijklmnop"]
    items = []
    for label in labels:
        these = ["".join(rng.choice(list(letters[label]), rng.integers(1, 5))) for _ in range(rng.integers(1, 30))]
        items.append(" ".join(these) + "!" * int(rng.integers(0, 4)))
    return make(items, labels, 3)


@pytest.mark.parametrize("strategy, kwargs", EVERY)
def test_every_partition_is_disjoint_complete_and_large_enough(many, strategy, kwargs):
    for clients, least in ((1, 1), (7, 10), (150, 1), (100, 3)):
        parts = dealt(many, strategy, clients, 5, least, **kwargs)
        assert len(parts) == clients and min(map(len, parts)) >= max(2, least)  # one is held out
        assert sorted(np.concatenate(parts)) == list(range(300))
        assert all((np.diff(part) > 0).all() for part in parts)
        again = dealt(many, strategy, clients, 5, least, **kwargs)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        if strategy != "topic_skew" or "sizes" in kwargs:
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UsageError, match="300 texts cannot give 40 clients 8 each: lower --num-clients"):
        dealt(many, strategy, 40, 0, 8, **kwargs)


@pytest.mark.parametrize("strategy, kwargs", EVERY[5:])
def test_clients_are_slices_in_the_order_of_the_score(many, strategy, kwargs):
    parts = dealt(many, strategy, 6, 5, **kwargs)
    values = partition.scores(many.splits["train"], *kwargs.values())
    assert len(np.unique(values)) > 20
    for low, high in zip(parts[:-1], parts[1:], strict=True):
        assert values[low].max() <= values[high].min()
    assert values[parts[0]].mean() < values[parts[-1]].mean()


def test_scores_by_hand():
    items = ["The cat, the Dog!", "a b_c well-known don't", "...", "Z\u00fcrich 2004"]
    of = {name: partition.scores(items, name).tolist() for name in flags.STYLE_CRITERIA + flags.SKEW_TYPES}
    assert partition.words(items[1]) == ["a", "b", "c", "well-known", "don't"]
    assert partition.words(items[3]) == ["z\u00fcrich", "2004"]
    assert of["length"] == [4, 5, 0, 2]
    assert of["formality"] == pytest.approx([2 / 17, 3 / 22, 1, 0])
    assert of["complexity"] == pytest.approx([12 / 4, (1 + 1 + 1 + 10 + 5) / 5, 0, 10 / 2])
    assert of["truncation"] == [17, 22, 3, 11]
    assert of["vocabulary"] == pytest.approx([3 / 4, 1, 0, 1])
    share = 1 / 11  # eleven words in all, "the" twice
    assert of["frequency"] == pytest.approx([(2 + 1 + 2 + 1) * share / 4, share, 0, share])


def test_texts_with_equal_scores_are_dealt_at_random():
    texts = make(["ab cd"] * 200, np.repeat([0, 1], 100))
    parts = dealt(texts, "style_skew", 4, 0)
    assert all(15 <= texts.labels["train"][part].sum() <= 35 for part in parts)  # not topic after topic
    assert parts[0].tolist() != dealt(texts, "style_skew", 4, 1)[0].tolist()


def test_statistics(many):
    """Labels 0, 1, 2 of a hundred texts each: the first client says 0, which is right once in four."""
    rows, held = [np.array([0, 1, 100]), np.arange(200, 210)], [np.array([2, 101, 102, 201]), np.arange(210, 220)]
    facts = partition.statistics(many, rows, held)
    assert json.loads(json.dumps(facts)) == facts and facts["label_names"] == ["a", "b", "c"]
    assert facts["label_histograms"] == [[3, 3, 1], [0, 0, 20]]
    assert facts["commonest_topic_accuracy"] == (1 / 4 + 1) / 2
