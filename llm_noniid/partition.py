"""Which client has which training text, and how unlike the clients' texts are.

    parts, notes = partition(texts, "topic_skew", num_clients=10, seed=42, alpha=0.1)
    facts = statistics(texts, tokens, parts)                  # JSON values, for the run folder and its figures

A word is a run of letters, digits, inner apostrophes and hyphens, in lower case. Partitions know no tokens: the same
texts go to the same clients whatever the tokenizer.
"""

import re

import numpy as np
import scipy.sparse
from scipy.special import rel_entr

from common import sharding
from common.cli import UsageError
from common.seeding import stream

PARTITIONS = ("iid", "topic_skew", "style_skew", "token_skew")
STYLE_CRITERIA = ("length", "formality", "complexity")
SKEW_TYPES = ("frequency", "truncation", "vocabulary")
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def partition(
    texts, strategy, num_clients, seed, alpha=0.1, style_criterion="length", skew_type="frequency", min_samples=1
):
    """The training texts of `Texts` dealt to clients: disjoint, complete, `min_samples` a client at least.

    iid: at random, in equal parts. topic_skew: each topic in proportions drawn from Dirichlet(alpha)
    (`common.sharding.dirichlet`; sizes differ too). style_skew, token_skew: equal slices of the texts in the order of
    a score (`scores`), the first client has the lowest; texts with equal scores stand in random order.

    Args: seed: of all draws; alpha: concentration, > 0 (small: few clients a topic); style_criterion: "length",
        "formality" or "complexity"; skew_type: "frequency", "truncation" or "vocabulary".
    Returns: (list of num_clients sorted int64 arrays, notes: lines for the log).
    Raises: UsageError for an unknown strategy, criterion or type, an alpha that is not positive and finite, more
        clients than texts, and fewer texts than num_clients * min_samples.
    """
    n = len(texts.splits["train"])
    if strategy not in PARTITIONS:
        raise UsageError(f"unknown partition {strategy!r}: choose one of {', '.join(PARTITIONS)}")
    if min_samples < 1:
        raise UsageError(f"--min-samples {min_samples} must be at least 1: no client may be empty")
    if n < num_clients * min_samples:
        at_most, each = n // min_samples, n // num_clients
        advice = f"lower --num-clients to at most {at_most}" if at_most else f"lower --min-samples to at most {each}"
        if not at_most and not each:
            advice = f"lower --num-clients to at most {n} and --min-samples to 1"
        raise UsageError(f"{n} texts cannot give {num_clients} clients {min_samples} each: {advice}")
    generator = stream(seed, "partition")
    if strategy == "iid":
        return sharding.iid(n, num_clients, generator, "texts"), []
    if strategy == "topic_skew":
        return sharding.dirichlet(texts.labels["train"], num_clients, alpha, generator, min_samples, "texts")
    criterion, known, flag = (
        (style_criterion, STYLE_CRITERIA, "--style-criterion")
        if strategy == "style_skew"
        else (skew_type, SKEW_TYPES, "--skew-type")
    )
    if criterion not in known:
        raise UsageError(f"{flag} {criterion} is unknown: choose one of {', '.join(known)}")
    values = scores(texts.splits["train"], criterion)
    # Not in the corpus' order, which may be by topic
    order = np.lexsort([generator.permutation(n), values])
    parts = [np.sort(order[part]) for part in sharding.contiguous(n, num_clients, what="texts")]
    notes = [] if values[order[0]] < values[order[-1]] else [f"{flag} {criterion}: all texts are alike, as iid"]
    return parts, notes


# ---------------------------------------------------------------------------------------------------- scores


def words(text):
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def scores(texts, criterion, found=None):
    """What style_skew and token_skew sort the texts by: fp64 [n].

    length: words. formality: punctuation marks and symbols per character. complexity: mean word length in characters.
    frequency: mean over the text's words of their share of all words of `texts`. truncation: length in characters.
    vocabulary: different words per word. A text without words has length, complexity, frequency and vocabulary 0.

    Args: found: the words of each text, where they are known already.
    Raises: ValueError for another criterion.
    """
    if criterion == "formality":
        return np.array([len(_PUNCTUATION.findall(text)) / max(1, len(text)) for text in texts])
    if criterion == "truncation":
        return np.array([len(text) for text in texts], dtype=np.float64)
    if criterion not in ("length", "complexity", "frequency", "vocabulary"):
        raise ValueError(f"criterion {criterion!r} is none of {', '.join(STYLE_CRITERIA + SKEW_TYPES)}")
    found = [words(text) for text in texts] if found is None else found
    counts = np.array([len(these) for these in found], dtype=np.float64)
    if criterion == "length":
        return counts
    if criterion == "complexity":
        sums = np.array([sum(map(len, these)) for these in found], dtype=np.float64)
    elif criterion == "vocabulary":
        sums = np.array([len(set(these)) for these in found], dtype=np.float64)
    else:
        ids, owner = _numbered(found)[:2]
        share = np.bincount(ids) / max(1, len(ids))
        sums = np.bincount(owner, weights=share[ids], minlength=len(found))
    return sums / np.maximum(counts, 1)


def _numbered(found):
    """(number of each word [all words], which text it stands in [all words], how many different words)."""
    number = {}
    ids = np.array([number.setdefault(word, len(number)) for these in found for word in these], dtype=np.int64)
    return ids, np.repeat(np.arange(len(found)), [len(these) for these in found]), len(number)


# ------------------------------------------------------------------------------------------------ statistics


def statistics(texts, tokens, parts, seed=0):
    """How the clients' training texts differ, as JSON values: a list has an entry for each of the K clients.

    counts; token_counts; label_names; label_histograms [K, topics]; vocabulary_sizes; vocabulary_overlap [K, K], the
    Jaccard index |V_a and V_b| / |V_a or V_b| of the clients' sets of words; quantiles (which), at them length_words
    and length_tokens [K, quantiles] (tokens as cut to max_length, end of text counted) and of all texts together
    length_words_all and length_tokens_all; means: {criterion: [K]}, the clients' mean of each of `scores`;
    label_divergence and token_divergence, the Jensen-Shannon divergence in bits of a client's distribution of topics,
    and of tokens (without end of text), to that of all clients' texts together.

    A small random sample diverges from the whole, too: label_divergence_chance and token_divergence_chance [K] are the
    same figures of one random partition (of key `seed`) into parts of the same sizes.

    Args: texts: `Texts`; tokens: {"train": `TokenizedTexts`, ...}; parts: from `partition`.
    Raises: ValueError when a part is empty or texts are missing or doubled.
    """
    sharding.check(parts, len(texts.splits["train"]))
    labels, n_labels, encoded = texts.labels["train"], len(texts.label_names), tokens["train"]
    found = [words(text) for text in texts.splits["train"]]
    overlap, sizes = vocabulary_overlap(found, parts)
    n_words, n_tokens = np.array([len(these) for these in found]), encoded.lengths()
    histograms = sharding.class_counts(parts, labels, n_labels)
    shuffled = stream(seed, "chance partition").permutation(len(labels))
    chance = np.split(shuffled, np.cumsum([len(part) for part in parts])[:-1])
    criteria = {name: scores(texts.splits["train"], name, found) for name in STYLE_CRITERIA + SKEW_TYPES}

    def count_labels(rows):
        return np.bincount(labels[rows], minlength=n_labels)

    def count_tokens(rows):
        return token_counts(encoded, rows, int(encoded.tokens.max()) + 1)

    all_labels, all_tokens = count_labels(np.arange(len(labels))), count_tokens(np.arange(len(labels)))

    return {
        "counts": [len(part) for part in parts],
        "token_counts": [int(n_tokens[part].sum()) for part in parts],
        "label_names": list(texts.label_names),
        "label_histograms": histograms.tolist(),
        "vocabulary_sizes": sizes.tolist(),
        "vocabulary_overlap": _rounded(overlap),
        "quantiles": list(QUANTILES),
        "length_words": _rounded([np.quantile(n_words[part], QUANTILES) for part in parts]),
        "length_words_all": _rounded(np.quantile(n_words, QUANTILES)),
        "length_tokens": _rounded([np.quantile(n_tokens[part], QUANTILES) for part in parts]),
        "length_tokens_all": _rounded(np.quantile(n_tokens, QUANTILES)),
        "means": {name: _rounded([values[part].mean() for part in parts]) for name, values in criteria.items()},
        "divergence_unit": "bits",
        "label_divergence": _rounded([js_divergence(count_labels(rows), all_labels) for rows in parts]),
        "label_divergence_chance": _rounded([js_divergence(count_labels(rows), all_labels) for rows in chance]),
        "token_divergence": _rounded([js_divergence(count_tokens(rows), all_tokens) for rows in parts]),
        "token_divergence_chance": _rounded([js_divergence(count_tokens(rows), all_tokens) for rows in chance]),
    }


def js_divergence(p, q):
    """Jensen-Shannon divergence (Lin 1991) in bits, from 0 (equal) to 1 (disjoint), along the last axis.

    (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2. Args: p, q: counts or probabilities [..., C], broadcast; each
    row is divided by its sum. Raises: ValueError for negative values, or a sum that is not positive and finite.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if p.shape[-1] != q.shape[-1] or not all(
        (0 < x.sum(-1)).all() and x.min() >= 0 and np.isfinite(x).all() for x in (p, q)
    ):
        raise ValueError("p and q must have one number of classes, no negative values and positive sums")
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    m = (p + q) / 2
    nats = (rel_entr(p, m) + rel_entr(q, m)).sum(-1) / 2
    return np.clip(nats / np.log(2), 0, 1)  # rounding may leave the range


def vocabulary_overlap(found, parts):
    """(Jaccard index of the clients' sets of words: fp64 [K, K], their sizes: int64 [K]).

    Args: found: the words of each text, a list of lists; parts: index arrays. Two clients without words overlap wholly.
    """
    ids, owner, n_words = _numbered(found)
    client = np.full(len(found), -1)
    for k, part in enumerate(parts):
        client[part] = k
    has = scipy.sparse.csr_array(
        (np.ones(len(ids), dtype=np.int64), (client[owner], ids)), shape=(len(parts), max(1, n_words))
    )
    has.sum_duplicates()
    has.data[:] = 1
    common = (has @ has.T).toarray()  # [K, K]
    sizes = common.diagonal()
    union = sizes[:, None] + sizes - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0), sizes


def token_counts(encoded, rows, size):
    """How often each token stands in the texts `rows`, their ends of text left out: int64 [size]."""
    rows = np.asarray(rows)
    lengths = encoded.offsets[rows + 1] - encoded.offsets[rows]
    starts = np.repeat(encoded.offsets[rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    counts = np.bincount(encoded.tokens[starts + np.arange(len(starts))], minlength=size)
    counts[encoded.eos] = 0
    return counts


def _rounded(values):
    """Nested lists of floats with 6 decimals."""
    return np.round(np.asarray(values, dtype=np.float64), 6).tolist()
