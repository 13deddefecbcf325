"""Every draw has its own key: the same for the same purpose, round and client, unrelated otherwise. Batches, too."""

import random

import numpy as np
import pytest
import torch

from common.batches import pass_after_pass
from common.seeding import key, seed_everything, seed_torch, stream, torch_stream


def test_the_same_key_gives_the_same_draws_whatever_came_before():
    first = stream(3, "batches", 2, 1).random(5)
    np.random.seed(99)
    stream(3, "batches", 2, 0).random(1000)
    assert np.array_equal(first, stream(3, "batches", 2, 1).random(5))


def test_keys_differ_in_every_argument_and_do_not_run_into_each_other():
    quadruples = [(s, p, r, c) for s in range(4) for p in ("a", "b", "a1", "") for r in range(12) for c in range(12)]
    keys = [key(*q) for q in quadruples]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)
    # What joined text or numpy's SeedSequence would confuse: [0, 5] and [0, 5, 0]; 1, 12 and 11, 2.
    assert key(0, "a", 5) == key(0, "a", 5, 0) != key(0, "a", 0, 5)
    assert key(0, "a", 1, 12) != key(0, "a", 11, 2)
    assert key(0, "a, 1", 0) != key(0, "a", 1)
    # Old runs are resumed with these; a change of the text that is hashed would show here.
    assert key(0, "batches", 1, 2) == key(np.int64(0), "batches", np.int32(1), np.uint8(2)) == 2820207791656049240
    for wrong in ((0.0, "a"), (0, "a", 1.0), (0, "a", 0, None)):
        with pytest.raises(TypeError):
            key(*wrong)


def test_torch_generators_are_keyed_too():
    a = torch.rand(4, generator=torch_stream(1, "labels", 3, 2))
    assert torch.equal(a, torch.rand(4, generator=torch_stream(1, "labels", 3, 2)))
    assert not torch.equal(a, torch.rand(4, generator=torch_stream(1, "labels", 3, 1)))
    with torch.random.fork_rng():
        seed_torch(1, "labels", 3, 2)
        assert torch.equal(a, torch.rand(4))


def test_seed_everything_makes_global_draws_repeatable_and_algorithms_deterministic():
    before = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        draws = []
        for seed in (5, 5, 6):
            seed_everything(seed)
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
        assert draws[0] == draws[1]
        assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


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
