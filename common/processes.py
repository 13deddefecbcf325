"""Federated scripts start their own processes: --processes N on one machine; torchrun does it on several.

On a CPU the default is a process of one thread for each core: that trains clients faster than one process of many
threads, and bits do not depend on how many cores a machine has.

The processes are torch's own (`torch.multiprocessing`): forked on a CPU, started anew for GPUs. Each says in one line
why it ends; the starter hands signals on, says who was killed, and lets nobody live on.
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

from common import hosts, parallel
from common.cli import SIGNALS, outcome, run_main

PROCESS_MEMORY = 2**30  # bytes that a process takes at least, on a CPU
PATIENCE = 7  # seconds after a process has refused: what all refuse, the main one has by then, waiting for a lock too
GONE = 75  # exit code of a process that only knows that another one has ended
GRACE = 10  # seconds to hear of another's end by a broken exchange, then by SIGTERM: queues kill 30 after theirs


def run_federated(main, args, clients, memory=PROCESS_MEMORY):
    """Calls `main(args)` in as many processes as --processes says, and ends with the exit code of who failed first.

    Args: clients: how many take part in a round (a process without one is idle); memory: bytes that a process will
        take, at a guess: the default number of processes fits into what is free.
    """
    if "WORLD_SIZE" in os.environ:
        if os.environ["WORLD_SIZE"] == "1":
            run_main(main, args)
        _one_of_all(main, args)
    on_cuda = args.device != "cpu" and torch.cuda.is_available()
    size = args.processes or max(1, min(_at_most(on_cuda, args.threads, memory), clients))
    if size == 1:
        run_main(main, args)
    sys.exit(_supervise(main, args, size, "spawn" if on_cuda else "fork"))  # who has seen a GPU cannot be forked


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
    """Starts the processes, hands signals on, ends all when one fails. Returns the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    asked = []

    def hand_on(number, frame):
        asked.append(number)
        for process in started.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends who is left is no news
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the new ones too, until they are `stoppable`
        to_speak = multiprocessing.get_context(method).Lock()  # who takes it says why the run ends
        whole = (main, argparse.Namespace(**vars(args)), os.getpid(), place, to_speak)
        started = start_processes(_child, whole, size, join=False, start_method=method)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, hand_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        while not started.join(grace_period=GRACE):
            pass
        return 0
    except (ProcessExitedException, ProcessRaisedException) as error:
        first = error.error_index
    finally:
        for process in multiprocessing.active_children():
            process.kill()
    if asked:
        how = "terminated" if asked[0] == signal.SIGTERM else "interrupted"
        print(f"{how}: run the same command with --resume to go on", file=sys.stderr)
        return 128 + asked[0]
    codes = [process.exitcode for process in started.processes]
    if said := [code for code in codes if code in (1, 2)]:
        return said[0]
    killed = next((rank for rank in (first, *range(size)) if codes[rank] not in (0, GONE)), first)
    number = -codes[killed] if codes[killed] < 0 else codes[killed] - 128
    how = f"ended by {signal.Signals(number).name}" + ", perhaps for its memory" * (number == signal.SIGKILL)
    print(f"failed: process {killed} was {how}: the same command with --resume goes on", file=sys.stderr)
    return 1


def _child(rank, main, args, starter, place, to_speak):
    os.setpgrp()  # the terminal's Ctrl-C goes to the starter, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by the starter or not: torch sends it at its end
    if os.getppid() != starter:  # which was before torch could ask for that
        os._exit(1)
    os.environ.update({name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()})
    _one_of_all(main, args, to_speak)


def _one_of_all(main, args, to_speak=None):
    """One process: calls main(args), says its own line where no other process says it, and ends.

    Only the main one (rank 0) may write meanwhile. A bug prints its traceback. to_speak: a lock, of a starter that says
    who was killed; under torchrun there is none, and the main one says that another has ended.
    """
    rank = int(os.environ.get("RANK", "0"))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.ExitStack() as stack:
        if rank:
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            code, line, error = outcome(main, args)
        except SystemExit as ended:
            code, line, error = ended.code or 0, "", None
        except Exception as bug:
            traceback.print_exc(file=sys.__stderr__)
            code, line, error = 1, f"failed: {type(bug).__name__}: {bug}", bug
    gone = isinstance(error, parallel.Gone)
    if code and not gone:
        hosts.say_goodbye()
    knows = rank == 0 or hosts.speaks() or not (gone or isinstance(error, parallel.AllFailed))
    if line and (rank == 0 and not to_speak or code < 128 and knows and not (gone and to_speak)):
        time.sleep(PATIENCE if rank and code == 2 else 0)  # what all refuse, the main process says
        if to_speak is None or to_speak.acquire(block=False):
            print(f"process {rank}: {line}" if rank else line, file=sys.stderr)
    if parallel.world().size > 1 and code == 0:
        parallel.close_parallel()
    # A gloo thread that drops its last tensor while the interpreter shuts down aborts the process (seen in one run in
    # ten on busy cores, torch 2.15): leave without that shutdown.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(GONE if gone and to_speak else code)
