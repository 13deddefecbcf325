"""Comparisons of {name: tensor}, and of a partition with what it parts."""

import numpy as np
import torch


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a[name], b[name])]
        assert torch.equal(*raw), name
    return True


def check_partition(parts, n):
    """Disjoint, complete over 0..n-1, none empty."""
    assert all(map(len, parts))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))
