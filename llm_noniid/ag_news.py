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
_FOLDERS = ("ag_news", "ag_news_csv", "ag-news", ".")  # under the data folder
_FILES = {"train": ("train.csv", "train_sample.csv"), "test": ("test.csv",)}


def read(data_root=None):
    """({"train", "test"}: (texts, labels int64 [n], 0 to 3), source, notes).

    From `data_root`/ag_news (or another of `_FOLDERS`), else the hub or its library's cache. A file has either the
    official layout (no header; class 1 to 4, title, description) or the header `label,text` and the same classes. Title
    and description are joined by a space, as on the hub, and texts are made alike (`tidy`), wherever they are from.

    Raises UsageError where a file is missing, where a row is broken (file and line named), and when there are neither
    files nor a hub.
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
    for name in _FOLDERS:
        paths = {split: [root / name / file for file in files] for split, files in _FILES.items()}
        found = {split: path for split, several in paths.items() for path in reversed(several) if path.is_file()}
        if len(found) == 2:
            return found
        if found and name != ".":
            missing = "test.csv" if "train" in found else "train.csv"
            raise UsageError(f"AG News in {root / name} is incomplete: put {missing} there too")
    return None


def read_csv(path):
    """(texts, labels) of a file; errors as `read`."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({one_line(error)}): get the file again") from error
    texts, labels = [], []
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    columns, line = 3, 1  # line: where the row begins: a text in quotes may go on for several lines
    try:
        for row in reader:
            text = tidy(" ".join(row[1:]))
            if line == 1 and row == ["label", "text"]:
                columns = 2
            elif len(row) != columns or row[0].strip() not in ("1", "2", "3", "4") or not text:
                wanted = "label and text" if columns == 2 else "class, title and description"
                raise UsageError(f"{path} line {line} is not {wanted}, with a class from 1 to 4: mend it")
            else:
                labels.append(int(row[0]) - 1)
                texts.append(text)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path} line {line} is broken ({one_line(error)}): get the file again") from error
    if len(texts) < 2:
        raise UsageError(f"{path} has {len(texts)} rows: get the file again")
    return texts, np.array(labels, dtype=np.int64)


def _from_hub(root):
    where = f"train.csv and test.csv into {root / 'ag_news'}"
    rows = hub_dataset((HUB_NAME,), dict.fromkeys(SIZES, ("text", "label")), f"no AG News under {root}", where)
    return {
        split: (list(map(tidy, rows[split]["text"])), np.array(rows[split]["label"], dtype=np.int64)) for split in SIZES
    }
