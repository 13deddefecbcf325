"""SCAFFOLD on quadratics whose optimum is known; its control variates by hand, in memory and in files."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from quadratics import Quadratics, near

from common import checkpoint
from common.parallel import Round
from common.scaffold import ControlVariates

STEPS, LR = 6, 0.08


@pytest.fixture(params=[False, True], ids=["memory", "files"])
def made(request, tmp_path):
    """A function that makes control variates of five clients."""
    return partial(in_memory, folder=tmp_path / "rows", on_disk=request.param)


def in_memory(theta, clients=5, folder="nowhere", **options):
    return ControlVariates(theta, clients, folder, **options)


def a_round(variates, offers, left_out=()):
    """A round in which the clients of {k: new c_k} offer these, and others are left out."""
    clients = Round([*offers, *left_out], followers=[variates, variates.rows])
    for k in clients:
        variates.offer(k, offers.get(k, torch.tensor([math.nan])))
        clients.counts(True)


def two_or_three(t):
    return np.random.default_rng(t).choice(5, 2 + t % 2, replace=False)


# ---- the method


@pytest.mark.parametrize("ids, kind, rounds, lr", [(None, "sgd", 50, LR), (two_or_three, "sgdm", 100, LR / 3)])
def test_it_reaches_the_optimum_where_fedavg_is_biased(ids, kind, rounds, lr):
    problem = Quadratics()
    variates = in_memory(problem.start)
    theta = problem.train(problem.start, rounds, STEPS, lr, variates, ids, kind=kind)
    assert near(theta, problem.optimum(), 1e-8)
    biased = problem.train(problem.start, 30, STEPS, lr, kind=kind)
    assert (biased - problem.optimum()).norm() > 1e-2
    # the control variates end at the gradients of the optimum, c at 0
    assert variates.c.norm() < 1e-7
    assert near(variates.correction(3), -problem.gradient(3, problem.optimum()), 1e-6)


@pytest.mark.parametrize("kind", ["sgd", "sgdm", "adamw"])
def test_the_optimum_with_exact_control_variates_is_a_fixed_point_of_any_optimiser(kind):
    problem = Quadratics()
    best, variates = problem.optimum(), in_memory(problem.start)
    a_round(variates, {k: problem.gradient(k, best) for k in range(5)})
    for k in range(5):
        # One step of Adam: it makes steps of a fixed size out of the rounding errors of the first.
        steps = 1 if kind == "adamw" else STEPS
        assert near(problem.local(best, k, steps, 0.01, kind, correction=variates.correction(k))[0], best, 1e-9)
        assert (problem.local(best, k, steps, 0.01, kind)[0] - best).norm() > 1e-3


def test_c_is_the_mean_over_all_clients_after_every_round_at_partial_participation(made):
    problem, n = Quadratics(), [5.0, 1.0, 3.0, 0.5, 2.0]
    variates, sizes = made(problem.start, weights=n), []

    def check(t):
        states = [w * (variates.c - variates.correction(k)) for k, w in enumerate(n)]  # what clients are given: c - c_k
        assert near(sum(states) / sum(n), variates.c, 1e-15)
        sizes.append(variates.c.norm().item())

    problem.train(problem.start, 12, STEPS, LR, variates, two_or_three, check, n)
    assert len(sizes) == 12 and min(sizes) > 1e-3


def test_weights_of_clients_move_the_optimum_that_is_reached():
    problem, n = Quadratics(), [5.0, 1.0, 3.0, 0.5, 2.0]
    theta = problem.train(problem.start, 60, STEPS, LR, in_memory(problem.start, weights=n), weights=n)
    assert near(theta, problem.optimum(n), 1e-10) and (problem.optimum(n) - problem.optimum()).norm() > 0.1
    # with the published c, the plain mean of the losses is minimised, whatever the weights of theta's mean are
    published = problem.train(problem.start, 60, STEPS, LR, in_memory(problem.start), weights=n)
    assert near(published, problem.optimum(), 1e-10)


@pytest.mark.parametrize("kind", ["sgd", "sgdm", "adamw"])
def test_zero_control_variates_are_fedavg_bit_for_bit(kind):
    problem = Quadratics(dtype=torch.float32)
    variates = in_memory(problem.start)
    theta, _ = problem.local(problem.start, 0, 3, LR)
    for k in range(5):
        correction = variates.correction(k)
        assert correction.dtype == torch.float32 and (correction == 0).all() and correction.signbit().all()
        with_zeros, _ = problem.local(theta, k, STEPS, LR, kind, correction=correction)
        assert torch.equal(with_zeros, problem.local(theta, k, STEPS, LR, kind)[0])
    # zeros of either sign in the gradient too
    gradient = torch.tensor([0.0, -0.0, 1.0, 0.0, -0.0])
    assert (gradient + correction).signbit().tolist() == gradient.signbit().tolist()


def test_two_clients_and_two_rounds_by_hand(made):
    variates = made(torch.zeros(1), 4)

    def corrections():
        return [variates.correction(k).item() for k in range(4)]

    assert corrections() == [0] * 4
    a_round(variates, {0: torch.tensor([2.0]), 3: torch.tensor([-1.0])})
    assert corrections() == [-1.75, 0.25, 0.25, 1.25]  # c = (2 - 1) / 4
    a_round(variates, {0: torch.tensor([4.0])}, left_out=[1])  # client 1 keeps its 0
    assert corrections() == [-3.25, 0.75, 0.75, 1.75]  # c = 1/4 + (4 - 2) / 4


def test_the_mean_gradient_is_the_papers_option_two_under_sgd():
    problem = Quadratics()
    variates = in_memory(problem.start)
    theta = problem.train(problem.start, 4, STEPS, LR, variates, two_or_three)
    for k in range(5):
        correction = variates.correction(k)
        theta_k, done = problem.local(theta, k, STEPS, LR, correction=correction, record=True)
        assert near((theta - theta_k) / (STEPS * LR) - correction, done.mean_gradient, 1e-13)


# ---- where they are kept


def test_files_give_the_same_bits_and_what_is_given_is_copied(tmp_path):
    problem = Quadratics(dtype=torch.float32)
    both = [ControlVariates(problem.start, 5, tmp_path / "rows", on_disk) for on_disk in (False, True)]
    a, b = (problem.train(problem.start, 7, STEPS, LR, v, two_or_three) for v in both)
    assert torch.equal(a, b) and torch.equal(both[0].c, both[1].c)
    assert all(torch.equal(both[0].correction(k), both[1].correction(k)) for k in range(5))
    assert len(list((tmp_path / "rows").iterdir())) == 5  # a file a client, offers that count are moved there
    for variates in both:
        given = torch.ones(5)
        a_round(variates, {1: given})
        before = variates.correction(1)
        given.fill_(7.0)
        variates.correction(1).fill_(9.0)
        assert torch.equal(variates.correction(1), before)


def test_a_checkpoint_holds_c_and_the_clients_that_took_part(made, tmp_path):
    problem = Quadratics(dtype=torch.float32)
    variates = made(problem.start)
    theta = problem.train(problem.start, 3, STEPS, LR, variates, lambda t: [0, 3, 4])
    rows = {"rows": variates.rows}
    checkpoint.save(tmp_path / "checkpoint", {}, {"variates": variates.state_dict()}, rows=rows)
    unbroken = problem.train(theta, 2, STEPS, LR, variates, two_or_three)
    again, (meta, shared) = made(problem.start), checkpoint.load(tmp_path / "checkpoint")
    assert list(meta["rows"]["rows"]) == [0, 3, 4] and shared["variates"]["c"].dtype == torch.float64
    again.load_state_dict(shared["variates"])
    again.rows.load(tmp_path / "checkpoint", "rows", meta["rows"]["rows"])
    assert torch.equal(problem.train(theta, 2, STEPS, LR, again, two_or_three), unbroken)
    assert torch.equal(again.c, variates.c)
