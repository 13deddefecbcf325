"""Batches: a client's passes over its examples; texts of different lengths padded, batches of like lengths."""

import numpy as np

from common.seeding import stream


def pass_after_pass(n, batch_size, first, steps, seed, client):
    """Which of its n examples a client takes in its next `steps` batches: int64 [steps, batch_size].

    Pass after pass over all of them, each in an order of its own, from where the client stands (`first` batches done);
    a batch may hold the end of one pass and the start of the next. Keyed by (seed, pass, client).
    """
    if steps < 1:
        return np.empty((0, batch_size), dtype=np.int64)
    low, high = first * batch_size, (first + steps) * batch_size
    passes = range(low // n, (high - 1) // n + 1)
    order = np.concatenate([stream(seed, "batches", e, client).permutation(n) for e in passes])
    return order[low - passes[0] * n : high - passes[0] * n].reshape(steps, batch_size)


def padded(tokens, offsets, rows, pad):
    """The texts `rows` of a flat array, padded on the right to the longest of them.

    Args: tokens: integers [all tokens]; offsets: int64 [n + 1], text i is tokens[offsets[i] : offsets[i + 1]]; rows:
        int64 [B]; pad: what padding is.

    Returns (int64 [B, L], bool [B, L]: where text is).
    """
    rows = np.asarray(rows)
    lengths = offsets[rows + 1] - offsets[rows]
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]  # [B, L]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = tokens[(offsets[rows][:, None] + np.arange(longest))[mask]]
    return ids, mask


def evaluation_batches(lengths, batch_size):
    """All texts once, the longest first (so that too large a batch fails at once): list of int64 arrays."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
