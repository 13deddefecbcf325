"""SCAFFOLD on quadratics whose optimum is known; its control variates by hand, in memory and in files."""

import math

import numpy as np
import pytest
import torch
from quadratics import Quadratics, near

from common import checkpoint
from common.rounds import Round
from common.scaffold import ControlVariates

STEPS, LR = 6, 0.08


def made(theta, clients=5, **options):
    return ControlVariates(theta, clients, "nowhere", **options)


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
    variates = made(problem.start)
    theta = problem.train(problem.start, rounds, STEPS, lr, variates, ids, kind=kind)
    assert near(theta, problem.optimum(), 1e-8)
    biased = problem.train(problem.start, 30, STEPS, lr, kind=kind)
    assert (biased - problem.optimum()).norm() > 1e-2
    # the control variates end at the gradients of the optimum, c at 0
    assert variates.c.norm() < 1e-7
    assert near(variates.correction(3), -problem.gradient(3, problem.optimum()), 1e-6)


def test_weights_of_clients_move_the_optimum_that_is_reached():
    problem, n = Quadratics(), [5.0, 1.0, 3.0, 0.5, 2.0]
    theta = problem.train(problem.start, 60, STEPS, LR, made(problem.start, weights=n), weights=n)
    assert near(theta, problem.optimum(n), 1e-10) and (problem.optimum(n) - problem.optimum()).norm() > 0.1
    # with the published c, the plain mean of the losses is minimised, whatever the weights of theta's mean are
    published = problem.train(problem.start, 60, STEPS, LR, made(problem.start), weights=n)
    assert near(published, problem.optimum(), 1e-10)


def test_two_clients_and_two_rounds_by_hand():
    variates = made(torch.zeros(1), 4)

    def corrections():
        return [variates.correction(k).item() for k in range(4)]

    first = variates.correction(0)  # -0.0 changes no bit of what it is added to
    assert first.item() == 0 and first.signbit() and first.dtype == torch.float32
    a_round(variates, {0: torch.tensor([2.0]), 3: torch.tensor([-1.0])})
    assert corrections() == [-1.75, 0.25, 0.25, 1.25]  # c = (2 - 1) / 4
    a_round(variates, {0: torch.tensor([4.0])}, left_out=[1])  # client 1 keeps its 0
    assert corrections() == [-3.25, 0.75, 0.75, 1.75]  # c = 1/4 + (4 - 2) / 4


def test_the_mean_gradient_is_the_papers_option_two_under_sgd():
    problem = Quadratics()
    variates = made(problem.start)
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


def test_a_checkpoint_holds_c_and_the_clients_that_took_part(tmp_path):
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
