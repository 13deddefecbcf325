"""Topics of texts that come without labels: the demo's by a table, WikiText's articles by clustering their words."""

import re

import numpy as np
import scipy.sparse

from common.seeding import stream

# ------------------------------------------------------------------------------------------------------- demo

DEMO_TOPICS = ("statements", "expressions", "data model", "built-in types")
_STATEMENTS = 0  # also what a later Python's reference adds under another name
_DEMO_PAGES = {
    1: "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls comparisons "
    "conversions exprlists floating imaginary in integers lambda numbers operator-summary power shifting slicings "
    "subscriptions truth unary",
    2: "attribute-access callable-types class customization id-classes naming objects specialattrs specialnames types",
    3: "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects dict formatstrings lists "
    "numeric-types sequence-types string-methods strings typesfunctions typesmapping typesmethods typesmodules "
    "typesseq typesseq-mutable",
}
_PAGE_TOPIC = {page: topic for topic, pages in _DEMO_PAGES.items() for page in pages.split()}


def demo_topic(page):
    """Which of `DEMO_TOPICS` a page of the Python language reference ("assert", "strings") belongs to: 0 to 3."""
    return _PAGE_TOPIC.get(page, _STATEMENTS)


# --------------------------------------------------------------------------------------------------- articles

ARTICLE_TOPICS = 8  # of WikiText-2: screen, war, history, sport, nature, music, roads, storms
_RESTARTS = 20
_MOST_ITERATIONS = 100
_LARGEST_SHARE = 0.3  # of the articles: a word in more of them tells no topic
_WORD = re.compile(r"[^\W\d_]{3,}")
_SEED = 2016  # of the data, not of a run: every run sees the same topics


def article_topics(train, others=(), k=ARTICLE_TOPICS):
    """Unsupervised topics of articles: spherical k-means (Dhillon & Modha 2001) of their TF-IDF vectors.

    x_iw proportional to (1 + log count_iw) log(n / df_w), ||x_i|| = 1; words in n // 120 or more and in at most 30 %
    of the training articles. Of `_RESTARTS` starts the one with the largest sum_i max_c x_i . centre_c is kept. The
    products are sparse and summed in one order, so that the number of threads cannot change a topic.

    Args: train: the articles that make the topics; others: further lists of articles, which take the nearest centre
        (nothing of them shapes the topics); k: topics, at most one an article.
    Returns: (labels: int64 [articles] of train, then one array for each of `others`; names: each topic's three most
        telling words). Topics are numbered in the order of their first training article.
    """
    counted = [_WORD.findall(article.lower()) for article in train]
    n, k = len(counted), min(k, len(counted))
    appears = {}
    for words in counted:
        for word in set(words):
            appears[word] = appears.get(word, 0) + 1
    low, high = max(1, n // 120), max(1, _LARGEST_SHARE * n)
    vocabulary = sorted(word for word, df in appears.items() if low <= df <= high)
    column = {word: j for j, word in enumerate(vocabulary)}
    weight = np.log(n / np.array([appears[word] for word in vocabulary])) if n > 1 else np.ones(len(vocabulary))
    rows = _unit_rows(counted, column, weight)
    fits = [_spherical_kmeans(rows, k, stream(_SEED, "topics of articles", 0, start)) for start in range(_RESTARTS)]
    labels, centres, _ = max(fits, key=lambda fit: fit[2])  # the first of equals
    found, first = np.unique(labels, return_index=True)
    order = found[np.argsort(first)]
    centres = centres[order]
    everything = [rows, *(_unit_rows([_WORD.findall(a.lower()) for a in more], column, weight) for more in others)]
    # [articles], the first of equals: an article without a known word has topic 0
    labels = [np.asarray(x @ centres.T).argmax(axis=1).astype(np.int64) for x in everything]
    rest = (centres.sum(axis=0) - centres) / max(1, len(centres) - 1)  # the mean of the other centres
    telling = np.argsort(rest - centres, axis=1, kind="stable")[:, :3]
    names = [" ".join(vocabulary[j] for j in top) for top in telling]
    return labels, tuple(name or f"topic {i}" for i, name in enumerate(names))


def _unit_rows(counted, column, weight):
    """TF-IDF rows of length 1 (0 for an article without a known word): csr fp64 [articles, words]."""
    indices, counts, starts = [], [], [0]
    for words in counted:
        known = [column[word] for word in words if word in column]
        which, how_often = np.unique(np.array(known, dtype=np.int64), return_counts=True)
        indices.append(which)
        counts.append(how_often)
        starts.append(starts[-1] + len(which))
    indices = np.concatenate([np.empty(0, dtype=np.int64), *indices])
    data = (1 + np.log(np.concatenate([np.empty(0), *counts]))) * weight[indices]
    rows = scipy.sparse.csr_array((data, indices, starts), shape=(len(counted), len(column)))
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    rows.data /= np.repeat(np.where(norms > 0, norms, 1), np.diff(rows.indptr))
    return rows


def _spherical_kmeans(rows, k, generator):
    """(labels [n], unit centres [k, words], sum of cosines) of one start from k random articles."""
    centres = rows[np.sort(generator.choice(rows.shape[0], k, replace=False))].toarray()  # [k, words]
    labels = None
    for _ in range(_MOST_ITERATIONS):
        cosines = np.asarray(rows @ centres.T)  # [n, k]
        nearest = cosines.argmax(axis=1)
        if labels is not None and np.array_equal(nearest, labels):
            break
        labels = nearest
        member = scipy.sparse.csr_array((np.ones(len(labels)), (labels, np.arange(len(labels)))), (k, len(labels)))
        sums = (member @ rows).toarray()  # [k, words]
        norms = np.sqrt((sums * sums).sum(axis=1))
        keeps = norms > 0  # an empty cluster keeps its centre
        centres[keeps] = sums[keeps] / norms[keeps, None]
    return labels, centres, float(cosines.max(axis=1).sum())
