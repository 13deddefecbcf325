"""Labelled texts for language models, tokenised once and padded per batch: AG News, WikiText-2, a demo.

texts = load_texts("ag_news", max_samples=2000)           # what lies on disk, else the hub; "demo": neither
tokenizer = common.text.load_tokenizer("bpe:2048", as_corpus(texts))
batch = encode(texts, tokenizer)["train"].batch(rows)     # input_ids, attention_mask, labels
"""

import hashlib
import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from common import text
from common.batches import padded
from common.cli import UsageError
from common.seeding import stream
from common.sharding import stratified
from common.text import SPLITS, Corpus, documents_sha256, load_corpus
from llm_noniid import ag_news
from llm_noniid.topics import DEMO_TOPICS, article_topics, demo_topics

IGNORE = -100  # the label that no loss counts
VALIDATION_SHARE, MOST_VALIDATION = 0.05, 2000  # of AG News' training texts, which come without a validation split
SHORTEST_PARAGRAPH = 6  # words; what is shorter in WikiText is a piece of a table or formula
DEMO_CHARACTERS = 200  # a sample of the demo ends with the sentence that reaches them


@dataclass(frozen=True)
class Texts:
    """splits: {"train", "validation", "test"} -> texts; labels: int64 [texts] of each split; notes: lines for the log.

    label_names: one for each label; fingerprint: for run.json (SHA-256 of texts and labels, counts, source).
    """

    name: str
    splits: dict[str, list[str]]
    labels: dict[str, np.ndarray]
    label_names: tuple[str, ...]
    notes: list[str]
    fingerprint: dict


def load_texts(dataset, data_root=None, cache_dir=None, max_samples=0, seed=42):
    """The texts of `dataset` with their topics, as `Texts`.

    ag_news: four topics (`llm_noniid.ag_news`); a random twentieth of the training texts, 2,000 at most, topics in
    proportion, is the validation split. wikitext: a text is a paragraph of WikiText-2 (headings and fragments dropped);
    its topic is its article's (`article_topics`), because the corpus has none. demo: prose of the Python language
    reference, cut into a few sentences each; its pages belong to four topics.

    max_samples: above 0 only so many training texts, drawn, topics in proportion. seed: of that and of AG News'
    validation split, which does not depend on max_samples.
    """
    splits, labels, names, source, notes = LOADERS[dataset](data_root, cache_dir, seed)
    n = len(splits["train"])
    if 0 < max_samples < n:
        generator = stream(seed, "choice of training texts")
        chosen = stratified(labels["train"], [max_samples, n - max_samples], generator, "texts")[0]
        splits, labels = splits | {"train": _take(splits["train"], chosen)}, labels | {"train": labels["train"][chosen]}
    content = {s: documents_sha256(splits[s]).encode() + labels[s].astype("<i8").tobytes() for s in SPLITS}
    fingerprint = {
        "dataset": dataset,
        "source": source,
        "sha256": {split: hashlib.sha256(of).hexdigest() for split, of in content.items()},
        "counts": {split: len(splits[split]) for split in SPLITS},
        "label_names": list(names),
    }
    return Texts(dataset, splits, labels, tuple(names), notes, fingerprint)


def as_corpus(texts):
    """`Texts` as a `common.text.Corpus` whose documents are the texts; `common.text.load_tokenizer` takes it."""
    return Corpus(texts.name, "texts", texts.fingerprint["source"], *(texts.splits[split] for split in SPLITS))


def _take(items, rows):
    return [items[i] for i in rows]


def _ag_news(data_root, cache_dir, seed):
    splits, source, notes = ag_news.read(data_root)
    items, labels = splits["train"]
    n = len(items)
    held_out = max(1, min(MOST_VALIDATION, int(VALIDATION_SHARE * n)))
    rows, held = stratified(labels, [n - held_out, held_out], stream(seed, "validation texts"), "texts")
    texts = {"train": _take(items, rows), "validation": _take(items, held), "test": splits["test"][0]}
    labels = {"train": labels[rows], "validation": labels[held], "test": splits["test"][1]}
    return texts, labels, ag_news.TOPICS, source, notes


def _wikitext(data_root, cache_dir, seed):
    corpus = load_corpus("wikitext2", data_root)
    articles = [getattr(corpus, split) for split in SPLITS]
    topics, names = article_topics(articles[0], articles[1:])
    splits, labels = {}, {}
    for split, documents, of_article in zip(SPLITS, articles, topics, strict=True):
        parts = [(part, topic) for d, topic in zip(documents, of_article, strict=True) for part in _paragraphs(d)]
        kept = [(part, topic) for part, topic in parts if len(part.split()) >= SHORTEST_PARAGRAPH]
        splits[split] = [part for part, _ in kept]
        labels[split] = np.array([topic for _, topic in kept], dtype=np.int64)
    return splits, labels, names, f"{corpus.source} ({corpus.variant})", []


def _paragraphs(article):
    """The lines of an article that are neither blank nor a heading (" = Title = ", " = = Section = = ")."""
    lines = (line.strip() for line in article.split("\n"))
    return [line for line in lines if line and not (line.startswith("= ") and line.endswith(" ="))]


def _demo(data_root, cache_dir, seed):
    corpus = load_corpus("demo")
    splits, labels = {}, {}
    for split in SPLITS:
        documents = getattr(corpus, split)
        topics = zip(documents, demo_topics(documents), strict=True)
        pieces = [(piece, topic) for document, topic in topics for piece in sentences(document)]
        splits[split] = [piece for piece, _ in pieces]
        labels[split] = np.array([topic for _, topic in pieces], dtype=np.int64)
    return splits, labels, DEMO_TOPICS, corpus.source, []


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


# ---------------------------------------------------------------------------------------------- tokenised


@dataclass(frozen=True)
class TokenizedTexts(text.TokenizedDocuments):
    """A tokenised split: text i is `tokens[offsets[i] : offsets[i + 1]]`, end of text last unless the text was cut.

    eos: the id of end of text, also the padding.
    """

    eos: int

    def scored(self, rows):
        """How many tokens of each of the texts `rows` are scored, all but its first: int64 [n]."""
        return self.lengths()[rows] - 1

    def units(self, rows):
        """What a mean loss divides by, of each of the texts `rows`: its scored tokens, of labels 1 (int64 [n])."""
        return self.scored(rows)

    def batch(self, rows):
        """The texts `rows` as int64 tensors {"input_ids", "attention_mask", "labels"} [B, L], padded on the right.

        labels are the input ids, -100 on the padding only: a model that shifts them (transformers' do) predicts
        labels[:, 1:], each text's own end included.
        """
        inputs, mask = padded(self.tokens, self.offsets, rows, self.eos)
        return as_tensors(inputs, mask, mask)


def as_tensors(inputs, mask, scored, **more):
    """A batch, whose labels are -100 where nothing is scored."""
    labels = np.where(scored, inputs, IGNORE)
    batch = {"input_ids": inputs, "attention_mask": mask.astype(np.int64), "labels": labels, **more}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def encode(texts, tokenizer, max_length=128, cache_dir=None):
    """{split: `TokenizedTexts`} of `Texts`: each text's tokens, then one end of text, `max_length` in all at most.

    A longer text keeps its first max_length tokens, without an end, which would teach the model to stop in the middle
    of a sentence. Words such as "<|endoftext|>" inside a text are ordinary characters. Cached before the cut.

    Raises UsageError for a max_length below 2 or above what the tokenizer's model takes.
    """
    if not 2 <= max_length <= tokenizer.model_max_length:
        most = min(tokenizer.model_max_length, 10**9)
        raise UsageError(f"--max-length {max_length} is outside 2 to {most}, the most of this tokenizer: change it")
    whole = text.encode(as_corpus(texts), tokenizer, cache_dir)
    return {split: _cut(whole[split], max_length, int(tokenizer.eos_token_id)) for split in SPLITS}


def _cut(documents, max_length, eos):
    lengths = documents.lengths()
    kept = np.minimum(lengths, max_length)
    inside = np.arange(len(documents.tokens)) - np.repeat(documents.offsets[:-1], lengths)  # each token's place
    tokens = documents.tokens[inside < np.repeat(kept, lengths)]
    return TokenizedTexts(tokens, np.concatenate([[0], np.cumsum(kept)]), eos)


@dataclass(frozen=True)
class LabelledTexts(TokenizedTexts):
    """A tokenised split whose task is the label: each text, " Topic:", its label's words, which alone are scored.

    starts: where these begin, int64 [n]; answers: the tokens of each label's words; labels: int64 [n].
    """

    starts: np.ndarray
    answers: tuple[np.ndarray, ...]
    labels: np.ndarray

    def scored(self, rows):
        return self.lengths()[rows] - self.starts[rows]

    def units(self, rows):
        return np.ones(len(rows), dtype=np.int64)

    def ending_in(self, c):
        """The same texts, each with label c."""
        questions = [self.tokens[a : a + n] for a, n in zip(self.offsets[:-1], self.starts, strict=True)]
        return with_answers(questions, self.answers, np.full(len(self), c), self.eos)

    def batch(self, rows):
        """As `TokenizedTexts.batch`, labels -100 on all but the label's words.

        Besides "before_scored" int64 [N]: the places of [B L] whose logits predict a scored token.
        """
        inputs, mask = padded(self.tokens, self.offsets, rows, self.eos)
        scored = mask & (np.arange(inputs.shape[1]) >= self.starts[rows][:, None])
        return as_tensors(inputs, mask, scored, before_scored=np.flatnonzero(scored) - 1)


def encode_labelled(texts, tokenizer, max_length=128, cache_dir=None):
    """{split: `LabelledTexts`} of `Texts`; a text is cut so that " Topic:" and the longest label fit into max_length.

    Raises UsageError for a max_length that leaves no token of a text.
    """
    words = (" Topic:", *(f" {name}" for name in texts.label_names))
    asks, *answers = (np.array(tokenizer.encode(one, add_special_tokens=False)) for one in words)
    room = max_length - len(asks) - max(map(len, answers))
    if room < 1:
        raise UsageError(f"--max-length {max_length} leaves a text no room beside its label: raise it by {1 - room}")
    splits = {}
    for split, whole in text.encode(as_corpus(texts), tokenizer, cache_dir).items():
        labels, kept = texts.labels[split], np.minimum(whole.lengths() - 1, room)  # without the end of text
        asks = asks.astype(whole.tokens.dtype)
        questions = [np.append(whole.tokens[a : a + n], asks) for a, n in zip(whole.offsets[:-1], kept, strict=True)]
        splits[split] = with_answers(questions, tuple(answers), labels, int(tokenizer.eos_token_id))
    return splits


def with_answers(questions, answers, labels, eos):
    """`LabelledTexts` of each text up to " Topic:" and its label."""
    joined = [np.append(asked, answers[c]).astype(asked.dtype) for asked, c in zip(questions, labels, strict=True)]
    starts, offsets = np.array([len(asked) for asked in questions]), np.cumsum([0, *map(len, joined)])
    return LabelledTexts(np.concatenate(joined), offsets, eos, starts, answers, labels)


def training_batches(n, batch_size, epochs=1, seed=0, t=0, client=0, steps=None):
    """Which of a client's n texts each step takes: a list of int64 arrays of at most batch_size.

    An epoch takes every text once, in an order of its own with the key (seed, t, client, epoch); its last batch may be
    smaller. epochs: above 0, 0.5 is the first half (rounded up) of an epoch's batches. steps: exactly so many batches
    instead, whatever n is: epochs follow each other until there are enough.
    """
    an_epoch = math.ceil(n / batch_size)  # batches
    wanted = math.ceil(epochs * an_epoch - 1e-9) if steps is None else steps
    batches = []
    for epoch in range(math.ceil(wanted / an_epoch)):
        order = stream(seed, f"batches of epoch {epoch}", t, client).permutation(n)
        batches += [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return batches[:wanted]
