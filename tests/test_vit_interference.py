"""vit_sparse_fl/interference.py: figures against numpy, held images, processes, a run that measures."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import answers_of, as_rank

from common.parallel import CHUNK, Round
from common.vector import Weights
from vit_sparse_fl import interference, study, train_federated_sparse
from vit_sparse_fl.flags import parse
from vit_sparse_fl.interference import CrossLosses, Interference, held_rows

IDS = [7, 2, 9, 4]
FIELDS = {"merge_gap", "interference", "interference_clients"}
FIELDS |= {f"interference_{name}" for name in ("own", "others", "chance")}


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


# ---- cosines, diversity, sign conflicts, drift

CLIENTS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23]
SIZES = (185, CHUNK + 77, 3)  # the second is summed in several pieces


def vector(tag, client=0):
    return torch.tensor(np.random.default_rng([tag, client]).standard_normal(sum(SIZES))).float()


def moved(theta, ids, still=()):
    """theta_k: a common direction and noise."""
    common = vector(1)
    return {k: theta.clone() if k in still else theta + 0.01 * (common + vector(2, k)) for k in ids}


def some_places():
    kept = torch.from_numpy(np.random.default_rng(3).random(sum(SIZES)) < 0.3)
    kept[-SIZES[-1] :] = False
    return kept.nonzero().view(-1)


def figures_of(theta, theta_ks, kept=None, frozen=0.0):
    figures = Interference(kept, frozen)
    for k in (clients := Round(theta_ks, followers=[figures], theta=theta)):
        clients.counts(theta_ks[k])
    return figures.result(clients, theta)


def by_numpy(theta, theta_ks, kept=None, frozen=0.0):
    d = np.stack([(theta_k.double() - theta.double()).numpy() for theta_k in theta_ks.values()])  # [m, n]
    d = d if kept is None else d[:, kept.numpy()]
    norms = np.linalg.norm(d, axis=1)
    moved = d[norms > 0]
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    whole = math.sqrt((theta.double().numpy() ** 2).sum() + frozen)
    return {
        "update_cosine": cosines.mean(),
        "gradient_diversity": (norms**2).sum() / (d.sum(0) ** 2).sum(),
        "drift": norms.mean() / whole,
    }


@pytest.mark.parametrize("kept", [None, some_places()], ids=["all", "masked"])
@pytest.mark.parametrize("m, still", [(5, ()), (10, (4, 90))])
def test_equals_numpy_on_stacked_updates(m, still, kept):
    theta = vector(0)
    theta_ks = moved(theta, CLIENTS[:m], still)
    ours, expected = (of(theta, theta_ks, kept, 250.0) for of in (figures_of, by_numpy))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name


def test_figures_by_hand():
    """Two clients at right angles, (3, 0, 0) and (0, 4, 0); two opposed; two alike."""
    theta = torch.tensor([0.0, 0.0, 5.0])

    def of(*updates):
        return figures_of(theta, {k: theta + torch.tensor(u) for k, u in enumerate(updates)})

    right = of([3.0, 0, 0], [0, 4.0, 0])
    assert right == {"update_cosine": 0.0, "gradient_diversity": 1.0, "drift": 3.5 / 5}
    opposed = of([3.0, 0, 1.0], [-3.0, 0, -1.0])
    assert opposed["update_cosine"] == pytest.approx(-1) and opposed["gradient_diversity"] is None
    alike = of([3.0, 0, 4.0], [3.0, 0, 4.0])
    assert alike["update_cosine"] == pytest.approx(1) and alike["gradient_diversity"] == 0.5
    assert alike["drift"] == 1


def process(rank, size, port, answers):
    interference.IMAGES = 6
    with as_rank(rank, size, port):
        answers.put((rank, everything()))


def everything():
    theta, one = vector(0), made()
    return [figures_of(theta, moved(theta, CLIENTS), some_places()), measured(one, one.weights.snapshot())]


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
