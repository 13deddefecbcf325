"""Labelled texts of the non-IID study: files with named lines, topics for all, splits that are keyed."""

import csv

import numpy as np
import pytest

from common.cli import UsageError
from common.text import load_corpus
from llm_noniid import data

SPLITS = ("train", "validation", "test")


pytestmark = pytest.mark.usefixtures("alone")


def write_rows(path, rows, start=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(rows)
    path.write_bytes(start + path.read_bytes())


def write_ag_news(root, n=80, train="train.csv"):
    """n training rows, the classes in the ratio 4 : 2 : 1 : 1, and 8 test rows."""
    classes = [(1, 1, 1, 1, 2, 2, 3, 4)[i % 8] for i in range(n)]
    rows = [(c, f"Title {i}", f"Text {i} of class {c}.") for i, c in enumerate(classes)]
    if train == "train_sample.csv":
        rows = [("label", "text"), *((c, f"{title} . {text}") for c, title, text in rows)]
    write_rows(root / "ag_news" / train, rows)
    write_rows(root / "ag_news" / "test.csv", [(i % 4 + 1, f"Test {i}", "It ends.") for i in range(8)])
    return root / "ag_news"


def refuse(match, *args, **kwargs):
    with pytest.raises(UsageError, match=match) as error:
        data.load_texts(*args, **kwargs)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ AG News


def test_official_rows_are_read_as_they_are_meant(tmp_path):
    rows = [
        (3, "Fears for T N pension", "Unions say they are 'disappointed'."),
        ("4", 'A "second" team, now', "A second\\team  of rocketeers \u00e9"),
        (1, "Two", "lines\nof text"),
        (2, "", "Only a description . "),
    ]
    path = tmp_path / "train.csv"
    write_rows(path, rows, b"\xef\xbb\xbf")
    texts, labels = data.read_csv(path)
    assert labels.dtype == np.int64 and labels.tolist() == [2, 3, 0, 1]
    assert texts == [
        "Fears for T N pension Unions say they are 'disappointed'.",
        'A "second" team, now A second team of rocketeers \u00e9',
        "Two lines of text",
        "Only a description",
    ]


def test_the_sample_and_the_official_file_give_the_same_texts(tmp_path):
    write_ag_news(tmp_path / "a")
    write_ag_news(tmp_path / "b", train="train_sample.csv")
    official, sample = (data.load_texts("ag_news", tmp_path / name) for name in "ab")
    assert official.splits == sample.splits and official.fingerprint["sha256"] == sample.fingerprint["sha256"]
    assert official.fingerprint["source"] == "ag_news/train.csv, test.csv" != sample.fingerprint["source"]
    assert official.label_names == ("World", "Sports", "Business", "Sci/Tech")
    for i, text in enumerate(official.splits["train"]):
        assert text.endswith(f"of class {official.labels['train'][i] + 1}.")


GOOD = '"1","A","begins\nhere"\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD + '"2","B","never closed\n"3","C","c"\n', r"cannot read .*train.csv"),
        (GOOD + '"2",""," \\ "\n', r"train.csv row 2 is not class, title and description"),
        ("label,text\n1,good\n0,bad\n", r"train.csv row 3 is not label and text, with a class from 1 to 4"),
        ("label,text\n", r"train.csv has 0 rows"),
        ("1,\udcff,x\n", r"cannot read .*train.csv"),
    ],
)
def test_a_broken_row_is_named(tmp_path, content, message):
    folder = write_ag_news(tmp_path)
    (folder / "train.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    refuse(message, "ag_news", tmp_path)


def test_missing_files(tmp_path):
    (write_ag_news(tmp_path) / "test.csv").unlink()
    refuse("no AG News under .* and the hub cannot be reached: .*--data-root", "ag_news", tmp_path)


def test_the_validation_split_is_stratified_keyed_and_cut_from_train(tmp_path):
    write_ag_news(tmp_path, 160)
    whole, _ = data.read_ag_news(tmp_path)[0]["train"]
    texts = data.load_texts("ag_news", tmp_path, seed=1)
    assert np.bincount(texts.labels["validation"], minlength=4).tolist() == [4, 2, 1, 1]  # 5 % of 160
    assert np.bincount(texts.labels["train"]).tolist() == [76, 38, 19, 19]
    assert sorted(texts.splits["train"] + texts.splits["validation"]) == sorted(whole)
    again, other = data.load_texts("ag_news", tmp_path, seed=1), data.load_texts("ag_news", tmp_path, seed=2)
    assert again.fingerprint == texts.fingerprint and other.splits["validation"] != texts.splits["validation"]
    few = data.load_texts("ag_news", tmp_path, max_samples=24, seed=1)
    assert few.splits["validation"] == texts.splits["validation"] and few.splits["test"] == texts.splits["test"]
    assert np.bincount(few.labels["train"]).tolist() == [12, 6, 3, 3]
    assert set(few.splits["train"]) < set(texts.splits["train"])
    assert all(t.endswith(f"of class {c + 1}.") for t, c in zip(few.splits["train"], few.labels["train"], strict=True))


# ----------------------------------------------------------------------------------------- wikitext, demo

KINDS = [2, 0, 1, 2, 3, 3, 0, 1, 0, 1, 2, 3]  # of a split's articles: a word of one kind is in a quarter of them
LINES = (
    "The ship and the cruiser had a gun and sailed with the fleet .",
    "The song and the album had a singer and led the chart .",
    "The species and the genus had a habitat and ate the larvae .",
    "The storm and the hurricane had a wind and made the landfall .",
)


def write_wikitext(root):
    def article(title, line):
        return f" \n = {title} = \n \n {line} \n \n = = Part {title} = = \n \n 2 \n {line} It went on . \n \n"

    (root / "wikitext-2").mkdir(parents=True)
    for name in ("train.txt", "valid.txt", "test.txt"):
        content = "".join(article(f"Thing {i}", LINES[kind]) for i, kind in enumerate(KINDS))
        (root / "wikitext-2" / name).write_text(content, "utf-8")


def test_wikitext_has_paragraphs_and_its_articles_topics(tmp_path, monkeypatch):
    write_wikitext(tmp_path)
    real = data.article_topics
    monkeypatch.setattr(data, "article_topics", lambda train, others: real(train, others, 4))
    texts = data.load_texts("wikitext", tmp_path)
    first = list(dict.fromkeys(KINDS))
    for split in SPLITS:
        wanted = [line for kind in KINDS for line in (LINES[kind], LINES[kind] + " It went on .")]
        assert texts.splits[split] == wanted
        assert texts.labels[split].tolist() == [first.index(kind) for kind in KINDS for _ in range(2)]
    for name, kind in zip(texts.label_names, first, strict=True):
        assert all(word in LINES[kind] for word in name.split()) and len(name.split()) == 3


def test_article_topics_find_three_vocabularies_and_degenerate_cases():
    rng = np.random.default_rng(0)
    vocabularies = [[f"{c}{d}{e}" for d in "abcde" for e in "abcde"] for c in "xyz"]
    kinds = rng.integers(0, 3, 60)
    articles = [" ".join([*rng.choice(vocabularies[k], 20), "the", "and", "common"]) for k in kinds]
    (labels, other), names = data.article_topics(articles, [articles[:5]], 3)
    first = list(dict.fromkeys(kinds.tolist()))
    assert labels.tolist() == [first.index(k) for k in kinds] and other.tolist() == labels[:5].tolist()
    assert all(name.split()[0][0] == "xyz"[k] for name, k in zip(names, first, strict=True))
    assert data.article_topics(articles, k=3)[0][0].tolist() == labels.tolist()
    assert data.article_topics(["alone here"], k=8)[0][0].tolist() == [0]
    assert data.article_topics(articles, [["12 ."]], k=3)[0][1].shape == (1,)  # no known word: the nearest centre


def test_the_demo_is_the_prose_of_mamba_with_four_topics():
    texts = data.load_texts("demo")
    corpus = load_corpus("demo")
    for split in SPLITS:
        pieces = " ".join(texts.splits[split])
        assert pieces.split() == " ".join(getattr(corpus, split)).split()  # nothing lost, nothing doubled
        assert len(texts.splits[split]) == len(texts.labels[split]) >= 80
    assert texts.label_names == ("statements", "expressions", "data model", "built-in types")
    assert (np.bincount(texts.labels["train"], minlength=4) >= 80).all()
    assert np.median([len(text) for text in texts.splits["train"]]) < 2 * data.DEMO_CHARACTERS
    few = data.load_texts("demo", max_samples=100)
    assert len(few.splits["train"]) == 100 and few.splits["validation"] == texts.splits["validation"]


def test_sentences_by_hand():
    assert data.sentences("One. Two! Is it? Yes (no). End", 8) == ["One. Two!", "Is it? Yes (no). End"]
    assert data.sentences("e.g. this one.\nNext: all:\nlast", 5) == ["e.g. this one.", "Next: all: last"]
    assert data.sentences("short", 100) == ["short"]
    assert data.sentences("A b. C d.", 100) == ["A b. C d."]
