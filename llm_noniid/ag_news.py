"""AG News (Zhang et al. 2015): four topics of news, from the official files, a sample of them, or the hub."""

import csv
import io

import numpy as np

from common.cache import one_line
from common.cli import UsageError
from common.corpora import data_folder
from common.hub import hub_dataset

TOPICS = ("World", "Sports", "Business", "Sci/Tech")  # classes 1 to 4 of the files, labels 0 to 3 here
HUB_NAME = "fancyzhx/ag_news"
SIZES = {"train": 120_000, "test": 7_600}
_FOLDERS = ("ag_news", "ag_news_csv", "ag-news", ".")  # under the data folder
_TRAIN_FILES, _TEST_FILE = ("train.csv", "train_sample.csv"), "test.csv"


def read(data_root=None):
    """({"train", "test"}: (texts, labels int64 [n], 0 to 3), source, notes).

    From `data_root`/ag_news (or ag_news_csv/, ag-news/, or right below): train.csv, else train_sample.csv, and
    test.csv; else the hub, or its library's cache. A file has either the official layout (no
    header; class 1 to 4, title, description) or the header `label,text` and the same classes. Title and description are
    joined by a space, as on the hub, and texts are made alike (`tidy`), wherever they are from.

    Raises UsageError when a file is missing, when a row is broken, has a class outside 1 to 4 or no text (file and line
    named), and when there are neither files nor a hub.
    """
    paths = _find(data_folder(data_root))
    if paths:
        found = {split: read_csv(path) for split, path in paths.items()}
        source = f"{paths['train'].parent.name}/{paths['train'].name}, {_TEST_FILE}"
    else:
        found, source = _from_hub(data_folder(data_root)), f"hub, {HUB_NAME}"
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
    """{"train", "test"}: paths of the first complete copy under `root`; None where there is none."""
    for name in _FOLDERS:
        folder = root / name
        train = next((folder / file for file in _TRAIN_FILES if (folder / file).is_file()), None)
        test = folder / _TEST_FILE
        if train and test.is_file():
            return {"train": train, "test": test}
        if name != "." and (train or test.is_file()):
            raise UsageError(f"AG News in {folder} is incomplete: put {_TEST_FILE if train else 'train.csv'} there too")
    return None


def read_csv(path):
    """(texts, labels) of a file; errors as `read`."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({one_line(error)}): get the file again") from error
    texts, labels = [], []
    columns = 3
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    line = 1  # where the row begins: a text in quotes may go on for several lines
    try:
        for row in reader:
            place = f"{path} line {line}"
            if line == 1 and row == ["label", "text"]:
                columns = 2
            elif len(row) != columns:
                wanted = "label and text" if columns == 2 else "class, title and description (or a header label,text)"
                raise UsageError(f"{place} has {len(row)} columns instead of {wanted}: mend it")
            else:
                name = row[0].strip()
                if name not in ("1", "2", "3", "4"):
                    raise UsageError(f"{place}: class {name!r} is outside 1 to 4 ({', '.join(TOPICS)}): mend it")
                labels.append(int(name) - 1)
                texts.append(_not_empty(" ".join(row[1:]), place))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{path} line {line} is broken ({one_line(error)}): mend its quotes, or get the file again"
        ) from error
    if not texts:
        raise UsageError(f"{path} has no rows: get the file again")
    return texts, np.array(labels, dtype=np.int64)


def _not_empty(text, place):
    text = tidy(text)
    if not text:
        raise UsageError(f"{place} has an empty text: remove the row or fill it")
    return text


def _from_hub(root):
    rows = hub_dataset(
        (HUB_NAME,),
        dict.fromkeys(SIZES, ("text", "label")),
        f"no AG News under {root}",
        f"train.csv and test.csv into {root / 'ag_news'}",
    )
    found = {}
    for split in SIZES:
        for i, label in enumerate(rows[split]["label"]):
            if label not in range(len(TOPICS)):
                raise UsageError(f"{HUB_NAME} {split} row {i}: label {label!r} is outside 0 to 3: it has changed")
        texts = [_not_empty(text, f"{HUB_NAME} {split} row {i}") for i, text in enumerate(rows[split]["text"])]
        found[split] = texts, np.array(rows[split]["label"], dtype=np.int64)
    return found
