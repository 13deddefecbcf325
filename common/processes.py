"""Federated scripts start their own processes: --processes N on one machine; torchrun does it on several.

On a CPU the default is a process of one thread for each core: two processes of one thread train clients faster than one
process of two (0.56 against 0.84 of the bare steps), and bits do not depend on how many cores a machine has.

The main process speaks for all. One that fails says why in the store that they share (`common.watch.tell`) and ends;
the others end with that line. The supervisor, which has started them, says it for one that was killed, hands signals
on, and ends whoever is left.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback

import torch

from common import parallel, watch
from common.cli import RunFailed, UsageError, run_main
from common.stopping import SIGNALS, code_of, held_back, stoppable

PARENT = "FEDQUARTET_SUPERVISOR"  # environment variable: its process
PROCESS_MEMORY = 2**30  # bytes that a process takes at least, on a CPU
PATIENCE = 3  # seconds after a process has refused: what all refuse, the main one has refused by then
HEARD = 1  # seconds after a process has failed: who waits for it has ended by itself, and is not to be disturbed
GRACE = 15  # seconds that a process has to end in: queues that send SIGTERM kill after 30


def run_federated(main, args, clients, memory=PROCESS_MEMORY):
    """Calls `main(args)` in as many processes as --processes says, and ends with the main one's exit code.

    Args: clients: how many take part in a round (a process without one is idle); memory: bytes that a process will
        take, at a guess: the default number of processes fits into what is free.
    """
    if "WORLD_SIZE" in os.environ:
        _member(main, args)
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    size = args.processes or max(1, min(_at_most(on_cuda, args.threads, memory), clients))
    if size == 1:
        run_main(main, args)
    _supervise(main, args, size, on_cuda)


def _at_most(on_cuda, threads, memory):
    """Processes that this machine takes well."""
    if on_cuda:
        return torch.cuda.device_count()
    return min(cores() // max(1, threads), _free_memory() // memory)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_memory():
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return 2**40


# ---- the supervisor


def _supervise(main, args, size, on_cuda):
    """Starts the processes, hands signals on, ends all when one fails; exits with the code of the first that did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {PARENT: os.getpid(), "TORCHELASTIC_USE_AGENT_STORE": True}  # the store is the supervisor's
    places = [{n: str(v) for n, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(size)]
    if on_cuda:  # a process that has seen the GPU cannot be forked
        children = [_Command([sys.executable, *sys.argv], place) for place in places]
    else:  # forked: nothing is imported twice
        context = multiprocessing.get_context("fork")
        sys.stdout.flush()
        sys.stderr.flush()
        children = [context.Process(target=_child, args=(main, args, place)) for place in places]
    asked = []

    def hand_on(number, frame):
        asked.append(number)
        _send(children, number)

    try:
        with held_back():
            for child in children:
                child.start()
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, hand_on)
        watch.meet(host=port)
        first = _first_to_fail(children, asked)
        _end_all(children, asked)
    finally:
        _send(children, signal.SIGKILL)
    codes = [child.exitcode for child in children]
    if codes[0] < 0 and (error := watch.failure()):  # it could not say it itself
        print(f"failed: {error}", file=sys.stderr)
    code = codes[0] if codes[0] > 0 else codes[first]
    sys.exit(code if code >= 0 else 128 - code)


def _first_to_fail(children, asked):
    """Waits for the processes. Returns the rank of the first that failed, 0 where none did, and says why it was killed.

    asked: signals that have been handed on: what ends then was asked to.
    """
    while any(child.exitcode is None for child in children):
        for rank, child in enumerate(children):
            child.join(0.05 / len(children))
            if child.exitcode:
                if child.exitcode < 0 and child.exitcode != -signal.SIGTERM and not asked:
                    name = signal.Signals(-child.exitcode).name
                    memory = ", perhaps for its memory" if name == "SIGKILL" else ""
                    watch.tell(f"it was ended by {name}{memory}: the same command with --resume goes on", rank=rank)
                return rank
    return 0


def _end_all(children, asked):
    """SIGTERM for who does not hear of it, unless a signal has been handed on, and SIGKILL for who is left then."""
    _join(children, HEARD)
    if not asked:
        _send(children, signal.SIGTERM)
    _join(children, GRACE)
    _send(children, signal.SIGKILL)
    _join(children, GRACE)


def _join(children, seconds):
    end = time.monotonic() + seconds
    for child in children:
        child.join(max(0, end - time.monotonic()))


def _send(children, number):
    for child in children:
        if child.pid is not None and child.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, number)


class _Command:
    """A `subprocess.Popen` with the face of a `multiprocessing.Process`."""

    def __init__(self, command, place):
        self._command, self._place, self._popen = command, place, None

    def start(self):
        self._popen = subprocess.Popen(self._command, env=os.environ | self._place, process_group=0)

    def join(self, timeout):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)

    @property
    def pid(self):
        return self._popen and self._popen.pid

    @property
    def exitcode(self):
        return self._popen.poll()


# ---- one of several processes


def _child(main, args, place):
    os.environ.update(place)
    os.setpgrp()  # the terminal's Ctrl-C goes to the supervisor, which hands it on
    _member(main, args)


def _member(main, args):
    """Calls main in one of several processes, which is started already."""
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("RANK", "0"))
    if PARENT in os.environ:
        for number in SIGNALS:  # held back until `stoppable`; what comes after it does not change how this process ends
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    elif args.processes not in (0, size):
        main = _refuse
    if size == 1:
        run_main(main, args)
    if {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # else `init_parallel` says what is missing
        watch.meet(patience=getattr(args, "patience", None))
    if rank:
        _leave(_follow(main, args))
    run_main(main, args, _leave, watch.stopped)


def _refuse(args):
    size = os.environ["WORLD_SIZE"]
    raise UsageError(f"--processes {args.processes} under torchrun with {size} processes: drop --processes")


def _end_with(parent):
    """Ends this process when the supervisor is gone (killed): nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(137)


def _follow(main, args):
    """main in a process that is not the main one, which is silent. Returns its exit code."""
    try:
        with stoppable(watch.stopped), _silence():
            try:
                return main(args) or 0
            except UsageError:
                time.sleep(PATIENCE)  # where the main process refuses too, it says so and all end
                raise
    except (parallel.AllFailed, watch.Gone):  # which the main process says
        return 1
    except KeyboardInterrupt as error:
        return code_of(error)
    except UsageError as error:
        watch.tell(error, refused=True)
        return 2
    except RunFailed as error:
        watch.tell(error)
        return 1
    except Exception as error:
        traceback.print_exc()
        watch.tell(f"{type(error).__name__}: {error}")
        return 1


@contextlib.contextmanager
def _silence():
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def _leave(code):
    watch.ends()
    # A gloo thread that drops its last tensor while the interpreter shuts down aborts the process (seen in one run in
    # ten on busy cores, torch 2.15): leave without that shutdown.
    if parallel.world().size > 1 and code == 0:
        parallel.close_parallel()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
