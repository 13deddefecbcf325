"""Text corpora as lists of whole documents: WikiText-2, and a demo text that every Python carries."""

import functools
import hashlib
import io
import itertools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from common.cli import UsageError
from common.hub import hub_dataset, reading

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Corpus:
    """Documents of three splits; `source` says where they are from."""

    name: str
    variant: str
    source: str
    train: list[str]
    validation: list[str]
    test: list[str]

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 of all documents."""
        hashes = [documents_sha256(getattr(self, split)) for split in SPLITS]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def documents_sha256(documents):
    """SHA-256 of a list of texts; lengths are hashed too, so that moving a boundary changes it."""
    digest = hashlib.sha256(f"{len(documents)} documents\n".encode())
    for document in documents:
        data = document.encode("utf-8")
        digest.update(f"{len(data)} bytes\n".encode())
        digest.update(data)
    return digest.hexdigest()


def data_folder(data_root=None):
    """The user's data: folder `data_root`, else environment variable FEDQUARTET_DATA, else ./data."""
    return Path(data_root or os.environ.get("FEDQUARTET_DATA") or "data").expanduser().absolute()


def load_corpus(dataset, data_root=None):
    """The documents of `dataset`, "wikitext2" or "demo", as a `Corpus`.

    wikitext2: files in the data folder (raw or tokens variant), else the hub, or its library's cache. demo: needs
    neither files nor a network.
    Raises: UsageError for an unknown name, an unreadable local copy, and when there is no whole local copy and the hub
        cannot be reached.
    """
    if dataset not in ("wikitext2", "demo"):
        raise UsageError(f"unknown dataset {dataset!r}: choose one of wikitext2, demo")
    return _demo() if dataset == "demo" else _wikitext2(data_folder(data_root) / "wikitext-2")


# ---- WikiText-2

RAW_FILES = ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")
FILES = {"raw": RAW_FILES, "tokens": ("train.txt", "valid.txt", "test.txt")}  # of the splits, in order of preference


def _wikitext2(folder):
    found = [(variant, names) for variant, names in FILES.items() if all((folder / n).is_file() for n in names)]
    if found:
        variant, names = found[0]
        source, texts = f"data root, {names[0]}", [_read_text(folder / name) for name in names]
    else:
        variant, source = "raw", "hub, Salesforce/wikitext wikitext-2-raw-v1"
        files = f"{', '.join(RAW_FILES)} (or train.txt, valid.txt, test.txt) into {folder}"
        columns = dict.fromkeys(SPLITS, ("text",))
        rows = hub_dataset(("Salesforce/wikitext", "wikitext-2-raw-v1"), columns, f"no WikiText-2 in {folder}", files)
        # The hub keeps one line a row, and an empty row for a blank line, which is " \n" in the official files.
        texts = ["".join(line or " \n" for line in rows[split]["text"]) for split in SPLITS]
    splits = [split_articles(text) for text in texts]
    if not all(splits):
        raise UsageError(f"WikiText-2 ({source}): no article in the {SPLITS[splits.index([])]} split: get it again")
    return Corpus("wikitext2", variant, source, *splits)


def _read_text(path):
    with reading(f"cannot read {path}", "get the file again"):
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")


def split_articles(text):
    """The articles of a WikiText file, each with its heading; nothing after the first heading is lost.

    An article starts at a level-1 heading ` = Title = ` between two blank lines. The blank lines matter: the
    training split has 600 articles and 29 more lines of the same look inside tables and formulas.
    """
    lines = list(io.StringIO(text))
    blank = [True, *(not line.strip() for line in lines), True]  # blank[i + 1] is line i
    heading = re.compile(r" ?= (?!= ).*(?<! =) = ?\n?")
    starts = [i for i, line in enumerate(lines) if blank[i] and blank[i + 2] and heading.fullmatch(line)]
    return ["".join(lines[a:b]) for a, b in itertools.pairwise([*starts, len(lines)])]


# ---- demo

_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\xa0": " "})
_LIST_MARK = re.compile(r"^(?:\* |\d+\. |\[\d+\] )")  # also of a footnote
_EMPHASIS = re.compile(r"(?<![\w\"*])\*{1,2}([A-Za-z_][^*]*)\*{1,2}(?![\w\"*])")  # *name*, **strong**
_DEMO_SHORTEST = 300  # characters; what is shorter after cleaning is not a document
_DEMO_SHARE = 0.1  # of the characters, for validation and for test each


def _demo():
    """English prose of the language reference that comes with every Python, split by topic."""
    from pydoc_data.topics import topics

    documents = demo_documents(topics)
    # A topic's place in the queue hangs on its name alone. One that would fill most of a split by itself
    # stays in the training text.
    queue = sorted(documents, key=lambda name: hashlib.sha256(f"demo split {name}".encode()).digest())
    wanted = _DEMO_SHARE * sum(map(len, documents.values()))
    filled, place = {"validation": 0, "test": 0}, {}
    for name in queue:
        split = min(filled, key=filled.get)
        if filled[split] < wanted and len(documents[name]) < wanted / 2:
            place[name] = split
            filled[split] += len(documents[name])
    splits = [[documents[n] for n in sorted(documents) if place.get(n, "train") == split] for split in SPLITS]
    return Corpus("demo", "prose", f"pydoc_data of Python {platform.python_version()}", *splits)


def demo_documents(topics):
    """The prose of `topics` (name -> plain text of a reference page): name -> paragraphs, a line each.

    Code, grammars, tables and headings go. The reference prints whole sections under several topics ("with"
    is also in "compound"): a paragraph stays only in the shortest topic that has it, so that no paragraph of
    the validation text is in the training text too.
    """
    seen, documents = set(), {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        kept = [paragraph for paragraph in _prose(topics[name]) if paragraph not in seen]
        seen.update(kept)
        text = "".join(paragraph + "\n" for paragraph in dict.fromkeys(kept))
        if len(text) >= _DEMO_SHORTEST:
            documents[name] = text
    return documents


def _prose(text):
    """Paragraphs of running English in one topic, each unwrapped into one line."""
    for block in re.split(r"\n\s*\n", text.translate(_PLAIN)):
        paragraph = _EMPHASIS.sub(r"\1", _LIST_MARK.sub("", " ".join(block.split())))
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph):
    if len(paragraph.split()) < 6 or paragraph[-1] not in ".:;)" or "::=" in paragraph or ">>>" in paragraph:
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    if re.match(r"[\"(]?[A-Z]", paragraph):
        return letters >= 0.8
    return letters >= 0.85 and "=" not in paragraph and paragraph[0].isalpha()
