"""Partitions of texts: complete and never empty, ordered by their scores, and statistics against other code."""

import json
import math

import numpy as np
import pytest
from scipy.stats import entropy

from common.cli import UsageError
from llm_noniid import data, flags, partition

EVERY = [
    ("iid", {}),
    *(("topic_skew", {"alpha": alpha}) for alpha in (0.01, 0.1, 1.0, 100.0)),
    *(("topic_skew", {"alpha": alpha, "sizes": "equal"}) for alpha in (0.01, 0.1, 100.0)),
    *(("style_skew", {"style_criterion": criterion}) for criterion in flags.STYLE_CRITERIA),
    *(("token_skew", {"skew_type": kind}) for kind in flags.SKEW_TYPES),
]


def make(items, labels=None, n_labels=2):
    labels = np.zeros(len(items), dtype=np.int64) if labels is None else np.asarray(labels)
    return data.Texts("made", {"train": list(items)}, {"train": labels}, tuple("abcd"[:n_labels]), [], {"source": "t"})


def tokenized(texts):
    """One token a character, ids above 1; 1 is end of text."""
    pieces = [[*(ord(c) % 200 + 2 for c in text), 1] for text in texts.splits["train"]]
    offsets = np.cumsum([0, *map(len, pieces)])
    tokens = np.concatenate(pieces).astype(np.uint16)
    return {"train": data.TokenizedTexts(tokens, offsets, np.diff(offsets) - 1, 1, 0)}


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
    for clients, least in ((1, 1), (7, 10), (300, 1), (100, 3)):
        parts, notes = partition.partition(many, strategy, clients, 5, min_samples=least, **kwargs)
        assert len(parts) == clients and min(map(len, parts)) >= least
        assert sorted(np.concatenate(parts)) == list(range(300))
        assert all((np.diff(part) > 0).all() for part in parts) and all(isinstance(note, str) for note in notes)
        again, _ = partition.partition(many, strategy, clients, 5, min_samples=least, **kwargs)
        assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
        if strategy != "topic_skew" or "sizes" in kwargs:
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UsageError, match="300 texts cannot give 40 clients 8 each: lower --num-clients to at most 37"):
        partition.partition(many, strategy, 40, 0, min_samples=8, **kwargs)


@pytest.mark.parametrize("strategy, kwargs", EVERY[8:])
def test_clients_are_slices_in_the_order_of_the_score(many, strategy, kwargs):
    parts, notes = partition.partition(many, strategy, 6, 5, **kwargs)
    values = partition.scores(many.splits["train"], *kwargs.values())
    assert len(np.unique(values)) > 20 and not notes
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
    parts, notes = partition.partition(texts, "style_skew", 4, 0)
    assert notes == ["--style-criterion length: all texts are alike, as iid"]
    assert all(15 <= texts.labels["train"][part].sum() <= 35 for part in parts)  # not topic after topic
    other, _ = partition.partition(texts, "style_skew", 4, 1)
    assert parts[0].tolist() != other[0].tolist()


@pytest.mark.parametrize(
    "num_clients, min_samples, advice",
    [
        (10, 31, "lower --num-clients to at most 9"),
        (4, 301, "lower --min-samples to at most 75"),
        (301, 301, "lower --num-clients to at most 300 and --min-samples to 1"),
    ],
)
def test_what_would_make_the_texts_enough(many, num_clients, min_samples, advice):
    with pytest.raises(UsageError, match=f"300 texts cannot give {num_clients} clients {min_samples} each: {advice}$"):
        partition.partition(many, "topic_skew", num_clients, 0, min_samples=min_samples)


# ------------------------------------------------------------------------------------------------ statistics


def test_divergence_by_hand_and_as_a_difference_of_entropies():
    assert partition.js_divergence([1, 0], [0, 3]) == 1.0  # disjoint: one bit
    assert partition.js_divergence([2, 6], [1, 3]) == 0.0
    half = 0.5 * (1 * math.log2(1 / 0.75) + 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert partition.js_divergence([1, 0], [1, 1]) == pytest.approx(half)
    p, q = np.random.default_rng(0).integers(0, 4, (2, 20, 30))
    m = (p / p.sum(1, keepdims=True) + q / q.sum(1, keepdims=True)) / 2
    wanted = entropy(m, base=2, axis=1) - (entropy(p, base=2, axis=1) + entropy(q, base=2, axis=1)) / 2
    assert partition.js_divergence(p, q) == pytest.approx(wanted, abs=1e-12)


def test_statistics_by_hand():
    texts = make(["aa bb", "bb cc bb", "dd", "aa aa"], [0, 1, 1, 0])
    parts = [np.array([0, 3]), np.array([1, 2])]
    facts = partition.statistics(texts, tokenized(texts), parts)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["counts"] == [2, 2] and facts["token_counts"] == [12, 12]  # characters, and two ends of text
    assert facts["label_names"] == ["a", "b"] and facts["label_histograms"] == [[2, 0], [0, 2]]
    assert facts["vocabulary_sizes"] == [2, 3]
    assert facts["vocabulary_overlap"] == [[1, 0.25], [0.25, 1]]  # bb, of aa bb cc dd
    half = partition.js_divergence([1, 0], [1, 1])
    assert facts["label_divergence"] == pytest.approx([half, half], abs=1e-6)
    # characters: a a b b, space twice, a a a a | b b c c b b, space twice, d d
    whole = {"a": 6, "b": 6, "c": 2, "d": 2, " ": 4}
    for got, own in zip(
        facts["token_divergence"], ({"a": 6, "b": 2, " ": 2}, {"b": 4, "c": 2, "d": 2, " ": 2}), strict=True
    ):
        wanted = partition.js_divergence([own.get(c, 0) for c in whole], list(whole.values()))
        assert got == pytest.approx(wanted, abs=1e-6)
    middle = facts["quantiles"].index(0.5)
    assert [row[middle] for row in facts["length_words"]] == [2, 2] and facts["length_words_all"][-1] == 3
    assert facts["length_words"][1][0] == 1 and facts["length_tokens"][1][-1] == 9  # "bb cc bb" and its end
    assert facts["means"]["length"] == [2, 2] and facts["means"]["truncation"] == [5, 5]
    assert facts["means"]["vocabulary"] == pytest.approx([(1 + 0.5) / 2, (2 / 3 + 1) / 2], abs=1e-6)


def test_statistics_against_sets_and_numpy(many):
    parts, _ = partition.partition(many, "topic_skew", 6, 3, 0.3)
    tokens = tokenized(many)
    facts = partition.statistics(many, tokens, parts)
    items, labels = many.splits["train"], many.labels["train"]
    sets = [{word for i in part for word in items[i].lower().replace("!", "").split()} for part in parts]
    jaccard = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    assert np.allclose(facts["vocabulary_overlap"], jaccard, atol=1e-6)
    assert facts["vocabulary_sizes"] == list(map(len, sets))
    for k, part in enumerate(parts):
        assert facts["label_histograms"][k] == [int((labels[part] == c).sum()) for c in range(3)]
        n_words = [len(items[i].split()) for i in part]
        assert np.allclose(facts["length_words"][k], np.quantile(n_words, partition.QUANTILES), atol=1e-6)
        assert facts["token_counts"][k] == sum(len(items[i]) + 1 for i in part)
        assert facts["means"]["length"][k] == pytest.approx(np.mean(n_words), abs=1e-6)


def test_random_clients_diverge_as_chance_does_and_skewed_ones_more(many):
    tokens = tokenized(many)
    iid = partition.statistics(many, tokens, partition.partition(many, "iid", 10, 0)[0])
    skewed = partition.statistics(many, tokens, partition.partition(many, "topic_skew", 10, 0, 0.05, min_samples=10)[0])
    for kind in ("label", "token"):
        own, chance = (np.mean(iid[f"{kind}_divergence{end}"]) for end in ("", "_chance"))
        assert chance > 0 and 0.5 < own / chance < 2
        assert np.mean(skewed[f"{kind}_divergence"]) > 3 * np.mean(skewed[f"{kind}_divergence_chance"])
    other = partition.statistics(many, tokens, partition.partition(many, "iid", 10, 0)[0], seed=1)
    changed = {name for name in iid if iid[name] != other[name]}
    assert changed == {"label_divergence_chance", "token_divergence_chance"}


def test_statistics_refuse_what_is_no_partition(many):
    halves = [np.arange(150), np.arange(149, 300)]
    with pytest.raises(ValueError, match="exactly once"):
        partition.statistics(many, tokenized(many), halves)
    with pytest.raises(ValueError, match="client 1 has 0 examples"):
        partition.statistics(many, tokenized(many), [np.arange(300), np.arange(0)])


def test_texts_without_words():
    texts = make(["...", "!!", "?"])
    parts, _ = partition.partition(texts, "token_skew", 3, 0)
    facts = partition.statistics(texts, tokenized(texts), parts)
    assert facts["vocabulary_overlap"] == [[1.0] * 3] * 3 and facts["vocabulary_sizes"] == [0, 0, 0]
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
