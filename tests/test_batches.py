"""common/batches.py: a client's batches, pass after pass."""

import numpy as np

from common.batches import pass_after_pass
from common.seeding import stream


def test_pass_after_pass_from_where_the_client_stands():
    n, size = 10, 4
    whole = pass_after_pass(n, size, 0, 15, seed=1, client=3)
    assert whole.shape == (15, size) and whole.dtype == np.int64
    for e in range(6):
        one = whole.reshape(-1)[e * n : (e + 1) * n]
        assert sorted(one) == list(range(n))
        assert np.array_equal(one, stream(1, "batches", e, 3).permutation(n))
    for first in range(11):  # stopped and continued anywhere
        assert np.array_equal(pass_after_pass(n, size, first, 4, 1, 3), whole[first : first + 4])
    assert not np.array_equal(pass_after_pass(n, size, 0, 15, 1, 4), whole)
    assert not np.array_equal(pass_after_pass(n, size, 0, 15, 2, 3), whole)
    assert pass_after_pass(n, size, 3, 0, 1, 3).shape == (0, size)
