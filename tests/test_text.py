"""Corpora, tokenizers, tokens: documents whole, bytes exact, bad input in one line, no network."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

from common import hub, text
from common.cli import UsageError

ARTICLE = " \n = {0} = \n \n The {0} is a thing . It was seen in 1907 , naïvely . \n \n = = History = = \n \n Old . \n"
TABLE = " P = Played , \n = Wins ; L = \n = Losses = \n More of it . \n"
REAL = os.environ.get("FEDQUARTET_DATA")


pytestmark = pytest.mark.usefixtures("alone")


def write_wikitext(root, names=text.RAW_FILES, change=lambda data: data):
    folder = root / "wikitext-2"
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        content = "".join(ARTICLE.format(f"Thing {i} {j}") for j in range(3)) + TABLE
        (folder / name).write_bytes(change(content.encode("utf-8")))
    return folder


def small_corpus(train=("one two three two one . " * 20, "deux naïve trois . " * 20), **changes):
    splits = {"train": list(train), "validation": ["one two ."], "test": ["three two .", "\u6771 one"]}
    return text.Corpus("small", "none", **{"source": "a test", **splits, **changes})


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------ WikiText-2


def test_an_article_starts_at_a_heading_between_blank_lines_and_nothing_is_lost():
    content = ARTICLE.format("A") + TABLE + ARTICLE.format("B = C")
    articles = text.split_articles(content)
    assert len(articles) == 2
    assert articles[0].startswith(" = A = \n") and articles[1].startswith(" = B = C = \n")
    assert " \n" + "".join(articles) == content
    assert "= = History = =" in articles[0] and "Losses" in articles[0]


def test_local_files_raw_ones_first_and_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDQUARTET_DATA", str(tmp_path))
    folder = write_wikitext(tmp_path, text.FILES["tokens"])
    (folder / "wiki.train.raw").write_text("an incomplete copy beside a complete one")
    assert text.load_corpus("wikitext2").variant == "tokens"
    write_wikitext(tmp_path)
    corpus = text.load_corpus("wikitext2")
    assert (corpus.name, corpus.variant) == ("wikitext2", "raw")
    assert [len(getattr(corpus, split)) for split in text.SPLITS] == [3, 3, 3]
    assert "Thing 0 0" in corpus.train[0] and "Thing 1 0" in corpus.validation[0] and "Thing 2" in corpus.test[0]
    write_wikitext(tmp_path, change=lambda data: b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n"))
    assert text.load_corpus("wikitext2").fingerprint == corpus.fingerprint


def test_the_fingerprint_sees_every_text_and_every_boundary():
    corpus = small_corpus()
    others = [
        small_corpus(train=(corpus.train[0] + corpus.train[1][:1], corpus.train[1][1:])),
        small_corpus(validation=["one two !"]),
        small_corpus(test=corpus.test[::-1]),
        small_corpus(validation=corpus.test, test=corpus.validation),
    ]
    assert len({c.fingerprint for c in [corpus, *others]}) == 5
    assert small_corpus(source="elsewhere").fingerprint == corpus.fingerprint


def test_files_that_are_not_a_whole_wikitext_are_one_line_with_the_way_out(tmp_path):
    for change, part in (
        (lambda data: b"none\n", "no article in the train split"),
        (lambda data: b"\xff\xfe" + data, "cannot read "),
    ):
        write_wikitext(tmp_path, change=change)
        with pytest.raises(UsageError) as error:
            text.load_corpus("wikitext2", tmp_path)
        assert part in one_line(error)
    (tmp_path / "wikitext-2" / "wiki.valid.raw").unlink()
    with pytest.raises(UsageError, match="wiki.train.raw.*train.txt.*--data-root.*--dataset demo") as error:
        text.load_corpus("wikitext2", tmp_path)
    one_line(error)


def test_a_network_that_does_not_answer_is_given_up_soon(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not hub.hub_reachable()
        assert time.monotonic() - start < 3
    assert not hub.hub_reachable()  # now nobody listens


def test_the_hub_gives_the_official_bytes_or_one_line(tmp_path, monkeypatch):
    import datasets

    folder = write_wikitext(tmp_path / "local")
    local = text.load_corpus("wikitext2", tmp_path / "local")

    def load_dataset(*name):
        assert name == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        texts = [(folder / raw).read_text("utf-8").splitlines(True) for raw in text.RAW_FILES]
        rows = [{"text": [line if line.strip() else "" for line in lines]} for lines in texts]
        return dict(zip(text.SPLITS, rows, strict=True))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    first = text.load_corpus("wikitext2", tmp_path / "empty")
    assert first.fingerprint == local.fingerprint
    assert first.variant == "raw" and first.source.startswith("hub")

    def fail(*name):
        raise ConnectionError("gone\nin the middle")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match="gone.*--dataset demo") as error:
        text.load_corpus("wikitext2", tmp_path / "empty")
    one_line(error)


# ------------------------------------------------------------------------------------------------------ demo

PROSE = "The quick statement jumps over *some* lazy\nexpressions, which is what “statements” are\nthere for.  Really."
CLEAN = 'The quick statement jumps over some lazy expressions, which is what "statements" are there for. Really.'


def test_demo_keeps_prose_and_drops_the_rest():
    page = (
        f'The "with" statement of this page here\n{"*" * 20}\n\n{PROSE}\n\n'
        "   Statement ::= a very long grammar of words that go on.\n\n   for x in range(3):\n       print(x, y, z)\n\n"
        "   >>> Some words that are printed by this example here.\n\n1. First this happens, then that, and so on.\n\n"
        f"+{'-' * 9}+{'-' * 9}+\n| Table   | row and more words of it. |\n\n   {PROSE}\n"
    )
    documents = text.demo_documents({"with": page * 4})
    assert documents == {}  # repeated paragraphs count once, and what is left is too short
    longer = "Another sentence of this page that makes it long enough. " * 5
    documents = text.demo_documents({"with": page + "\n" + longer})
    assert documents["with"].splitlines() == [
        CLEAN,
        "First this happens, then that, and so on.",
        longer.strip(),
    ]


def test_demo_splits_share_no_paragraph_and_need_nothing():
    corpus = text.load_corpus("demo", "/nonexistent")
    paragraphs = [{line for d in getattr(corpus, split) for line in d.splitlines()} for split in text.SPLITS]
    train, validation, test = paragraphs
    assert not train & validation and not train & test and not validation & test
    sizes = [sum(map(len, getattr(corpus, split))) for split in text.SPLITS]
    assert sizes[0] > 150_000 and all(0.05 * sum(sizes) < size < 0.2 * sum(sizes) for size in sizes[1:])
    assert len(corpus.train) >= 30 and min(map(len, corpus.train)) >= 300
    assert corpus == text.load_corpus("demo")


# ------------------------------------------------------------------------------------------------ tokenizers


def test_bpe_has_the_size_asked_for_and_is_the_same_in_every_process():
    corpus = text.load_corpus("demo")
    tokenizer = text.load_tokenizer("bpe:700", corpus)
    assert text.vocabulary_size(tokenizer) == 700 and tokenizer.eos_token == text.END_OF_TEXT
    program = (
        "from common import text; c = text.load_corpus('demo');"
        "print(text.tokenizer_fingerprint(text.load_tokenizer('bpe:700', c)))"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    alone = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert alone.stdout.strip() == text.tokenizer_fingerprint(tokenizer), alone.stderr


@pytest.mark.parametrize("spec", ["bpe:many", "bpe:256", "bpe:-1", "nowhere/tokenizer", "gpt2"])
def test_a_tokenizer_that_is_not_there_is_one_line(tmp_path, spec, monkeypatch):
    import transformers

    def no_copy(*args, **kwargs):
        raise OSError("not in the cached files")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", no_copy)
    with pytest.raises(UsageError) as error:
        text.load_tokenizer(spec, small_corpus(), tmp_path)
    assert "bpe:" in one_line(error)


def test_a_folder_and_a_name_under_the_data_root_are_the_same_tokenizer(tmp_path):
    corpus = small_corpus()
    trained = text.load_tokenizer("bpe:270", corpus)
    folder = tmp_path / "tokenizers" / "mine"
    trained.save_pretrained(folder)
    for spec, root in [(str(folder), None), ("mine", tmp_path)]:
        loaded = text.load_tokenizer(spec, corpus, root)
        assert text.tokenizer_fingerprint(loaded) == text.tokenizer_fingerprint(trained)
        (folder / "tokenizer_config.json").unlink(missing_ok=True)  # then by tokenizer.json alone


def test_a_tokenizer_that_cannot_be_read_or_cannot_end_a_document_is_one_line(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="no end-of-text token"):
        text.load_tokenizer(str(tmp_path), small_corpus())
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": 3}}')
    with pytest.raises(UsageError) as error:
        text.load_tokenizer(str(tmp_path), small_corpus())
    assert "tokenizer.json" in one_line(error)


def test_byte_lengths_add_up_to_the_bytes_of_the_text():
    corpus = small_corpus()
    tokenizer = text.load_tokenizer("bpe:280", corpus)
    lengths = text.token_byte_lengths(tokenizer)
    assert lengths.shape == (text.vocabulary_size(tokenizer),) and lengths[tokenizer.eos_token_id] == 0
    for document in [*corpus.train, "東京 ☂ <|endoftext|> end", "\t\n "]:
        ids = tokenizer(document, split_special_tokens=True)["input_ids"]
        assert lengths[ids].sum() == len(document.encode("utf-8"))


# ---------------------------------------------------------------------------------------------------- tokens


def test_documents_come_back_whole_each_with_its_end():
    corpus = small_corpus()
    tokenizer = text.load_tokenizer("bpe:270", corpus)
    splits = text.encode(corpus, tokenizer)
    for split in text.SPLITS:
        documents = splits[split]
        assert len(documents) == len(getattr(corpus, split)) and documents.tokens.dtype == np.uint16
        for i, document in enumerate(getattr(corpus, split)):
            ids = documents.tokens[documents.offsets[i] : documents.offsets[i + 1]]
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[:-1]) == document
    assert splits["train"].lengths().sum() == len(splits["train"].tokens)


def test_a_special_token_in_the_text_is_text_and_settings_of_the_tokenizer_do_not_matter():
    corpus = small_corpus(validation=["one <|endoftext|> two"])
    tokenizer = text.load_tokenizer("bpe:270", corpus)
    fingerprint = text.tokenizer_fingerprint(tokenizer)
    assert len(tokenizer("one two three one", truncation=True, max_length=2)["input_ids"]) == 2
    assert text.tokenizer_fingerprint(tokenizer) == fingerprint
    ids = text.encode(corpus, tokenizer)["validation"].tokens
    assert (ids == tokenizer.eos_token_id).sum() == 1 and len(ids) > 10


@pytest.mark.skipif(not REAL, reason="FEDQUARTET_DATA is not set")
def test_real_wikitext2_has_its_articles_and_its_bytes():
    corpus = text.load_corpus("wikitext2", REAL)
    assert [len(getattr(corpus, split)) for split in text.SPLITS] == [600, 60, 60]
    tokenizer = text.load_tokenizer("gpt2", corpus, REAL)
    assert text.vocabulary_size(tokenizer) == 50257
    splits = text.encode(corpus, tokenizer)
    lengths = text.token_byte_lengths(tokenizer)
    for split in text.SPLITS:
        assert lengths[splits[split].tokens].sum() == sum(len(d.encode()) for d in getattr(corpus, split))
