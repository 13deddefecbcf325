"""SCAFFOLD on quadratics whose optimum is known; its control variates in memory, in files, over processes."""

import hashlib
from argparse import Namespace

import numpy as np
import pytest
import torch
from comparing import near, same_bits
from processes import answers_of, as_rank
from quadratics import Quadratics, flat, unflat

from common import checkpoint, parallel
from common.before.aggregation import effective_steps
from common.before.scaffold import ControlVariates, option_two
from common.cli import RunFailed, UsageError
from common.parallel import Lanes
from common.runlog import start_run

STEPS, LR = 6, 0.08


def mean_of_states(variates, problem, weights=None):
    """sum_k p_k c_k, read through what clients are given: c_k = c - correction."""
    weights = weights or [1.0] * len(problem)
    states = [{n: variates.c[n] - t for n, t in variates.correction(k).items()} for k in range(len(problem))]
    return {n: sum(w * s[n] for w, s in zip(weights, states, strict=True)) / sum(weights) for n in variates.c}


def two_or_three(round):
    return np.random.default_rng(round).choice(5, 2 + round % 2, replace=False)


@pytest.fixture(params=["cpu", "folder"])
def where(request, tmp_path):
    return {"folder": None if request.param == "cpu" else tmp_path / "variates"}


@pytest.mark.parametrize("clients", [None, two_or_three])
@pytest.mark.parametrize("kind", ["sgd", "sgdm"])
def test_it_reaches_the_optimum_where_fedavg_is_biased(clients, kind):
    problem = Quadratics()
    lr = LR if kind == "sgd" else LR / 3
    variates = ControlVariates(problem.start(), 5)
    theta = problem.train(problem.start(), 50 if clients is None else 100, STEPS, lr, variates, clients, kind=kind)
    assert (flat(theta) - problem.optimum()).norm() < 1e-8
    biased = problem.train(problem.start(), 30, STEPS, lr, kind=kind)
    assert (flat(biased) - problem.optimum()).norm() > 1e-2
    # the control variates end at the gradients of the optimum, c at 0
    assert flat(variates.c).norm() < 1e-7
    exact = problem.gradient(3, unflat(problem.optimum()))
    assert near(variates.correction(3), {n: -t for n, t in exact.items()}, 1e-6)


@pytest.mark.parametrize("kind", ["sgd", "sgdm", "adamw"])
def test_the_optimum_with_exact_control_variates_is_a_fixed_point_of_any_optimiser(kind):
    problem = Quadratics()
    best = unflat(problem.optimum())
    variates = ControlVariates(best, 5)
    for k in range(5):
        variates.offer(k, problem.gradient(k, best))
    variates.close_round(Lanes(range(5), sticky=True))
    for k in range(5):
        # One step of Adam: it makes steps of a fixed size out of the rounding errors of the first.
        steps = 1 if kind == "adamw" else STEPS
        still, _ = problem.local(best, k, steps, 0.01, kind, correction=variates.correction(k))
        assert near(still, best, 1e-9)
        drifted, _ = problem.local(best, k, steps, 0.01, kind)
        assert (flat(drifted) - flat(best)).norm() > 1e-3


def test_c_is_the_mean_over_all_clients_after_every_round_at_partial_participation(where):
    problem = Quadratics()
    variates = ControlVariates(problem.start(), 5, **where)
    sizes = []

    def check(round):
        assert near(mean_of_states(variates, problem), variates.c, 1e-15)
        sizes.append(flat(variates.c).norm().item())

    problem.train(problem.start(), 12, STEPS, LR, variates, two_or_three, after=check)
    assert min(sizes) > 1e-3


def test_weights_of_clients_move_the_optimum_that_is_reached():
    problem, n = Quadratics(), [5.0, 1.0, 3.0, 0.5, 2.0]
    variates = ControlVariates(problem.start(), 5, weights=n)
    checked = []
    theta = problem.train(
        problem.start(),
        60,
        STEPS,
        LR,
        variates,
        weights=n,
        after=lambda round: checked.append(near(mean_of_states(variates, problem, n), variates.c, 1e-15)),
    )
    assert len(checked) == 60 and (flat(theta) - problem.optimum(n)).norm() < 1e-10
    assert (problem.optimum(n) - problem.optimum()).norm() > 0.1
    # with the published c, the plain mean of the losses is minimised, whatever the weights of theta's mean
    published = problem.train(problem.start(), 60, STEPS, LR, ControlVariates(problem.start(), 5), weights=n)
    assert (flat(published) - problem.optimum()).norm() < 1e-10
    for bad in ([1.0] * 4, [0.0] * 5, [1.0, 1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights"):
            ControlVariates(problem.start(), 5, weights=bad)


@pytest.mark.parametrize("kind", ["sgd", "sgdm", "adamw"])
def test_zero_control_variates_are_fedavg_bit_for_bit(kind):
    problem = Quadratics(dtype=torch.float32)
    variates = ControlVariates(problem.start(), 5)
    theta, _ = problem.local(problem.start(), 0, 3, LR)
    for k in range(5):
        correction = variates.correction(k)
        assert all(t.dtype == torch.float32 and (t == 0).all() and t.signbit().all() for t in correction.values())
        with_zeros, _ = problem.local(theta, k, STEPS, LR, kind, correction=correction)
        assert same_bits(with_zeros, problem.local(theta, k, STEPS, LR, kind)[0])
    # zeros of either sign in the gradient too
    gradient = torch.tensor([0.0, -0.0, 1.0])
    assert same_bits({"g": gradient + variates.correction(0)["w"]}, {"g": gradient})


def test_identical_clients_are_fedavg():
    problem = Quadratics(same=True)
    plain = problem.train(problem.start(), 9, STEPS, LR)
    corrected = problem.train(problem.start(), 9, STEPS, LR, ControlVariates(problem.start(), 5))
    assert near(corrected, plain, 1e-14)


def test_two_clients_and_two_rounds_by_hand():
    variates = ControlVariates({"w": torch.zeros(1)}, 4)

    def correction(k):
        return variates.correction(k)["w"].item()

    for k, g in ((0, 2.0), (3, -1.0)):
        variates.offer(k, {"w": torch.tensor([g])})
    assert correction(0) == 0  # an offer counts from the end of the round on
    variates.close_round(Lanes([3, 0], sticky=True))
    # c = (2 - 1) / 4
    assert [correction(k) for k in range(4)] == [-1.75, 0.25, 0.25, 1.25]
    variates.offer(0, {"w": torch.tensor([4.0])})
    variates.close_round(Lanes([0, 1], sticky=True))  # client 1 was left out: it keeps its 0
    # c = 1/4 + (4 - 2) / 4
    assert [correction(k) for k in range(4)] == [-3.25, 0.75, 0.75, 1.75]
    variates.close_round(Lanes([2], sticky=True))  # everyone was left out
    assert correction(1) == 0.75


# ---- option II


def test_option_two_is_the_mean_gradient_under_sgd():
    problem = Quadratics()
    variates = ControlVariates(problem.start(), 5)
    theta = problem.train(problem.start(), 4, STEPS, LR, variates, two_or_three)
    for k in range(5):
        correction = variates.correction(k)
        theta_k, done = problem.local(theta, k, STEPS, LR, correction=correction, record=True)
        assert near(option_two(correction, theta, theta_k, STEPS, "sgd", LR), done.mean_gradient, 1e-13)
    with pytest.raises(UsageError, match="adamw"):
        option_two(correction, theta, theta_k, STEPS, "adamw", LR)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_option_two_with_momentum_is_a_mean_of_gradients_too(momentum):
    problem = Quadratics()
    correction = unflat(torch.linspace(-0.5, 0.5, 5, dtype=torch.float64))
    theta = unflat(torch.linspace(1, 2, 5, dtype=torch.float64))
    # Step t's gradient acts (1 - rho^(H-t)) / (1 - rho) times; these weights add up to a.
    gradients, w = [], flat(theta).clone()
    buffer = torch.zeros(5, dtype=torch.float64)
    for _ in range(STEPS):
        gradients.append(problem.A[1] @ (w - problem.target[1]))
        buffer = momentum * buffer + gradients[-1] + flat(correction)
        w = w - LR * buffer
    acts = torch.tensor([(1 - momentum ** (STEPS - t)) / (1 - momentum) for t in range(STEPS)], dtype=torch.float64)
    expected = (acts[:, None] * torch.stack(gradients)).sum(0) / acts.sum()
    theta_k, _ = problem.local(theta, 1, STEPS, LR, "sgdm", momentum, correction=correction)
    found = option_two(correction, theta, theta_k, STEPS, "sgdm", LR, momentum)
    assert torch.allclose(flat(found), expected, atol=1e-12)
    # divided by H instead, it would not be a mean of the gradients
    plain = option_two(correction, theta, theta_k, STEPS, "sgd", LR)
    assert (flat(plain) - expected).norm() > 0.3 * expected.norm()


def test_option_two_under_adam_would_be_far_from_the_gradients():
    problem = Quadratics()
    problem.A *= 1e-4
    theta = problem.start()
    theta_k, done = problem.local(theta, 0, STEPS, 1e-3, "adamw", record=True)
    as_if = flat(option_two(unflat(torch.zeros(5, dtype=torch.float64)), theta, theta_k, STEPS, "sgd", 1e-3))
    assert as_if.norm() > 1e3 * flat(done.mean_gradient).norm()


# ---- where they are kept


def test_a_folder_gives_the_same_bits_and_holds_a_file_a_client(tmp_path):
    problem = Quadratics(dtype=torch.float32)
    folder = tmp_path / "here"
    in_memory, in_files = (ControlVariates(problem.start(), 5, place) for place in (None, folder))
    assert not folder.exists()

    def two_of_four(round):
        return np.random.default_rng(round).choice(4, 2, replace=False)

    a, b = (problem.train(problem.start(), 7, STEPS, LR, v, two_of_four) for v in (in_memory, in_files))
    assert same_bits(a, b) and same_bits(in_memory.c, in_files.c)
    assert sorted(f.name for f in folder.iterdir()) == [f"client_{k:06d}.safetensors" for k in range(4)]
    assert all(same_bits(in_memory.correction(k), in_files.correction(k)) for k in range(5))
    # what an earlier process left is not read
    again = ControlVariates(problem.start(), 5, folder)
    assert all(t.signbit().all() for t in again.correction(0).values())
    in_files.delete_files()
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_or_read_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    problem = Quadratics()
    variates = ControlVariates(problem.start(), 5, tmp_path / "file")
    with pytest.raises(RunFailed, match="cannot save.*file: File exists"):
        variates.offer(0, problem.start())
    variates = ControlVariates(problem.start(), 5, tmp_path / "folder")
    variates.offer(0, problem.start())
    variates.close_round(Lanes([0], sticky=True))
    (tmp_path / "folder" / "client_000000.safetensors").write_bytes(b"short")
    with pytest.raises(RunFailed, match="cannot read.*--resume"):
        variates.correction(0)


def test_what_is_given_is_copied(where):
    variates = ControlVariates({"w": torch.zeros(2)}, 3, **where)
    gradient = torch.ones(2)
    variates.offer(1, {"w": gradient})
    gradient.fill_(7.0)
    variates.close_round(Lanes([1], sticky=True))
    correction = variates.correction(1)["w"]
    assert torch.allclose(correction, torch.full((2,), 1 / 3 - 1))
    correction.fill_(9.0)
    assert variates.correction(1)["w"].max() < 0


def test_other_dtypes():
    variates = ControlVariates({"w": torch.zeros(2, 2, dtype=torch.bfloat16).T}, 2)
    variates.offer(0, {"w": torch.full((2, 2), 1 + 2.0**-10).T})
    variates.close_round(Lanes([0], sticky=True))
    assert variates.c["w"].dtype == torch.float64 and variates.c["w"][0, 0] == (1 + 2.0**-10) / 2  # fp32 was kept
    assert variates.correction(1)["w"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not trainable.*steps"):
        ControlVariates({"w": torch.zeros(2), "steps": torch.tensor(3)}, 2)


def test_wrong_use_is_refused(where):
    problem = Quadratics()
    variates, good = ControlVariates(problem.start(), 5, **where), problem.start()
    for k in (-1, 5):
        with pytest.raises(ValueError, match="none of 0 to 4"):
            variates.correction(k)
        with pytest.raises(ValueError, match="none of 0 to 4"):
            variates.offer(k, good)
    with pytest.raises(ValueError, match="entries differ.*: b$"):
        variates.offer(0, {"w": good["w"]})
    with pytest.raises(ValueError, match="w: client 0 has \\(4,\\), not \\(3,\\)"):
        variates.offer(0, {**good, "w": torch.zeros(4)})
    with pytest.raises(ValueError, match="not finite"):
        variates.offer(0, {**good, "w": torch.tensor([1.0, float("nan"), 0.0])})
    variates.offer(0, good)
    with pytest.raises(ValueError, match="already"):
        variates.offer(0, good)
    with pytest.raises(ValueError, match="sticky"):
        variates.close_round(Lanes([0]))
    with pytest.raises(ValueError, match="not of this round: \\[0\\]"):
        variates.close_round(Lanes([1, 2], sticky=True))
    variates.close_round(Lanes([0], sticky=True))


# ---- checkpoints


def broken_run(folder, rounds, stop=None, files=False, resume=False):
    """A run of SCAFFOLD that may be killed inside round `stop`, after an offer. Returns (theta, variates)."""
    problem = Quadratics(dtype=torch.float32)
    args = Namespace(output_dir=str(folder), run_name=None, resume=resume, overwrite=False, track="off")
    with start_run("scaffold", args, "r") as run:
        run.begin({}, {})
        variates = ControlVariates(problem.start(), 5, run.folder / "variates" if files else None)
        theta = run.restore(problem.start(), variates.lasting)
        for round in run.rounds(rounds):
            if round == stop:
                variates.offer(4, unflat(torch.ones(5)))
                raise KeyboardInterrupt
            theta = problem.train(theta, 1, STEPS, LR, variates, lambda _, r=round: two_or_three(r))
            run.log(round, {"val_loss": 0.0})
            if round % 2 == 1:
                run.save(round, theta, variates.lasting)
    return theta, variates


@pytest.mark.parametrize("files", [False, True])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, files):
    theta, variates = broken_run(tmp_path / "whole", 8, files=files)
    with pytest.raises(KeyboardInterrupt):
        broken_run(tmp_path / "broken", 8, stop=5, files=files)  # a round after the checkpoint
    again, restored = broken_run(tmp_path / "broken", 8, files=files, resume=True)
    assert same_bits(again, theta) and same_bits(restored.c, variates.c)
    for k in range(5):
        assert same_bits(restored.correction(k), variates.correction(k))
    meta, shared, client = checkpoint.load(tmp_path / "broken" / "r" / "checkpoint")
    assert set(shared) == {"theta", "control_variate"} and meta["clients"] == [0, 1, 2, 3, 4]
    assert shared["control_variate"]["w"].dtype == torch.float64 and client(1)["w"].dtype == torch.float32


def test_a_checkpoint_reads_files_one_at_a_time_and_other_models_are_refused(tmp_path):
    variates = ControlVariates({"w": torch.zeros(2)}, 9, tmp_path)
    for k in (8, 2):
        variates.offer(k, {"w": torch.full((2,), float(k))})
    variates.close_round(Lanes([2, 8], sticky=True))
    clients = variates.lasting["control_variates"].client_states()
    assert not isinstance(clients, dict) and sorted(clients) == [2, 8]
    assert {k: t["w"][0].item() for k, t in clients.items()} == {2: 2.0, 8: 8.0}
    with pytest.raises(ValueError, match="another model: other, w"):
        variates.lasting["control_variate"].load_state_dict({"other": torch.zeros(2)})
    # itself it is neither kind of lasting object: a checkpoint would lose c or the c_k without a word
    assert not hasattr(variates, "state_dict") and not hasattr(variates, "client_states")


# ---- processes

IDS = [31, 4, 17, 2, 90, 8, 55, 12, 40, 23, 6]
ROUNDS = [IDS, IDS[::2], [90, 2, 12, 40, 6], IDS[3:]]


def gradient(k, round):
    draw = np.random.default_rng([k, round])
    return {
        n: torch.tensor(draw.standard_normal(s) * 10 ** draw.uniform(-4, 4, s)).float()
        for n, s in {"w": (37, 5), "long": (parallel.CHUNK + 77,)}.items()
    }


def history(folder=None, turned=False):
    """{what: digest}: c after each round, and the corrections of this process's clients at the end."""
    variates = ControlVariates({n: torch.zeros_like(t) for n, t in gradient(0, 0).items()}, 91, folder)
    digests = {}
    for round, ids in enumerate(ROUNDS):
        lanes = Lanes(ids[::-1] if turned else ids, sticky=True)
        for k in lanes:
            if (k + round) % 5:
                variates.offer(k, gradient(k, round))
        variates.close_round(lanes)
        digests[f"c {round}"] = digest(variates.c)
    mine = Lanes(IDS, sticky=True)
    corrections = mine.gather({k: digest(variates.correction(k)) for k in mine})
    return {**digests, **corrections}


def digest(theta):
    hashed = hashlib.sha256()
    for _, t in sorted(theta.items()):
        hashed.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        variates = ControlVariates({"w": torch.zeros(2)}, 91)
        strangers = [k for k in IDS if Lanes([k], sticky=True).owner(k) != rank]
        for k in strangers:
            with pytest.raises(ValueError, match="another process"):
                variates.correction(k)
            with pytest.raises(ValueError, match="another process"):
                variates.offer(k, {"w": torch.zeros(2)})
            variates.lasting["control_variates"].load_client(k, lambda _: 1 / 0)  # not its own: not even read
        answers.put((rank, (len(strangers), history(turned=size == 3))))


def test_processes_order_and_place_change_no_bit(tmp_path):
    alone = history()
    assert history(turned=True) == alone == history(tmp_path)
    assert len(set(alone.values())) == len(alone)
    for size in (2, 3, 8):
        results = answers_of(size, process)
        assert {rank: found for rank, (_, found) in results.items()} == {rank: alone for rank in range(size)}
        assert all(strangers > 0 for strangers, _ in results.values())


def test_the_sum_over_lanes_is_a_plain_sum():
    variates = ControlVariates({"w": torch.zeros(37, 5)}, 91)
    for k in IDS:
        variates.offer(k, {"w": gradient(k, 0)["w"]})
    variates.close_round(Lanes(IDS, sticky=True))
    assert near(variates.c, {"w": sum(gradient(k, 0)["w"].double() for k in sorted(IDS)) / 91}, 1e-13)
    for k in IDS[:4]:  # differences of fp32 numbers, which fp32 would round
        variates.offer(k, {"w": gradient(k, 1)["w"]})
    variates.close_round(Lanes(IDS, sticky=True))
    last = {k: gradient(k, int(k in IDS[:4]))["w"].double() for k in sorted(IDS)}
    assert near(variates.c, {"w": sum(last.values()) / 91}, 1e-13)


def test_momentum_form_of_a():
    for rho in (0.0, 0.5, 0.9):
        for steps in (1, 2, 7):
            closed = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
            assert effective_steps(steps, "sgdm", rho) == pytest.approx(closed, rel=1e-14)
