"""What documents are about."""

import numpy as np
from threadpoolctl import threadpool_limits

from common.text import demo_documents

ARTICLE_TOPICS = 8  # of WikiText-2
TOPICS_SEED = 2016  # of the data, not of a run: every run sees the same topics
DEMO_TOPICS = {  # the pages of the Python language reference; all others are the first topic's
    "statements": "",
    "expressions": "atom-identifiers atom-literals attribute-references await binary bitwise booleans calls "
    "comparisons conversions exprlists floating imaginary in integers lambda numbers operator-summary power shifting "
    "slicings subscriptions truth unary",
    "data model": "attribute-access callable-types class customization id-classes naming objects specialattrs "
    "specialnames types",
    "built-in types": "bltin-code-objects bltin-ellipsis-object bltin-null-object bltin-type-objects dict "
    "formatstrings lists numeric-types sequence-types string-methods strings typesfunctions typesmapping typesmethods "
    "typesmodules typesseq typesseq-mutable",
}


def demo_topics(documents):
    """The topic of each of the demo's documents, a number in the order of `DEMO_TOPICS`: int64 [documents]."""
    from pydoc_data.topics import topics  # which load_corpus found

    page_of = {document: page for page, document in demo_documents(topics).items()}
    topic_of = {page: topic for topic, pages in enumerate(DEMO_TOPICS.values()) for page in pages.split()}
    return np.array([topic_of.get(page_of[document], 0) for document in documents], dtype=np.int64)


def article_topics(train, others=(), k=ARTICLE_TOPICS, seed=TOPICS_SEED):
    """Unsupervised topics of articles: k-means of their TF-IDF vectors, rows of length 1, both scikit-learn's.

    x_iw proportional to (1 + log count_iw) (1 + log(n / df_w)); words of three letters or more that are in n // 120 to
    30 % of the training articles. On one thread: the order of sums cannot change a topic.

    Args: train: the articles that make the topics; others: further lists, which take the nearest centre; k: topics.
    Returns: (labels: int64 [articles] of train, then of each of `others`; names: each topic's three most telling
        words). Topics are numbered in the order of their first training article.
    """
    from sklearn.cluster import KMeans  # only here: it takes a while to import
    from sklearn.feature_extraction.text import TfidfVectorizer

    n = len(train)
    words = TfidfVectorizer(
        token_pattern=r"[^\W\d_]{3,}",
        min_df=max(1, n // 120),
        max_df=max(1, int(0.3 * n)),
        sublinear_tf=True,
        smooth_idf=False,
    )
    rows = words.fit_transform(train)  # [n, words]
    with threadpool_limits(1):
        fit = KMeans(min(k, n), n_init=20, random_state=seed).fit(rows)
        labels = [fit.labels_, *(fit.predict(words.transform(more)) for more in others)]
    kinds, first = np.unique(labels[0], return_index=True)
    order = kinds[np.argsort(first)]  # a topic's number -> the cluster's
    labels = [np.argsort(order)[clusters].astype(np.int64) for clusters in labels]
    centres = fit.cluster_centers_[order]
    rest = (centres.sum(axis=0) - centres) / max(1, len(centres) - 1)  # the mean of the other centres
    telling = np.argsort(rest - centres, axis=1, kind="stable")[:, :3]
    return labels, tuple(" ".join(names) for names in words.get_feature_names_out()[telling])
