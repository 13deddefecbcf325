"""The nine tasks of GLUE: their columns, labels, splits, official sizes and files, and what they are measured by."""

import dataclasses
import functools
import warnings

import numpy as np

from common.cli import RunFailed, UsageError
from common.hub import sha256_of
from common.text import documents_sha256


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
        number = "" if task.regression else f" (0 to {len(task.labels) - 1})"
        raise UsageError(f"{where(i)}: label {labels[i]!r} is not {wanted}{number}: correct or remove that example")
    return Split(texts, np.array(values, dtype=np.float32 if task.regression else np.int64), categories)


def _score(label):
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return value if 0 <= value <= HIGHEST_SCORE else None


# ---------------------------------------------------------------------------------------------- metrics


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

    f1 is of class 1, 0 where that is neither predicted nor there; a correlation with a constant is 0, with a warning.
    """
    from scipy import stats  # only here: they take a second to import
    from sklearn import metrics

    plain = {"accuracy": metrics.accuracy_score, "f1": functools.partial(metrics.f1_score, zero_division=0.0)}
    if metric in plain:
        return float(plain[metric](labels, predictions))
    for what, values in (("predictions", predictions), ("labels", labels)):
        if np.ptp(values) == 0:
            warnings.warn(f"all {len(values)} {what} are the same: {metric} correlation is taken as 0", stacklevel=3)
            return 0.0
    if metric == "matthews":
        return float(metrics.matthews_corrcoef(labels, predictions))
    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[metric]
    return float(correlation(np.asarray(predictions, np.float64), np.asarray(labels, np.float64)).statistic)
