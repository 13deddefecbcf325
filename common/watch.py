"""What the processes of a run learn of each other besides their exchanges: where they are, and why one has failed.

They share a store (torch's TCPStore), which says at which client each of them is, and the first reason for a failure.
Who waits for others looks there: so a signal is seen, a death is one line that names process and client, and who is
waited for longer than --patience is named.
"""

import contextlib
import os
import socket
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from common.cli import RunFailed, UsageError

TICK = timedelta(seconds=0.5)  # between two looks at the others while one waits for them
MOURNING = 2.0  # seconds: so long after a connection broke, the reason may be in the store
DAY = timedelta(hours=24)  # a client may train for hours before the others hear of it

_size = 1
_store = None
_gone = None  # the exception of who has seen that another is gone
_patience = 1800.0  # seconds


class Gone(RunFailed):
    """Another process ended without a reason that this one could read."""


def meet(host=None, patience=None):
    """Opens the store of the processes that the environment names; does nothing when called again.

    host: a port where this process, which is none of them, serves it; patience: of --patience, in minutes.
    """
    global _store, _patience
    _patience = _patience if patience is None else 60 * patience
    if host is not None:
        _store = dist.TCPStore("127.0.0.1", host, is_master=True, wait_for_workers=False, timeout=DAY)
        return
    if _store is None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, the supervisor's
        _store = next(dist.rendezvous("env://", timeout=DAY))[0]
    elif _store is None:
        address, port, main = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), _rank() == 0
        _store = dist.TCPStore(address, port, is_master=main, wait_for_workers=False, timeout=DAY)
    _store.set(f"process {_rank()}", f"{_machine()} {os.getpid()}")


def _machine():
    """Names the processes that this one can see: its host's, or its container's."""
    with contextlib.suppress(OSError):  # not Linux
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def at(place):
    """Says at which client this process is ("": it waits, or does what is no client's)."""
    _write("at", place)


def ends():
    """Says that this process ends by itself: who looks for it does not take it for killed."""
    _write("process", "")


def _write(what, text):
    if _store is not None:
        with contextlib.suppress(RuntimeError):  # the store's process is gone: this one hears of it where it waits
            _store.set(f"{what} {_rank()}", text)


def _read(what, rank):
    try:
        return _store.get(f"{what} {rank}").decode() if _store.check([f"{what} {rank}"]) else ""
    except RuntimeError:  # the store's process is gone
        return ""


def where(rank):
    """`process R, client K of round T`; only the process where it is at no client, or that is not known."""
    place = _read("at", rank)
    return f"process {rank}" + (f", {place}" if place else "")


def tell(reason, refused=False, rank=None):
    """Says why this process (or `rank`) fails; the first to say so counts. refused: its input is bad, exit code 2."""
    if _store is None:  # nobody else hears of it
        print(f"error: process {_rank()}: {reason}", file=sys.__stderr__)
        return
    line = f"{where(_rank() if rank is None else rank)}: {reason}"
    with contextlib.suppress(RuntimeError):
        _store.compare_set("failed", "", f"{int(refused)}{line}")


def failure():
    """The exception with which every process ends because one has failed, or is gone, or None."""
    with contextlib.suppress(RuntimeError):
        if _store is not None and _store.check(["failed"]):
            text = _store.get("failed").decode()
            return (UsageError if text[0] == "1" else RunFailed)(text[1:])
    return _gone


def stopped():
    """The exception for a signal that comes because another process has failed or was killed, or None.

    torchrun ends the others when one is killed, and does not say which.
    """
    return failure() or next(filter(None, map(_killed, range(_size))), None)


def _killed(rank):
    machine, _, pid = _read("process", rank).rpartition(" ")
    if machine == _machine():  # on others nobody can know
        try:
            os.kill(int(pid), 0)
        except PermissionError:  # the number is another user's process by now
            return None
        except ProcessLookupError:
            why = "perhaps it was killed for its memory: the same command with --resume goes on"
            return Gone(f"{where(rank)}: it is gone, {why}")
    return None


def _rank():
    return int(os.environ.get("RANK", "0"))


def _raise_failure():
    if (error := failure()) is not None:
        raise error


def all_here(size):
    """Waits until every process has come this far, in Python: what follows cannot be interrupted.

    Returns the store of their exchanges.
    """
    global _size
    _size = size
    _store.set(f"here {_rank()}", "")
    began, said = time.monotonic(), 1
    while missing := [r for r in range(size) if not _store.check([f"here {r}"])]:
        _raise_failure()
        said = _complain(began, said, lambda: missing)
        time.sleep(0.02)
    return dist.PrefixStore("exchanges", _store)


def leave():
    """One process again."""
    global _size, _store, _gone
    _size, _store, _gone = 1, None, None


def _complain(began, said, others):
    """One line each time that --patience is over, by the first process that waits. Returns which time is the next.

    others: function to the ranks that do not wait.
    """
    waited = time.monotonic() - began
    if waited < said * _patience:
        return said
    late = others()
    if all(rank in late for rank in range(_rank())):
        names = "; ".join(map(where, late)) or "the other processes"
        print(f"waiting for {names} for {waited / 60:.3g} minutes (--patience)", file=sys.__stderr__, flush=True)
    return said + 1


def _busy():
    """The other processes that are at a client: they do not wait."""
    return [rank for rank in range(_size) if rank != _rank() and _read("at", rank)]


def _late():
    """The other processes that do not wait."""
    with contextlib.suppress(RuntimeError):  # the store's process is gone
        return [rank for rank in range(_size) if rank != _rank() and not _store.check([f"waits {rank}"])]
    return []


def _say_waits(waits):
    """Says whether this process waits: who does not, is waited for, wherever it is."""
    with contextlib.suppress(RuntimeError):
        _store.set(f"waits {_rank()}", "") if waits else _store.delete_key(f"waits {_rank()}")


def wait(work):
    """Waits for an exchange. Signals are seen, who is late is named, and the end of another process is an exception.

    Raises: RunFailed or UsageError with the reason for which a process has failed; Gone without one.
    """
    global _gone
    began, said, completed, waits = time.monotonic(), 1, False, False
    while True:
        try:
            work.wait(TICK)
            if waits:
                _say_waits(False)
            return
        except RuntimeError:  # it is not complete yet, or broken
            if completed:
                break
            completed = work.is_completed()
        _raise_failure()
        if not waits:
            _say_waits(waits := True)
        said = _complain(began, said, _late)
    names = "; ".join(map(where, _busy())) or "between two clients"
    _gone = Gone(f"another process is gone ({names}): see its output")
    end = time.monotonic() + MOURNING
    while failure() is _gone and time.monotonic() < end:
        time.sleep(0.05)
    raise failure()
