"""GLUE's files, the hub, the demo, tokens and batches."""

import json

import numpy as np
import pytest

import common.hub
from common.cli import UsageError
from lora_glue_fl.data_prep import encode, load_task
from lora_glue_fl.glue_tasks import TASKS, demo_tokenizer, evaluate

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


# ---------------------------------------------------------------------------------------------- files


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


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands for `datasets`: returns what is put into it, and counts the calls."""
    import datasets

    state = {"calls": [], "rows": None}

    def load_dataset(*args):
        state["calls"].append(args)
        if isinstance(state["rows"], Exception):
            raise state["rows"]
        return state["rows"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(common.hub, "hub_reachable", lambda: True)
    return state


@pytest.mark.parametrize("task", ["stsb", "mnli"])
def test_the_hub_gives_the_same_as_the_files(task, hub, tmp_path):
    write_files(tmp_path, task)
    local = load_task(task, data_root=tmp_path)
    # the hub has scores in float32
    hub["rows"] = {
        name: {**split.texts, "label": split.labels.tolist(), "idx": [0] * len(split)}
        for name, split in local.splits.items()
    }
    data = load_task(task)
    assert data.fingerprint["sha256"] == local.fingerprint["sha256"]
    assert data.fingerprint["source"] == f"hub, nyu-mll/glue {task}"
    assert data.splits["train"].labels.dtype == local.splits["train"].labels.dtype
    assert hub["calls"] == [("nyu-mll/glue", task)]


# ------------------------------------------------------------------------------------------------ demo


def bag_of_words(encoded, size):
    counts = np.zeros((len(encoded), size))
    rows = np.repeat(np.arange(len(encoded)), encoded.lengths())
    np.add.at(counts, (rows, encoded.tokens.astype(int)), 1.0)
    return counts


@pytest.mark.parametrize("task", list(TASKS))
def test_the_demo_can_be_learned(task):
    data, tokenizer = load_task(task, "demo"), demo_tokenizer()
    encoded = encode(data, tokenizer)
    train = data.splits["train"]
    x = bag_of_words(encoded["train"], len(tokenizer))
    y = train.labels[:, None] if task == "stsb" else np.eye(data.task.num_labels)[train.labels]
    weights = np.linalg.solve(x.T @ x + 3.0 * np.eye(x.shape[1]), x.T @ y)  # ridge
    for split in data.task.evaluation_splits:
        outputs = bag_of_words(encoded[split], len(tokenizer)) @ weights
        found = evaluate(data.task, split, outputs, data.splits[split].labels)
        assert min(found.values()) > (0.7 if task == "cola" else 0.85)
        assert max(found.values()) < 0.995  # noise in the labels


def test_the_demo_is_the_same_on_every_machine():
    # Any change of the sentences changes the figures of every demo run.
    scores = load_task("stsb", "demo").splits["train"].labels
    assert (scores.min(), scores.max(), scores.dtype) == (0, 5, np.float32) and len(np.unique(scores)) > 20
    hashes = [load_task(task, "demo").fingerprint["sha256"]["train"][:8] for task in TASKS]
    assert hashes == "ea11a7c5 facba88c c4ed3435 d1a7b892 84e2a3f9 d3debdf8 d46172f8 5b993d1d f586c7b3".split()
