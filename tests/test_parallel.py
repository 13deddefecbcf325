"""Sums over clients have the same bits on 1, 2, 3, 4 and 8 processes: real ones, joined by gloo."""

import hashlib

import numpy as np
import pytest
import torch
from processes import answers_of, as_rank

from common import parallel
from common.aggregation import PrecisionWeightedMean, WeightedMean
from common.cli import UsageError
from common.parallel import CHUNK, LANES, Lanes, LaneSum, Sums, World, broadcast, chunks, init_parallel, is_main, world

IDS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23, 6]  # 11 clients: lanes 0 to 2 have two each


def tensors(tag, client, spread):
    """A client's tensors; magnitudes over many decades, so that every other order of summation shows."""
    draw = np.random.default_rng([tag, client])

    def make(*shape):
        return torch.tensor(draw.standard_normal(shape) * 10 ** draw.uniform(-spread, spread, shape)).float()

    return {"w": make(37, 5), "chunked": make(CHUNK + 77), "scalar": make(), "steps": torch.tensor(client)}


def scenarios():
    """{name: digest of the fp64 mean}, over what is special about lanes: one each, two each, left out, sticky."""
    theta = tensors(0, 0, 1)
    weights = {k: 1.0 + k / 7 for k in IDS}
    results = {}
    for name, ids, sticky, left_out in [
        ("all", IDS, False, ()),
        ("other order", IDS[::-1], False, ()),
        ("one each", IDS[:6], False, ()),
        ("one", IDS[:1], False, ()),
        ("sticky", IDS, True, ()),
        ("left out", IDS, False, (2, 4, 31, 90)),  # 2 and 40 share lane 0; 90 is the last of its lane
    ]:
        mean = WeightedMean(theta, lanes := Lanes(ids, sticky))
        for k in lanes:
            if k not in left_out:
                mean.add(tensors(1, k, 4), weights[k])
        results[name] = digest(mean.delta())

    mean = WeightedMean(theta, lanes := Lanes(IDS))
    for k in lanes:
        mean.add(tensors(1, k, 4), weights[k], log_weight=(k % 13) * 100.3)
    results["log weights"] = digest(mean.delta())

    for damping in (0.0, 0.1):
        mean = PrecisionWeightedMean(theta, lanes := Lanes(IDS), damping=damping, normalize=damping > 0)
        for k in lanes:
            precision = {n: t.square() for n, t in tensors(2, k, 3).items() if n in ("w", "chunked")}
            precision["w"][k % 30] = 0
            mean.add(tensors(1, k, 4), weights[k], precision)
        results[f"precision {damping}"] = digest(mean.delta())

    gathered = (lanes := Lanes(IDS)).gather({k: [k, str(k)] for k in lanes})
    assert gathered == {k: [k, str(k)] for k in sorted(IDS)} and list(gathered) == sorted(IDS)
    return results


def digest(theta):
    hashed = hashlib.sha256()
    for name, t in sorted(theta.items()):
        assert t.dtype == (torch.int64 if name == "steps" else torch.float64)
        hashed.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        assert init_parallel() == init_parallel() == world() == World(rank, size, rank, "gloo")
        assert is_main() == (rank == 0)
        lanes = Lanes(IDS)
        assert list(lanes) == list(lanes.mine)
        assert all((lanes.owner(k) == rank) == (k in lanes.mine) for k in IDS)
        assert broadcast({"from": rank}, source=size - 1) == {"from": size - 1}
        parallel.barrier()
        answers.put((rank, scenarios()))
    assert world() == World()


@pytest.fixture(scope="module")
def alone():
    return scenarios()


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_any_number_of_processes_gives_the_same_bits(size, alone):
    results = answers_of(size, process)
    assert results == {rank: alone for rank in range(size)}


def test_the_order_of_the_ids_does_not_matter_and_the_scenarios_are_sensitive(alone):
    assert alone["all"] == alone["other order"]
    # Otherwise equal digests above would show nothing: another dealing into lanes does change bits.
    assert len(set(alone.values())) == len(alone) - 1


def test_a_client_alone_in_its_lane_takes_a_shorter_way_to_the_same_bits(alone, monkeypatch):
    monkeypatch.setattr(Lanes, "alone", False)
    assert scenarios() == alone


def test_dealing():
    lanes = Lanes(range(100, 119))
    assert list(lanes)[:5] == [100, 108, 116, 101, 109]  # lane by lane
    assert sorted(lanes) == list(lanes.clients) == list(range(100, 119)) and len(lanes) == 19
    assert lanes.current is None
    assert [lanes.current for _ in lanes] == [0] * 3 + [1] * 3 + [2] * 3 + [x for i in range(3, 8) for x in (i, i)]
    assert lanes.current is None
    sticky = Lanes([3, 11, 4], sticky=True)
    assert [(k, sticky.current, sticky.alone) for k in sticky] == [(3, 3, False), (11, 3, False), (4, 4, True)]
    assert list(Lanes([])) == []
    with pytest.raises(ValueError, match="twice"):
        Lanes([1, 2, 1])


def test_a_sticky_client_keeps_its_process_whoever_else_is_sampled(monkeypatch):
    monkeypatch.setattr(parallel, "_world", World(rank=1, size=3))
    assert {Lanes(others + [20], sticky=True).owner(20) for others in ([], [1], [1, 2, 3], [30, 40])} == {
        20 % LANES % 3
    }
    assert len({Lanes(others + [20]).owner(20) for others in ([], [1], [1, 2, 3], [30, 40])}) > 1


def test_every_client_has_one_process(monkeypatch):
    for size in (1, 2, 3, 5, 8, 9):
        mine = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "_world", World(rank=rank, size=size))
            lanes = Lanes(IDS)
            mine += lanes
            assert all(lanes.owner(k) == rank for k in lanes.mine)
        assert sorted(mine) == sorted(IDS)


def test_adding_outside_of_the_loop_or_twice_is_refused():
    total = LaneSum(lanes := Lanes([1, 2]))
    with pytest.raises(RuntimeError, match="inside"):
        total.begin(1.0)
    for _ in lanes:
        total.begin(1.0)
    with pytest.raises(RuntimeError, match="twice"):
        for _ in lanes:
            total.begin(1.0)
    total.total()
    with pytest.raises(RuntimeError, match="before"):
        for _ in lanes:
            total.begin(1.0)


def test_levels_of_sums():
    sums = Sums()
    for value, level in [(1.0, 2.0), (1.0, 1000.0), (1.0, 999.0), (5.0, -1000.0)]:
        sums.add_number("n", value * sums.raise_level(level))
    assert sums.level == 1000.0
    assert sums.numbers["n"] == pytest.approx(1 + np.exp(-1.0), rel=1e-15)


def test_chunks_cover_everything_once_and_are_views():
    t = torch.zeros(3, CHUNK)
    for (piece,) in chunks(t):
        piece += 1
    assert torch.equal(t, torch.ones(3, CHUNK))
    assert [len(a) for a, _ in chunks(torch.zeros(10), torch.ones(10), size=4)] == [4, 4, 2]


def test_half_an_environment_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2"):
        init_parallel()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert init_parallel() == World()


def test_devices_of_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert World(3, 4, local_rank=3).device("cuda") == torch.device("cuda:1")
    assert World(3, 4, local_rank=3).device("cuda:0") == torch.device("cuda:0")
    assert World(3, 4, local_rank=3).device("cpu") == torch.device("cpu")
