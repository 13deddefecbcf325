"""Federated scripts start their own processes: --processes N on one machine; torchrun does it on several.

On a CPU the default is a process of one thread for each core: two processes of one thread train clients faster than one
process of two (0.56 against 0.84 of the bare steps), and bits do not depend on how many cores a machine has.
"""

import atexit
import contextlib
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import torch

from common import parallel
from common.cli import UsageError, run_main

PARENT = "FEDQUARTET_SUPERVISOR"  # environment variable: its process
REFUSALS = "FEDQUARTET_REFUSALS"  # environment variable: the pipe on which processes tell it why they refuse
PROCESS_MEMORY = 2**30  # bytes that a process takes at least, on a CPU
PATIENCE = 3  # seconds after a process has refused: what all refuse, the main one has refused by then


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


def _supervise(main, args, size, on_cuda):
    """Starts the processes, hands signals on, ends all when one fails; exits with the main one's code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    refusals, tell = os.pipe()
    shared |= {PARENT: os.getpid(), REFUSALS: tell}
    places = [{n: str(v) for n, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()} for r in range(size)]
    if on_cuda:  # a process that has seen the GPU cannot be forked
        children = [_Command([sys.executable, *sys.argv], place) for place in places]
    else:  # forked: nothing is imported twice
        context = multiprocessing.get_context("fork")
        sys.stdout.flush()
        sys.stderr.flush()
        children = [context.Process(target=_child, args=(main, args, place)) for place in places]
    for child in children:
        child.start()

    def hand_on(number, frame):
        for child in children:
            if child.exitcode is None:
                os.kill(child.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    waiting = list(children)
    while waiting:
        for child in waiting:
            child.join(0.05)
        if select.select([refusals], [], [], 0)[0]:
            _refused(children, refusals)
        if any(child.exitcode for child in waiting):
            # The others hear of it at their next exchange, or are ended: the main one last, which then hears of their
            # end where it waits for them, and says in run.json how the run ended.
            for child in reversed(children):
                child.join(5)
                if child.exitcode is None:
                    child.terminate()
        waiting = [child for child in waiting if child.exitcode is None]
    codes = [child.exitcode for child in children]
    # its own code counts before that of one that was ended for it
    code = codes[0] if codes[0] > 0 else next((c for c in codes if c > 0), min(codes))
    sys.exit(code if code >= 0 else 128 - code)


def _refused(children, refusals):
    """Says why a process refuses, in one line for all that do: the main one's, or the first with its rank. Ends all."""
    reasons, end = {}, time.monotonic() + PATIENCE
    while 0 not in reasons and time.monotonic() < end:
        if select.select([refusals], [], [], 0.1)[0]:
            lines = os.read(refusals, 2**16).decode(errors="replace").splitlines()
            reasons |= {int(rank): reason for rank, _, reason in (line.partition(" ") for line in lines)}
    rank = min(reasons)
    print(f"error: process {rank}: {reasons[rank]}" if rank else f"error: {reasons[0]}", file=sys.stderr)
    # those that refuse go last: who waits for them in an exchange would say that they are gone
    for refusing in (False, True):
        ending = [child for rank, child in enumerate(children) if (rank in reasons) == refusing]
        for child in ending:
            child.terminate()
        for child in ending:
            child.join(PATIENCE)
    sys.exit(2)


class _Command:
    """A `subprocess.Popen` with the face of a `multiprocessing.Process`."""

    def __init__(self, command, place):
        self._command, self._place, self._popen = command, place, None

    def start(self):
        tell = int(self._place[REFUSALS])
        self._popen = subprocess.Popen(self._command, env=os.environ | self._place, process_group=0, pass_fds=[tell])

    def join(self, timeout):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)

    def terminate(self):
        self._popen.terminate()

    @property
    def pid(self):
        return self._popen.pid

    @property
    def exitcode(self):
        return self._popen.poll()


def _child(main, args, place):
    os.environ.update(place)
    os.setpgrp()  # the terminal's Ctrl-C goes to the supervisor, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _member(main, args)


def _member(main, args):
    """Calls main in one of several processes, which is started already."""
    size = int(os.environ["WORLD_SIZE"])
    if PARENT in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    elif args.processes not in (0, size):
        main = _refuse
    rank = int(os.environ.get("RANK", "0"))
    run_main(_one_of(main, rank), args, _leave if size > 1 else sys.exit)


def _refuse(args):
    size = os.environ["WORLD_SIZE"]
    raise UsageError(f"--processes {args.processes} under torchrun with {size} processes: drop --processes")


def _end_with(parent):
    """Ends this process when the supervisor is gone (killed): nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(137)


def _one_of(main, rank):
    """main in one of several processes: the main one speaks for all, and a refusal is one line, whoever refuses."""

    def one(args):
        try:
            with _silence() if rank else contextlib.nullcontext():
                return main(args)
        except UsageError as error:
            if REFUSALS in os.environ:
                os.write(int(os.environ[REFUSALS]), f"{rank} {error}\n".encode())
                signal.pause()  # the supervisor says it and ends all
            if rank == 0:
                raise
            time.sleep(PATIENCE)  # where the main process refuses too, torchrun ends this one
            raise UsageError(f"process {rank}: {error}") from error
        except (parallel.AllFailed, KeyboardInterrupt) as error:  # which the main process says
            if rank == 0:
                raise
            return 130 if isinstance(error, KeyboardInterrupt) else 1

    return one


@contextlib.contextmanager
def _silence():
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def _leave(code):
    # A gloo thread that drops its last tensor while the interpreter shuts down aborts the process (seen in one run in
    # ten on busy cores, torch 2.15): leave without that shutdown.
    if parallel.world().size > 1 and code == 0:
        parallel.close_parallel()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
