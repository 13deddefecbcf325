"""How a script is stopped: Ctrl-C (SIGINT) and SIGTERM, which queues send before they take a machine away, are alike.

While a script still imports nothing has begun, and they end it at once (`end_imports`). After that both are an
exception where the script is at that moment, so that a run keeps what it can and run.json says `interrupted`. C++ code
is not broken off: the exception comes when it returns.
"""

import contextlib
import os
import signal
import sys
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_later = None  # signals that came while `undisturbed`
AGAIN = 1.0  # seconds: a terminal, a launcher and a queue may send the same signal; one that comes later means it


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


def code_of(error):
    """The exit code of a process that a KeyboardInterrupt ends: 130, of a `Terminated` 143."""
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def stoppable(reason=lambda: None):
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`; once more, later, ends the process at once.

    An error that follows from the interruption (a library turned it into one of its own) is raised as the interruption.
    reason: function to the exception to raise instead, or None. A signal that was ignored from outside stays ignored.
    """
    came = []  # when, and what was raised

    def stop(number, frame):
        if _later is not None:
            _later.append(number)
            return
        if came:
            if time.monotonic() > came[0] + AGAIN:
                os._exit(128 + number)
            return
        error = reason() or (Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt())
        came.extend((time.monotonic(), error))
        raise error

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # who started this process may have held them back
        yield
    except Exception as error:
        if came and error is not came[1]:
            raise came[1] from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def undisturbed():
    """Inside, what `stoppable` raises waits; other programs that are started inside get their signals as ever."""
    global _later
    outer, _later = _later, []
    try:
        yield
    finally:
        came, _later = _later, outer
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def held_back():
    """Inside, SIGINT and SIGTERM wait, for this process and for those that it starts until they are `stoppable`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def end_imports():
    """From now on a signal ends this process at once, with one line, if it is one of this repository's scripts.

    Not in a program of somebody else that imports `common`.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    house = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = os.path.dirname(os.path.dirname(os.path.abspath(script))) == house
    if ours:
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, _end)


def _end(number, frame):
    os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
    os._exit(128 + number)
