"""Which example belongs to which client: partitions as lists of sorted int64 arrays of indices, no client empty.

All are disjoint and complete but `overlap`. Arguments: n: examples; labels, categories [n]:
whole numbers (categories also strings), the classes are those that occur; k: clients; generator: of numpy
(`common.seeding.stream`); what: the word for examples in messages. All raise UsageError for too many clients.
"""

import itertools

import numpy as np
from scipy.special import logsumexp

from common.cli import UsageError

DIRICHLET_DRAWS = 20  # at alpha 0.01 nearly every draw leaves clients without a sample


def contiguous(n, k, sizes=None, what="examples"):
    """Slices of 0..n-1 in order, whose counts differ by at most one.

    Args: sizes: the items' sizes, e.g. tokens per document: each cut then is at the item boundary that is nearest to
        i/k of all tokens. Raises: UsageError when a client would get items of size zero only.
    """
    check_counts(n, k, what)
    if sizes is None:
        cuts = [n * i // k for i in range(k + 1)]
    else:
        cuts = _balanced_cuts(np.asarray(sizes, dtype=np.int64), n, k, what)
    return [np.arange(low, high) for low, high in zip(cuts[:-1], cuts[1:], strict=True)]


def iid(n, k, generator, what="examples"):
    """A random partition of 0..n-1 into k parts whose counts differ by at most one."""
    check_counts(n, k, what)
    return [np.sort(part) for part in np.array_split(generator.permutation(n), k)]


def stratified(labels, k, generator, what="samples"):
    """A random partition that keeps the labels' proportions in every part.

    Args: k: the number of parts, whose sizes then differ by at most one, and the counts of a label too; or the list of
        their sizes, which must sum to n: then each part has its share of each label, rounded so that the sizes hold.
    Raises: ValueError for sizes that do not sum to n.
    """
    labels = np.asarray(labels)
    n = len(labels)
    shuffled = generator.permutation(n)
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]  # label after label, each in random order
    if isinstance(k, int | np.integer):
        check_counts(n, k, what)
        # Dealt round and round: any run of the queue, so each label, meets every part equally often, up to one.
        parts = [by_label[place::k] for place in generator.permutation(k)]
        return [np.sort(part) for part in parts]
    sizes = [int(size) for size in k]
    if sum(sizes) != n or min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1 and sum to {n}, got {sizes}")
    _, counts = np.unique(labels, return_counts=True)
    queues = np.split(by_label, np.cumsum(counts)[:-1])
    parts = []
    for size in sizes:
        left = np.array([len(queue) for queue in queues])
        take = _largest_remainder(left / left.sum(), size)
        parts.append(np.sort(np.concatenate([queue[:t] for queue, t in zip(queues, take, strict=True)])))
        queues = [queue[t:] for queue, t in zip(queues, take, strict=True)]
    return parts


def classes(labels, k, nc, generator, what="samples"):
    """Every client gets samples of exactly `nc` classes, and every class about equally many clients.

    The classes are queued as random permutations one after the other, and client i takes the next nc of the queue:
    all classes have the same number of clients when their number C divides k * nc, else the numbers differ by one.
    At the seam of two permutations the later one is rearranged so that no client meets a class twice. A class's
    samples are dealt evenly to its clients; those left over go to the clients that have the fewest.

    Raises: UsageError for nc outside 1..C, for classes without a client (named), and for a class with fewer samples
        than clients.
    """
    labels = np.asarray(labels)
    names, counts = np.unique(labels, return_counts=True)
    check_counts(len(labels), k, what)
    if not 1 <= nc <= len(names):
        raise UsageError(f"--nc {nc} is outside 1 to {len(names)}, the number of classes: choose one in between")
    queue = np.empty(0, dtype=np.int64)  # positions in `names`
    while len(queue) < k * nc:
        fresh = generator.permutation(len(names))
        begun = queue[len(queue) // nc * nc :]  # what the client at the seam has already
        first = fresh[~np.isin(fresh, begun)][: nc - len(begun)]
        queue = np.concatenate([queue, first, fresh[~np.isin(fresh, first)]])
    owned = queue[: k * nc].reshape(k, nc)  # [clients, nc]

    unused = np.setdiff1d(np.arange(len(names)), owned)
    if len(unused):
        listed = f"{len(unused)} of {len(names)} classes have no client: {_listed(names[unused])}"
        raise UsageError(f"--num-clients {k} x --nc {nc} is {k * nc}: {listed}; raise one of the two")
    degrees = np.bincount(owned.ravel(), minlength=len(names))  # clients of each class
    for c in np.flatnonzero(counts < degrees)[:1]:
        raise UsageError(
            f"class {names[c]} has {counts[c]} {what} for {degrees[c]} clients: "
            f"lower --nc ({nc}) or --num-clients ({k})"
        )
    shares = [[] for _ in range(k)]
    totals = (counts // degrees)[owned].sum(axis=1)  # before what is left over
    for c in range(len(names)):
        owners = np.flatnonzero((owned == c).any(axis=1))
        owners = owners[np.argsort(totals[owners], kind="stable")]
        totals[owners[: counts[c] % degrees[c]]] += 1
        pieces = np.array_split(generator.permutation(np.flatnonzero(labels == names[c])), len(owners))  # longest first
        for client, piece in zip(owners, pieces, strict=True):
            shares[client].append(piece)
    return [np.sort(np.concatenate(share)) for share in shares]


def dirichlet(labels, k, alpha, generator, min_samples=1, what="samples", flag="--alpha", first=0):
    """Each class is dealt to the clients in proportions drawn from Dirichlet(alpha, ..., alpha).

    Counts are rounded by the largest remainder. A draw that leaves a client with fewer than `min_samples` is drawn
    again, `DIRICHLET_DRAWS` times at most; then the draw that lacked least is repaired: sample by sample the
    smallest client gets one of the largest client's, of a label that it has already if it can.

    Args: alpha: concentration, > 0 (small: few clients a class; large: like `iid`); flag, first: what messages call
        alpha and the first client.
    Returns: (partition, notes: lines for the log).
    Raises: UsageError for an alpha that is not positive and finite, and fewer than k * min_samples samples.
    """
    labels = np.asarray(labels)
    n = len(labels)
    if not (np.isfinite(alpha) and alpha > 0):
        raise UsageError(f"{flag} {alpha} must be a positive number")
    check_counts(n, k, what)
    if n < k * min_samples:
        raise UsageError(
            f"{n} {what} cannot give {k} clients {min_samples} each: lower --num-clients to at most {n // min_samples}"
        )
    names, sizes = np.unique(labels, return_counts=True)
    notes, best, draw = [], None, 0
    while draw < DIRICHLET_DRAWS:
        draw += 1
        shares = generator.dirichlet(np.full(k, float(alpha)), size=len(names))  # [classes, clients]
        counts = np.stack([_largest_remainder(s, size) for s, size in zip(shares, sizes, strict=True)])
        lacking = np.maximum(min_samples - counts.sum(axis=0), 0)  # [clients]
        if best is None or lacking.sum() < best[1].sum():
            best = counts, lacking
        if lacking.sum() == 0:
            break
    counts, lacking = best
    if lacking.any():
        notes.append(
            f"{flag} {alpha}: each of {DIRICHLET_DRAWS} draws left clients with fewer than {min_samples} {what}; "
            f"{lacking.sum()} moved from the largest clients to clients {_listed(first + np.flatnonzero(lacking))}"
        )
        _fill_up(counts, min_samples)
    elif draw > 1:
        notes.append(f"{flag} {alpha}: draw {draw} was the first with at least {min_samples} {what} a client")
    return _dealt(labels, names, counts, generator), notes


def equal_parts(labels, k, alpha, generator, flag="--alpha"):
    """Parts of equal size (to one example) whose labels differ: k sorted int64 arrays, disjoint and complete.

    Client i's proportions are q_i ~ Dirichlet(alpha, ..., alpha), as of Hsu, Qi and Brown 2019, section 3. They deal
    client after client and renormalise q_i when a label is used up, so that the last clients have what is left over,
    whatever their q_i. Here all are dealt to at once: of the matrices with the margins n / k and the labels' sizes the
    one nearest to q in relative entropy, x_ij = u_i q_ij v_j (iterative proportional fitting, Deming and Stephan 1940),
    and whole numbers beside it. No client's place in the order matters. A large alpha gives every client the labels'
    shares of all examples; a small one that assignment of clients to labels that q likes best, in which at most
    labels - 1 clients have more than one label. Raises UsageError for an alpha that is not positive and finite.
    """
    if not (np.isfinite(alpha) and alpha > 0):
        raise UsageError(f"{flag} {alpha} must be a positive number")
    names, columns = np.unique(labels, return_counts=True)
    rows = np.full(k, len(labels) // k)
    rows[: len(labels) % k] += 1
    # Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha) (Marsaglia and Tsang 2000): its logarithm, as it itself may be 0
    draw = generator.standard_gamma(alpha + 1, (k, len(names)))
    log_q = np.log(draw) + np.log1p(-generator.random(draw.shape)) / alpha  # [clients, labels]
    counts = _whole_numbers(_fitted(log_q, rows, columns), rows, columns)
    return _dealt(labels, names, counts.T, generator)


def _fitted(log_q, rows, columns, most=10_000):
    """u_i q_ij v_j whose sums are `rows` [k] and `columns` [C]: to 0.01, or as near as `most` iterations come."""
    log_v = np.zeros(len(columns))
    for _ in range(most):
        log_u = np.log(rows) - logsumexp(log_q + log_v, axis=1)
        log_x = log_q + log_u[:, None]  # [k, C]
        log_v = np.log(columns) - logsumexp(log_x, axis=0)
        x = np.exp(log_x + log_v)
        if np.abs(x.sum(axis=1) - rows).max() < 0.01:
            break
    return x


def _whole_numbers(x, rows, columns):
    """int64 beside x [k, C], of sums exactly `rows` and `columns` (which have one total)."""
    x = x * (rows / np.maximum(rows, x.sum(axis=1)))[:, None]
    x *= columns / np.maximum(columns, x.sum(axis=0))
    counts = np.floor(x).astype(np.int64)
    lack, left = rows - counts.sum(axis=1), columns - counts.sum(axis=0)
    for most in (1, len(rows) * rows.max()):  # one a cell, by the largest remainder; then whatever is left
        for i, j in zip(*np.unravel_index(np.argsort(counts - x, axis=None, kind="stable"), x.shape), strict=True):
            given = min(most, lack[i], left[j])
            counts[i, j] += given
            lack[i] -= given
            left[j] -= given
    return counts


def overlap(labels, k, rho, generator, what="samples"):
    """`stratified`, but a fraction `rho` of each client's samples is drawn from all samples, so shared with others.

    Each client keeps a random (1 - rho) n/k of its part, which no other client keeps, and draws rho n/k from all that
    it did not keep. With rho above 0 the clients overlap, and samples that nobody kept or drew are with no client.

    Returns: (partition, notes: lines for the log). Raises: UsageError for a rho outside 0..1.
    """
    if not 0 <= rho <= 1:
        raise UsageError(f"--overlap-ratio {rho} is outside 0 to 1: choose one in between")
    n = len(labels)
    mixed, holders = [], np.zeros(n, dtype=np.int64)
    for part in stratified(labels, k, generator, what):
        kept = generator.permutation(part)[round(rho * len(part)) :]
        others = np.setdiff1d(np.arange(n), kept, assume_unique=True)
        drawn = generator.choice(others, len(part) - len(kept), replace=False)
        mixed.append(np.sort(np.concatenate([kept, drawn])))
        holders[mixed[-1]] += 1
    if (holders == 1).all():
        return mixed, []
    shared, nowhere = (holders > 1).sum(), (holders == 0).sum()
    return mixed, [f"--overlap-ratio {rho}: {shared} of {n} {what} are with several clients, {nowhere} with none"]


def category(categories, k, generator, what="samples"):
    """Whole categories go to the clients, round and round in random order.

    With more clients than categories the clients are dealt to the categories instead, and each category is split
    evenly among its clients; a category with fewer samples than that takes only as many clients as it has samples.

    Returns: (partition, notes: lines for the log).
    """
    categories = np.asarray(categories)
    check_counts(len(categories), k, what)
    names, which, counts = np.unique(categories, return_inverse=True, return_counts=True)
    order = generator.permutation(len(names))
    if len(names) >= k:
        return [np.flatnonzero(np.isin(which, order[place::k])) for place in range(k)], []
    owners = [[] for _ in names]
    queue = itertools.cycle(order)
    for client in range(k):
        c = next(queue)
        while len(owners[c]) == counts[c]:
            c = next(queue)
        owners[c].append(client)
    parts = [None] * k
    for c, clients in enumerate(owners):
        pieces = np.array_split(generator.permutation(np.flatnonzero(which == c)), len(clients))
        for client, piece in zip(clients, pieces, strict=True):
            parts[client] = np.sort(piece)
    return parts, [f"{k} clients share {len(names)} categories: each is split evenly among its clients"]


def class_counts(parts, labels, n_classes):
    """How many samples of each class each client has: int64 [clients, classes]."""
    labels = np.asarray(labels)
    return np.stack([np.bincount(labels[part], minlength=n_classes) for part in parts])


def check_counts(n, k, what):
    """Raises UsageError for fewer than one client, and for fewer of `what` than clients."""
    if k < 1:
        raise UsageError(f"{k} clients: --num-clients must be at least 1")
    if n < k:
        raise UsageError(f"{n} {what} cannot be dealt to {k} clients: lower --num-clients ({k}) to at most {n}")


def _dealt(labels, names, counts, generator):
    """Each label's samples in random order, cut at counts [labels, clients]: a sorted int64 array a client."""
    pieces = [
        np.split(generator.permutation(np.flatnonzero(labels == name)), np.cumsum(row)[:-1])
        for name, row in zip(names, counts, strict=True)
    ]
    return [np.sort(np.concatenate(share)) for share in zip(*pieces, strict=True)]


def _largest_remainder(shares, total):
    """Whole numbers that sum to `total`, each the floor or the ceiling of its share of it; ties to the first."""
    ideal = np.asarray(shares) * total
    counts = np.floor(ideal).astype(np.int64)
    counts[np.argsort(counts - ideal, kind="stable")[: total - counts.sum()]] += 1
    return counts


def _fill_up(counts, min_samples):
    """Moves samples, in counts [classes, clients], until every client has `min_samples`."""
    totals = counts.sum(axis=0)
    while totals.min() < min_samples:
        to, giver = totals.argmin(), totals.argmax()
        shared = np.where(counts[:, to] > 0, counts[:, giver], 0)
        label = shared.argmax() if shared.any() else counts[:, giver].argmax()
        counts[label, giver] -= 1
        counts[label, to] += 1
        totals[giver] -= 1
        totals[to] += 1


def _listed(values):
    """The first ten of `values` in words."""
    return ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def _balanced_cuts(sizes, n, k, what):
    before = np.concatenate([[0], np.cumsum(sizes)])  # before[i]: the size of the items before item i
    cuts = [0]
    for i in range(1, k):
        ideal = before[-1] * i / k
        cut = int(np.searchsorted(before, ideal))
        if cut > 0 and ideal - before[cut - 1] <= before[cut] - ideal:
            cut -= 1
        # Every client keeps at least one item.
        cuts.append(min(max(cut, cuts[-1] + 1), n - (k - i)))
    cuts.append(n)
    for client, (low, high) in enumerate(zip(cuts[:-1], cuts[1:], strict=True)):
        if before[low] == before[high]:
            raise UsageError(f"client {client} has {high - low} empty {what}: lower --num-clients ({k})")
    return cuts
