"""vit_sparse_fl/interference.py: its figures against numpy, losses against plain loops, a run that measures."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import answers_of, as_rank
from torch.nn import functional as F

from common.parallel import CHUNK, Round
from common.seeding import torch_stream
from common.vector import Weights
from vit_sparse_fl import interference, study, train_federated_sparse
from vit_sparse_fl.flags import parse
from vit_sparse_fl.interference import CrossLosses, Interference, held_rows

IDS = [7, 2, 9, 4]
FIELDS = {"held_loss", "merge_gap", "client_merge_gap", "interference", "interference_clients"}
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
    """theta_k: a common direction and noise; a part that nobody moves, a part that only some move."""
    common, result = vector(1), {}
    for k in ids:
        theta_k = theta + 0.01 * (common + vector(2, k))
        theta_k[SIZES[0] : SIZES[0] + 1000] = theta[SIZES[0] : SIZES[0] + 1000]
        if k % 2:
            theta_k[:50] = theta[:50]
        result[k] = theta.clone() if k in still else theta_k
    return result


def some_places():
    kept = torch.from_numpy(np.random.default_rng(3).random(sum(SIZES)) < 0.3)
    kept[-SIZES[-1] :] = False
    return kept.nonzero().view(-1)


def figures_of(theta, theta_ks, kept=None, frozen=0.0, left_out=None):
    figures = Interference(kept, frozen)
    for k in (clients := Round(theta_ks, followers=[figures], theta=theta)):
        if k != left_out:
            clients.counts(theta_ks[k])
    return figures.result(clients, theta)


def by_numpy(theta, theta_ks, kept=None, frozen=0.0):
    d = np.stack([(theta_k.double() - theta.double()).numpy() for theta_k in theta_ks.values()])  # [m, n]
    d = d if kept is None else d[:, kept.numpy()]
    norms = np.linalg.norm(d, axis=1)
    moved = d[norms > 0]
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    up, down = (d > 0).sum(0), (d < 0).sum(0)
    any_ = up + down > 1
    mean = d.mean(0)
    whole = math.sqrt((theta.double().numpy() ** 2).sum() + frozen)
    return {
        "update_cosine": cosines.mean(),
        "gradient_diversity": (norms**2).sum() / (d.sum(0) ** 2).sum(),
        "sign_conflict": (1 - np.abs(up - down)[any_] / (up + down)[any_]).mean(),
        "drift": norms.mean() / whole,
        "drift_to_mean": math.sqrt((np.linalg.norm(d - mean, axis=1) ** 2).mean()) / np.linalg.norm(mean),
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
    assert right == {
        "update_cosine": 0.0,
        "gradient_diversity": 1.0,
        "sign_conflict": None,  # no weight that both moved
        "drift": 3.5 / 5,
        "drift_to_mean": 1.0,
    }
    opposed = of([3.0, 0, 1.0], [-3.0, 0, -1.0])
    assert opposed["update_cosine"] == pytest.approx(-1) and opposed["sign_conflict"] == 1.0
    assert opposed["gradient_diversity"] is None and opposed["drift_to_mean"] is None
    alike = of([3.0, 0, 4.0], [3.0, 0, 4.0])
    assert alike["update_cosine"] == pytest.approx(1) and alike["gradient_diversity"] == 0.5
    assert alike["drift_to_mean"] == 0 and alike["sign_conflict"] == 0 and alike["drift"] == 1


def test_one_client_and_no_movement():
    theta = vector(0)
    one = figures_of(theta, moved(theta, [4]))
    assert one["update_cosine"] is None and one["gradient_diversity"] == pytest.approx(1)
    none = figures_of(theta, {k: theta.clone() for k in (1, 2)})
    assert none["drift"] == 0
    assert all(none[n] is None for n in ("update_cosine", "gradient_diversity", "sign_conflict", "drift_to_mean"))


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
