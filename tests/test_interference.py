"""The interference figures equal plain numpy on stacked updates, whatever the processes."""

import math

import numpy as np
import pytest
import torch
from processes import answers_of, as_rank

from common.parallel import CHUNK, Lanes
from vit_sparse_fl.interference import Interference

IDS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23]
SHAPES = {"w": (37, 5), "chunked": (CHUNK + 77,), "bias": (3,)}


def tensors(tag, client=0):
    draw = np.random.default_rng([tag, client])
    theta = {name: torch.tensor(draw.standard_normal(shape)).float() for name, shape in SHAPES.items()}
    return theta | {"steps": torch.tensor(client)}


def clients(theta, ids, still=()):
    """theta_k: a common direction and noise; a part that nobody moves, a part that only some move."""
    common, result = tensors(1), {}
    for k in ids:
        noise = tensors(2, k)
        theta_k = {n: theta[n] + 0.01 * (common[n] + noise[n]) for n in SHAPES} | {"steps": torch.tensor(k)}
        theta_k["chunked"][:1000] = theta["chunked"][:1000]
        if k % 2:
            theta_k["w"][:10] = theta["w"][:10]
        result[k] = dict(theta) if k in still else theta_k
    return result


def some_masks():
    draw = np.random.default_rng(3)
    return {n: torch.from_numpy(draw.random(SHAPES[n]) < 0.3) for n in ("w", "chunked")}


def measured(theta, theta_ks, masks=None):
    figures = Interference(theta, lanes := Lanes(theta_ks), masks)
    for k in lanes:
        figures.add(theta_ks[k])
    return figures.result()


def by_numpy(theta, theta_ks, masks=None):
    def flat(weights, counted):
        parts = [(n, weights[n].double().numpy().ravel()) for n in counted]
        return np.concatenate([p if masks is None else p[masks[n].numpy().ravel()] for n, p in parts])

    counted = [n for n in SHAPES if masks is None or n in masks]
    d = np.stack([flat(w, counted) - flat(theta, counted) for w in theta_ks.values()])  # [m, weights]
    norms = np.linalg.norm(d, axis=1)
    moved = d[norms > 0]
    unit = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    up, down = (d > 0).sum(0), (d < 0).sum(0)
    any_ = up + down > 1
    mean = d.mean(0)
    whole = np.concatenate([theta[n].double().numpy().ravel() for n in SHAPES])
    return {
        "update_cosine": cosines.mean(),
        "gradient_diversity": (norms**2).sum() / (d.sum(0) ** 2).sum(),
        "sign_conflict": (1 - np.abs(up - down)[any_] / (up + down)[any_]).mean(),
        "drift": norms.mean() / np.linalg.norm(whole),
        "drift_to_mean": math.sqrt((np.linalg.norm(d - mean, axis=1) ** 2).mean()) / np.linalg.norm(mean),
    }


@pytest.mark.parametrize("masks", [None, some_masks()], ids=["all", "masked"])
@pytest.mark.parametrize("still", [(), (4, 90)], ids=["all move", "two stay"])
@pytest.mark.parametrize("m", [5, 10])
def test_equals_numpy_on_stacked_updates(m, still, masks):
    theta = tensors(0)
    theta_ks = clients(theta, IDS[:m], still)
    ours, expected = measured(theta, theta_ks, masks), by_numpy(theta, theta_ks, masks)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-9), name


def test_counting_weights_that_nobody_moved_changes_nothing():
    """Updates that are zero outside of the mask: counting them or not gives the same figures."""
    theta, masks = tensors(0), some_masks()
    theta_ks = clients(theta, IDS)
    for theta_k in theta_ks.values():
        theta_k["bias"] = theta["bias"]
        for name, mask in masks.items():
            theta_k[name] = torch.where(mask, theta_k[name], theta[name])
    with_, without = measured(theta, theta_ks, masks), measured(theta, theta_ks)
    for name in with_:
        assert with_[name] == pytest.approx(without[name], rel=1e-12), name


def test_figures_by_hand():
    """Two clients at right angles, (3, 0, 0) and (0, 4, 0); two opposed; two alike."""
    theta = {"w": torch.tensor([0.0, 0.0, 5.0])}

    def of(*updates):
        return measured(theta, {k: {"w": theta["w"] + torch.tensor(u)} for k, u in enumerate(updates)})

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


def test_one_client_no_movement_no_client():
    theta = tensors(0)
    one = measured(theta, clients(theta, [4]))
    assert one["update_cosine"] is None and one["gradient_diversity"] == pytest.approx(1)
    none = measured(theta, {k: dict(theta) for k in (1, 2)})
    assert none["drift"] == 0
    assert all(none[n] is None for n in ("update_cosine", "gradient_diversity", "sign_conflict", "drift_to_mean"))
    with pytest.raises(ValueError, match="no client"):
        Interference(theta, Lanes([1])).result()


def test_nothing_is_changed_and_nothing_is_kept_per_client():
    theta = tensors(0)
    theta_ks = clients(theta, IDS)
    copies = [{n: t.clone() for n, t in w.items()} for w in (theta, *theta_ks.values())]
    measured(theta, theta_ks, some_masks())
    for copy, w in zip(copies, (theta, *theta_ks.values()), strict=True):
        assert all(torch.equal(copy[n], w[n]) for n in copy)


def test_threads_change_no_bit():
    theta = tensors(0)
    theta_ks = clients(theta, IDS)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([measured(theta, theta_ks), measured(theta, theta_ks, some_masks())])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        answers.put((rank, everything()))


def everything():
    theta = tensors(0)
    return [measured(theta, clients(theta, IDS), masks) for masks in (None, some_masks())]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_processes_change_no_bit(size):
    results = answers_of(size, process)
    assert results == {rank: everything() for rank in range(size)}
