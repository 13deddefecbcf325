"""Texts of different lengths as batches: one flat array of tokens, padded per batch; batches of like lengths."""

import numpy as np


def padded(tokens, offsets, rows, pad, multiple=1):
    """The texts `rows` of a flat array, padded on the right to the longest of them.

    Args: tokens: integers [all tokens]; offsets: int64 [n + 1], text i is tokens[offsets[i] : offsets[i + 1]]; rows:
        int64 [B]; pad: what padding is; multiple: the padded length is rounded up to a multiple of it.

    Returns (int64 [B, L], bool [B, L]: where text is).
    """
    rows = np.asarray(rows)
    lengths = offsets[rows + 1] - offsets[rows]
    longest = -(-int(lengths.max()) // multiple) * multiple
    mask = np.arange(longest) < lengths[:, None]  # [B, L]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = tokens[(offsets[rows][:, None] + np.arange(longest))[mask]]
    return ids, mask


def evaluation_batches(lengths, batch_size):
    """All texts once, the longest first (so that too large a batch fails at once): list of int64 arrays."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
