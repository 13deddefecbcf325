"""Sums over clients have the same bits on 1, 2 and 3 processes: real ones, joined by gloo."""

import hashlib
import math
from functools import partial

import pytest
import torch
from harness import answers_of, as_rank

from common.aggregation import NormalizedMean, PrecisionWeightedMean, WeightedMean
from common.cli import UsageError
from common.client_rows import ClientRows, rows_on_disk
from common.parallel import World, broadcast, init_parallel, is_main, world
from common.rounds import Round
from common.scaffold import ControlVariates

SIZE = 100_003
ROUNDS = ([0, 1, 2, 3, 4, 5, 6], [3], [9, 1], [8, 2, 7, 5])
WORK = [5, 3, 3, 8, 1, 1, 1, 2, 2, 2]


def vector(seed):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def scenarios(folder, rounds=ROUNDS):
    """A digest of everything that rounds of several accumulators, control variates and rows give."""
    theta, digest = vector(0), hashlib.sha256()
    on_disk = rows_on_disk(10, 4, 4)
    variates = ControlVariates(theta, 10, folder / "variates", on_disk, weights=[1.0 + k for k in range(10)])
    rows = ClientRows(folder / "rows", on_disk)
    for t, ids in enumerate(rounds):
        weights = [1.0 + k for k in range(10)]
        clients = Round(ids, weights, WORK, [variates, variates.rows, rows], number=t)
        means = WeightedMean(theta, clients), PrecisionWeightedMean(theta, clients), NormalizedMean(theta, clients)
        for k in clients:
            theta_k = theta + vector(k + 1 + 10 * t) + 0.1 * variates.correction(k)
            before = rows.get(k)
            rows.put(k, {"turns": torch.tensor([1.0 + (before["turns"].item() if before else 0)])})
            if k == 2 and t == 0:
                theta_k[5] = math.nan
            variates.offer(k, theta_k - theta)
            means[0].add(theta_k, log_weight=-3.0 * k)
            means[1].add(theta_k, vector(50 + k).square())
            if k != 4:  # a client may be skipped
                means[2].add(theta_k, a=k + 2.0)
            clients.work(k)
            clients.note(k, loss=torch.tensor(1.0 * k))
        for mean in means:
            digest.update(mean.result().numpy().tobytes())
        digest.update(variates.c.numpy().tobytes())
        digest.update(repr((clients.clients, clients.left_out, clients.amount, clients.notes())).encode())
        theta = means[0].result()
    turns = {k: row["turns"].item() for k in range(10) if (row := rows.get(k))}
    return digest.hexdigest(), turns if is_main() else None


def process(folder, rank, size, port, answers):
    with as_rank(rank, size, port):
        assert world() == World(rank, size, rank, "gloo")
        assert is_main() == (rank == 0)
        assert broadcast({"from": rank}) == {"from": 0}
        answers.put((rank, scenarios(folder / str(size))))
    assert world() == World()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return scenarios(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(size, alone, tmp_path):
    answers = answers_of(size, partial(process, tmp_path))
    assert {digest for digest, _ in answers.values()} == {alone[0]}
    # every client's row goes with it, and the round in which it was left out does not count
    assert answers[0][1] == {k: 2.0 if k in (1, 3, 5) else 1.0 for k in range(10)}


def test_the_scenario_is_sensitive_to_the_order(alone, tmp_path, monkeypatch):
    monkeypatch.setattr("test_parallel.WORK", list(range(10)))
    assert scenarios(tmp_path)[0] != alone[0]
    assert list(Round([4, 1, 3, 0], work=[5, 3, 3, 8, 1])) == [3, 0, 1, 4]


def test_rows_are_kept_by_a_checkpoint_and_dropped_with_a_client_left_out(tmp_path):
    for in_place, on_disk in ((False, False), (True, False), (False, True), (True, True)):
        rows = ClientRows(tmp_path / f"{in_place}{on_disk}", on_disk, in_place)

        def take(bad=(), rows=rows, value=0.0):
            clients = Round([0, 1, 2], followers=[rows])
            for k in clients:
                rows.put(k, {"x": torch.full((2,), value + k)})
                if k in bad:
                    clients.counts(None, torch.tensor([math.nan]))

        take(value=10.0)
        fresh = tmp_path / f"checkpoint{in_place}{on_disk}"
        fresh.mkdir()
        saved = rows.save(fresh, "x", fresh)
        assert list(saved) == [0, 1, 2]
        take(bad=(1,), value=20.0)
        assert rows.get(0)["x"].tolist() == [20.0, 20.0] and rows.get(7) is None
        # moments that were trained in place are spoiled; a row of its own is the one of before
        assert rows.get(1) is None if in_place else rows.get(1)["x"].tolist() == [11.0, 11.0]
        again = ClientRows(tmp_path / "again", on_disk, in_place)
        again.load(fresh, "x", saved)
        assert [again.get(k)["x"][0].item() for k in range(3)] == [10.0, 11.0, 12.0]
        take(rows=again, bad=(2,), value=30.0)
        later = tmp_path / f"later{in_place}{on_disk}"
        later.mkdir()
        assert list(again.save(later, "x", later)) == ([0, 1] if in_place else [0, 1, 2])
        again.remove()
        assert not (tmp_path / "again").exists()


def test_several_processes_share_no_gpu_that_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--device cuda:1 with 2 processes"):
        init_parallel("cuda:1")
