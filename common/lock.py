"""One process at a time works in a run folder: a lock that ends with its process, however that ends."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from common.cli import UsageError

LOCK = ".lock"  # its file in a run folder
LEAVING = 10  # seconds that a killed process may need until all its files are closed


class FolderLock:
    """flock on FOLDER/.lock, which names its holder. A file that no living process holds is no lock."""

    def __init__(self, folder):
        self.path, self._file = Path(folder) / LOCK, None

    @property
    def held(self):
        """Whether this object holds the lock."""
        return self._file is not None

    def take(self):
        """Holds the lock until `release` or the end of this process; does nothing where it is held already.

        A file system without locks gives a warning.
        Raises UsageError where another process holds it, OSError where its file cannot be opened.
        """
        if self.held:
            return
        end = time.monotonic() + LEAVING
        while not self.held:
            file = open(self.path, "ab+", buffering=0)  # noqa: SIM115  closed by `release`; children that exec lack it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    holder = file.read(200).decode(errors="replace").strip() or "another process"
                if _is_leaving(holder) and time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                raise UsageError(
                    f"{self.path.parent} is in use: {holder} works in it: wait for its end or choose another --run-name"
                ) from None
            except OSError as error:
                print(
                    f"warning: {self.path.parent} cannot be locked ({error.strerror}): start no second run in it",
                    file=sys.stderr,
                )
            if self._is_in_place(file):
                self._file = file
            else:  # its holder removed it after it was opened here
                file.close()
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self):
        """Gives the lock up and removes its file; does nothing where it is not held."""
        file, self._file = self._file, None
        if file is None:
            return
        if self._is_in_place(file):  # not so where the folder was moved
            with contextlib.suppress(OSError):
                self.path.unlink()
        file.close()

    def _is_in_place(self, file):
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        return False


def _is_leaving(holder):
    """Whether the process that a lock file names is of this machine and dead: the lock goes with its last thread."""
    words = holder.split()
    if not Path("/proc/self/stat").exists() or words[:1] != ["process"] or words[-1] != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{words[1]}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
