"""More than one process: who they are, and what they tell each other.

Several processes are started by `--processes` or `torchrun`; gloo carries CPU tensors and nccl CUDA tensors (gloo too
where several processes share a GPU).

Only the main process (rank 0) needs the run's folder: what it reads there it sends, what belongs there it is sent.
"""

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import hosts
from common.cli import RunFailed, UsageError, ended_at_once

CPU = torch.device("cpu")
DAY = timedelta(hours=24)  # a client may train for hours before the others hear of it


@dataclass(frozen=True)
class World:
    """This process: `rank` of `size`, `local_rank` on its machine, `backend` None, "gloo" or "nccl"."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    backend: str | None = None

    def device(self, kind):
        """This process's device: "cuda" becomes the GPU of its local rank (shared where GPUs are fewer)."""
        device = torch.device(kind)
        if device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", self.local_rank % max(1, torch.cuda.device_count()))


_world = World()


def world():
    """The `World` that `init_parallel` found; one process before it was called."""
    return _world


def is_main():
    """True in the process that writes files and prints (rank 0)."""
    return _world.rank == 0


def init_parallel(device="cpu"):
    """Joins the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): the `World`.

    Args: device: "cpu" or "cuda": where the tensors to be summed will be.
    Raises: UsageError when the environment names several processes but not where they meet.
    """
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or _world.size > 1:
        return _world
    kind = torch.device(device)
    if kind.type == "cuda" and kind.index is not None:
        raise UsageError(f"--device {device} with {size} processes: use --device cuda, each takes its own GPU")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start with torchrun --nproc-per-node {size}"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    # nccl refuses two processes on one GPU.
    own_gpu = kind.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", size)) <= torch.cuda.device_count()
    if own_gpu:
        torch.cuda.set_device(local_rank)
    with ended_at_once(), with_others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo", timeout=DAY)
    _world = World(dist.get_rank(), size, local_rank, "nccl" if own_gpu else "gloo")
    if int(os.environ.get("LOCAL_WORLD_SIZE", size)) < size:
        hosts.watch(_world.rank, all_gather)
    return _world


def close_parallel():
    """Leaves the process group, when all have come to the end; one process again afterwards."""
    global _world
    with contextlib.suppress(Gone):
        barrier()
    hosts.say_goodbye()
    dist.destroy_process_group()
    _world = World()


def barrier():
    """Waits for every process."""
    all_gather(None)


def all_gather(thing):
    """A list with every process's small picklable `thing`, by rank; the same on every process."""
    if _world.size == 1:
        return [thing]
    things = [None] * _world.size
    with with_others():
        dist.all_gather_object(things, thing)
    return things


def broadcast(thing):
    """The main process's picklable `thing`, on every process."""
    if _world.size == 1:
        return thing
    things = [thing if is_main() else None]
    with with_others():
        dist.broadcast_object_list(things, src=0)
    return things[0]


def from_main(function, *args):
    """function(*args) as the main process finds it: its value, or its UsageError or RunFailed, on every process."""
    value = error = None
    if is_main():
        try:
            value = function(*args)
        except (UsageError, RunFailed) as raised:
            if _world.size == 1:
                raise
            error = raised if isinstance(raised, UsageError) else AllFailed(str(raised))
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def send(thing, rank):
    """Sends a picklable thing to a process, which calls `receive`; tensors in its dicts and tuples one by one."""
    tensors = []

    def place(t):
        tensors.append(t.detach().to(CPU).contiguous())
        return _Place(t.dtype, t.shape)

    with with_others():
        dist.send_object_list([_each(thing, torch.Tensor, place)], rank, device=CPU)
        for t in tensors:
            if t.numel():
                dist.send(t, rank)


def receive(rank, device="cpu"):
    """What process `rank` sends, its tensors on `device`."""

    def fill(place):
        t = torch.empty(place.shape, dtype=place.dtype)
        if t.numel():
            dist.recv(t, rank)
        return t.to(device)

    things = [None]
    with with_others():
        dist.recv_object_list(things, rank, device=CPU)
        return _each(things[0], _Place, fill)


def broadcast_tensors(tensors, device="cpu"):
    """The main process's {name: tensor}, on every process and on `device`."""
    if is_main():
        for rank in range(1, _world.size):
            send(tensors, rank)
        return {name: t.to(device) for name, t in tensors.items()}
    return receive(0, device)


def _each(thing, kind, change):
    """A nested thing of dicts and tuples with what is of a kind changed."""
    if isinstance(thing, kind):
        return change(thing)
    if isinstance(thing, dict):
        return {key: _each(value, kind, change) for key, value in thing.items()}
    if isinstance(thing, tuple):
        return tuple(_each(value, kind, change) for value in thing)
    return thing


class _Place(NamedTuple):
    """Of a tensor that follows."""

    dtype: torch.dtype
    shape: torch.Size


class Gone(RunFailed):
    """Another process ended, and this one, which waited for it, does not know why."""


@contextlib.contextmanager
def with_others():
    """Where another process ends, an exchange's connection breaks."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Gone(
            f"an exchange broke off ({str(error).split('. ')[0]}): {hosts.who_left()} has ended, see its output"
        ) from error


class AllFailed(RunFailed):
    """What every process raises alike, so that the main one says it for all."""


def my_share(things):
    """Every P-th of a list, from this process's rank on: what it does of a job that all share."""
    return things[_world.rank :: _world.size]
