"""More than one process: which of a round's clients are mine, and how sums stay the same bits.

Several processes are started by `--processes` or `torchrun`; gloo carries CPU tensors and nccl CUDA tensors (gloo too
where several processes share a GPU).

A floating-point sum depends on its order, so the order is that of one process: client after client. With P processes
the client at position i of the round is trained by process i mod P. After each wave of P clients every process sends
slice j of what its client gave to process j, and each owner adds the P parts in the order of the clients, in fp64, to
its slice of the sum; at the end the slices are gathered. The same bits for any number of processes.
"""

import contextlib
import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.cli import RunFailed, UsageError, ended_at_once
from common.vector import is_finite

# Elements per step on a CPU: fp64 buffers of this length stay in a core's cache (5x faster than without).
CHUNK = 65536
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
    with ended_at_once(), _with_others():
        dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo", timeout=DAY)
    _world = World(dist.get_rank(), size, local_rank, "nccl" if own_gpu else "gloo")
    return _world


def close_parallel():
    """Leaves the process group; one process again afterwards."""
    global _world
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
    with _with_others():
        dist.all_gather_object(things, thing)
    return things


def broadcast(thing):
    """The main process's small picklable `thing`, on every process."""
    return all_gather(thing if is_main() else None)[0]


def chunks(*tensors, size=CHUNK):
    """Equal pieces of the flattened tensors, as tuples of views; on CUDA one piece."""
    flat = [t.reshape(-1) for t in tensors]
    if flat[0].device.type != "cpu":
        return iter([tuple(flat)])
    return zip(*(t.split(size) for t in flat), strict=True)


# ------------------------------------------------------------------------------------------- a round, client by client


class Follower:
    """What goes along with a run's rounds: state that outlives them, or a probe that measures their clients.

    A `Round` opens it, hands it each client that counts, and closes it; a subclass has what it needs of these.
    """

    def open_round(self, clients, theta):
        """A round begins. Args: clients: its `Round`; theta: the weights that it begins with."""

    def finite(self, clients):
        """Vectors of the client that has just worked, beside its weights, without which finite it does not count."""
        return ()

    def accept(self, clients, theta_k):
        """The client that the round is at counts. Args: theta_k: as it was given to the mean; not to be kept."""

    def close_round(self, clients):
        """The round is over: `clients.left_out` are all processes'. Every process calls it."""

    def state_dict(self):
        """{name: tensor} of what outlives the round."""
        return {}

    def load_state_dict(self, state):
        """Takes it back."""


class Round:
    """A round's clients in order, longest work first, then by id; iterating yields this process's.

        clients = Round([3, 1, 4], weights=n)
        mean = WeightedMean(theta, clients)
        for k in clients:
            mean.add(train(k))
        theta = mean.result()

    Attributes: clients: all processes' ids, in order; weights: what each id counts in a mean; number: t, from 0;
    left_out: sorted ids of those whose update was not finite (at the end of the loop: all processes'); amount: sum of
    what `work` was told.
    Args: clients: ids; weights: {id: weight} or a list by id (None: all 1); work: the size of each one's work, likewise
        (None: all alike); followers: `Follower`s; theta: the weights that the round begins with, for them; hint: the
        next action where too many are left out.
    Raises: ValueError for a client named twice or a weight below 0; RunFailed, at the end of the loop, where more than
        half of the clients were left out.
    """

    def __init__(self, clients, weights=None, work=None, followers=(), theta=None, hint="lower the rate", number=0):
        ids = [int(k) for k in clients]
        if len(set(ids)) != len(ids):
            raise ValueError(f"a client is named twice: {sorted(ids)}")
        self.clients = tuple(sorted(ids, key=lambda k: (-work[k] if work is not None else 0, k)))
        self.weights = dict.fromkeys(ids, 1) if weights is None else {k: weights[k] for k in ids}
        if bad := {k: w for k, w in self.weights.items() if not 0 <= w < math.inf}:
            raise ValueError(f"weights {bad} are not finite numbers of at least 0")
        self.world, self.number, self.hint = _world, number, hint
        self.left_out, self.amount = [], 0
        self.current, self._added, self._sent = None, set(), None  # the accumulators that have had the current client
        self._sums, self._notes, self._followers = [], {}, tuple(followers)
        for follower in self._followers:
            follower.open_round(self, theta)

    def __len__(self):
        return len(self.clients)

    def __iter__(self):
        for first in range(0, len(self.clients), self.world.size):
            place = first + self.world.rank
            if place < len(self.clients):
                self.current, self._added, self._sent = self.clients[place], set(), None
                yield self.current
                if self._sent is not None and self.current not in self.left_out:
                    for follower in self._followers:
                        follower.accept(self, self._sent)
                self.current, self._added, self._sent = None, set(), None
            if self.world.size > 1 and self._sums:
                heads = zip(*all_gather([total.head() for total in self._sums]), strict=True)
                for total, every in zip(self._sums, heads, strict=True):
                    total.exchange(every)
        self._close()

    @property
    def weight(self):
        """What the client that the round is at counts in a mean."""
        return self.weights[self.current]

    def counts(self, sent, *vectors):
        """Whether the client that the round is at counts: these vectors, and those of the followers, are finite. Else
        it is left out. sent: what the followers are handed: its weights, as a mean was given them.

        Raises: RuntimeError outside of the loop over the round.
        """
        if self.current is None:
            raise RuntimeError("add() belongs inside `for k in clients:`")
        if is_finite(*vectors, *(v for follower in self._followers for v in follower.finite(self))):
            self._sent = sent if self._sent is None else self._sent
            return True
        if self.current not in self.left_out:
            self.left_out.append(self.current)
        return False

    def work(self, amount):
        """Adds to what the round's clients worked on: tokens, images or examples of this process's client."""
        self.amount += int(amount)

    def note(self, k, **values):
        """Notes what is logged of client k: numbers, or tensors of one element, which nothing waits for."""
        self._notes.setdefault(k, {}).update(values)

    def notes(self):
        """{client: {name: value}} of all processes, sorted by id, null for who was left out. Every process calls it."""
        plain = {
            k: {n: v.item() if torch.is_tensor(v) and v.numel() == 1 else v for n, v in seen.items()}
            for k, seen in self._notes.items()
        }
        noted = self.gather(plain)
        return {k: None if k in self.left_out else noted.get(k, {}) for k in sorted(self.clients)}

    def gather(self, objects):
        """Every process's {client: small picklable thing} in one dict, sorted, the same on every process."""
        return dict(sorted((k, thing) for part in all_gather(objects) for k, thing in part.items()))

    def register(self, total):
        """Makes an accumulator part of the exchanges between clients: it is asked for head(), a picklable thing or
        None, then given every process's by exchange(heads); close() tells it that no client follows."""
        self._sums.append(total)

    def take_turn(self, total):
        """Raises: RuntimeError unless the round is at a client that the accumulator `total` has not had yet."""
        if self.current is None or total in self._added:
            raise RuntimeError("add() belongs inside `for k in clients:`, once a client")
        self._added.add(total)

    def _close(self):
        for total in self._sums:
            total.close()
        self._sums.clear()  # each holds the round: a cycle, which would keep its vectors
        parts = all_gather((self.left_out, self.amount))
        self.left_out = sorted(k for out, _ in parts for k in out)
        self.amount = sum(amount for _, amount in parts)
        out, everyone = self.left_out, len(self.clients)
        if 2 * len(out) > everyone:
            raise LeftOut(
                f"round {self.number + 1}: updates of {len(out)} of {everyone} clients are not finite (clients "
                f"{', '.join(map(str, out[:10]))}): {self.hint}",
                self.number,
                out,
            )
        for follower in self._followers:
            follower.close_round(self)


class Gone(RunFailed):
    """Another process ended, and this one, which waited for it, does not know why."""


@contextlib.contextmanager
def _with_others():
    """Where another process ends, an exchange's connection breaks."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Gone(
            f"an exchange broke off ({str(error).split('. ')[0]}): another process has ended, see its output"
        ) from error


class AllFailed(RunFailed):
    """What every process raises alike, so that the main one says it for all."""


class LeftOut(AllFailed):
    """More than half of a round's clients sent nothing finite. Attributes: round (from 0), clients."""

    def __init__(self, message, round, clients):
        super().__init__(message)
        self.round, self.clients = round, clients


class OrderedSum:
    """fp64 sums over a round's clients, each element in the order of the clients, each process owning a slice.

        total = OrderedSum(clients, fold, theta)
        for k in clients:
            total.add((weight,), theta_k)            # at most once a client
        (summed,), numbers = total.result()

    fold(sums, theta, given, *numbers) adds one client: 1-d tensors of equal length, pieces of the vectors; those of the
    tuple `sums` (fp64) are changed in place. It must work element by element. prepare(sums, *numbers), if given, comes
    before it once a client, with this process's whole slices, and returns the numbers for fold.

    Args: clients: `Round`; fold; theta: vector [n] that every process has; sums: how many; prepare.
    """

    def __init__(self, clients, fold, theta, sums=1, prepare=None):
        self._clients, self._fold, self._prepare = clients, fold, prepare
        slices = theta.detach().tensor_split(clients.world.size)
        self._lengths = [len(piece) for piece in slices]
        self._theta = slices[clients.world.rank]
        self._sums = [torch.zeros_like(self._theta, dtype=torch.float64) for _ in range(sums)]
        self._numbers, self._given = [], None
        clients.register(self)

    def add(self, numbers, *vectors):
        """Adds the client that the round is at: its numbers, and vectors [n] (read now, not kept).

        Raises: RuntimeError outside of the loop over the round, or for a second call for one client.
        """
        self._clients.take_turn(self)
        numbers, vectors = tuple(map(float, numbers)), [v.detach() for v in vectors]
        if len(self._lengths) == 1:
            self._add(numbers, vectors)
        else:
            self._given = numbers, [v.to(self._theta.device, copy=True) for v in vectors]

    def head(self):
        """What the other processes must know of what was given: (numbers, dtypes), or None."""
        return None if self._given is None else (self._given[0], [v.dtype for v in self._given[1]])

    def exchange(self, every):
        """Between two clients, on every process. Args: every: all processes' `head`."""
        (_, given), self._given = self._given or (None, None), None
        present = [rank for rank, one in enumerate(every) if one is not None]
        if not present:
            return
        received = []
        for i, dtype in enumerate(every[present[0]][1]):
            sent = self._theta.new_empty(0, dtype=dtype) if given is None else given[i]
            sizes = [0 if one is None else len(self._theta) for one in every]
            whole = self._theta.new_empty(sum(sizes), dtype=dtype)
            _all_to_all(whole, sent, sizes, [0] * len(every) if given is None else self._lengths)
            received.append(whole.split(sizes))
        for rank in present:
            self._add(every[rank][0], [parts[rank] for parts in received])

    def close(self):
        """After the loop: lets go of fold and prepare, often of who holds this sum, a cycle that keeps the vectors."""
        self._fold = self._prepare = None

    def result(self):
        """([sums] fp64 [n], [numbers of each client that was added, in order]), the same bits on every process.

        Every process calls it, after the loop.
        """
        return [self._gathered(s) for s in self._sums], self._numbers

    def _add(self, numbers, vectors):
        self._numbers.append(numbers)
        if self._prepare is not None:
            numbers = self._prepare(self._sums, *numbers)
        for theta, *pieces in chunks(self._theta, *self._sums, *vectors):
            self._fold(pieces[: len(self._sums)], theta, pieces[len(self._sums) :], *numbers)

    def _gathered(self, piece):
        size = len(self._lengths)
        if size == 1:
            return piece
        whole = piece.new_empty(sum(self._lengths))
        _all_to_all(whole, piece.repeat(size), self._lengths, [len(piece)] * size)
        return whole


def _all_to_all(received, sent, received_sizes, sent_sizes):
    """Process i's j-th part of `sent` becomes process j's i-th part of `received` (1-d tensors, sizes in elements)."""
    staged = received.is_cuda and _world.backend == "gloo"
    into = torch.empty(received.shape, dtype=received.dtype) if staged else received
    sent = sent.cpu() if staged else sent
    with _with_others():
        dist.all_to_all_single(into, sent, received_sizes, sent_sizes)
    if staged:
        received.copy_(into)


def my_share(things):
    """Every P-th of a list, from this process's rank on: what it does of a job that all share."""
    return things[_world.rank :: _world.size]
