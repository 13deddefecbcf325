"""Which client has which training text, and how unlike the clients' texts are.

    parts, notes = partition(texts, "topic_skew", num_clients=10, seed=42, alpha=0.1)
    facts = statistics(texts, tokens, parts)                  # JSON values, for the run folder and its figures

A word is a run of letters, digits, inner apostrophes and hyphens, in lower case. Partitions know no tokens: the same
texts go to the same clients whatever the tokenizer.
"""

import itertools
import re
from collections import Counter

import numpy as np
import scipy.sparse

from common import sharding
from common.cli import UsageError
from common.seeding import stream
from common.sharding import equal_parts
from llm_noniid.flags import SKEW_TYPES, STYLE_CRITERIA
from llm_noniid.topics import js_divergence

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_PUNCTUATION = re.compile(r"[^\w\s]|_")


def partition(
    texts,
    strategy,
    num_clients,
    seed,
    alpha=0.1,
    style_criterion="length",
    skew_type="frequency",
    min_samples=1,
    sizes="dirichlet",
):
    """The training texts of `Texts` dealt to clients: disjoint, complete, `min_samples` a client at least.

    iid: at random, in equal parts. topic_skew: each topic in proportions drawn from Dirichlet(alpha)
    (`common.sharding.dirichlet`; sizes differ too), or with sizes "equal" as `equal_parts`. style_skew, token_skew:
    equal slices of the texts in the order of a score (`scores`), the first client has the lowest; texts with equal
    scores stand in random order.

    Args: strategy: one of `flags.PARTITIONS`; seed: of all draws; alpha: > 0 (small: few clients a topic);
        style_criterion: one of `STYLE_CRITERIA`; skew_type: one of `SKEW_TYPES`; min_samples: at least 1; sizes: one of
        `common.choices.SIZES`, of topic_skew.
    Returns: (list of num_clients sorted int64 arrays, notes: lines for the log).
    Raises: UsageError for an alpha that is not positive and finite, more clients than texts, and fewer texts than
        num_clients * min_samples.
    """
    n = len(texts.splits["train"])
    if n < num_clients * min_samples:
        at_most, each = n // min_samples, n // num_clients
        advice = f"lower --num-clients to at most {at_most}" if at_most else f"lower --min-samples to at most {each}"
        if not at_most and not each:
            advice = f"lower --num-clients to at most {n} and --min-samples to 1"
        raise UsageError(f"{n} texts cannot give {num_clients} clients {min_samples} each: {advice}")
    generator = stream(seed, "partition")
    if strategy == "iid":
        return sharding.iid(n, num_clients, generator, "texts"), []
    if strategy == "topic_skew" and sizes == "equal":
        return equal_parts(texts.labels["train"], num_clients, alpha, generator), []
    if strategy == "topic_skew":
        return sharding.dirichlet(texts.labels["train"], num_clients, alpha, generator, min_samples, "texts")
    if strategy not in ("style_skew", "token_skew"):
        raise ValueError(f"partition {strategy!r} is no partition")
    criterion = style_criterion if strategy == "style_skew" else skew_type
    values = scores(texts.splits["train"], criterion)
    # Not in the corpus' order, which may be by topic
    order = np.lexsort([generator.permutation(n), values])
    parts = [np.sort(order[part]) for part in sharding.contiguous(n, num_clients, what="texts")]
    flag = "--style-criterion" if strategy == "style_skew" else "--skew-type"
    notes = [] if values[order[0]] < values[order[-1]] else [f"{flag} {criterion}: all texts are alike, as iid"]
    return parts, notes


def words(text):
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def scores(texts, criterion, of_texts=None):
    """What style_skew and token_skew sort the texts by: fp64 [n].

    length: words. formality: punctuation marks and symbols per character. complexity: mean word length in characters.
    frequency: mean over the text's words of their share of all words of `texts`. truncation: length in characters.
    vocabulary: different words per word. A text without words has length, complexity, frequency and vocabulary 0.

    Args: of_texts: the words of each text, where they are known already.
    """
    if criterion == "formality":
        return np.array([len(_PUNCTUATION.findall(text)) / max(1, len(text)) for text in texts])
    if criterion == "truncation":
        return np.array([len(text) for text in texts], dtype=np.float64)
    of_texts = of_texts or [words(text) for text in texts]
    counts = np.array([len(these) for these in of_texts], dtype=np.float64)
    if criterion == "length":
        return counts
    if criterion == "complexity":
        sums = [sum(map(len, these)) for these in of_texts]
    elif criterion == "vocabulary":
        sums = [len(set(these)) for these in of_texts]
    else:
        every = list(itertools.chain.from_iterable(of_texts))
        times = Counter(every)
        shares = np.array([times[word] for word in every]) / max(1, len(every))
        sums = np.bincount(np.repeat(np.arange(len(texts)), counts.astype(np.int64)), shares, len(texts))
    return np.array(sums) / np.maximum(counts, 1)


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
    labels, encoded = texts.labels["train"], tokens["train"]
    of_texts = [words(text) for text in texts.splits["train"]]
    overlap, sizes = vocabulary_overlap(of_texts, parts)
    n_words, n_tokens = np.array([len(these) for these in of_texts]), encoded.lengths()
    shuffled = stream(seed, "chance partition").permutation(len(labels))
    chance = np.split(shuffled, np.cumsum([len(part) for part in parts])[:-1])
    criteria = {name: scores(texts.splits["train"], name, of_texts) for name in STYLE_CRITERIA + SKEW_TYPES}
    has = {"label": np.eye(len(texts.label_names))[labels], "token": token_counts(encoded)}  # [texts, classes] each

    def divergence(kind, parts):
        whole = has[kind].sum(axis=0)
        return _rounded([js_divergence(has[kind][part].sum(axis=0), whole) for part in parts])

    return {
        "counts": [len(part) for part in parts],
        "token_counts": [int(n_tokens[part].sum()) for part in parts],
        "label_names": list(texts.label_names),
        "label_histograms": sharding.class_counts(parts, labels, len(texts.label_names)).tolist(),
        "vocabulary_sizes": sizes.tolist(),
        "vocabulary_overlap": _rounded(overlap),
        "quantiles": list(QUANTILES),
        "length_words": _rounded([np.quantile(n_words[part], QUANTILES) for part in parts]),
        "length_words_all": _rounded(np.quantile(n_words, QUANTILES)),
        "length_tokens": _rounded([np.quantile(n_tokens[part], QUANTILES) for part in parts]),
        "length_tokens_all": _rounded(np.quantile(n_tokens, QUANTILES)),
        "means": {name: _rounded([values[part].mean() for part in parts]) for name, values in criteria.items()},
        "divergence_unit": "bits",
        "label_divergence": divergence("label", parts),
        "label_divergence_chance": divergence("label", chance),
        "token_divergence": divergence("token", parts),
        "token_divergence_chance": divergence("token", chance),
    }


def vocabulary_overlap(of_texts, parts):
    """(Jaccard index of the clients' sets of words: fp64 [K, K], their sizes: int64 [K]).

    Args: of_texts: the words of each text, a list of lists; parts: index arrays. Two clients without words overlap
    wholly.
    """
    from sklearn.preprocessing import MultiLabelBinarizer  # only here: it takes a while to import

    vocabularies = [{word for i in part for word in of_texts[i]} for part in parts]
    has = MultiLabelBinarizer(sparse_output=True).fit_transform(vocabularies)  # [K, words]
    common = (has @ has.T).toarray()  # [K, K]
    sizes = common.diagonal()
    union = sizes[:, None] + sizes - common
    return np.where(union > 0, common / np.maximum(union, 1), 1.0), sizes


def token_counts(encoded):
    """How often each token stands in each text, the ends of texts left out: sparse int64 [texts, tokens]."""
    scored = np.where(encoded.tokens == encoded.eos, 0, 1)
    return scipy.sparse.csr_array((scored, encoded.tokens.astype(np.int32), encoded.offsets))


def _rounded(values):
    """Nested lists of floats with 6 decimals."""
    return np.round(np.asarray(values, dtype=np.float64), 6).tolist()
