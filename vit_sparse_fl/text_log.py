"""The text log of a run: `LOG_DIR/NAME.log`, a line `timestamp | level | message` each, by Python's logging."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from common import parallel
from common.cli import UsageError


class _BesideTheBar(logging.Handler):
    """Messages on stderr, above a progress bar; those with extra={"quiet": True} are for the file alone."""

    def emit(self, record):
        if not getattr(record, "quiet", False):
            tqdm.write(record.getMessage(), file=sys.stderr)


def open_log(folder, name):
    """The study's logger, from now on into this run's file and on stderr; the main process's part only.

    Args: folder: of the logs; name: the run's. Raises UsageError when the folder cannot be made.
    """
    log = logging.getLogger("vit_sparse_fl")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):  # of the run before this one
        log.removeHandler(handler)
        handler.close()
    if parallel.is_main():
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {folder}: {error.strerror}; choose --log-dir") from None
        file = logging.FileHandler(Path(folder) / f"{name}.log", encoding="utf-8", delay=True)
        file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(file)
        log.addHandler(_BesideTheBar())
    else:
        log.addHandler(logging.NullHandler())
    return log
