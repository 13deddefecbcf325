"""The rules to average adapters: what they serve and its error, bits over processes."""

import hashlib
import math

import numpy as np
import pytest
import torch
from adapters import close, dense, normal
from harness import answers_of, as_rank

from common.cli import RESPLIT, RULES
from common.lowrank import MIXED_RANKS, AdapterMean, trained_factors
from common.rounds import Round

SIZES = {"square": (24, 24), "tall": (40, 16), "wide": (12, 33)}  # d x k
S = 2.0  # scale


def adapter(seed, r=3, dtype=torch.float64, sizes=SIZES):
    draw = np.random.default_rng(seed)
    return {name: (normal(draw, r, k, dtype=dtype), normal(draw, d, r, dtype=dtype)) for name, (d, k) in sizes.items()}


def local(start, client, rule="naive", round=0, scale=0.3, sizes=SIZES):
    """A client's factors: what the rule trains in this round has moved."""
    trained, moved = trained_factors(rule, round), adapter([7, client], sizes=sizes)
    return {
        name: tuple(
            t + scale * m.to(t) if letter in trained else t
            for letter, t, m in zip("AB", start[name], moved[name], strict=True)
        )
        for name in start
    }


def mean_of(rule, start, adapters, weights, scales=None, round=0, **options):
    mean = AdapterMean(rule, start, S, clients := Round(range(len(adapters)), weights, number=round), **options)
    for k in clients:
        assert mean.add(adapters[k], scale=scales[k] if scales else None)
    return mean


def dense_mean(clients, weights, scales=None):
    """{layer: mean of s B A} by numpy."""
    scales = scales or [S] * len(clients)
    return {
        name: sum(
            w * s * c[name][1].double().numpy() @ c[name][0].double().numpy()
            for c, w, s in zip(clients, weights, scales, strict=True)
        )
        / sum(weights)
        for name in clients[0]
    }


def served_delta(served, name, scale=S):
    """What the layer adds in all, by numpy: the adapter's product and the base update."""
    A, B = (t.double().numpy() for t in served.factors[name])
    update = served.updates[name].full().numpy() if name in served.updates else 0.0
    return scale * B @ A + update


# ---- the rules

N = [5.0, 1.0, 3.0, 2.0]


@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_exact_rules_serve_the_mean_of_products_and_each_hands_on_its_factors(rule, round):
    start = adapter(0)
    clients = [local(start, k, rule, round) for k in range(4)]
    served = mean_of(rule, start, clients, N, round=round).result()
    assert (set(served.updates) == set(SIZES)) == (rule in ("stack", "residual"))
    exact = rule not in ("svd", "naive", "rotate")
    assert exact == (served.error < 1e-14)
    for name, mean in dense_mean(clients, N).items():
        (A, B), (A_0, B_0) = served.factors[name], start[name]
        mean_A, mean_B = (sum(w * c[name][i] for w, c in zip(N, clients, strict=True)) / sum(N) for i in (0, 1))
        if exact:
            close(served_delta(served, name), mean, 1e-14)
        if rule == "stack":
            edge = 1 / math.sqrt(A.shape[1])
            assert not B.any() and (A.abs() <= edge).all() and A.std() > 0.3 * edge
        elif rule not in ("svd", "rotate"):  # what was not trained is as it was, bit for bit
            close(A, mean_A), close(B, mean_B)
            letters = trained_factors(rule, round)
            assert ("A" in letters or torch.equal(A, A_0)) and ("B" in letters or torch.equal(B, B_0))


def test_naive_misses_by_the_covariance_of_the_factors():
    """mean(BA) - mean(B) mean(A) = mean((B - mean B)(A - mean A))."""
    start = adapter(0)
    clients = [local(start, k) for k in range(4)]
    served = mean_of("naive", start, clients, N).result()
    missed, norm = 0.0, 0.0
    for name, mean in dense_mean(clients, N).items():
        mean_A, mean_B = (sum(w * c[name][i] for w, c in zip(N, clients, strict=True)) / sum(N) for i in (0, 1))
        parts = [(w, S, c[name][0] - mean_A, c[name][1] - mean_B) for w, c in zip(N, clients, strict=True)]
        covariance = dense(parts) / sum(N)
        close(mean - served_delta(served, name), covariance, 1e-12)
        missed, norm = missed + np.sum(covariance**2), norm + np.sum(mean**2)
    assert served.error == pytest.approx(math.sqrt(missed / norm), rel=1e-12) and served.error > 0.01


def test_svd_serves_the_best_of_its_rank():
    start = adapter(0)
    clients = [local(start, k) for k in range(4)]
    served = mean_of("svd", start, clients, N, rank=5, new_scale=0.25, split="balanced").result()
    tail, total = 0.0, 0.0
    for name, mean in dense_mean(clients, N).items():
        U, sigma, Vh = np.linalg.svd(mean, full_matrices=False)
        close(served_delta(served, name, 0.25), (U[:, :5] * sigma[:5]) @ Vh[:5], 5e-14)
        tail, total = tail + (sigma[5:] ** 2).sum(), total + (sigma**2).sum()
    assert served.error == pytest.approx(math.sqrt(tail / total), rel=1e-11)  # Eckart-Young


@pytest.mark.parametrize("rule", RESPLIT)
def test_a_split_changes_the_factors_and_not_the_product(rule):
    start = adapter(0)
    clients = [local(start, k) for k in range(4)]
    plain, split = (mean_of(rule, start, clients, N, split=split).result() for split in (None, "us"))
    assert plain.error == pytest.approx(split.error, rel=1e-9, abs=1e-12)
    for name in start:
        close(served_delta(split, name), served_delta(plain, name), 1e-12)
        A, B = split.factors[name]
        close(A @ A.T, np.eye(len(A)), 1e-12)
        assert np.abs(A.numpy() - plain.factors[name][0].numpy()).max() > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_one_client_and_equal_clients(rule):
    start = adapter(0, dtype=torch.float32)
    client = local(start, 3, rule)
    for clients, weights in [([client], [0.3]), ([client] * 11, [0.1 + 0.3 * k for k in range(11)])]:
        served = mean_of(rule, start, clients, weights).result()
        for name, mean in dense_mean([client], [1.0]).items():
            close(served_delta(served, name), mean, 3e-7)
            if rule not in (*MIXED_RANKS, "rotate"):
                assert all(torch.equal(a, b) for a, b in zip(served.factors[name], client[name], strict=True))
        assert served.error < 3e-7


@pytest.mark.parametrize("rule", RULES)
def test_the_first_round_and_a_round_without_change_are_no_nan(rule):
    start = {name: (A, torch.zeros_like(B)) for name, (A, B) in adapter(0).items()}
    served = mean_of(rule, start, [start] * 3, [1.0] * 3).result()
    assert served.error == 0
    for name in SIZES:
        assert not served_delta(served, name).any() and torch.isfinite(served.factors[name][0]).all()
        assert served.factors[name][0].any()  # both zero would never learn


@pytest.mark.parametrize("rule", MIXED_RANKS)
def test_clients_of_different_ranks_and_scales(rule):
    start = adapter(0, r=6)
    clients = [adapter(k, r) for k, r in enumerate([2, 4, 6])]
    scales = [16 / 2, 16 / 4, 16 / 6]
    served = mean_of(rule, start, clients, N[:3], scales, rank=12).result()
    for name, mean in dense_mean(clients, N[:3], scales).items():
        close(served_delta(served, name), mean)
    assert served.error < 1e-13


@pytest.mark.parametrize("rule", ["svd", "naive", "stack"])
def test_what_is_not_finite_is_left_out(rule):
    """A client's factors, or what else is said of it: its head; as a client of weight 0, it changes nothing."""
    start = adapter(0)
    adapters = [local(start, k, rule) for k in range(5)]
    weightless = mean_of(rule, start, adapters, [1.0, 0.0, 3.0, 0.0, 5.0], seed=1)
    A, B = adapters[1]["tall"]
    adapters[1]["tall"] = A, B.clone().index_fill_(1, torch.tensor([2]), math.inf)
    head, weights = torch.zeros(2), [1.0, 2.0, 3.0, 4.0, 5.0]
    mean = AdapterMean(rule, start, S, clients := Round(range(5), weights), seed=1, head=head)
    added = [mean.add(adapters[k], torch.tensor([0.0, math.nan if k == 3 else k])) for k in clients]
    assert added == [True, False, True, False, True] and clients.left_out == [1, 3]
    others = mean_of(rule, start, adapters[::2], [1.0, 3.0, 5.0], seed=1)
    served = mean.result()
    assert served.head.tolist() == pytest.approx([0.0, (2 * 3 + 4 * 5) / 9])
    assert digest(served) == digest(others.result()) == digest(weightless.result())


def test_rounds_of_rolora_begin_with_b():
    assert [trained_factors("rolora", round) for round in range(3)] == [("B",), ("A",), ("B",)]
    assert {trained_factors("ffa", round) for round in range(3)} == {("B",)}
    assert trained_factors("svd", 1) == trained_factors("naive", 0) == ("A", "B")


# ---- order, processes, threads, memory

IDS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23, 6]


def digest(served):
    hashed = hashlib.sha256()
    tensors = [t for pair in served.factors.values() for t in pair]
    tensors += [update.full() for update in served.updates.values()]
    for t in tensors:
        hashed.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    hashed.update(repr((served.error, served.norm)).encode())
    return hashed.hexdigest()


def scenarios(ids=IDS):
    """{rule: digest}; layers stay factors, or turn dense at the second or the seventh of 11 clients of rank 3."""
    results = {}
    sizes = {"factors": (50, 41), "at the second": (6, 4), "at the seventh": (20, 26)}
    start = adapter(0, dtype=torch.float32, sizes=sizes)
    for rule in RULES:
        for dtype in (torch.float32, torch.bfloat16):
            begin = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in start.items()}
            mean = AdapterMean(rule, begin, S, clients := Round(ids, {k: 1.0 + k / 7 for k in ids}), seed=1)
            for k in clients:
                mean.add(local(begin, k, rule, scale=1.0, sizes=sizes))
            results[f"{rule} {dtype}"] = digest(mean.result())
    return results


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        answers.put((rank, scenarios()))


@pytest.fixture(scope="module")
def alone():
    return scenarios()


@pytest.mark.parametrize("size", [2, 5])
def test_any_number_of_processes_gives_the_same_bits(size, alone):
    results = answers_of(size, process)
    assert results == {rank: alone for rank in range(size)}


def test_neither_the_order_of_the_ids_nor_the_threads_enter(alone):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert scenarios(IDS[::-1]) == alone
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
