"""GLUE's tasks from the official tsv files, or from the hub through `datasets`."""

from common.cache import cache_folder, one_line
from common.cli import UsageError
from common.corpora import data_folder
from common.hub import hub_dataset
from lora_glue_fl.glue_tasks import make_split

HUB_NAME = "nyu-mll/glue"
_ROOTS = ("glue", "GLUE", "glue_data", ".")  # under the data folder
_COLA_HEADER = ("source", "label", "star", "sentence")  # CoLA's train and dev have no header line
_MOST_SKIPPED = 1e-3  # of a file's rows; QQP's train file has three broken ones


def read_task(task, splits, data_root=None, cache_dir=None):
    """({split: Split}, source, notes): the asked splits of an official task.

    From the first folder that is there, `data_root`/glue/FOLDER (or GLUE/, glue_data/, or right below), else what an
    earlier download left in the cache, else the hub.

    Raises UsageError when a file is missing, is not the task's or has a label that is not, and when there are
    neither files nor a hub.
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
        cache_folder(cache_dir) / f"glue-{task.name}.json.gz",
        f"no GLUE task {task.name} under {root}",
        f"{', '.join(map(_file_name, task.splits))} into {root / 'glue' / task.folder}",
    )
    found = {}
    for split in splits:
        columns = rows[split]
        texts = {column: columns[column] for column in task.columns}
        found[split] = make_split(task, texts, columns["label"], {}, lambda i, s=split: f"{HUB_NAME} {s} example {i}")
    return found, f"hub, {HUB_NAME} {task.name}", []


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
    first = 0
    if task.name == "cola" and (len(rows[0]) == len(_COLA_HEADER) and rows[0] != list(_COLA_HEADER)):
        header = _COLA_HEADER
    else:
        header, first = rows[0], 1
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
