"""Rounds as the scripts of mamba_fl assemble them, against plain loops in fp64; the pieces of mamba_fl.

The loops use torch, the model, the data and the keys of the random streams, nothing of the rounds' code.
"""

import json
import math
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import flags, run
from safetensors.torch import load_file

from common.cli import RunFailed, UsageError
from common.seeding import stream, torch_stream
from common.vector import Weights
from mamba_fl import central, fed_avg, fed_core, fed_entropy, fed_fisher, fed_momentum, measuring
from mamba_fl.data import build_data
from mamba_fl.fed_core import plan_rounds, round_ends
from mamba_fl.mamba2 import Mamba2Config
from mamba_fl.ssm_config import make_model
from plots.read import not_finite

V, T, B, H, K, SEED = 400, 32, 2, 2, 5, 3
TINY = f"--dataset demo --tokenizer bpe:{V} --d-model 32 --d-state 16 --headdim 16 --sequence-length {T} "
TINY += f"--batch-size {B} --num-clients {K} --sharding iid --threads 1 --seed {SEED} --val-sequences 2 --prompt= "
FEDERATED = f"{TINY} --local-updates {H} --participation 0.5 --rounds 3 --val-freq 3 --client-val-sequences 0 "
# 2.5 of the 5 clients: 3
SGD = "--client-optimizer sgd --lr 0.5"
BAD = {4}  # the second client of the second round


@cache
def few(*args):
    """The data of a run, for the evaluation a few blocks of them."""
    data = build_data(*args)
    return replace(data, validation=data.validation[:4], test=data.test[:4])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(fed_core, "build_data", few)
    monkeypatch.setattr(measuring, "draw_curve", lambda folder: None)


@pytest.fixture(scope="module")
def data():
    return few("demo", f"bpe:{V}", T, K, "iid", SEED, None)


@pytest.fixture
def spoil(monkeypatch):
    """The clients at these places, counted over all rounds, turn NaN in their local steps: BAD, or what is put in."""
    steps, seen, places = fed_core.local_steps, [], set(BAD)

    def local_steps(loss, batches, weights, *rest, **options):
        done = steps(loss, batches, weights, *rest, **options)
        if len(seen) in places:
            weights.theta[7] = math.nan
        seen.append(0)
        return done

    monkeypatch.setattr(fed_core, "local_steps", local_steps)
    return places


class Plain:
    """The reference: an fp64 model, torch.optim, and the draws by their keys.

    Args: train: each client's blocks; rates: of every step of the run, by default lr; ends: the steps before each
        round, by default H a round; held: {part of a name: after how many rounds it is averaged}.
    """

    def __init__(self, train, lr=0.5, kind="sgd", ends=None, rates=None, betas=(0.9, 0.999), held=None):
        self.model = make_model(Mamba2Config(vocab_size=V, d_model=32, d_state=16, headdim=16), seed=SEED).double()
        self.start = self.theta = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.train, self.lr, self.kind, self.betas, self.held = train, lr, kind, betas, held or {}
        self.ends, self.rates = ends or range(0, 99, H), rates or [lr] * 99
        self.done, self.states, self.last = defaultdict(int), {}, {}  # of each client: steps, moments, theta_k

    def sampled(self, t):
        return sorted(stream(SEED, "participation", t).choice(K, 3, replace=False).tolist())

    def logits(self, blocks):
        return self.model(blocks[:, :-1])[..., :V]

    def nll(self, blocks, labels=None):
        labels = blocks[:, 1:] if labels is None else labels
        return F.cross_entropy(self.logits(blocks).flatten(0, 1), labels.flatten(), reduction="sum")

    def perplexity(self, blocks):
        with torch.no_grad():
            return math.exp(self.nll(blocks) / blocks[:, 1:].numel())

    def drawn(self, blocks, generator):
        """blocks [n, T + 1] with labels that the model draws: where its cumulated probabilities pass a number."""
        with torch.no_grad():
            cumulated = torch.softmax(self.logits(blocks), -1).cumsum(-1)  # [n, T, V]
        at = torch.rand(blocks[:, 1:].numel(), generator=generator, dtype=torch.float64).view(-1, T, 1)
        return (cumulated <= at).sum(-1)

    def precision(self, k, t, labels):
        """n_k (F_k + 0.2 mean F_k) of 3 of the client's sequences at the model's weights."""
        blocks = self.train[k]
        rows = np.sort(stream(SEED, "fisher", t, k).choice(len(blocks), 3, replace=False))
        drawn = self.drawn(blocks[rows], torch_stream(SEED, "fisher labels", t, k))
        ys = blocks[rows, 1:] if labels == "data" else drawn
        fisher = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        for row, y in zip(rows, ys, strict=True):
            self.model.zero_grad()
            self.nll(blocks[row : row + 1], y).backward()
            for n, p in self.model.named_parameters():
                fisher[n] += p.grad**2 / 3
        mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        return {n: len(blocks) * (f + 0.2 * mean) for n, f in fisher.items()}

    def local(self, k, t=0):
        """theta_k after the client's steps of round t."""
        blocks = self.train[k]
        t_k, last = self.last.get(k, (None, None))
        own = {n for n in self.theta if t_k == t - 1 and not self.averaged(n, t_k)}  # what it goes on with
        self.model.load_state_dict({n: last[n] if n in own else w for n, w in self.theta.items()}, strict=False)
        groups = [{"params": [], "weight_decay": 0.01}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.model.named_parameters():
            groups[name.endswith(("dt_bias", "A_log", "D"))]["params"].append(p)
        of = partial(torch.optim.AdamW, betas=self.betas) if self.kind == "adamw" else torch.optim.SGD
        optimizer = of(groups, lr=self.lr, foreach=False)
        if self.kind == "adamw" and k in self.states:
            optimizer.load_state_dict(self.states[k])
        order = [i for e in range(2) for i in stream(SEED, "batches", e, k).permutation(len(blocks))]
        first_step, end = self.ends[t], self.ends[t + 1]
        for step in range(first_step, end):
            first = (self.done[k] + step - first_step) * B
            optimizer.zero_grad()
            (self.nll(blocks[order[first : first + B]]) / (B * T)).backward()
            for group in optimizer.param_groups:
                group["lr"] = self.rates[step]
            optimizer.step()
        self.states[k] = optimizer.state_dict()
        self.done[k] += end - first_step
        self.last[k] = t, {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return self.last[k][1]

    def averaged(self, name, t):
        """Whether the average after round t (of three) has the parameter."""
        return t == 2 or all(word not in name or (t + 1) % n == 0 for word, n in self.held.items())

    def examples(self, k, t):
        return len(self.train[k])

    def rounds(self, weigh=None, step=lambda theta, delta: {n: theta[n] + delta[n] for n in theta}, bad=BAD):
        """theta after three rounds: weigh(k, t) gives each client's weight, a number or {name: tensor}."""
        places = iter(range(99))
        for t in range(3):
            top, bottom = {n: 0.0 for n in self.theta}, {n: 0.0 for n in self.theta}
            for k in self.sampled(t):
                theta_k = self.local(k, t)
                if next(places) in bad:
                    del self.states[k], self.last[k]
                    continue
                w = (weigh or self.examples)(k, t)
                for n in self.theta:
                    w_n = w[n] if isinstance(w, dict) else w
                    top[n], bottom[n] = top[n] + w_n * (theta_k[n] - self.theta[n]), bottom[n] + w_n
            new = step(self.theta, {n: top[n] / bottom[n] for n in self.theta})
            self.theta = {n: new[n] if self.averaged(n, t) else self.theta[n] for n in new}

    def agrees(self, theta, tolerance=2e-4):
        """The movements agree to a share of their size: a plain fault in a weight or a draw moves them by percents."""
        moved, missed = (
            sum((a[n] - b[n]).square().sum() for n in a) ** 0.5
            for a, b in ((self.theta, self.start), (theta, self.theta))
        )
        assert moved > 0.01 and missed < tolerance * moved, (missed / moved).item()


def slower(theta, delta):
    """The server's step at --server-lr 0.7."""
    return {n: theta[n] + 0.7 * delta[n] for n in theta}


SCHEDULE = "--lr-scheduler cosine --warmup-steps 2"


def torch_rates(total, base):
    """The rates that torch's schedulers give for the flags of SCHEDULE."""
    optimizer, lrs = torch.optim.SGD([torch.zeros(1)], base), torch.optim.lr_scheduler
    rise, fall = lrs.LinearLR(optimizer, 1 / 2, total_iters=1), lrs.CosineAnnealingLR(optimizer, total - 2)
    whole, rates = lrs.SequentialLR(optimizer, [rise, fall], [2]), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        whole.step()
    return rates


def test_fed_avg(data, tmp_path, spoil):
    plain = Plain(data.train, rates=torch_rates(6, 0.5))
    assert len({tuple(plain.sampled(t)) for t in range(3)}) > 1 and len({len(b) for b in data.train}) == K
    theta, rows = run(fed_avg, tmp_path, f"{FEDERATED} {SGD} {SCHEDULE} --server-lr 0.7 --client-val-sequences 1")
    own = {}

    def weigh(k, t):
        own[k] = plain.perplexity(data.validation[:1])
        return len(data.train[k])

    plain.rounds(weigh, slower)
    plain.agrees(theta)
    assert [row["round"] for row in rows] == [0, 3] and rows[1]["left_out"] == [[2, plain.sampled(1)[1]]]
    assert rows[1]["clients"] == plain.sampled(2) and "train_loss" not in rows[0]
    assert rows[1]["client_val_ppl"] == pytest.approx([own[k] for k in rows[1]["clients"]], rel=1e-4)
    plain.model.load_state_dict(plain.theta, strict=False)
    assert rows[1]["val_ppl"] == pytest.approx(plain.perplexity(data.validation[:2]), rel=1e-4)
    losses, n = rows[1]["client_train_loss"], [len(data.train[k]) for k in rows[1]["clients"]]
    assert rows[1]["train_loss"] == pytest.approx(np.average(losses, weights=n))
    assert rows[1]["tokens"] == 9 * H * B * T and rows[1]["bytes_up"] == 9 * 4 * sum(t.numel() for t in theta.values())


def test_groups_that_are_averaged_less_often(data, tmp_path, spoil):
    """Between averages a client goes on with its own values of a group, unless it was left out."""
    spoil.clear()
    spoil.add(6)  # the second of five in the second round
    plain = Plain(data.train, held={"embedding": 2, "conv1d": 3, "norm": 1})
    plain.sampled = lambda t: list(range(K))
    words = f"{FEDERATED} --participation 1 {SGD} --server-lr 0.7"
    words += f" --average-every embedding={2 * H} conv={3 * H} norms={H}"
    theta, rows = run(fed_avg, tmp_path, words)
    plain.rounds(step=slower, bad=spoil)
    plain.agrees(theta)
    held = [sum(w.numel() for n, w in theta.items() if word in n) for word in ("embedding", "conv1d")]
    numbers = 3 * sum(w.numel() for w in theta.values()) - held[0] - 2 * held[1]
    assert rows[1]["bytes_up"] == 4 * K * numbers
    assert rows[1]["bytes_down"] == rows[1]["bytes_up"]  # at the beginning all; not what the last round averages


def test_rounds_of_equal_sums_of_squared_rates(data, tmp_path):
    rates = torch_rates(24, 0.5)
    ends, sums = [0], np.cumsum(np.square(rates))
    for t in range(3):
        ends.append(1 + next(i for i, total in enumerate(sums) if total > sums[-1] * (t + 1) / 3 - 1e-9))
    assert ends[-1] == 24 and ends[1] < 8 and ends[3] - ends[2] > 8  # long where rates are low
    plain = Plain(data.train, ends=ends, rates=rates)
    plain.sampled = lambda t: list(range(K))
    words = f"{FEDERATED} --participation 1 --local-updates 8 --val-freq 1 {SGD} {SCHEDULE} --rounds-by drift"
    theta, rows = run(fed_avg, tmp_path, words)
    assert [row["steps"] for row in rows] == ends
    plain.rounds(bad=())
    plain.agrees(theta, 2e-3)
    args = flags(fed_avg, f"{TINY} --rounds 100 --local-updates 8 {SCHEDULE} --rounds-by drift")
    ends = round_ends(args, 100, 800)
    assert ends[0] == 0 and ends[-1] == 800 and min(np.diff(ends)) >= 1


def test_moments_that_clients_keep(data, tmp_path, spoil):
    """AdamW: a client's moments go on, those of a client that is left out start anew."""
    plain = Plain(data.train, 1e-3, "adamw", betas=(0.7, 0.99))
    later = {*plain.sampled(1), *plain.sampled(2)}
    spoil.clear()
    spoil.add(next(place for place, k in enumerate(plain.sampled(0)) if k in later))  # one that comes again
    theta, _ = run(fed_avg, tmp_path, FEDERATED + "--lr 1e-3 --beta1 0.7 --beta2 0.99")
    plain.rounds(bad=spoil)
    plain.agrees(theta, 1e-2)  # where a gradient is near 0, AdamW's first steps have the sign of its rounding


def test_moments_that_clients_share(data, tmp_path, spoil):
    """Every client of a round begins with the server's m, v and step; a client that is left out is not in them."""
    plain = Plain(data.train, 1e-3, "adamw")
    theta, rows = run(fed_avg, tmp_path, f"{FEDERATED} --lr 1e-3 --client-state pooled")
    ends, places = iter([{*plain.sampled(t)} - ({plain.sampled(1)[1]} if t == 1 else set()) for t in range(3)]), []

    def step(theta, delta):
        clients, old = next(ends), places[-1] if places else None
        p = {k: len(data.train[k]) / sum(len(data.train[j]) for j in clients) for k in clients}
        q, new = sum(w * w for w in p.values()), {}
        for i, one in plain.states[min(clients)]["state"].items():
            m, v = (sum(w * plain.states[k]["state"][i][f] for k, w in p.items()) for f in ("exp_avg", "exp_avg_sq"))
            m0, v0 = (old[i]["exp_avg"], old[i]["exp_avg_sq"]) if old else (0.0, 0.0)
            B = ((m - 0.9**H * m0) / (1 - 0.9**H)) ** 2
            A = (v - 0.999**H * v0) / (1 - 0.999**H)
            w = 0.1 * (1 + 0.9**H) / (1.9 * (1 - 0.9**H))
            C = (A - (A - B) * (1 - q) / (1 - q * w)).clamp_min(0)
            v = 0.999**H * v0 + (1 - 0.999**H) * C
            new[i] = {"step": one["step"].clone(), "exp_avg": m, "exp_avg_sq": v}
        places.append(new)
        groups = next(iter(plain.states.values()))["param_groups"]
        plain.states = {k: {"state": deepcopy(new), "param_groups": groups} for k in range(K)}
        return {n: theta[n] + delta[n] for n in theta}

    plain.rounds(step=step)
    plain.agrees(theta, 1e-2)
    assert rows[1]["bytes_up"] == 3 * 9 * 4 * sum(t.numel() for t in theta.values()) == rows[1]["bytes_down"]


@pytest.mark.parametrize("form", ["heavy_ball", "ema", "nesterov"])
def test_fed_momentum(form, data, tmp_path, spoil):
    v = {}

    def step(theta, delta):
        for n in theta:
            v[n] = 0.8 * v.get(n, 0.0) + (0.2 if form == "ema" else 1.0) * delta[n]
        return {n: theta[n] + 0.7 * (delta[n] + 0.8 * v[n] if form == "nesterov" else v[n]) for n in theta}

    plain, more = Plain(data.train), f"--momentum-form {form}" if form != "nesterov" else "--server-optimizer nesterov"
    theta, _ = run(fed_momentum, tmp_path, f"{FEDERATED} {SGD} {more} --server-lr 0.7 --server-momentum 0.8")
    plain.rounds(step=step)
    plain.agrees(theta)


def test_fed_entropy(data, tmp_path, spoil):
    plain, seen = Plain(data.train), {}

    def weigh(k, t):
        blocks = data.held_out[k]
        rows = stream(SEED, "entropy", t, k).choice(len(blocks), 8, replace=False)
        log_p = torch.log_softmax(plain.logits(blocks[rows]), -1)
        seen[k] = -(log_p.exp() * log_p).sum(-1).mean().item()
        return math.exp(-seen[k] / 0.01)

    theta, rows = run(fed_entropy, tmp_path, f"{FEDERATED} {SGD} --temperature 0.01 --server-lr 0.7")
    plain.rounds(weigh, slower)
    plain.agrees(theta, 2e-3)
    assert rows[1]["client_entropy"] == pytest.approx([seen[k] for k in rows[1]["clients"]], rel=1e-5)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fed_fisher(labels, data, tmp_path, spoil):
    plain = Plain(data.train)
    more = f"{SGD} --fisher-samples 3 --fisher-labels {labels} --fisher-damping 0.2 --server-lr 0.7"
    theta, rows = run(fed_fisher, tmp_path, FEDERATED + more)
    plain.rounds(partial(plain.precision, labels=labels), slower)
    # one drawn label of 96 at the border to its neighbour moves theta by 0.05, the labels of another client by 0.5
    plain.agrees(theta, 1e-3 if labels == "data" else 0.15)
    assert rows[1]["bytes_up"] == 2 * rows[1]["bytes_down"]  # the weights and their precision


def test_central_trains_on_the_clients_text_in_one_order(data, tmp_path):
    """Five steps of central training are torch's AdamW on the union of the shards; what is saved and logged of them."""
    theta, rows = run(central, tmp_path, f"{TINY} --rounds 5 --val-freq 5 --lr 0.004 {SCHEDULE} --save-deltas")
    plain = Plain([torch.cat(data.train)], kind="adamw", ends=range(6), rates=torch_rates(5, 0.004))
    for t in range(5):
        before, plain.theta = plain.theta, plain.local(0, t)
    plain.agrees(theta, 1e-2)
    last, before = plain.theta["backbone.layers.0.mixer.A_log"], before["backbone.layers.0.mixer.A_log"]
    for kind, expected in (("params", last), ("deltas", last - before)):
        saved = np.load(tmp_path / "r" / "server" / kind / "step_000005.npz")["layers.0.A_log"]
        np.testing.assert_allclose(saved, expected, rtol=1e-2)
    norms = rows[1]["delta_norms"]
    assert list(norms) == [f"layers.0.{name}" for name in ("dt_bias", "A_log", "D", "in_proj")]
    assert norms["layers.0.A_log"] == pytest.approx((last - before).norm().item(), rel=1e-2)


def test_one_client_is_central_training_bitwise(tmp_path):
    words = f"{TINY} --num-clients 1 --batch-size 4 --rounds 4"
    fed, _ = run(fed_avg, tmp_path / "fed", f"{words} --client-val-sequences 2")
    whole, _ = run(central, tmp_path / "central", words)
    assert all(torch.equal(fed[name], whole[name]) for name in whole)


def test_the_servers_rate_follows_the_schedule(data, tmp_path):
    """Clients' SGD at a constant rate, bias-corrected Adam at the server: torch's Adam on the mean update."""
    rates = torch_rates(6, 0.01)[::H]  # as the share of --lr that a round begins with
    plain, moments = Plain(data.train), {}

    def step(theta, delta):
        rate, new = rates.pop(0), {}
        for n, w in theta.items():
            p = moments.setdefault(n, [torch.nn.Parameter(w.clone()), None])
            p[1] = p[1] or torch.optim.Adam([p[0]], eps=1e-8)
            p[0].grad, p[1].param_groups[0]["lr"] = -delta[n], rate
            p[1].step()
            new[n] = p[0].detach().clone()
        return new

    words = f"{SGD} {SCHEDULE} --scheduled server "
    words += "--server-optimizer adam --server-bias-correction --server-lr 0.01 --server-beta2 0.999 --server-tau 1e-8"
    theta, _ = run(fed_momentum, tmp_path, f"{FEDERATED} {words}")
    plain.rounds(step=step, bad=())
    plain.agrees(theta, 1e-2)


def test_central_training_that_diverges_is_told_from_one_that_failed(tmp_path):
    with pytest.raises(RunFailed, match="not finite: lower --lr"):
        run(central, tmp_path, f"{TINY} --rounds 9 --val-freq 1 --lr 1e9")
    assert not_finite(json.loads((tmp_path / "r" / "run.json").read_text()))


# ---- what a run leaves


def test_final_holds_the_best_weights_if_asked(tmp_path):
    words, losses = f"{FEDERATED} --lr 0.3 --val-freq 1 --final best", []  # the second round is worse than the first
    first, _ = run(fed_avg, tmp_path / "1", f"{words} --rounds 1")
    run(fed_avg, tmp_path / "2", f"{words} --rounds 2")
    for rounds in "12":
        final = load_file(tmp_path / rounds / "r" / "final" / "model.safetensors")
        assert all(torch.equal(final[n.replace("embedding.", "embeddings.")].double(), t) for n, t in first.items())
        results = harness.read_results(tmp_path / rounds / "r")
        assert results["best_round"] == results["final_round"] == 1
        losses.append((results["test_ppl_best"], results["test_ppl_last"]))
    assert losses[0][0] == losses[0][1] == losses[1][0] != losses[1][1]


def test_the_test_text_changes_nothing_before_the_final_evaluation(tmp_path, monkeypatch):
    words = f"{FEDERATED} --rounds 2 --val-freq 1"
    run(fed_entropy, tmp_path / "text", words)
    noise = torch.randint(V, (4, T + 1))
    monkeypatch.setattr(fed_core, "build_data", lambda *args: replace(few(*args), test=noise))
    run(fed_entropy, tmp_path / "noise", words)
    text, other = tmp_path / "text" / "r", tmp_path / "noise" / "r"
    assert harness.read_lines(text) == harness.read_lines(other) and harness.digest(text) == harness.digest(other)
    text, other = harness.read_results(text), harness.read_results(other)
    assert {name for name in text if text[name] != other[name]} == {"test_ppl_best", "test_ppl_last"}


def test_the_plan_of_rounds():
    n, words = [40, 40], f"{TINY} --local-updates {H} "
    args = flags(fed_avg, words + "--participation 0.6 --rounds 7 --config pure_ssm_4_layer")
    assert plan_rounds(args, n) == (7, 14) and args.layers == 4
    args = flags(fed_avg, words + "--n-epochs 1.05 --warmup-steps 21")
    assert plan_rounds(args, n) == (11, 21)  # the last round has what is left of the budget
    with pytest.raises(UsageError, match="client 1 has 1 sequences.*--batch-size 2"):
        plan_rounds(args, [5, 1])
    clients, whole = [31, 30, 29], flags(central, f"{TINY} --n-epochs 1.5 --batch-size 6")
    tokens = plan_rounds(whole, [90])[1] * 6  # which the clients train on too, whatever their local updates
    for lu in (1, 8):
        more = flags(fed_avg, f"{TINY} --n-epochs 1.5 --num-clients 3 --local-updates {lu}")
        assert plan_rounds(more, clients)[1] * 3 * B == tokens
    args.warmup_steps = 22
    with pytest.raises(UsageError, match="--warmup-steps 22 is more than the run's 21 steps: lower it"):
        plan_rounds(args, n)


def test_gradient_watch_is_the_mean_of_the_last_ten_cosines():
    weights = Weights(torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(2))}))
    watch, angles = central.GradientWatch(weights), np.cumsum(np.linspace(0, 0.5, 15))
    for i, angle in enumerate(angles):
        weights.parameters["w"].grad = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)])
        watch.see()
        if i == 8:  # a checkpoint in between
            state, watch = watch.state_dict(), central.GradientWatch(weights)
            watch.load_state_dict(state)
    assert watch.mean_cosine() == pytest.approx(np.cos(np.diff(angles)[-10:]).mean())


def test_training_history_has_the_sources_fields():
    line = {"steps": 8, "val_ppl": 5.0, "client_entropy": [1.0, None, 2.0], "client_val_ppl": [7.0, 8.0]}
    history = measuring.training_history("fed_entropy", [line, {"round": 9}])
    assert history["global_step"] == [8, None] and history["server_val_ppl"] == [5.0, None]
    assert history["client_val_ppls"] == [[7.0, 8.0], []] and history["avg_client_entropy"] == [1.5, None]
    central = "step val_loss val_ppl train_loss generated grad_cosine delta_norms"
    assert list(measuring.training_history("central", [line])) == central.split()
