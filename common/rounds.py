"""A round, client by client: which of its clients are this process's, and how sums stay the same bits.

A floating-point sum depends on its order, so the order is that of one process: client after client. With P processes
the client at position i of the round is trained by process i mod P. After each wave of P clients every process sends
slice j of what its client gave to process j, and each owner adds the P parts in the order of the clients, in fp64, to
its slice of the sum; at the end the slices are gathered. The same bits for any number of processes. A wave is one
message from each process to each, which travels while the next client is trained.
"""

import math

import torch
import torch.distributed as dist

from common.parallel import AllFailed, all_gather, receive, send, with_others, world
from common.vector import is_finite

# Elements per step on a CPU: fp64 buffers of this length stay in a core's cache (5x faster than without).
CHUNK = 65536


def chunks(*tensors, size=CHUNK):
    """Equal pieces of the flattened tensors, as tuples of views; on CUDA one piece."""
    flat = [t.reshape(-1) for t in tensors]
    if flat[0].device.type != "cpu":
        return iter([tuple(flat)])
    return zip(*(t.split(size) for t in flat), strict=True)


class Follower:
    """What goes along with a run's rounds: state that outlives them, or a probe that measures their clients.

    A `Round` opens it, hands it each client that counts, and closes it; a subclass has what it needs of these.
    """

    def open_round(self, clients, theta):
        """A round begins. Args: clients: its `Round`; theta: the weights that it begins with."""

    def open_wave(self, clients, wave):
        """The next clients begin, one a process. Args: wave: their ids, by rank. Every process calls it."""

    def finite(self, clients):
        """Vectors of the client that has just worked, beside its weights, without which finite it does not count."""
        return ()

    def accept(self, clients, theta_k):
        """The client that the round is at counts. Args: theta_k: as it was given to the mean; not to be kept."""

    def close_wave(self, clients, wave):
        """They are done, and accepted or left out. Every process calls it."""

    def close_round(self, clients):
        """The round is over: `clients.left_out` are all processes'. Every process calls it."""

    def state_dict(self):
        """{name: tensor} of what outlives the round."""
        return {}

    def load_state_dict(self, state):
        """Takes it back."""


class ToMain(Follower):
    """What clients leave for the main process, such as files for the run's folder: `write(k, thing)` is called there.

    Args: write: function of a client's id and what it has left, as `send` takes it.
    """

    def __init__(self, write):
        self._write, self._left = write, None

    def leave(self, thing):
        """Leaves a thing of the client that the round is at."""
        self._left = thing

    def close_wave(self, clients, wave):
        mine, self._left = self._left, None
        for k, thing in clients.to_main(wave, mine):
            if thing is not None:
                self._write(k, thing)


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
        self.world, self.number, self.hint = world(), number, hint
        self.left_out, self.amount = [], 0
        self.current, self._added, self._sent = None, set(), None  # the accumulators that have had the current client
        self._sums, self._notes, self._followers, self._exchange = [], {}, tuple(followers), None
        for follower in self._followers:
            follower.open_round(self, theta)

    def __len__(self):
        return len(self.clients)

    def __iter__(self):
        size, rank = self.world.size, self.world.rank
        self._exchange = _Exchange(self._sums, self.world) if size > 1 and self._sums else None
        for first in range(0, len(self.clients), size):
            wave = self.clients[first : first + size]
            for follower in self._followers:
                follower.open_wave(self, wave)
            if rank < len(wave):
                self.current, self._added, self._sent = wave[rank], set(), None
                yield self.current
                if self._sent is not None and self.current not in self.left_out:
                    for follower in self._followers:
                        follower.accept(self, self._sent)
                self.current, self._added, self._sent = None, set(), None
            if self._exchange:
                self._exchange.start(len(wave))
            for follower in self._followers:
                follower.close_wave(self, wave)
        if self._exchange:
            self._exchange.finish()
            self._exchange = None
        self._close()

    def to_main(self, wave, mine):
        """(k, what its process has of it) of each client of a wave, on the main process; nothing elsewhere.

        Every process calls it, with what it has of its own client (see `send`), and iterates over it.
        """
        if self.world.rank == 0:
            yield wave[0], mine
            for rank in range(1, len(wave)):
                yield wave[rank], receive(rank)
        elif self.world.rank < len(wave):
            send(mine, 0)

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
        """Makes an accumulator (`OrderedSum`, or what has its attributes) part of the exchanges between clients."""
        self._sums.append(total)

    def exchange(self, total, numbers, vectors):
        """Gives an accumulator's numbers and vectors of the current client to all processes."""
        self._exchange.put(total, numbers, vectors)

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

    Args: clients: `Round`; fold; theta: vector [n] that every process has; sums: how many; prepare; vectors: how many a
        client gives, of theta's dtype.
    """

    def __init__(self, clients, fold, theta, sums=1, prepare=None, vectors=1):
        self._clients, self._fold, self._prepare = clients, fold, prepare
        slices = theta.detach().tensor_split(clients.world.size)
        self.lengths, self.vectors, self.dtype = [len(piece) for piece in slices], vectors, theta.dtype
        self._theta = slices[clients.world.rank]
        self._sums = [torch.zeros_like(self._theta, dtype=torch.float64) for _ in range(sums)]
        self._numbers = []
        clients.register(self)

    def add(self, numbers, *vectors):
        """Adds the client that the round is at: its numbers, and vectors [n] (read now, not kept).

        Raises: RuntimeError outside of the loop over the round, or for a second call for one client.
        """
        self._clients.take_turn(self)
        numbers = tuple(map(float, numbers))
        if len(self.lengths) == 1:
            self.take(numbers, [v.detach() for v in vectors])
        else:
            self._clients.exchange(self, numbers, vectors)

    def take(self, numbers, pieces):
        """Adds one client's numbers and this process's slices of its vectors."""
        self._numbers.append(numbers)
        if self._prepare is not None:
            numbers = self._prepare(self._sums, *numbers)
        pieces = [piece.to(self._theta.device) for piece in pieces]
        for theta, *parts in chunks(self._theta, *self._sums, *pieces):
            self._fold(parts[: len(self._sums)], theta, parts[len(self._sums) :], *numbers)

    def close(self):
        """After the loop: lets go of fold and prepare, often of who holds this sum, a cycle that keeps the vectors."""
        self._fold = self._prepare = None

    def result(self):
        """([sums] fp64 [n], [numbers of each client that was added, in order]), the same bits on every process.

        Every process calls it, after the loop.
        """
        return [self._gathered(s) for s in self._sums], self._numbers

    def _gathered(self, piece):
        size = len(self.lengths)
        if size == 1:
            return piece
        staged = piece.is_cuda and world().backend == "gloo"
        whole = torch.empty(sum(self.lengths), dtype=piece.dtype, device="cpu" if staged else piece.device)
        with with_others():
            dist.all_to_all_single(whole, piece.to(whole).repeat(size), self.lengths, [len(piece)] * size)
        return whole.to(piece.device)


class _Exchange:
    """A wave's message from each process to each: every accumulator's numbers, then the receiver's slices of vectors.

    It travels while the next clients are trained: what has come is added when the next one is given, or at the end.
    Args: sums: the accumulators; world.
    """

    HEAD = 5  # float64 of an accumulator: how many numbers it was given, plus one (0: nothing was), and these

    def __init__(self, sums, world):
        self.sums, self.world, self.flying = sums, world, None
        # where in the message to process j an accumulator's slices begin, in bytes, and their lengths; its end
        self.places, self.ends = {total: [] for total in sums}, []
        for j in range(world.size):
            end = 8 * self.HEAD * len(sums)
            for total in sums:
                self.places[total].append(end)
                end += total.vectors * self._room(total, j)
            self.ends.append(end)
        starts = [sum(self.ends[:j]) for j in range(world.size)]
        device = torch.device("cuda", torch.cuda.current_device()) if world.backend == "nccl" else "cpu"
        sent = torch.zeros(sum(self.ends), dtype=torch.uint8, device=device)
        self.sent = [sent[start : start + end] for start, end in zip(starts, self.ends, strict=True)]
        self.whole, self.received = sent, sent.new_empty(world.size * self.ends[world.rank])

    def _room(self, total, j):
        return -(-total.lengths[j] * total.dtype.itemsize // 8) * 8  # whatever follows begins at a multiple of 8

    def _slices(self, message, total, j):
        """An accumulator's slices of vectors in a message to process j."""
        room, size, first = self._room(total, j), total.lengths[j] * total.dtype.itemsize, self.places[total][j]
        starts = [first + i * room for i in range(total.vectors)]
        return [message[start : start + size].view(total.dtype) for start in starts]

    def _heads(self, message):
        return message[: 8 * self.HEAD * len(self.sums)].view(torch.float64).view(len(self.sums), self.HEAD)

    def put(self, total, numbers, vectors):
        """Writes what an accumulator was given into the messages."""
        self.finish()
        head = torch.tensor([1 + len(numbers), *numbers], dtype=torch.float64)
        pieces = [v.detach().split(total.lengths) for v in vectors]
        for j, message in enumerate(self.sent):
            self._heads(message)[self.sums.index(total), : len(head)] = head
            for of, place in zip(pieces, self._slices(message, total, j), strict=True):
                place.copy_(of[j])

    def start(self, clients):
        """Sends the messages of a wave of so many clients."""
        self.finish()
        mine, rank = self.ends[self.world.rank], self.world.rank
        out = self.ends if rank < clients else [0] * self.world.size
        into = [mine * (r < clients) for r in range(self.world.size)]
        with with_others():
            work = dist.all_to_all_single(self.received[: sum(into)], self.whole[: sum(out)], into, out, async_op=True)
        self.flying = work, clients

    def finish(self):
        """Waits for the wave that is under way, and adds it in the order of the clients."""
        if self.flying is None:
            return
        (work, clients), self.flying = self.flying, None
        with with_others():
            work.wait()
        for message in self.sent:
            self._heads(message).zero_()
        for message in self.received.split(self.ends[self.world.rank])[:clients]:
            for total, (given, *numbers) in zip(self.sums, self._heads(message).tolist(), strict=True):
                if given:
                    total.take(tuple(numbers[: int(given) - 1]), self._slices(message, total, self.world.rank))
