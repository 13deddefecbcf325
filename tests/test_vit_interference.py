"""vit_sparse_fl/cross_losses.py against plain loops, and that a run which measures is the run that does not."""

import importlib
import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import answers_of, as_rank
from torch.nn import functional as F

from common.cli import UsageError, checked, run_main
from common.parallel import Round
from common.seeding import torch_stream
from common.vector import Weights
from vit_sparse_fl import cross_losses, study, train_federated
from vit_sparse_fl.cross_losses import CrossLosses, held_rows
from vit_sparse_fl.flags import parse

IDS = [7, 2, 9, 4]
FIELDS = {"held_loss", "merge_gap", "client_merge_gap", "interference", "interference_clients"}
FIELDS |= {f"interference_{name}" for name in ("own", "others", "chance")}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(cross_losses, "IMAGES", 6)


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


def measured(one, theta, left_out=None):
    sent, cross = updates(theta), CrossLosses(one)
    for k in (clients := Round(IDS, followers=[cross], theta=theta, number=3)):
        if k != left_out:
            clients.counts(sent[k])
    return cross.result(clients, theta + 0.1)


def loss(one, theta, k):
    """L_k(theta), by hand."""
    W, b = theta[:40].view(4, 10), theta[40:]
    rows = held_rows(one, k)
    return sum(
        F.cross_entropy((W @ one.data.validation[r] + b)[None], one.data.validation_labels[r][None]).item()
        for r in rows
    ) / len(rows)


@pytest.mark.parametrize("left_out", [None, 2])
def test_the_matrix_its_chance_level_and_the_gap_are_the_plain_loops(left_out):
    one = made()
    theta = one.weights.snapshot()
    row = measured(one, theta, left_out)
    assert row.keys() == FIELDS
    ids = [k for k in sorted(IDS) if k != left_out]
    sent, stepped = updates(theta), {}
    for k in ids:
        signs = torch.randint(0, 2, theta.shape, generator=torch_stream(5, "interference signs", 3, k)) * 2 - 1
        stepped[k] = theta + signs * (sent[k] - theta)
    matrix, chance = (
        np.array([[loss(one, some[j], i) - loss(one, theta, i) for j in ids] for i in ids]) for some in (sent, stepped)
    )
    others = ~np.eye(len(ids), dtype=bool)
    assert row["interference_clients"] == ids
    assert np.array(row["interference"]) == pytest.approx(matrix, rel=1e-4, abs=1e-5)
    assert row["held_loss"] == pytest.approx(np.mean([loss(one, theta, k) for k in ids]), rel=1e-5)
    assert row["interference_own"] == pytest.approx(matrix.diagonal().mean(), rel=1e-4)
    assert row["interference_others"] == pytest.approx(matrix[others].mean(), rel=1e-4)
    assert row["interference_chance"] == pytest.approx(chance[others].mean(), rel=1e-4, abs=1e-5)
    gaps = [loss(one, theta + 0.1, k) - loss(one, sent[k], k) for k in ids]
    assert row["client_merge_gap"] == pytest.approx(gaps, rel=1e-4, abs=1e-5)
    assert row["merge_gap"] == pytest.approx(np.mean(gaps), rel=1e-4, abs=1e-5)


def test_a_clients_held_images_have_its_classes_in_its_proportions(monkeypatch):
    monkeypatch.setattr(cross_losses, "IMAGES", 7)
    one = made()
    labels = one.data.validation_labels
    assert labels[held_rows(one, 2)].bincount(minlength=4).tolist() == [4, 0, 3, 0]  # 100 of class 0, 100 of class 2
    assert labels[held_rows(one, 0)].tolist() == [0] * 7
    monkeypatch.setattr(cross_losses, "IMAGES", 64)
    assert sorted(held_rows(one, 0).tolist()) == list(range(0, 40, 4))  # no more than there are
    assert len(set(held_rows(one, 1).tolist())) == len(held_rows(one, 1)) == 10


def process(rank, size, port, answers):
    cross_losses.IMAGES = 6
    with as_rank(rank, size, port):
        one = made()
        answers.put((rank, measured(one, one.weights.snapshot())))


def test_processes_change_no_bit():
    one = made()
    assert answers_of(2, process) == dict.fromkeys(range(2), measured(one, one.weights.snapshot()))


# ---- whole runs

SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 8 --threads 1 --processes 1 --seed 0 --lr 0.05 "
SMALL += "--num-clients 12 --participation-rate 0.25 --num-rounds 4 --eval-every 2 --save-every 2 --dropout 0.1"


def call(script, words):
    """A script in this process. Returns its exit code."""
    module = importlib.import_module(f"vit_sparse_fl.{script}")
    with pytest.raises(SystemExit) as stop:
        run_main(module.main, checked(parse, module.build_parser(), shlex.split(words)))
    return stop.value.code


def lines_of(folder):
    times = ("seconds", "images_per_second", "peak_memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


@pytest.mark.parametrize(
    "script, more",
    [("train_federated", ""), ("train_federated_sparse", "--mask-strategy random")],
    ids=["dense", "sparse"],
)
def test_a_run_that_measures_is_the_run_that_does_not(script, more, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "draw_accuracy", lambda *_: None)
    monkeypatch.setattr(cross_losses, "CLIENTS", 2)
    for name, flags in (("plain", ""), ("measured", "--interference-every 2")):
        assert call(script, f"{SMALL} {more} {flags} --output-dir {tmp_path} --run-name {name}") == 0
    plain, rows = lines_of(tmp_path / "plain"), lines_of(tmp_path / "measured")
    assert [FIELDS <= row.keys() for row in rows] == [False, True, True]
    assert [{name: value for name, value in row.items() if name not in FIELDS} for row in rows] == plain
    harness_files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert len(harness_files) > 3
    for file in harness_files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "measured" / file).read_bytes(), file
    assert rows[1]["interference_own"] != rows[1]["interference_others"] and len(rows[1]["interference"]) == 2


def test_where_it_would_not_be_measured_is_refused():
    for words, every in (("--interference-every 15", 10), ("--interference-every 600", 100)):
        with pytest.raises(UsageError, match="--interference-every .* give a multiple"):
            parse(train_federated.build_parser(), f"{words} --eval-every {every}".split())


# ---- the figure and the table
