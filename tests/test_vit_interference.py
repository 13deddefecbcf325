"""vit_sparse_fl/interference.py: drift, held images, processes. A run that measures: tests/test_vit_rounds.py."""

import math
from types import SimpleNamespace

import pytest
import torch
from harness import answers_of, as_rank

from common.rounds import Round
from common.vector import Weights
from vit_sparse_fl import interference
from vit_sparse_fl.interference import CrossLosses, Drift, held_rows

IDS = [7, 2, 9, 4]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(interference, "IMAGES", 6)
    monkeypatch.setattr(interference, "CLIENTS", 3)


def made(clients=10):
    """A study of a linear model on ten-dimensional images of four classes; clients have one or two of these."""
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 4)
    held, labels = torch.randn(40, 10), torch.arange(40) % 4
    train = torch.arange(400) % 4
    rows = [torch.nonzero((train == k % 4) | (train == k % 2)).view(-1) for k in range(clients)]
    data = SimpleNamespace(validation=held, validation_labels=labels, train_labels=train, n_classes=4)
    args = SimpleNamespace(seed=5, interference_every=4)
    return SimpleNamespace(
        args=args, data=data, rows=rows, model=model, weights=Weights(model), pixels=lambda x: x, device="cpu"
    )


def updates(theta):
    return {k: theta + 0.3 * torch.randn(len(theta), generator=torch.Generator().manual_seed(100 + k)) for k in IDS}


def measured(one, theta):
    sent, cross = updates(theta), CrossLosses(one)
    for k in (clients := Round(IDS, followers=[cross], theta=theta, number=3)):
        clients.counts(sent[k])
    return cross.result(clients, theta + 0.1)


def test_a_clients_held_images_have_its_classes_in_its_proportions(monkeypatch):
    monkeypatch.setattr(interference, "IMAGES", 7)
    one = made()
    labels = one.data.validation_labels
    assert labels[held_rows(one, 2)].bincount(minlength=4).tolist() == [4, 0, 3, 0]  # 100 of class 0, 100 of class 2
    assert labels[held_rows(one, 0)].tolist() == [0] * 7
    monkeypatch.setattr(interference, "IMAGES", 64)
    assert sorted(held_rows(one, 0).tolist()) == list(range(0, 40, 4))  # no more than there are
    assert len(set(held_rows(one, 1).tolist())) == len(held_rows(one, 1)) == 10


def drift_of(updates, frozen=0.0):
    """Of clients that move from (0, 0, 5) by these."""
    drift, theta = Drift(frozen), torch.tensor([0.0, 0.0, 5.0])
    for k in (clients := Round(range(len(updates)), followers=[drift], theta=theta)):
        clients.counts(*[theta + torch.tensor(updates[k])] * 2)
    return drift.result(clients, theta)["drift"]


def test_drift_by_hand():
    assert drift_of([[3.0, 0, 0], [0, 4.0, 0]]) == 3.5 / 5
    assert drift_of([[0, 0, 0.0], [3.0, 0, 4.0]], frozen=11.0) == 2.5 / 6
    assert drift_of([[math.nan, 0, 0], [3.0, 0, 4.0], [0, 4.0, 3.0]]) == 1  # who is left out does not count


def process(rank, size, port, answers):
    interference.IMAGES, interference.CLIENTS = 6, 3
    with as_rank(rank, size, port):
        answers.put((rank, everything()))


def everything():
    one = made()
    return [drift_of([[0.1 * k, 1 / (k + 1), 0] for k in range(5)]), measured(one, one.weights.snapshot())]


def test_processes_change_no_bit():
    alone = everything()
    assert answers_of(2, process) == dict.fromkeys(range(2), alone)
    assert len(alone[1]["interference_clients"]) == len(alone[1]["interference"]) == 3
