"""Drift of gradients and SCAFFOLD's corrections: against torch alone, by hand, by chance; what a run logs of them."""

import copy
import math

import numpy as np
import pytest
import torch
from noniid_script import done, no_dropout, padded, parsed, spied, token_rows, words

from common.runlog import read_metrics
from llm_noniid import drift, train
from llm_noniid.data import load_texts
from llm_noniid.text_model import load_text_model

SGD = "--client-optimizer sgd --learning-rate 0.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    args = parsed(*words(tmp_path_factory.mktemp("drift"), "a"))
    return load_text_model(args, load_texts("demo", max_samples=160), torch.device("cpu"), None)


def test_gradient_is_that_of_the_mean_over_tokens_and_the_model_is_left_as_it_was(model):
    weights, rows = model.weights, np.arange(3, 40)  # three batches, the last one smaller
    theta = weights.snapshot() + 0.05 * torch.randn(weights.size, generator=torch.Generator().manual_seed(0))
    before, state = weights.snapshot(), torch.get_rng_state()
    model.module.train()
    found = drift.gradient(model, theta, rows)
    assert torch.equal(weights.theta, before) and torch.equal(torch.get_rng_state(), state) and model.module.training
    assert all(p.grad is None for p in weights.parameters.values())

    weights.load(theta)
    plain = copy.deepcopy(model.module).double().eval()
    weights.load(before)
    tokens = token_rows(model.tokenizer, load_texts("demo", max_samples=160).splits["train"])
    plain(**padded([tokens[i] for i in rows], model.tokenizer.eos_token_id)).loss.backward()
    # the same parameters in the same order of the module
    names = {id(p): name for name, p in weights.parameters.items()}
    names = [names[id(p)] for p in model.module.parameters() if p.requires_grad]
    learnt = dict(zip(names, (p for p in plain.parameters() if p.requires_grad), strict=True))
    expected = torch.cat([learnt[name].grad.flatten() for name in weights.parameters])
    assert expected.norm() > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def pull(own, dealt, correction=None, recorded=None):
    figures = {"own": torch.tensor(own), "dealt": torch.tensor(dealt)}
    return figures | ({} if correction is None else {"correction": torch.tensor(correction), "recorded": recorded})


def test_figures_by_hand():
    """grad f = (3, 2) of weights 1 and 3; apart (-2, -2), (2/3, 2/3): 8/4 + 3/4 * 8/9 = 8/3, over 13."""
    pulls = {4: pull([1.0, 0.0], [3.0, 2.0], [0.0, 5.0], 2.0), 7: pull([11 / 3, 8 / 3], [3.0, 2.0], [3.0, 3.0], 3.0)}
    row = drift.figures(pulls, {4: 1, 7: 3}, True)
    assert row["drift_ratio"] == pytest.approx(math.sqrt(8 / 3 / 13), rel=1e-6)
    assert row["drift_ratio_chance"] == 0 and row["drift_held_out"] is True
    assert row["correction_ratio"] == pytest.approx((5 / 2 + math.sqrt(18) / 3) / 2)
    assert row["correction_cosine"] == pytest.approx((math.sqrt(0.5) - 1) / 2, rel=1e-6)
    pulls[4]["correction"] *= 0  # a client that has no correction yet has no direction
    row = drift.figures(pulls, {4: 1, 7: 3}, True)
    assert row["correction_ratio"] == pytest.approx(math.sqrt(18) / 6)
    assert row["correction_cosine"] == pytest.approx(-1, rel=1e-6)
    pulls[7]["correction"] *= 0
    assert drift.figures(pulls, {4: 1, 7: 3}, False)["correction_cosine"] is None
    assert drift.figures({4: pulls[4]}, {4: 1}, False) == {}
    blown = {0: pull([math.nan, 1.0], [1.0, 1.0]), 1: pull([1.0, 1.0], [1.0, 1.0])}
    assert drift.figures(blown, [1, 1], False)["drift_ratio"] is None


def test_control_variates_that_are_the_gradients_correct_all_of_the_drift():
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(5, 30, generator=generator)
    c = gradients.mean(0)
    pulls = {k: pull(g.tolist(), g.tolist(), (c - g).tolist(), float(g.norm())) for k, g in enumerate(gradients)}
    row = drift.figures(pulls, [1] * 5, False)
    assert row["correction_cosine"] == pytest.approx(1, rel=1e-5)
    expected = ((c - gradients).norm(dim=1) / gradients.norm(dim=1)).mean()
    assert row["correction_ratio"] == pytest.approx(float(expected), rel=1e-5)
    against = {k: one | {"correction": -one["correction"]} for k, one in pulls.items()}
    assert drift.figures(against, [1] * 5, False)["correction_cosine"] == pytest.approx(-1, rel=1e-5)


class Made:
    """What `drift.draw` reads of a study."""

    def __init__(self, n, sizes, held):
        ends = np.cumsum([0, *sizes])
        self.args = type("", (), {"seed": 3, "drift_samples": n})
        self.rows = [np.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        self.held = [1000 + 100 * k + np.arange(count) for k, count in enumerate(held)]

    def batches_of(self, k):
        return [self.rows[k][:4], self.rows[k][4:8]]


def test_texts_are_not_those_of_the_rounds_batches_where_there_are_enough():
    study = Made(6, [30, 12, 5], [9, 3, 1])
    own, dealt, held_out = drift.draw(study, {2, 0, 1}, study.batches_of, 4)
    assert list(own) == [0, 1, 2] and [len(rows) for rows in own.values()] == [6, 6, 5] and not held_out
    assert all(set(own[k]) <= set(study.rows[k]) for k in own) and own[0].min() >= 8
    assert sorted(np.concatenate(list(own.values()))) == sorted(np.concatenate(list(dealt.values())))
    assert [len(rows) for rows in dealt.values()] == [6, 6, 5]
    assert len(set(dealt[0].tolist()) & set(own[0].tolist())) < 6
    again, other = (drift.draw(study, [0, 1, 2], study.batches_of, t)[0] for t in (4, 5))
    assert again[0].tolist() == own[0].tolist() != other[0].tolist()
    # of the clients 0 and 1 alone each holds out 3
    study.args.drift_samples = 3
    own, _, held_out = drift.draw(study, [0, 1], study.batches_of, 4)
    assert held_out and all(set(own[k]) <= set(study.held[k]) and len(own[k]) == 3 for k in own)


def test_clients_that_are_alike_drift_as_chance_does_and_others_more():
    draw = np.random.default_rng(0)
    study, ratios = Made(20, [100] * 8, [1] * 8), {}
    for kind, apart in (("alike", 0.0), ("not", 0.6)):
        centres = apart * draw.standard_normal((8, 200)) + draw.standard_normal(200)
        of_text = np.repeat(centres, 100, axis=0) + 3 * draw.standard_normal((800, 200))
        own, dealt, _ = drift.draw(study, range(8), study.batches_of, 0)
        means = [{k: of_text[rows].mean(0) for k, rows in part.items()} for part in (own, dealt)]
        pulls = {k: pull(means[0][k].tolist(), means[1][k].tolist()) for k in own}
        row = drift.figures(pulls, [1] * 8, False)
        ratios[kind] = row["drift_ratio"] / row["drift_ratio_chance"]
    assert ratios["alike"] == pytest.approx(1, abs=0.1) and ratios["not"] > 1.2


@pytest.mark.slow
def test_a_run_logs_the_drift_that_torch_finds_and_is_else_as_without(tmp_path, monkeypatch):
    no_dropout(monkeypatch)
    studies, noted, real = spied(monkeypatch), [], train.drift.measured

    def measured(model, theta, drawn, k, *given):
        noted.append((theta.clone(), drawn, k))
        return real(model, theta, drawn, k, *given)

    monkeypatch.setattr(train.drift, "measured", measured)
    more = f"--algorithm scaffold {SGD} --num-rounds 3 --sizes equal --alpha 0.1 --eval-every"
    rows = read_metrics(done(tmp_path, "a", f"{more} 1 --drift-samples 4"))
    plain = read_metrics(done(tmp_path, "b", f"{more} 1"))
    fields = {"drift_ratio", "drift_ratio_chance", "drift_held_out", "correction_ratio", "correction_cosine"}
    for with_it, without in zip(rows, plain, strict=True):
        assert with_it.keys() - without.keys() == (fields if with_it["round"] else set())
        skipped = {"seconds", "peak_memory", "tokens_per_second"}
        assert {n: with_it[n] for n in without if n not in skipped} == {
            n: without[n] for n in without if n not in skipped
        }
    assert rows[1]["correction_ratio"] == 0 and rows[1]["correction_cosine"] is None  # c and c_k are 0
    assert 0 < rows[3]["correction_ratio"] and -1 <= rows[3]["correction_cosine"] <= 1
    assert [k for *_, k in noted] == [0, 1, 2, 3] * 3 and studies[0].args.drift_samples == 4

    last = noted[-4:]
    assert all(torch.equal(theta, last[0][0]) for theta, *_ in last)  # the round's start, whatever the client made
    n = np.array([len(studies[0].rows[k]) for k in range(4)])
    for name, texts in (("drift_ratio", last[0][1][0]), ("drift_ratio_chance", last[0][1][1])):
        g = torch.stack([drift.gradient(studies[0].model, last[0][0], texts[k]).double() for k in range(4)]).numpy()
        mean = n @ g / n.sum()
        expected = math.sqrt(n @ ((g - mean) ** 2).sum(1) / n.sum()) / np.linalg.norm(mean)
        assert rows[3][name] == pytest.approx(expected, rel=1e-5)
