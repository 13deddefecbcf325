"""AG News (Zhang et al. 2015): four topics of news, from the official files, a sample of them, or the hub."""

import csv
import io

import numpy as np

from common.cli import UsageError
from common.hub import hub_dataset, one_line
from common.text import data_folder

TOPICS = ("World", "Sports", "Business", "Sci/Tech")  # classes 1 to 4 of the files, labels 0 to 3 here
HUB_NAME = "fancyzhx/ag_news"
SIZES = {"train": 120_000, "test": 7_600}


def read(data_root=None):
    """({"train", "test"}: (texts, labels int64 [n], 0 to 3), source, notes).

    From `data_root`/ag_news (ag_news_csv, or data_root itself), else the hub or its library's cache. A file has either
    the official layout (no header; class 1 to 4, title, description) or the header `label,text` and the same classes.
    Title and description are joined by a space, as on the hub, and texts are made alike (`tidy`).

    Raises UsageError where a row is broken (file and row named), and when there are neither files nor a hub.
    """
    root = data_folder(data_root)
    if paths := _find(root):
        found = {split: read_csv(path) for split, path in paths.items()}
        source = f"{paths['train'].parent.name}/{paths['train'].name}, test.csv"
    else:
        found, source = _from_hub(root), f"hub, {HUB_NAME}"
    notes = [
        f"ag_news {split}: {len(found[split][0])} texts, officially {size} ({source})"
        for split, size in SIZES.items()
        if len(found[split][0]) != size
    ]
    return found, source, notes


def tidy(text):
    r"""One line without the files' traces: their mark of a line's end (\) and runs of white space become one space.

    So does a full stop between spaces: some public copies of the data join title and description by it.
    """
    return " ".join(word for word in text.replace("\\", " ").split() if word != ".")


def _find(root):
    """{"train", "test"}: paths of the first copy under `root`; None where there is none."""
    for folder in (root / "ag_news", root / "ag_news_csv", root):
        train = [folder / name for name in ("train.csv", "train_sample.csv") if (folder / name).is_file()]
        if train and (folder / "test.csv").is_file():
            return {"train": train[0], "test": folder / "test.csv"}
    return None


def read_csv(path):
    """(texts, labels) of a file; errors as `read`."""
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path} ({one_line(error)}): get the file again") from error
    columns = 2 if rows[:1] == [["label", "text"]] else 3
    texts, labels = [], []
    for i, row in list(enumerate(rows, 1))[columns == 2 :]:
        text = tidy(" ".join(row[1:]))
        if len(row) != columns or row[0].strip() not in ("1", "2", "3", "4") or not text:
            wanted = "label and text" if columns == 2 else "class, title and description"
            raise UsageError(f"{path} row {i} is not {wanted}, with a class from 1 to 4: mend it")
        labels.append(int(row[0]) - 1)
        texts.append(text)
    if len(texts) < 2:
        raise UsageError(f"{path} has {len(texts)} rows: get the file again")
    return texts, np.array(labels, dtype=np.int64)


def _from_hub(root):
    where = f"train.csv and test.csv into {root / 'ag_news'}"
    rows = hub_dataset((HUB_NAME,), dict.fromkeys(SIZES, ("text", "label")), f"no AG News under {root}", where)
    return {
        split: (list(map(tidy, rows[split]["text"])), np.array(rows[split]["label"], dtype=np.int64)) for split in SIZES
    }
