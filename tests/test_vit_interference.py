"""vit_sparse_fl/interference.py: drift, held images, processes, a run that measures."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from processes import answers_of, as_rank

from common.parallel import Round
from common.vector import Weights
from vit_sparse_fl import interference, study, train_federated_sparse
from vit_sparse_fl.flags import parse
from vit_sparse_fl.interference import CrossLosses, Drift, held_rows

IDS = [7, 2, 9, 4]
FIELDS = {"interference", "interference_clients", "interference_own", "interference_others"}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(interference, "IMAGES", 6)


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
    interference.IMAGES = 6
    with as_rank(rank, size, port):
        answers.put((rank, everything()))


def everything():
    one = made()
    return [drift_of([[0.1 * k, 1 / (k + 1), 0] for k in range(5)]), measured(one, one.weights.snapshot())]


def test_processes_change_no_bit():
    assert answers_of(2, process) == dict.fromkeys(range(2), everything())


# ---- whole runs

SMALL = "--dataset demo --model tiny --classes 0:4 --batch-size 8 --threads 1 --processes 1 --seed 0 --lr 0.05 "
SMALL += "--num-clients 12 --participation-rate 0.25 --num-rounds 4 --eval-every 2 --save-every 2 --dropout 0.1"


def lines_of(folder):
    times = ("seconds", "images_per_second", "peak_memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_a_run_that_measures_is_the_run_that_does_not(tmp_path, monkeypatch):
    script = train_federated_sparse
    monkeypatch.setattr(study, "draw_accuracy", lambda *_: None)
    monkeypatch.setattr(interference, "CLIENTS", 2)
    for name, flags in (("plain", ""), ("measured", "--interference-every 2")):
        words = f"{SMALL} --mask-strategy random {flags} --output-dir {tmp_path} --run-name {name}".split()
        script.main(parse(script.build_parser(), words))
    plain, rows = lines_of(tmp_path / "plain"), lines_of(tmp_path / "measured")
    assert [FIELDS <= row.keys() for row in rows] == [False, True, True]
    assert [{name: value for name, value in row.items() if name not in FIELDS} for row in rows] == plain
    harness_files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert len(harness_files) > 3
    for file in harness_files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "measured" / file).read_bytes(), file
    assert rows[1]["interference_own"] != rows[1]["interference_others"] and len(rows[1]["interference"]) == 2
