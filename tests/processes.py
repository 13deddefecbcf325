"""Several processes for a test, as torchrun would start them."""

import contextlib
import os
import socket

import harness
import torch

from common import parallel


@contextlib.contextmanager
def as_rank(rank, size, port):
    """This process as one of `size` that torchrun started, with one thread."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    parallel.init_parallel()
    yield
    parallel.close_parallel()


def answers_of(size, process):
    """{rank: answer} of `size` processes process(rank, size, port, answers), each putting (rank, answer)."""
    context = harness.server()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = context.SimpleQueue()
    processes = [context.Process(target=process, args=(rank, size, port, answers)) for rank in range(size)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
        p.kill()  # one that waits for a process that failed
    assert [p.exitcode for p in processes] == [0] * size
    return dict(answers.get() for _ in range(size))
