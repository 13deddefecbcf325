"""The interference figures equal plain numpy on stacked updates, whatever the processes."""

import math

import numpy as np
import pytest
import torch
from processes import answers_of, as_rank

from common.parallel import CHUNK, Round
from vit_sparse_fl.interference import Interference

IDS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23]
SIZES = (185, CHUNK + 77, 3)  # the second is summed in several pieces


def vector(tag, client=0):
    return torch.tensor(np.random.default_rng([tag, client]).standard_normal(sum(SIZES))).float()


def clients(theta, ids, still=()):
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


def measured(theta, theta_ks, kept=None, frozen=0.0, left_out=None):
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
@pytest.mark.parametrize("m, still", [(5, ()), (10, ()), (10, (4, 90))])
def test_equals_numpy_on_stacked_updates(m, still, kept):
    theta = vector(0)
    theta_ks = clients(theta, IDS[:m], still)
    ours, expected = (of(theta, theta_ks, kept, 250.0) for of in (measured, by_numpy))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name


def test_figures_by_hand():
    """Two clients at right angles, (3, 0, 0) and (0, 4, 0); two opposed; two alike."""
    theta = torch.tensor([0.0, 0.0, 5.0])

    def of(*updates):
        return measured(theta, {k: theta + torch.tensor(u) for k, u in enumerate(updates)})

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
    one = measured(theta, clients(theta, [4]))
    assert one["update_cosine"] is None and one["gradient_diversity"] == pytest.approx(1)
    none = measured(theta, {k: theta.clone() for k in (1, 2)})
    assert none["drift"] == 0
    assert all(none[n] is None for n in ("update_cosine", "gradient_diversity", "sign_conflict", "drift_to_mean"))


def test_a_client_that_is_left_out_does_not_count():
    theta = vector(0)
    theta_ks = clients(theta, IDS[:4])
    figures = measured(theta, theta_ks, left_out=IDS[0])
    del theta_ks[IDS[0]]
    assert figures == pytest.approx(by_numpy(theta, theta_ks), rel=1e-9)


def test_threads_change_no_bit():
    theta = vector(0)
    theta_ks = clients(theta, IDS)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([measured(theta, theta_ks), measured(theta, theta_ks, some_places())])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        answers.put((rank, everything()))


def everything():
    theta = vector(0)
    return [measured(theta, clients(theta, IDS), kept) for kept in (None, some_places())]


def test_processes_change_no_bit():
    results = answers_of(3, process)
    assert results == {rank: everything() for rank in range(3)}
