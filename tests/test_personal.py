"""common/personal.py: what stays with a client, by hand and against means of whole vectors."""

import math
from types import SimpleNamespace

import pytest
import torch

from common import client_rows, parallel
from common.aggregation import ServerAdam, ServerMomentum, WeightedMean
from common.client_rows import ClientRows
from common.parallel import Round
from common.personal import Personal, make_personal
from common.vector import Weights

pytestmark = pytest.mark.usefixtures("alone")
N = [2.0, 1.0, 1.0]  # weights of three clients


def made(tmp_path, names=("b",), on_disk=False):
    """(weights of a [2, 2] and b [3], `Personal` of some of them)."""
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, -0.0, 7.0])
    weights = Weights(torch.nn.ParameterDict({"a": torch.nn.Parameter(a), "b": torch.nn.Parameter(b)}))
    return weights, Personal(weights, names, ClientRows(tmp_path / "rows", on_disk) if names else None)


def rounds(personal, theta, clients, step, total=2, bad=()):
    """theta after some rounds in which client k adds k + 1 to all that it has; step: of the server."""
    for t in range(total):
        these = Round(clients, closers=[personal.rows.close_round] if personal.rows else ())
        mean = WeightedMean(theta, these)
        for k in these:
            theta_k = personal.own(theta, k) + k + 1.0
            if (t, k) in bad:
                theta_k[-1] = math.nan
            personal.keep(k, theta_k)
            mean.add(personal.sent(theta_k, theta), N[k])
        theta = step(theta, mean)
    return theta


def plain(theta, mean):
    return mean.result()


@pytest.mark.parametrize("on_disk", [False, True])
def test_two_rounds_by_hand(on_disk, tmp_path):
    weights, personal = made(tmp_path, on_disk=on_disk)
    start = weights.snapshot()
    assert (personal.size, personal.bytes) == (3, 12)
    theta = rounds(personal, start, [0, 1], plain)
    assert torch.equal(theta[4:], start[4:]) and math.copysign(1, theta[5]) == -1  # the server never steps there
    torch.testing.assert_close(theta[:4], start[:4] + 2 * (2 * 1 + 1 * 2) / 3)
    for k, moved in enumerate((2, 4, 0)):  # client 2 never took part
        own = personal.own(theta, k)
        assert torch.equal(own[:4], theta[:4]) and torch.equal(own[4:], start[4:] + moved)
    served = personal.served(theta, N)
    assert torch.equal(served[:4], theta[:4]) and torch.equal(served[4:], start[4:] + (2 * 2 + 1 * 4 + 0) / 4)
    assert torch.equal(personal.without(theta), torch.cat([theta[:4], torch.zeros(3)]))


def test_the_mean_of_one_round_is_that_of_averaging(tmp_path):
    weights, personal = made(tmp_path)
    theta = rounds(personal, weights.snapshot(), [0, 1, 2], plain, 1)
    _, off = made(tmp_path, ())
    assert torch.equal(personal.served(theta, N), rounds(off, weights.snapshot(), [0, 1, 2], plain, 1))
    assert (off.size, off.bytes, off.served(theta, N), off.own(theta, 0), off.sent(theta, None)) == (0, 0, *[theta] * 3)


def test_personal_of_everything_is_every_client_for_itself(tmp_path):
    weights, personal = made(tmp_path, ("a", "b"))
    start = weights.snapshot()
    theta = rounds(personal, start, [0, 1, 2], plain, 3)
    assert torch.equal(theta, start) and personal.bytes == weights.bytes
    assert all(torch.equal(personal.own(theta, k), start + 3 * (k + 1)) for k in range(3))
    assert torch.equal(personal.served(theta, N), start + 3 * (2 * 1 + 2 + 3) / 4)


@pytest.mark.parametrize(
    "server", [ServerMomentum(0.7), ServerMomentum(1, nesterov=True), *map(ServerAdam, ("adam", "yogi", "adagrad"))]
)
def test_a_server_optimiser_never_steps_on_what_is_personal(server, tmp_path):
    weights, personal = made(tmp_path)
    start = weights.snapshot()
    theta = rounds(personal, start, [0, 1], lambda theta, mean: server.step(theta, mean.delta()), 3)
    assert torch.equal(theta[4:], start[4:]) and not torch.equal(theta[:4], start[:4])
    assert torch.equal(personal.own(theta, 1)[4:], start[4:] + 6)


def test_a_client_that_is_left_out_keeps_what_it_had(tmp_path):
    weights, personal = made(tmp_path)  # what is not finite is in its own part
    start = weights.snapshot()
    theta = rounds(personal, start, [0, 1, 2], plain, 2, {(1, 2)})
    assert torch.equal(personal.own(theta, 2)[4:], start[4:] + 3)
    assert theta[0].item() == pytest.approx(1 + (2 * 1 + 2 + 3) / 4 + (2 * 1 + 2) / 3)


@pytest.mark.parametrize("processes, memory, on_disk", [(1, 36, False), (1, 35, True), (2, 36, True)])
def test_where_the_rows_of_a_run_lie(processes, memory, on_disk, tmp_path, monkeypatch):
    """Three clients of 12 bytes each: in memory where there is room for all, for the one process that reads them."""
    monkeypatch.setattr(parallel, "world", lambda: SimpleNamespace(size=processes))
    monkeypatch.setattr(client_rows, "MEMORY", memory)
    weights, _ = made(tmp_path)
    assert make_personal(weights, ["b"], tmp_path, 3).rows.on_disk == on_disk
    assert make_personal(weights, (), tmp_path, 3).rows is None


def test_rows_go_on_from_a_checkpoint(tmp_path):
    weights, personal = made(tmp_path)
    theta = rounds(personal, weights.snapshot(), [0, 1], plain)
    (tmp_path / "new").mkdir()
    saved = personal.rows.save(tmp_path / "new", "personal", tmp_path / "checkpoint")
    (tmp_path / "new").rename(tmp_path / "checkpoint")
    _, again = made(tmp_path / "other")
    again.rows.load(tmp_path / "checkpoint", "personal", saved)
    assert torch.equal(again.served(theta, N), personal.served(theta, N))
    wanted = rounds(personal, theta, [0, 2], plain)
    assert torch.equal(rounds(again, theta, [0, 2], plain), wanted)
    assert all(torch.equal(again.own(wanted, k), personal.own(wanted, k)) for k in range(3))
    assert {name: t.shape for name, t in again.rows.get(0).items()} == {"b": (3,)}  # the tensors' names
