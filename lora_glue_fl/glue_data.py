"""A task of GLUE: from the official tsv files, from the hub through `datasets`, or generated.

data = load_task("rte", data_root=None)                    # official files, else the hub; dataset="demo": neither
"""

import dataclasses

import numpy as np

from common.cache import one_line
from common.cli import UsageError
from common.corpora import data_folder
from common.hub import hub_dataset
from lora_glue_fl.demo_glue import demo_task
from lora_glue_fl.flags import DATASETS
from lora_glue_fl.glue_tasks import Split, Task, find_task, make_split

HUB_NAME = "nyu-mll/glue"
_ROOTS = ("glue", "GLUE", "glue_data", ".")  # under the data folder
_COLA_HEADER = ["source", "label", "star", "sentence"]  # CoLA's train and dev have no header line
_MOST_SKIPPED = 1e-3  # of a file's rows; QQP's train file has three broken ones


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's splits. notes: lines for the log; fingerprint: for run.json (SHA-256 of each split, counts of examples
    and, but for regression, of each label, source)."""

    task: Task
    splits: dict[str, Split]
    notes: list[str]
    fingerprint: dict


def load_task(name, dataset="glue", data_root=None, splits=None):
    """The task `name` ("cola" ... "wnli") as `TaskData`.

    dataset: "glue" (the official tsv files under the data folder, else the hub) or "demo"
    (generated). splits: which are needed, all by default. A size that is not the official one is noted.

    Raises UsageError for an unknown task or dataset, and for data that are missing or damaged.
    """
    task = find_task(name)
    splits = splits or task.splits
    if dataset not in DATASETS:
        raise UsageError(f"unknown dataset {dataset!r}: choose one of {', '.join(DATASETS)}")
    if dataset == "demo":
        generated = demo_task(task.name)
        there, source, notes = {split: generated[split] for split in splits}, "generated", []
    else:
        there, source, notes = _read_task(task, splits, data_root)
        sizes = [(split, len(there[split]), task.sizes[split]) for split in splits]
        notes += [f"{task.name} {s}: {n} examples, officially {size} ({source})" for s, n, size in sizes if n != size]
    fingerprint = {
        "dataset": dataset,
        "task": task.name,
        "source": source,
        "sha256": {split: there[split].sha256() for split in splits},
        "counts": {split: len(there[split]) for split in splits},
    }
    if not task.regression:
        of_labels = {split: np.bincount(there[split].labels, minlength=task.num_labels) for split in splits}
        fingerprint["label_counts"] = {split: counts.tolist() for split, counts in of_labels.items()}
    return TaskData(task, there, notes, fingerprint)


def _read_task(task, splits, data_root):
    """({split: Split}, source, notes): the asked splits of an official task.

    From the first folder that is there, `data_root`/glue/FOLDER (or GLUE/, glue_data/, or right below), else the hub
    or its library's cache.
    """
    root = data_folder(data_root)
    for place in _ROOTS:
        folder = root / place / task.folder
        if folder.is_dir():
            notes = []
            return {split: _read_tsv(task, folder / _file_name(split), notes) for split in splits}, str(folder), notes
    rows = hub_dataset(
        (HUB_NAME, task.name),
        dict.fromkeys(task.splits, (*task.columns, "label")),
        f"no GLUE task {task.name} under {root}",
        f"{', '.join(map(_file_name, task.splits))} into {root / 'glue' / task.folder}",
    )

    def of(split):
        texts = {column: rows[split][column] for column in task.columns}
        return make_split(task, texts, rows[split]["label"], {}, lambda i: f"{HUB_NAME} {split} example {i}")

    return {split: of(split) for split in splits}, f"hub, {HUB_NAME} {task.name}", []


def _file_name(split):
    return split.replace("validation", "dev") + ".tsv"


def _read_tsv(task, path, notes):
    """One file as a `Split`. Quotes are literal; a row that lacks a column that is needed is skipped and noted."""
    if not path.is_file():
        raise UsageError(f"{path.parent} lacks {path.name}: put it there, or take another --data-root or task")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # MRPC's files start with a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({one_line(error)}): get the file again") from error
    # Only "\n" ends a line: splitlines would also cut at the rarer separators that stand inside sentences.
    rows = [line.removesuffix("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    bare = task.name == "cola" and len(rows[0]) == len(_COLA_HEADER) and rows[0] != _COLA_HEADER
    header, first = (_COLA_HEADER, 0) if bare else (rows[0], 1)
    missing = [name for name in task.file_columns.values() if name not in header and name != "genre"]
    if missing:
        raise UsageError(f"{path} has no column {' nor '.join(missing)}: it is not the official file of {task.name}")
    places = {column: header.index(name) for column, name in task.file_columns.items() if name in header}
    needed = 1 + max(places.values())
    lines = [i for i in range(first, len(rows)) if len(rows[i]) >= needed]
    skipped = len(rows) - first - len(lines)
    if not lines or skipped > max(3, _MOST_SKIPPED * len(rows)):
        raise UsageError(f"{path}: {skipped} of {len(rows) - first} rows lack columns: get the file again")
    if skipped:
        notes.append(f"{path.name}: {skipped} rows without all columns are skipped")
    columns = {column: [rows[i][place] for i in lines] for column, place in places.items()}
    texts = {column: columns[column] for column in task.columns}
    categories = {name: columns[name] for name in columns if name not in (*task.columns, "label")}
    return make_split(task, texts, columns["label"], categories, lambda i: f"{path} line {lines[i] + 1}")
