"""Texts as lists of whole documents (WikiText-2, a demo that every Python carries), tokenizers, tokens.

    corpus = load_corpus("wikitext2", data_root=None)        # what lies on disk, else the hub
    tokenizer = load_tokenizer("gpt2", corpus, data_root=None)
    tokens = encode(corpus, tokenizer)                       # each document ends with end of text

A document is an article of WikiText-2 or a topic of the Python language reference. Documents stay whole up to
here, so that a study can deal them to its clients before it packs them into blocks.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

from common.cli import UsageError
from common.hub import hub_dataset, hub_reachable, quiet, reading

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


def sha256_of(parts):
    """SHA-256 (hex) of a list of strings and numbers; as JSON, so that no two lists run together."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def data_folder(data_root=None):
    """The user's data: folder `data_root`, else environment variable FEDQUARTET_DATA, else ./data."""
    return Path(data_root or os.environ.get("FEDQUARTET_DATA") or "data").expanduser().absolute()


def load_corpus(dataset, data_root=None):
    """The documents of `dataset`, "wikitext2" or "demo", as a `Corpus`.

    wikitext2: files in the data folder (raw or tokens variant), else the hub, or its library's cache. demo: needs
    neither files nor a network.
    Raises: UsageError for an unreadable local copy, and without a whole one when the hub cannot be reached.
    """
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


END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenizedDocuments:
    """One split: document i is `tokens[offsets[i] : offsets[i + 1]]` and ends with the end-of-text token."""

    tokens: np.ndarray  # [sum of lengths], uint16 or int32
    offsets: np.ndarray  # [documents + 1], int64

    def __len__(self):
        return len(self.offsets) - 1

    def lengths(self):
        """Tokens of each document, end of text included: int64 [documents]."""
        return np.diff(self.offsets)


# ---- tokenizers


def load_tokenizer(spec, corpus, data_root=None):
    """A fast tokenizer of `transformers` with an end-of-text token: `train_bpe` for "bpe:N", else `saved_tokenizer`.

    Raises: UsageError when N is too small or not a number, and when the tokenizer is not there, cannot be read or
        cannot end a document.
    """
    if spec.startswith("bpe:"):
        size = int(digits) if (digits := spec.removeprefix("bpe:")).isdecimal() else 0
        if size < 257:
            raise UsageError(f"--tokenizer {spec}: give bpe:N with N of at least 257 (256 bytes and end of text)")
        return train_bpe(corpus.train, size)
    advice = "give a tokenizer's folder, gpt2 with its tokenizer.json there, or bpe:N, such as bpe:4096"
    tokenizer = saved_tokenizer(spec, data_root, advice)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"tokenizer {spec!r} has no end-of-text token (eos_token): take gpt2 or bpe:N")
    return tokenizer


def saved_tokenizer(spec, data_root, advice):
    """A fast tokenizer of `transformers`: `data_root`/tokenizers/`spec`, the folder `spec`, or by its name on the hub.

    Where its files name no end of text, but `END_OF_TEXT` is a token, it is that. No code from a folder is run.
    Raises: UsageError when it is not there (`advice`: what to do) or cannot be read.
    """
    import transformers

    named = data_folder(data_root) / "tokenizers" / spec
    folder = next((path for path in (named, Path(spec).expanduser()) if path.is_dir()), None)
    how = {"local_files_only": bool(folder) or not hub_reachable(), "trust_remote_code": False}
    with quiet(), reading(f"no tokenizer in {folder or spec}", "it needs a tokenizer.json"):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder or spec, **how)
        except OSError as error:
            raise UsageError(f"no tokenizer {spec!r}, nor {named}: {advice}") from error
        if tokenizer.eos_token is None and END_OF_TEXT in tokenizer.get_vocab():
            tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def train_bpe(documents, size):
    """A byte-level BPE (GPT-2's pre-tokenizer and byte alphabet) of at most `size` tokens; fewer of a small text.

    The 256 bytes and `END_OF_TEXT` are among them. Deterministic: ties between pairs are broken by their ids.
    """
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(documents, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def vocabulary_size(tokenizer):
    """One more than the largest token id, special and added tokens included: the rows an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def token_byte_lengths(tokenizer):
    """UTF-8 bytes that each token stands for: int64 [vocabulary_size]; 0 for special tokens and unused ids.

    bits per byte = sum of -log2 p(token) / sum of these over the same tokens. Byte-level BPE writes each byte
    as one character; SentencePiece-like vocabularies write a space as U+2581 and single bytes as <0xNN>.
    """
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    added = tokenizer.added_tokens_decoder
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode("utf-8"))
        elif byte_level:
            lengths[index] = len(token)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("\u2581", " ").encode("utf-8"))
    return lengths


def tokenizer_fingerprint(tokenizer):
    """SHA-256 of the whole tokenizer (rules, vocabulary, added tokens) and of the id that ends a document.

    Truncation and padding are left out: they are settings of the last call, and `encode` uses neither.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return sha256_of([{k: v for k, v in rules.items() if k not in ("truncation", "padding")}, tokenizer.eos_token_id])


# ---- tokens


def encode(corpus, tokenizer):
    """Every split as `TokenizedDocuments`: {"train", "validation", "test"}, end of text after each document."""
    with reading("this tokenizer cannot split the texts", "give another --tokenizer"):
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # settings below stay here
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # WikiText's "<unk>" is text, also where a tokenizer has such a token
        return {split: _tokenized(getattr(corpus, split), backend, tokenizer) for split in SPLITS}


def _tokenized(documents, backend, tokenizer):
    kind = np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.int32
    encodings = backend.encode_batch_fast(documents, add_special_tokens=False)
    pieces = [np.array([*e.ids, tokenizer.eos_token_id], dtype=kind) for e in encodings]
    return TokenizedDocuments(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64))
