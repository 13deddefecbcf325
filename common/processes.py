"""Federated scripts start their own processes: --processes N on one machine; torchrun does it on several.

On a CPU the default is a process of one thread for each core: that trains clients faster than one process of many
threads, and bits do not depend on how many cores a machine has.

The processes are torch's own (`torch.multiprocessing`): forked on a CPU, started anew for GPUs. Each tells its starter
how it ended; that one says the first cause in one line, hands signals on, and lets nobody live on.
"""

import argparse
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from common import parallel
from common.cli import SIGNALS, outcome, run_main

PROCESS_MEMORY = 2**30  # bytes that a process takes at least, on a CPU
PATIENCE = 3  # seconds after a process has refused: what all refuse, the main one has refused by then
GRACE = 10  # seconds to hear of another's end by a broken exchange, then by SIGTERM: queues kill 30 after theirs


def run_federated(main, args, clients, memory=PROCESS_MEMORY):
    """Calls `main(args)` in as many processes as --processes says, and ends with the exit code of who failed first.

    Args: clients: how many take part in a round (a process without one is idle); memory: bytes that a process will
        take, at a guess: the default number of processes fits into what is free.
    """
    if "WORLD_SIZE" in os.environ:
        _under_torchrun(main, args)
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    size = args.processes or max(1, min(_at_most(on_cuda, args.threads, memory), clients))
    if size == 1:
        run_main(main, args)
    code, line = _supervise(main, args, size, "spawn" if on_cuda else "fork")  # who has seen a GPU cannot be forked
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def _at_most(on_cuda, threads, memory):
    """Processes that this machine takes well."""
    if on_cuda:
        return torch.cuda.device_count()
    free = 2**40  # not Linux
    with contextlib.suppress(OSError, KeyError), open("/proc/meminfo", encoding="ascii") as file:
        free = int(dict(line.split(":", 1) for line in file)["MemAvailable"].split()[0]) * 1024
    return min(cores() // max(1, threads), free // memory)


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- who starts them


def _supervise(main, args, size, method):
    """Starts the processes, hands signals on, ends all when one fails. Returns (exit code, the line that says why)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipes = [multiprocessing.get_context(method).Pipe(duplex=False) for _ in range(size)]
    asked, first = [], None

    def hand_on(number, frame):
        asked.append(number)
        for process in started.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends who is left is no news
    sys.stdout.flush()
    sys.stderr.flush()
    plain = argparse.Namespace(**vars(args))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the new ones too, until they are `stoppable`
        whole = (main, plain, os.getpid(), place, [send for _, send in pipes])
        started = start_processes(_child, whole, size, join=False, start_method=method)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        for _, send in pipes:
            send.close()
        while not started.join(grace_period=GRACE):
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        first = error.error_index
    finally:
        for process in multiprocessing.active_children():
            process.kill()
    if first is None:
        return 0, ""
    told = [_received(receive) for receive, _ in pipes]
    return _cause(told, started.processes[first].exitcode, first, asked)


def _received(pipe):
    """What a process told of its end, or None."""
    with contextlib.suppress(EOFError):
        return pipe.recv() if pipe.poll() else None


def _cause(told, exitcode, first, asked):
    """(exit code, line) of all. Args: told: {exit code, line, whether another's end is all it knows} of each rank, or
    None; exitcode, first: of the process that ended first and its rank; asked: signals that were handed on.
    """
    ends = {rank: end for rank, end in enumerate(told) if end}
    if asked:
        return next((end[:2] for end in ends.values() if end[0] == 128 + asked[0]), (128 + asked[0], "interrupted"))
    for rank, (code, line, gone) in ends.items():
        if 0 < code < 128 and not gone:
            word, reason = line.split(": ", 1)
            return code, line if rank == 0 else f"{word}: process {rank}: {reason}"
    if told[first]:  # somebody has signalled one of the processes, not this one
        return told[first][:2]
    how = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    memory = ", perhaps for its memory" if exitcode == -signal.SIGKILL else ""
    return 1, f"failed: process {first} was ended by {how}{memory}: the same command with --resume goes on"


# ---- one of several processes


def _child(rank, main, args, starter, place, sends):
    os.setpgrp()  # the terminal's Ctrl-C goes to the starter, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by the starter or not: torch sends it at its end
    if os.getppid() != starter:  # which was before torch could ask for that
        os._exit(1)
    os.environ.update({name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})
    code, line, error = _one_of_all(main, args, rank)
    sends[rank].send((code, line, isinstance(error, parallel.Gone)))
    _leave(code)


def _under_torchrun(main, args):
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ.get("RANK", "0"))
    if size == 1:
        run_main(main, args)
    code, line, error = _one_of_all(main, args, rank)
    if rank == 0 or code < 128 and not isinstance(error, (parallel.AllFailed, parallel.Gone)):
        time.sleep(PATIENCE if rank and code == 2 else 0)  # where the main process refuses too, torchrun ends all
        if line:
            print(f"process {rank}: {line}" if rank else line, file=sys.stderr)
    _leave(code)


def _one_of_all(main, args, rank):
    """`outcome` of a process; only the main one (rank 0) may write meanwhile. A bug prints its traceback."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            return outcome(main, args)
        except SystemExit as error:
            return error.code or 0, "", None
        except Exception as error:
            traceback.print_exc(file=sys.__stderr__)
            return 1, f"failed: {type(error).__name__}: {error}", error


def _leave(code):
    # A gloo thread that drops its last tensor while the interpreter shuts down aborts the process (seen in one run in
    # ten on busy cores, torch 2.15): leave without that shutdown.
    if parallel.world().size > 1 and code == 0:
        parallel.close_parallel()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
