"""vit_sparse_fl/cross_losses.py against plain loops, and that a run which measures is the run that does not."""

import importlib
import json
import shlex
from types import SimpleNamespace

import harness
import numpy as np
import plotting
import pytest
import torch
from fixed_runs import DENSE, SPARSE, write_vit
from processes import answers_of, as_rank
from torch.nn import functional as F

from common.cli import UsageError, checked, run_main
from common.parallel import Round
from common.seeding import stream
from common.vector import Weights
from vit_sparse_fl import study, train_federated
from vit_sparse_fl.cross_losses import CrossLosses, cosines, gram_of, held_rows
from vit_sparse_fl.flags import parse

IDS = [7, 2, 9, 4]
FIELDS = {"held_loss", "merge_gap", "client_merge_gap", "interference", "interference_clients"}
FIELDS |= {f"interference_{name}" for name in ("own", "others", "chance")}
FIELDS |= {f"cosine_{name}" for name in ("between", "within", "excess", "chance")}


def made(clients=10, images=6):
    """A study of a linear model on ten-dimensional images of four classes; clients have one or two of these."""
    torch.manual_seed(0)
    model = torch.nn.Linear(10, 4)
    held, labels = torch.randn(40, 10), torch.arange(40) % 4
    train = torch.arange(400) % 4
    rows = [torch.nonzero((train == k % 4) | (train == k % 2)).view(-1) for k in range(clients)]
    data = SimpleNamespace(validation=held, validation_labels=labels, train_labels=train, n_classes=4)
    args = SimpleNamespace(seed=5, interference_clients=8, interference_images=images)
    return SimpleNamespace(
        args=args, data=data, rows=rows, model=model, weights=Weights(model), pixels=lambda x: x, device="cpu"
    )


def updates(theta, tag):
    return {
        k: theta + 0.3 * torch.randn(len(theta), generator=torch.Generator().manual_seed(100 * tag + k)) for k in IDS
    }


def measured(one, theta, kept=None, left_out=None):
    firsts, seconds = updates(theta, 1), updates(theta, 2)
    cross = CrossLosses(one, order := Round(IDS), theta, 3, kept)
    for k in order:
        if k != left_out and cross.add(firsts[k], firsts[k] - theta):
            cross.add_other(seconds[k] - theta)
    return cross.result(theta + 0.1)


def loss(one, theta, k):
    """L_k(theta), by hand."""
    W, b = theta[:40].view(4, 10), theta[40:]
    rows = held_rows(one, k)
    return sum(
        F.cross_entropy((W @ one.data.validation[r] + b)[None], one.data.validation_labels[r][None]).item()
        for r in rows
    ) / len(rows)


@pytest.mark.parametrize("left_out, masked", [(None, False), (2, True)])
def test_the_matrix_the_gap_and_the_cosines_are_the_plain_loops(left_out, masked):
    one = made()
    theta, kept = one.weights.snapshot(), torch.arange(0, 44, 3) if masked else torch.arange(44)
    row = measured(one, theta, kept if masked else None, left_out)
    assert row.keys() == FIELDS
    ids = [k for k in sorted(IDS) if k != left_out]
    firsts, seconds = updates(theta, 1), updates(theta, 2)
    assert row["interference_clients"] == ids
    matrix = [[loss(one, firsts[j], i) - loss(one, theta, i) for j in ids] for i in ids]
    gaps = [loss(one, theta + 0.1, k) - loss(one, firsts[k], k) for k in ids]
    off = [matrix[i][j] for i in range(len(ids)) for j in range(len(ids)) if i != j]

    def cosine(a, b):
        a, b = ((v - theta)[kept].double() for v in (a, b))
        return float(a @ b / a.norm() / b.norm())

    within = np.mean([cosine(firsts[k], seconds[k]) for k in ids])
    pairs = [(i, j) for i in ids for j in ids if i < j]
    between = np.mean([cosine(a[i], b[j]) for i, j in pairs for a in (firsts, seconds) for b in (firsts, seconds)])
    near = {
        "interference": pytest.approx(np.array(matrix), rel=1e-4, abs=1e-5),
        "held_loss": pytest.approx(np.mean([loss(one, theta, k) for k in ids]), rel=1e-5),
        "interference_own": pytest.approx(np.mean([matrix[i][i] for i in range(len(ids))]), rel=1e-4),
        "interference_others": pytest.approx(np.mean(off), rel=1e-4),
        "client_merge_gap": pytest.approx(gaps, rel=1e-4, abs=1e-5),
        "merge_gap": pytest.approx(np.mean(gaps), rel=1e-4),
        "cosine_between": pytest.approx(between, abs=1e-5),
        "cosine_within": pytest.approx(within, abs=1e-5),
        "cosine_excess": pytest.approx(between - within, abs=1e-5),
    }
    assert all((np.array(row[name]) if name == "interference" else row[name]) == value for name, value in near.items())
    assert abs(row["interference_chance"]) > 0


def test_a_clients_held_images_have_its_classes_in_its_proportions():
    one = made(images=7)
    labels = one.data.validation_labels
    assert labels[held_rows(one, 2)].bincount(minlength=4).tolist() == [4, 0, 3, 0]  # 100 of class 0, 100 of class 2
    assert labels[held_rows(one, 0)].tolist() == [0] * 7
    one.args.interference_images = 64
    assert sorted(held_rows(one, 0).tolist()) == list(range(0, 40, 4))  # no more than there are
    assert len(set(held_rows(one, 1).tolist())) == len(held_rows(one, 1)) == 10


def test_cosines_and_their_chance_by_hand():
    e = torch.eye(3)
    row = cosines(gram_of([e[0], 2 * e[0], e[1], 3 * e[1]]), stream(0, "x"))
    # of the three matchings one is the clients' own (excess -1), the others mix: 0 within, 1/2 of 4 pairs between
    assert row == {"cosine_between": 0, "cosine_within": 1, "cosine_excess": -1, "cosine_chance": 1}
    assert set(cosines(gram_of([e[0], e[0], e[1], 0 * e[1]]), stream(0, "x")).values()) == {None}
    still = cosines(gram_of([e[0], e[0], e[1], e[1], 0 * e[1], e[2]]), stream(0, "x"))
    assert still == row  # who did not move does not count


def test_updates_without_a_client_are_within_their_chance_level():
    """Draws of one distribution: the excess lies within chance in about 95 of 100 cases."""
    draws, inside = np.random.default_rng(0), 0
    for i in range(40):
        d = torch.from_numpy(draws.standard_normal((12, 30))) + 0.3
        row = cosines(gram_of(list(d)), stream(i, "x"))
        inside += abs(row["cosine_excess"]) <= row["cosine_chance"]
    assert 34 <= inside <= 40


def process(rank, size, port, answers):
    with as_rank(rank, size, port):
        one = made()
        answers.put((rank, measured(one, one.weights.snapshot())))


def test_processes_change_no_bit():
    one = made()
    assert answers_of(2, process) == dict.fromkeys(range(2), measured(one, one.weights.snapshot()))


# ---- whole runs

SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 8 --threads 1 --processes 1 --seed 0 --lr 0.05 "
SMALL += "--num-clients 12 --participation-rate 0.25 --num-rounds 4 --eval-every 2 --save-every 2 --dropout 0.1"
TOPK = "--upload topk --error-feedback --download topk"
MEASURES = "--interference-every 2 --interference-clients 2 --interference-images 8"


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
    for name, flags in (("plain", ""), ("measured", MEASURES)):
        assert call(script, f"{SMALL} {more} {flags} --output-dir {tmp_path} --run-name {name}") == 0
    plain, rows = lines_of(tmp_path / "plain"), lines_of(tmp_path / "measured")
    assert [FIELDS <= row.keys() for row in rows] == [False, True, True]
    assert [{name: value for name, value in row.items() if name not in FIELDS} for row in rows] == plain
    harness_files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.safetensors")]
    assert len(harness_files) > 3
    for file in harness_files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "measured" / file).read_bytes(), file
    assert rows[1]["interference_own"] != rows[1]["interference_others"] and len(rows[1]["interference"]) == 2


def test_topk_with_what_clients_keep_goes_on_and_runs_on_two_processes_to_the_same_bits(tmp_path, monkeypatch):
    from vit_sparse_fl import train_federated_sparse as script

    monkeypatch.setattr(study, "draw_accuracy", lambda *_: None)
    words = f"{SMALL} {TOPK} {MEASURES} --run-name r --output-dir"
    assert call("train_federated_sparse", f"{words} {tmp_path / 'a'}") == 0
    report = script.report

    def interrupted(made, run, best, t, *rest, **fields):
        if t == 3:
            raise KeyboardInterrupt
        return report(made, run, best, t, *rest, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(script, "report", interrupted)
        assert call("train_federated_sparse", f"{words} {tmp_path / 'b'}") == 130
    assert call("train_federated_sparse", f"{words} {tmp_path / 'b'} --resume") == 0
    harness.same_run(tmp_path / "a" / "r", tmp_path / "b" / "r")
    ranks = harness.run_ranks(["vit_sparse_fl/train_federated_sparse.py", *shlex.split(words), str(tmp_path / "c")], 2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].err
    harness.same_run(tmp_path / "a" / "r", tmp_path / "c" / "r")
    rows = [{f.name: f.read_bytes() for f in (tmp_path / x / "r" / "checkpoint").glob("topk_*")} for x in "abc"]
    assert rows[0] and rows[0] == rows[1] == rows[2]


def test_where_it_would_not_be_measured_is_refused():
    for words, every in (("--interference-every 15", 10), ("--interference-every 600", 100)):
        with pytest.raises(UsageError, match="--interference-every .* give a multiple"):
            parse(train_federated.build_parser(), f"{words} --eval-every {every}".split())


# ---- the figure and the table


def test_the_figure_and_the_table_show_means_with_their_chance_levels(tmp_path):
    for seed in range(2):
        for command, shift in ((DENSE, 0.0), (SPARSE, 0.1)):
            folder = write_vit(tmp_path, command, seed=seed)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for row in rows[1:]:  # measured in two of three rounds
                at = row["round"] / 100 + seed + shift
                row |= {"interference_own": -at, "interference_others": at / 2, "interference_chance": 0.01}
                row |= {"merge_gap": 2 * at, "cosine_excess": -0.2, "cosine_chance": 0.05}
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((name, figure),) = plotting.figures("vit", tmp_path, "cross").items()
    assert name == "cross_losses.png" and "mean of 2 seeds" in figure.get_suptitle()
    own, others, gap, excess = figure.axes
    assert plotting.ticks(own.yaxis) == ["Dense FedAvg", "Random"]

    def points(axis):
        return [float(line.get_xdata()[0]) for container in axis.containers for line in container.lines[:1] if line]

    assert points(own) == pytest.approx([-0.75, -0.85]) and points(others) == pytest.approx([0.375, 0.425])
    marks = [
        [float(line.get_xdata()[0]) for line in axis.lines if line.get_markersize() == 13] for axis in (others, gap)
    ]
    assert marks[0][:1] + marks[1][:1] == pytest.approx([0.01, 0.9 * 0.75])  # ten clients a round
    bands = [(patch.get_x(), patch.get_width()) for patch in excess.patches]
    assert bands == [pytest.approx((-0.05, 0.1))] * 2
    row = plotting.table("table vit", tmp_path)["Random"]
    shown = [row[head] for head in ("own loss", "others' loss", "random signs", "merge gap", "between - within")]
    assert shown == ["-0.8500 ± 0.7071", "0.4250 ± 0.3536", "0.0100 ± 0.0000", "1.7000 ± 1.4142", "-0.200 ± 0.000"]
    assert row["others / own"] == "0.500 ± 0.000" and row["at random"] == "0.050 ± 0.000" and "MB down" not in row
