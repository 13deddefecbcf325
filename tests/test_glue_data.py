"""GLUE's files, the hub, the demo, tokens, batches of similar length, metrics against plain formulas."""

import json

import numpy as np
import pytest
import torch
from encoders import make_tokenizer
from scipy import stats

import common.hub
from common.cli import RunFailed, UsageError
from common.seeding import stream
from common.text import sha256_of
from lora_glue_fl.data_prep import encode, load_task, training_batches
from lora_glue_fl.glue_tasks import TASKS, demo_tokenizer, evaluate, score

FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI"}
FOLDERS |= {"qnli": "QNLI", "rte": "RTE", "wnli": "WNLI"}
# (header or None, rows) of the official files, and what is to be read from them: texts of the columns, labels
STS_HEADER = "index genre filename year old_index source1 source2 sentence1 sentence2 score"
MNLI_HEADER = "index promptID pairID genre s1_parse s2_parse s1_tree s2_tree sentence1 sentence2 label1 gold_label"
FILES = {
    "cola": (None, ["gj04 1  A~b.", "bc 0 * C~d."], [["A b.", "C d."]], [1, 0]),
    "sst2": ("sentence label", ["good~ 1", '"bad 0'], [["good ", '"bad']], [1, 0]),
    "mrpc": (
        "Quality #1~ID #2~ID #1~String #2~String",
        ['1 10 11 He~said~"no. She~said.', "0 12 13 A B"],
        [['He said "no.', "A"], ["She said.", "B"]],
        [1, 0],
    ),
    "stsb": (
        STS_HEADER,
        ["0 main-news x 2012 1 none none A B 3.8", "1 main-forums x 2013 2 none none C D 0"],
        [["A", "C"], ["B", "D"]],
        [3.8, 0],
    ),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", ["0 1 2 A? B? 1"], [["A?"], ["B?"]], [1]),
    "mnli": (
        MNLI_HEADER,
        ["0 1 2 fiction p p t t A B x neutral", "1 1 2 slate p p t t C D x contradiction"],
        [["A", "C"], ["B", "D"]],
        [1, 2],
    ),
    "qnli": ("index question sentence label", ["0 Q S not_entailment"], [["Q"], ["S"]], [1]),
    "rte": (
        "index sentence1 sentence2 label",
        ["0 A B entailment", "1 C D not_entailment"],
        [["A", "C"], ["B", "D"]],
        [0, 1],
    ),
    "wnli": ("index sentence1 sentence2 label", ["0 A B 1"], [["A"], ["B"]], [1]),
}


def line(text):
    return text.replace(" ", "\t").replace("~", " ")


def write_files(root, task, end="\n", start=b""):
    """The official files of a task, all splits alike; returns their folder."""
    folder = root / "glue" / FOLDERS[task]
    folder.mkdir(parents=True, exist_ok=True)
    header, rows, _, _ = FILES[task]
    text = end.join(map(line, [*([header] if header else []), *rows])) + end
    for split in TASKS[task].splits:
        (folder / f"{split.replace('validation', 'dev')}.tsv").write_bytes(start + text.encode("utf-8"))
    return folder


pytestmark = pytest.mark.usefixtures("alone")


def refuse(match, *args, **kwargs):
    with pytest.raises(UsageError, match=match) as error:
        load_task(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- files


@pytest.mark.parametrize(
    "task, end, start", [*((task, "\n", b"") for task in TASKS), ("mrpc", "\r\n", b"\xef\xbb\xbf")]
)
def test_official_files(task, end, start, tmp_path):
    folder = write_files(tmp_path, task, end, start)
    data = load_task(task.upper(), data_root=tmp_path)
    _, rows, texts, labels = FILES[task]
    assert data.fingerprint["source"] == str(folder) and tuple(data.splits) == TASKS[task].splits
    for split in data.splits.values():
        assert list(split.texts) == list(TASKS[task].columns) and list(split.texts.values()) == texts
        assert split.labels.dtype == (np.float32 if task == "stsb" else np.int64)
        assert split.labels.tolist() == pytest.approx(labels)
    genres = {"stsb": ["main-news", "main-forums"], "mnli": ["fiction", "slate"]}.get(task)
    assert data.splits["train"].categories == ({"genre": genres} if genres else {})
    assert data.fingerprint["counts"] == {split: len(rows) for split in TASKS[task].splits}
    assert data.fingerprint == json.loads(json.dumps(data.fingerprint))


def test_files_that_are_not_right(tmp_path):
    folder = write_files(tmp_path, "rte")
    train = folder / "train.tsv"
    good = train.read_text()
    cases = {
        good.replace("not_entailment", "neutral"): r"train.tsv line 3: label 'neutral' is not one of entailment, not",
        good.replace("label", "gold"): "train.tsv has no column label: it is not the official file of rte",
        good + "4\tx\n" * 4: "4 of 6 rows lack columns",
    }
    for text, match in cases.items():
        train.write_text(text)
        refuse(match, "rte", data_root=tmp_path)
    train.write_text(good + "4\tx\n\n")
    data = load_task("rte", data_root=tmp_path)
    assert len(data.splits["train"]) == 2
    train.unlink()
    refuse(r"RTE lacks train.tsv: put it there", "rte", data_root=tmp_path)
    assert len(load_task("rte", data_root=tmp_path, splits=["validation"]).splits["validation"]) == 2
    folder = write_files(tmp_path, "stsb")
    (folder / "dev.tsv").write_text(line(STS_HEADER) + "\n" + line("0 g f y o n n A B 5.1"))
    refuse("dev.tsv line 2: label '5.1' is not a number from 0 to 5", "stsb", data_root=tmp_path)


# ---- the hub


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_the_hub_gives_the_same_as_the_files(task, tmp_path, monkeypatch):
    import datasets

    write_files(tmp_path, task)
    local = load_task(task, data_root=tmp_path)
    # the hub has scores in float32
    rows = {
        name: {**split.texts, "label": split.labels.tolist(), "idx": [0] * len(split)}
        for name, split in local.splits.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: {("nyu-mll/glue", task): rows}[name])
    monkeypatch.setattr(common.hub, "hub_reachable", lambda: True)
    data = load_task(task)
    assert data.fingerprint["sha256"] == local.fingerprint["sha256"]
    assert data.fingerprint["source"] == f"hub, nyu-mll/glue {task}"
    assert data.splits["train"].labels.dtype == local.splits["train"].labels.dtype


# ---- demo


def test_the_demo_is_the_same_on_every_machine():
    # Any change of the sentences changes the figures of every demo run.
    scores = load_task("stsb", "demo").splits["train"].labels
    assert (scores.min(), scores.max(), scores.dtype) == (0, 5, np.float32) and len(np.unique(scores)) > 20
    hashes = [load_task(task, "demo").fingerprint["sha256"].values() for task in TASKS]
    assert [
        sha256_of(list(each))[:8] for each in hashes
    ] == "e7e4c1ad 5b904798 1ff1bc59 09a1a3a1 d5d1a690 5504bd0c 9d33041a 8b9599e8 8d6d29f2".split()


# ---- tokens


def test_the_demo_tokenizer():
    tokenizer = demo_tokenizer()
    special = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id
    assert special == (0, 1, 2, 3)
    ids = tokenizer("the Doctor sold", "zebra")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "the", "doctor", "sold", "</s>", "</s>", "<unk>", "</s>"]
    for task in TASKS:
        encoded = encode(load_task(task, "demo"), tokenizer)
        assert all(3 not in split.tokens for split in encoded.values())  # no word is unknown
    assert 100 < len(tokenizer) < 300


def bert_tokenizer():
    """Of a model that tells the two sentences apart by types, and takes 64 tokens."""
    tokenizer = make_tokenizer("bert")
    tokenizer.model_max_length = 64
    return tokenizer


@pytest.mark.parametrize("task, most", [("rte", 20), ("qnli", 14)])  # one has the longer sentence first, one second
@pytest.mark.parametrize("make", [demo_tokenizer, bert_tokenizer])
def test_batches_equal_the_tokenizers_own_padding(make, task, most):
    tokenizer, data = make(), load_task(task, "demo")
    encoded = encode(data, tokenizer, max_length=most)
    rows = np.array([7, 0, 1199, 7])
    batch = encoded["train"].batch(rows)
    texts = [[column[i] for i in rows] for column in data.splits["train"].texts.values()]
    own = tokenizer(*texts, truncation=True, max_length=most, padding=True, return_tensors="pt")
    assert set(batch) == set(own) | {"labels"} and batch["input_ids"].shape[1] == most
    for name in own:
        assert torch.equal(batch[name], own[name]) and batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == data.splits["train"].labels[rows].tolist()
    ids = tokenizer(*data.splits["train"].texts.values(), truncation=True, max_length=most)["input_ids"]
    assert encoded["train"].lengths().tolist() == list(map(len, ids))


def test_a_length_that_the_model_does_not_take():
    with pytest.raises(UsageError, match="--max-length 65 is outside 8 to 64"):
        encode(load_task("rte", "demo"), bert_tokenizer(), max_length=65)


# ---- batches


@pytest.mark.parametrize("n, size", [(1, 8), (8, 8), (65, 32)])
def test_every_epoch_has_each_example_once(n, size):
    lengths = stream(0, "lengths").integers(5, 60, size=n)
    batches, steps = training_batches(lengths, size, 3, seed=0), -(-n // size)
    assert len(batches) == 3 * steps and max(map(len, batches)) <= size
    for epoch in range(3):
        rows = np.concatenate(batches[epoch * steps : (epoch + 1) * steps])
        assert np.array_equal(np.sort(rows), np.arange(n))


def test_batches_change_with_every_key_and_with_nothing_else():
    lengths = stream(0, "lengths").integers(5, 60, size=200)

    def order(*args, epochs=1):
        return [tuple(rows) for rows in training_batches(lengths, 16, epochs, *args)]

    first, second = order(0, 1, 2, epochs=2)[:13], order(0, 1, 2, epochs=2)[13:]
    assert order(0, 1, 2) == first != second
    others = [order(1, 1, 2), order(0, 2, 2), order(0, 1, 3), second]
    # not only in another order: other examples meet
    sets = [{frozenset(rows) for rows in batches} for batches in (first, *others)]
    assert all(len(a & b) <= 2 for i, a in enumerate(sets) for b in sets[:i])


# ---- metrics


def test_metrics_by_hand():
    y, p = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])  # tp 2, fn 1, tn 1, fp 1
    assert score("accuracy", p, y) == 3 / 5 and score("f1", p, y) == pytest.approx(2 / 3)
    assert score("matthews", p, y) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert score("pearson", [0, 1, 2, 3], [0, 0, 1, 1]) == pytest.approx(2 / np.sqrt(5))
    assert score("spearman", [1, 10, 100], [1, 3, 2]) == pytest.approx(0.5)


def test_constant_predictions_are_zero():
    y, zeros = np.array([0, 1, 1, 0]), np.zeros(4, dtype=int)
    for metric in ("pearson", "spearman"):
        with pytest.warns(stats.ConstantInputWarning):
            assert score(metric, zeros + 2, y) == 0.0
    assert score("f1", zeros, y) == score("matthews", zeros, y) == 0.0


def test_every_task_has_the_metrics_of_glue():
    others = {"cola": ["val_matthews"], "stsb": ["val_pearson", "val_spearman"]}
    others |= dict.fromkeys(("mrpc", "qqp"), ["val_accuracy", "val_f1"])
    for name, task in TASKS.items():
        labels = np.arange(6) % 5 if task.regression else np.arange(6) % task.num_labels
        perfect = labels[:, None] * 1.0 if task.regression else np.eye(task.num_labels)[labels] * 7 - 3
        metrics = evaluate(task, task.evaluation_splits[0], perfect, labels)
        assert list(metrics) == others.get(name, ["val_accuracy"])
        assert all(type(value) is float and value == pytest.approx(1.0) for value in metrics.values())


def test_outputs_that_are_not_finite():
    outputs = np.zeros((4, 2))
    outputs[1:3, 0] = np.nan
    with pytest.raises(RunFailed, match="2 of 4 outputs on rte are not finite: lower --learning-rate"):
        evaluate(TASKS["rte"], "validation", outputs, np.zeros(4, dtype=int))
