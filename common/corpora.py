"""Text corpora as lists of whole documents: WikiText-2, and a demo text that every Python carries."""

import dataclasses
import hashlib
import io
import itertools
import os
import platform
import re
from pathlib import Path

from common.cache import one_line
from common.cli import UsageError
from common.hub import hub_dataset

DATASETS = ("wikitext2", "demo")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents of three splits; `source` says where they are from, `fingerprint` is the SHA-256 of all."""

    name: str
    variant: str
    source: str
    train: list[str]
    validation: list[str]
    test: list[str]
    fingerprint: str = dataclasses.field(init=False)

    def __post_init__(self):
        hashes = [documents_sha256(getattr(self, split)) for split in SPLITS]
        object.__setattr__(self, "fingerprint", hashlib.sha256("\n".join(hashes).encode()).hexdigest())


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

    wikitext2: files under the data folder (raw or tokens variant), else the hub, or its library's cache. demo: needs
    neither files nor a network.

    Raises UsageError for an unknown name, an unreadable or incomplete local copy, and when there is no local
    copy and the hub cannot be reached.
    """
    if dataset == "wikitext2":
        return _wikitext2(data_folder(data_root))
    if dataset == "demo":
        return _demo()
    raise UsageError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")


# ---------------------------------------------------------------------------------------------- WikiText-2

_FOLDERS = ("wikitext-2", "wikitext2", "wikitext-2-raw", "wikitext-2-raw-v1", ".")
RAW_FILES = ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")
FILES = (  # variant, then its names of the three splits, in the order of preference
    ("raw", RAW_FILES),
    ("tokens", ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens")),
    ("tokens", ("train.txt", "valid.txt", "test.txt")),
)


def _wikitext2(root):
    variant, paths = _find_wikitext2(root)
    if paths:
        return _wikitext2_corpus(variant, f"data root, {paths[0].name}", [_read_text(path) for path in paths])
    rows = hub_dataset(
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        dict.fromkeys(SPLITS, ("text",)),
        f"no WikiText-2 under {root}",
        f"{', '.join(RAW_FILES)} (or train.txt, valid.txt, test.txt) into {root / 'wikitext-2'}",
    )
    # The hub keeps one line a row, and an empty row for a blank line, which is " \n" in the official files.
    texts = ["".join(line or " \n" for line in rows[split]["text"]) for split in SPLITS]
    return _wikitext2_corpus("raw", "hub, Salesforce/wikitext wikitext-2-raw-v1", texts)


def _find_wikitext2(root):
    """(variant, [train, valid, test]) of the first complete copy under `root`, or (None, None)."""
    incomplete = None
    for folder in _FOLDERS:
        for variant, names in FILES:
            missing = [name for name in names if not (root / folder / name).is_file()]
            if not missing:
                return variant, [root / folder / name for name in names]
            if len(missing) < len(names) and folder != ".":
                incomplete = incomplete or (root / folder, missing)
    if incomplete:
        folder, missing = incomplete
        raise UsageError(f"WikiText-2 in {folder} is incomplete: put {' and '.join(missing)} there too")
    return None, None


def _read_text(path):
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({one_line(error)}): get the file again") from error


def _wikitext2_corpus(variant, source, texts):
    splits = [split_articles(text) for text in texts]
    for split, documents in zip(SPLITS, splits, strict=True):
        if not documents:
            raise UsageError(f"WikiText-2 ({source}): no article in the {split} split: get the file again")
    return Corpus("wikitext2", variant, source, *splits)


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


# ---------------------------------------------------------------------------------------------------- demo

_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\xa0": " "})
_LIST_MARK = re.compile(r"^(?:\* |\d+\. |\[\d+\] )")  # also of a footnote
_EMPHASIS = re.compile(r"(?<![\w\"*])\*{1,2}([A-Za-z_][^*]*)\*{1,2}(?![\w\"*])")  # *name*, **strong**
_DEMO_SHORTEST = 300  # characters; what is shorter after cleaning is not a document
_DEMO_SHARE = 0.1  # of the characters, for validation and for test each


def _demo():
    """English prose of the language reference that comes with every Python, split by topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UsageError("this Python lacks pydoc_data: install its whole standard library") from error
    documents = demo_documents(topics)
    # A topic's place in the queue hangs on its name alone. One that would fill most of a split by itself
    # stays in the training text.
    queue = sorted(documents, key=lambda name: hashlib.sha256(f"demo split {name}".encode()).digest())
    wanted = _DEMO_SHARE * sum(map(len, documents.values()))
    filled = {"validation": 0, "test": 0}
    place = {}
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
    seen = set()
    documents = {}
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
        paragraph = " ".join(block.split())
        paragraph = _LIST_MARK.sub("", paragraph)
        paragraph = _EMPHASIS.sub(r"\1", paragraph)
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph):
    if len(paragraph.split()) < 6 or paragraph[-1] not in ".:;)" or "::=" in paragraph or ">>>" in paragraph:
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    if re.match(r"[\"(]?[A-Z]", paragraph):
        return letters >= 0.8
    return letters >= 0.85 and "=" not in paragraph and paragraph[0].isalpha()
