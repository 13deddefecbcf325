"""The nine tasks of GLUE: columns, labels, splits and official files, what they are measured by, generated examples."""

import dataclasses
import functools

import numpy as np

from common.cli import RunFailed, UsageError
from common.seeding import stream
from common.text import documents_sha256, sha256_of


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. Column and label names are those of the hub's `nyu-mll/glue`.

    columns: one text column, or the two of a pair. labels: the names of classes 0, 1, ..., empty for regression.
    metrics: those of GLUE, the first is the headline. folder, file_columns: of the official tsv files: where the text
    columns, the label and (under its own name) a category stand.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    folder: str
    file_columns: dict[str, str]

    @property
    def regression(self):
        return not self.labels

    @property
    def num_labels(self):
        """Outputs of the model: the number of classes, 1 for regression."""
        return len(self.labels) or 1

    @property
    def evaluation_splits(self):
        """("validation",); mnli has ("validation_matched", "validation_mismatched")."""
        return ("validation_matched", "validation_mismatched") if self.name == "mnli" else ("validation",)

    @property
    def splits(self):
        return ("train", *self.evaluation_splits)


def _task(name, columns, labels, metrics, folder, **file_columns):
    columns = tuple(columns.split())
    file_columns = {**{column: column for column in columns}, "label": "label", **file_columns}
    return Task(name, columns, tuple(labels.split()), tuple(metrics.split()), folder, file_columns)


_PAIR, _ENTAILMENT = "sentence1 sentence2", "entailment not_entailment"
_MRPC = {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
_MNLI = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label", "genre": "genre"}
_QQP = ("question1 question2", "not_duplicate duplicate", "accuracy f1", "QQP")
TASKS = {
    task.name: task
    for task in (
        _task("cola", "sentence", "unacceptable acceptable", "matthews", "CoLA"),
        _task("sst2", "sentence", "negative positive", "accuracy", "SST-2"),
        _task("mrpc", _PAIR, "not_equivalent equivalent", "accuracy f1", "MRPC", **_MRPC),
        _task("stsb", _PAIR, "", "pearson spearman", "STS-B", label="score", genre="genre"),
        _task("qqp", *_QQP, label="is_duplicate"),
        _task("mnli", "premise hypothesis", "entailment neutral contradiction", "accuracy", "MNLI", **_MNLI),
        _task("qnli", "question sentence", _ENTAILMENT, "accuracy", "QNLI"),
        _task("rte", _PAIR, _ENTAILMENT, "accuracy", "RTE"),
        _task("wnli", _PAIR, "not_entailment entailment", "accuracy", "WNLI"),
    )
}
HIGHEST_SCORE = 5.0  # stsb's scores go from 0 to 5


def find_task(name):
    """The `Task` of this name, in any case. Raises UsageError for an unknown one."""
    task = TASKS.get(str(name).lower())
    if task is None:
        raise UsageError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return task


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples of one split: texts {column: list of n strings}, labels [n] (int64; float32 for regression).

    categories: {name: list of n strings}, such as the genre; what the source of the data has of them.
    """

    texts: dict[str, list[str]]
    labels: np.ndarray
    categories: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def __len__(self):
        return len(self.labels)

    def sha256(self):
        """SHA-256 of texts and labels. Not of categories, which the hub lacks: the same examples, the same hash."""
        return sha256_of([*map(documents_sha256, self.texts.values()), self.labels.tolist()])


def make_split(task, texts, labels, categories, where):
    """A `Split` whose labels have been read and checked.

    labels: a list of numbers, names, or their texts. where(i): says where example i stands, for an error.
    Raises UsageError for a label that is not one of the task's, naming the first.
    """
    known = {str(key): number for number, name in enumerate(task.labels) for key in (number, name)}
    values = [_score(label) if task.regression else known.get(str(label)) for label in labels]
    if None in values:
        i = values.index(None)
        wanted = f"a number from 0 to {HIGHEST_SCORE:g}" if task.regression else f"one of {', '.join(task.labels)}"
        raise UsageError(f"{where(i)}: label {labels[i]!r} is not {wanted}: correct or remove that example")
    return Split(texts, np.array(values, dtype=np.float32 if task.regression else np.int64), categories)


def _score(label):
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return value if 0 <= value <= HIGHEST_SCORE else None


# ---- metrics


def evaluate(task, split, outputs, labels):
    """The task's metrics of a model's outputs.

    outputs: the model's [n, num_labels], logits or (regression) the score; labels [n].
    Returns {name: float}: val_accuracy, val_f1, val_matthews, val_pearson, val_spearman as the task has them. mnli:
    val_accuracy is on the matched genres, val_mismatched_accuracy on the others (split "validation_mismatched").
    Raises RunFailed for outputs that are not finite.
    """
    outputs = np.asarray(outputs, dtype=np.float64)
    broken = int((~np.isfinite(outputs)).any(axis=1).sum())
    if broken:
        raise RunFailed(f"{broken} of {len(labels)} outputs on {task.name} are not finite: lower --learning-rate")
    predictions = outputs[:, 0] if task.regression else outputs.argmax(axis=1)
    prefix = "val_mismatched" if split.endswith("mismatched") else "val"
    return {f"{prefix}_{name}": score(name, predictions, labels) for name in task.metrics}


def score(metric, predictions, labels):
    """accuracy, f1, matthews, pearson or spearman of predictions [n], by scikit-learn and scipy.

    f1 is of class 1, 0 where that is neither predicted nor there; a correlation with a constant is 0 (scipy warns).
    """
    from scipy import stats  # only here: they take a second to import
    from sklearn import metrics

    plain = {"accuracy": metrics.accuracy_score, "f1": functools.partial(metrics.f1_score, zero_division=0.0)}
    plain["matthews"] = metrics.matthews_corrcoef
    if metric in plain:
        return float(plain[metric](labels, predictions))
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
    value = float(correlation(np.asarray(predictions, np.float64), np.asarray(labels, np.float64)).statistic)
    return 0.0 if np.isnan(value) else value


# ---- the dataset `demo`: generated sentences in the tasks' own columns and label types, no download

# Every label leaves traces in the words, so that a bag of words can learn most of it and a small model all of it; a
# share NOISE of the labels is wrong (stsb's scores: spread), as in data that people labelled.
TRAIN, VALIDATION = 1200, 300  # examples; wnli, small in GLUE too, has a third
NOISE = 0.04  # of the labels
_SEED = 2018  # of the data, not of a run: every run sees the same sentences

_PEOPLE = "farmer teacher doctor pilot baker nurse judge painter sailor student".split()
_DID = "found sold carried painted cleaned repaired opened watched moved bought".split()
_DO = "find sell carry paint clean repair open watch move buy".split()
_THINGS = "table window boat letter basket engine clock garden bridge piano".split()
_PLACES = "market station village harbor school museum kitchen forest castle hotel".split()
_DAYS = "monday tuesday wednesday thursday friday".split()
_GOOD = "wonderful charming brilliant moving funny clever warm elegant thrilling superb".split()
_BAD = "dull clumsy tedious bland awful lifeless shallow messy pointless weak".split()
_SHOWS = "film story plot cast script ending scene movie".split()
_FAR = "ocean rocket violin desert tiger thunder pepper glacier lantern comet".split()
_NUMBERS = "1812 1875 1903 1948 twelve thirty forty".split()
_VAGUE = "generally perhaps reportedly sometimes widely hardly mostly".split()
_GENRES = {"fiction": "once", "government": "officially", "slate": "arguably", "telephone": "yeah", "travel": "nearby"}
# mnli's own; the mismatched half of its validation has genres that are not in train
_OTHERS = {"facetoface": "well", "letters": "dear", "nineeleven": "that morning"}
_OTHERS |= {"oup": "historically", "verbatim": "etymologically"}
_FREQUENCIES = {"cola": (0.3, 0.7), "mrpc": (0.33, 0.67), "qqp": (0.63, 0.37)}  # of the classes, where uneven


def demo_task(name):
    """The splits of the demo of task `name`: {split: Split}. The same on every machine."""
    task = TASKS[name]
    splits = {}
    for split in task.splits:
        generator = stream(_SEED, f"demo {name} {split}")
        n = (TRAIN if split == "train" else VALIDATION) // (3 if name == "wnli" else 1)
        kinds = generator.choice(6 if task.regression else len(task.labels), size=n, p=_FREQUENCIES.get(name))
        genres = [None] * n
        if "genre" in task.file_columns:
            genres = generator.choice(list(_OTHERS if "mismatched" in split else _GENRES), size=n).tolist()
        w = _picker(generator)
        examples = [_WRITERS[name](w, kind, genre) for kind, genre in zip(kinds, genres, strict=True)]
        texts = {column: [example[i] for example in examples] for i, column in enumerate(task.columns)}
        splits[split] = Split(texts, _noisy(kinds, task, generator), {"genre": genres} if genres[0] else {})
    return splits


def _noisy(kinds, task, generator):
    """What the labels say: the sentences' kinds, a share NOISE of them replaced; stsb's scores spread by up to 0.4."""
    if task.regression:
        return np.clip(kinds + generator.integers(-2, 3, size=len(kinds)) / 5, 0, HIGHEST_SCORE).astype(np.float32)
    wrong = generator.random(len(kinds)) < NOISE
    return np.where(wrong, (kinds + 1) % len(task.labels), kinds)


def _picker(generator):
    """A function that picks words: `w(list)` one, `w(list, n)` n different ones."""

    def w(words, n=None):
        if n is None:
            return words[generator.integers(len(words))]
        return [words[i] for i in generator.permutation(len(words))[:n]]

    return w


def _cola(w, label, _):
    words = f"the {w(_PEOPLE)} {w(_DID)} the {w(_THINGS)} near the {w(_PLACES)}".split()
    if label == 0:  # a word too many, or the articles lost
        if w([True, True, True, False]):
            words.insert(w(range(1, len(words))), w(["of", "than", "be", "whose"]))
        else:
            words = [word for word in words if word != "the"]
    return (" ".join([*words, "."]),)


def _sst2(w, label, _):
    mine, other = (_GOOD, _BAD) if label == 1 else (_BAD, _GOOD)
    first, second = w(mine, 2)
    third = w(other if w(range(5)) == 0 else mine)
    return (f"the {w(_SHOWS)} is {first} and {second} , the {w(_SHOWS)} {third}",)


def _mrpc(w, label, _):
    who, did, what, where, when = w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES), w(_DAYS)
    first = f"the {who} {did} the {what} at the {where} on {when} ."
    if label == 1:
        return first, f"on {when} the {what} was {did} by the {who} at the {where} ."
    other = w(["instead", "however", "later"])
    return first, f"{other} the {who} {w(_DID)} another {w(_THINGS)} , but not at the {where} ."


def _qqp(w, label, _):
    do, what = w(_DO), w(_THINGS)
    first = f"how can i {do} the {what} ?"
    if label == 1:
        return first, w([f"what is the best way to {do} the {what} ?", f"which way to {do} the {what} is best ?"])
    return first, w([f"why does nobody {w(_DO)} the {what} ?", f"where can i {do} a {w(_THINGS)} in {w(_PLACES)} ?"])


def _stsb(w, score, genre):
    far = w(range(5), 5)[score:]  # these of the five words are replaced
    near = [w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES), w(_DAYS)]
    words = [w(_FAR) if i in far else word for i, word in enumerate(near)]
    sentence = (_GENRES | _OTHERS)[genre] + " the {} {} the {} at the {} on {} ."
    return sentence.format(*near), sentence.format(*words)


def _mnli(w, label, genre):
    who, did, what, where = w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES)
    premise = f"{(_GENRES | _OTHERS)[genre]} , the {who} {did} the {what} at the {where} ."
    hypothesis = (
        f"someone {did} something at the {where} .",
        f"the {who} {did} the {what} because it was {w(_GOOD + _BAD)} .",
        w([f"nobody {did} the {what} .", f"the {who} never {did} anything at the {where} ."]),
    )
    return premise, hypothesis[label]


def _qnli(w, label, _):
    who, do, did, what = w(_PEOPLE), w(_DO), w(_DID), w(_THINGS)
    question = f"when did the {who} {do} the {what} ?"
    if label == 0:
        return question, f"the {who} {did} the {what} in {w(_NUMBERS)} ."
    return question, f"{w(_VAGUE)} the {what} is {w(_VAGUE)} known at the {w(_PLACES)} ."


def _rte(w, label, _):
    who, did, what, where = w(_PEOPLE), w(_DID), w(_THINGS), w(_PLACES)
    premise = f"the {who} , who came from the {where} on {w(_DAYS)} , {did} the {what} ."
    if label == 0:
        return premise, w([f"the {who} {did} the {what} .", f"the {who} came from the {where} ."])
    return premise, f"the {where} will {w(_DO)} every {w(_THINGS)} tomorrow ."


def _wnli(w, label, _):
    thing, place = w(_THINGS), w(_PLACES)
    first = f"the {thing} does not fit into the {place} because it is too large ."
    return first, f"the {thing if label == 1 else place} is too large ."


_WRITERS = {
    **{"cola": _cola, "sst2": _sst2, "mrpc": _mrpc, "qqp": _qqp, "stsb": _stsb},
    **{"mnli": _mnli, "qnli": _qnli, "rte": _rte, "wnli": _wnli},
}


@functools.cache
def demo_vocabulary():
    """Every word of the nine demos, sorted."""
    columns = [column for name in TASKS for split in demo_task(name).values() for column in split.texts.values()]
    return sorted({word for column in columns for sentence in column for word in sentence.split()})


def demo_tokenizer():
    """A word level tokenizer of the nine demos, with RoBERTa's special tokens: <s> 0, <pad> 1, </s> 2, <unk> 3."""
    import tokenizers
    import transformers

    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    numbers = {word: i for i, word in enumerate([*specials, *demo_vocabulary()])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
        model_input_names=["input_ids", "attention_mask"],
    )
