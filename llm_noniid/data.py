"""Texts with topics: AG News, paragraphs of WikiText-2, a demo.

texts = load_texts("ag_news", max_samples=2000)           # what lies on disk, else the hub; "demo": neither
"""

import csv
import hashlib
import io
import re
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from common.cli import UsageError
from common.hub import hub_dataset, one_line
from common.seeding import stream
from common.sharding import stratified
from common.text import SPLITS, Corpus, data_folder, demo_documents, documents_sha256, load_corpus

AG_NEWS_TOPICS = ("World", "Sports", "Business", "Sci/Tech")  # classes 1 to 4 of the files, labels 0 to 3 here
HUB_NAME = "fancyzhx/ag_news"
VALIDATION_SHARE, MOST_VALIDATION = 0.05, 2000  # of AG News' training texts, which come without a validation split
ARTICLE_TOPICS = 8  # of WikiText-2
TOPICS_SEED = 2016  # of the data, not of a run: every run sees the same topics
SHORTEST_PARAGRAPH = 6  # words; what is shorter in WikiText is a piece of a table or formula
DEMO_CHARACTERS = 200  # a sample of the demo ends with the sentence that reaches them
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


@dataclass(frozen=True)
class Texts:
    """splits: {"train", "validation", "test"} -> texts; labels: int64 [texts] of each split, their topics.

    label_names: one for each label; fingerprint: for run.json (SHA-256 of texts and labels, counts, source).
    """

    name: str
    splits: dict[str, list[str]]
    labels: dict[str, np.ndarray]
    label_names: tuple[str, ...]
    fingerprint: dict


def load_texts(dataset, data_root=None, max_samples=0, seed=42):
    """The texts of `dataset` with their topics, as `Texts`.

    ag_news: four topics; a random twentieth of the training texts, 2,000 at most, topics in proportion, is the
    validation split. wikitext: a text is a paragraph of WikiText-2 (headings and fragments dropped); its topic is its
    article's (`article_topics`), because the corpus has none. demo: prose of the Python language reference, cut into a
    few sentences each; its pages belong to four topics.

    max_samples: above 0 only so many training texts, drawn, topics in proportion. seed: of that and of AG News'
    validation split, which does not depend on max_samples.
    """
    found, names, source = LOADERS[dataset](data_root, seed)
    n = len(found["train"][0])
    if 0 < max_samples < n:
        draw = stream(seed, "choice of training texts")
        found["train"] = _take(found["train"], stratified(found["train"][1], [max_samples, n - max_samples], draw)[0])
    splits, labels = ({split: found[split][i] for split in SPLITS} for i in (0, 1))
    content = {s: documents_sha256(splits[s]).encode() + labels[s].astype("<i8").tobytes() for s in SPLITS}
    fingerprint = {
        "dataset": dataset,
        "source": source,
        "sha256": {split: hashlib.sha256(of).hexdigest() for split, of in content.items()},
        "counts": {split: len(splits[split]) for split in SPLITS},
    }
    return Texts(dataset, splits, labels, tuple(names), fingerprint)


def as_corpus(texts):
    """`Texts` as a `common.text.Corpus` whose documents are the texts; `common.text.load_tokenizer` takes it."""
    return Corpus(texts.name, "texts", texts.fingerprint["source"], *(texts.splits[split] for split in SPLITS))


def _take(split, rows):
    texts, labels = split
    return [texts[i] for i in rows], labels[rows]


def _pieces(documents, topics, cut):
    """(texts, labels) of what `cut` makes of each document, with the document's topic."""
    parts = [(piece, topic) for document, topic in zip(documents, topics, strict=True) for piece in cut(document)]
    return [piece for piece, _ in parts], np.array([topic for _, topic in parts], dtype=np.int64)


# ---- AG News (Zhang et al. 2015)


def _ag_news(data_root, seed):
    splits, source = read_ag_news(data_root)
    labels = splits["train"][1]
    held_out = max(1, min(MOST_VALIDATION, int(VALIDATION_SHARE * len(labels))))
    draw = stream(seed, "validation texts")
    rows, held = stratified(labels, [len(labels) - held_out, held_out], draw)
    parts = {"train": _take(splits["train"], rows), "validation": _take(splits["train"], held)}
    return splits | parts, AG_NEWS_TOPICS, source


def read_ag_news(data_root=None):
    """({"train", "test"}: (texts, labels int64 [n], 0 to 3), source).

    From `data_root`/ag_news (ag_news_csv, or data_root itself), else the hub or its library's cache. A file has either
    the official layout (no header; class 1 to 4, title, description) or the header `label,text` and the same classes.
    Title and description are joined by a space, as on the hub, and texts are made alike (`tidy`).

    Raises UsageError where a row is broken (file and row named), and when there are neither files nor a hub.
    """
    root = data_folder(data_root)
    for folder in (root / "ag_news", root / "ag_news_csv", root):
        for train in ("train.csv", "train_sample.csv"):
            if (folder / train).is_file() and (folder / "test.csv").is_file():
                source = f"{folder.name}/{train}, test.csv"
                return {"train": read_csv(folder / train), "test": read_csv(folder / "test.csv")}, source
    columns, where = ("text", "label"), f"train.csv and test.csv into {root / 'ag_news'}"
    rows = hub_dataset((HUB_NAME,), {"train": columns, "test": columns}, f"no AG News under {root}", where)
    splits = {s: (list(map(tidy, of["text"])), np.array(of["label"], dtype=np.int64)) for s, of in rows.items()}
    return splits, f"hub, {HUB_NAME}"


def tidy(text):
    r"""One line without the files' traces: their mark of a line's end (\) and runs of white space become one space.

    So does a full stop between spaces: some public copies of the data join title and description by it.
    """
    return " ".join(word for word in text.replace("\\", " ").split() if word != ".")


def read_csv(path):
    """(texts, labels) of a file; errors as `read_ag_news`."""
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path} ({one_line(error)}): get the file again") from error
    columns = 2 if rows[:1] == [["label", "text"]] else 3
    texts, labels = [], []
    for i, row in list(enumerate(rows, 1))[columns == 2 :]:
        text = tidy(" ".join(row[1:]))
        if len(row) != columns or row[0].strip() not in ("1", "2", "3", "4") or not text:
            wanted = "label and text" if columns == 2 else "class, title and description"
            raise UsageError(f"{path} row {i} is not {wanted}, with a class from 1 to 4: mend it")
        labels.append(int(row[0]) - 1)
        texts.append(text)
    if len(texts) < 2:
        raise UsageError(f"{path} has {len(texts)} rows: get the file again")
    return texts, np.array(labels, dtype=np.int64)


# ---- WikiText-2


def _wikitext(data_root, seed):
    corpus = load_corpus("wikitext2", data_root)
    articles = [getattr(corpus, split) for split in SPLITS]
    topics, names = article_topics(articles[0], articles[1:])
    splits = {s: _pieces(*pair, paragraphs) for s, *pair in zip(SPLITS, articles, topics, strict=True)}
    return splits, names, f"{corpus.source} ({corpus.variant})"


def paragraphs(article):
    """The lines of an article that are neither short nor a heading (" = Title = ", " = = Section = = ")."""
    lines = (line.strip() for line in article.split("\n"))
    whole = (line for line in lines if len(line.split()) >= SHORTEST_PARAGRAPH)
    return [line for line in whole if not (line.startswith("= ") and line.endswith(" ="))]


def article_topics(train, others=(), k=ARTICLE_TOPICS):
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
        fit = KMeans(min(k, n), n_init=20, random_state=TOPICS_SEED).fit(rows)
        labels = [fit.labels_, *(fit.predict(words.transform(more)) for more in others)]
    kinds, first = np.unique(labels[0], return_index=True)
    order = kinds[np.argsort(first)]  # a topic's number -> the cluster's
    labels = [np.argsort(order)[clusters].astype(np.int64) for clusters in labels]
    centres = fit.cluster_centers_[order]
    rest = (centres.sum(axis=0) - centres) / max(1, len(centres) - 1)  # the mean of the other centres
    telling = np.argsort(rest - centres, axis=1, kind="stable")[:, :3]
    return labels, tuple(" ".join(names) for names in words.get_feature_names_out()[telling])


# ---- demo


def _demo(data_root, seed):
    from pydoc_data.topics import topics

    corpus = load_corpus("demo")
    page_of = {document: page for page, document in demo_documents(topics).items()}
    topic_of = {page: topic for topic, pages in enumerate(DEMO_TOPICS.values()) for page in pages.split()}
    splits = {}
    for split in SPLITS:
        documents = getattr(corpus, split)
        splits[split] = _pieces(documents, [topic_of.get(page_of[one], 0) for one in documents], sentences)
    return splits, DEMO_TOPICS, corpus.source


def sentences(document, characters=DEMO_CHARACTERS):
    """A document as pieces of whole sentences, each of `characters` or more; the rest joins the last."""
    pieces, current = [], ""
    for sentence in re.split(r"(?<=[.!?:;)])\s*\n|(?<=[.!?])\s+(?=[\"(]?[A-Z])", document.strip()):
        current = f"{current} {sentence}".strip()
        if len(current) >= characters:
            pieces.append(current)
            current = ""
    if current:
        pieces[-1:] = [" ".join([*pieces[-1:], current])]
    return pieces


LOADERS = {"ag_news": _ag_news, "wikitext": _wikitext, "demo": _demo}
