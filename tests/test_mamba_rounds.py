"""Rounds as the scripts of mamba_fl assemble them, against plain loops in fp64; the pieces of mamba_fl.

The loops use torch, the model, the data and the keys of the random streams, nothing of the rounds' code.
"""

import json
import math
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.best import Best, best_line
from common.cli import RunFailed, UsageError
from common.runlog import read_metrics
from common.seeding import stream, torch_stream
from common.vector import Weights
from mamba_fl import central, fed_avg, fed_core, fed_entropy, fed_fisher, fed_momentum
from mamba_fl.data import build_data
from mamba_fl.fed_core import plan_rounds, start_model
from mamba_fl.flags import complete_flags
from mamba_fl.mamba2 import Mamba2Config
from mamba_fl.measuring import training_history
from mamba_fl.ssm_config import load_pretrained, make_model, save_pretrained
from plots.read import not_finite

V, T, B, H, K, SEED = 400, 32, 2, 2, 5, 3
TINY = f"--dataset demo --tokenizer bpe:{V} --d-model 32 --d-state 16 --headdim 16 --sequence-length {T} "
TINY += f"--batch-size {B} --num-clients {K} --sharding iid --threads 1 --seed {SEED} --val-sequences 2 --prompt= "
FEDERATED = f"{TINY} --local-updates {H} --participation 0.5 --rounds 3 --val-freq 3 --client-val-sequences 0 "
# 2.5 of the 5 clients: 3
SGD = "--client-optimizer sgd --lr 0.5"
BAD = {4}  # the second client of the second round


@pytest.fixture(scope="module")
def data():
    return build_data("demo", f"bpe:{V}", T, K, "iid", SEED)


def flags(module, words):
    return complete_flags(module.build_parser().parse_args(words.split()))


def run(module, folder, words):
    """(theta after the last round {name: fp64}, lines of metrics.jsonl) of a run in `folder`/r."""
    module.main(flags(module, f"{words} --output-dir {folder} --run-name r"))
    theta = load_file(folder / "r" / "checkpoint" / "theta.safetensors")
    return {name: t.double() for name, t in theta.items()}, read_metrics(folder / "r")


def spoil(monkeypatch, places):
    """The clients at these places, counted over all rounds, turn NaN in their local steps."""
    steps, seen = fed_core.local_steps, []

    def local_steps(loss, batches, weights, *rest, **options):
        done = steps(loss, batches, weights, *rest, **options)
        if len(seen) in places:
            weights.theta[7] = math.nan
        seen.append(0)
        return done

    monkeypatch.setattr(fed_core, "local_steps", local_steps)


class Plain:
    """The reference: an fp64 model, torch.optim, and the draws by their keys.

    Args: train: each client's blocks; rates: of every step of the run, by default lr; clip: norm of a step's gradient.
    """

    def __init__(self, train, lr=0.5, kind="sgd", steps=H, rates=None, clip=math.inf):
        self.betas = (0.9, 0.999)
        self.model = make_model(Mamba2Config(vocab_size=V, d_model=32, d_state=16, headdim=16), seed=SEED).double()
        self.start = self.theta = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.train, self.lr, self.kind, self.steps = train, lr, kind, steps
        self.turns, self.states = defaultdict(int), {}
        self.rates, self.clip = rates or [lr] * 99, clip

    def sampled(self, t):
        return sorted(stream(SEED, "participation", t).choice(K, 3, replace=False).tolist())

    def logits(self, blocks):
        return self.model(blocks[:, :-1])[..., :V]

    def nll(self, blocks):
        return torch.nn.functional.cross_entropy(
            self.logits(blocks).flatten(0, 1), blocks[:, 1:].flatten(), reduction="sum"
        )

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
        ys = (
            blocks[rows, 1:]
            if labels == "data"
            else self.drawn(blocks[rows], torch_stream(SEED, "fisher labels", t, k))
        )
        fisher = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        for row, y in zip(rows, ys, strict=True):
            self.model.zero_grad()
            torch.nn.functional.cross_entropy(self.logits(blocks[row : row + 1])[0], y, reduction="sum").backward()
            for n, p in self.model.named_parameters():
                fisher[n] += p.grad**2 / 3
        mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        return {n: len(blocks) * (f + 0.2 * mean) for n, f in fisher.items()}

    def local(self, k, t=0):
        """theta_k after the client's steps of round t."""
        blocks = self.train[k]
        self.model.load_state_dict(self.theta, strict=False)
        groups = [{"params": [], "weight_decay": 0.01}, {"params": [], "weight_decay": 0.0}]
        for name, p in self.model.named_parameters():
            groups[name.endswith(("dt_bias", "A_log", "D"))]["params"].append(p)
        of = partial(torch.optim.AdamW, betas=self.betas) if self.kind == "adamw" else torch.optim.SGD
        optimizer = of(groups, lr=self.lr, foreach=False)
        if self.kind == "adamw" and k in self.states:
            optimizer.load_state_dict(self.states[k])
        order = [i for e in range(2) for i in stream(SEED, "batches", e, k).permutation(len(blocks))]
        at = self.turns[k] * self.steps * B
        for i, first in enumerate(range(at, at + self.steps * B, B)):
            optimizer.zero_grad()
            (self.nll(blocks[order[first : first + B]]) / (B * T)).backward()
            norm = torch.cat([p.grad.flatten() for p in self.model.parameters()]).norm().item()
            for p in self.model.parameters():
                p.grad *= min(1.0, self.clip / norm)
            for group in optimizer.param_groups:
                group["lr"] = self.rates[t * self.steps + i]
            optimizer.step()
        self.states[k] = optimizer.state_dict()
        self.turns[k] += 1
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def rounds(self, weigh, bad=(), step=lambda theta, delta: {n: theta[n] + delta[n] for n in theta}):
        """theta after three rounds: weigh(k, theta_k, t) gives each client's weight, a number or {name: tensor}."""
        places = iter(range(9))
        for t in range(3):
            top, bottom = {n: 0.0 for n in self.theta}, {n: 0.0 for n in self.theta}
            for k in self.sampled(t):
                theta_k = self.local(k, t)
                if next(places) in bad:
                    del self.states[k]
                    continue
                w = weigh(k, theta_k, t)
                for n in self.theta:
                    w_n = w[n] if isinstance(w, dict) else w
                    top[n], bottom[n] = top[n] + w_n * (theta_k[n] - self.theta[n]), bottom[n] + w_n
            self.theta = step(self.theta, {n: top[n] / bottom[n] for n in self.theta})
        return self.theta

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


def test_fed_avg(data, tmp_path, monkeypatch):
    plain = Plain(data.train)
    assert len({tuple(plain.sampled(t)) for t in range(3)}) > 1 and len({len(b) for b in data.train}) == K
    spoil(monkeypatch, BAD)
    theta, rows = run(fed_avg, tmp_path, FEDERATED + SGD + " --client-val-sequences 1")
    own = {}

    def weigh(k, *_):
        own[k] = plain.perplexity(data.validation[:1])
        return len(data.train[k])

    plain.rounds(weigh, BAD)
    plain.agrees(theta)
    assert [row["round"] for row in rows] == [0, 3] and rows[1]["left_out"] == [[2, plain.sampled(1)[1]]]
    assert rows[1]["clients"] == plain.sampled(2) and "train_loss" not in rows[0]
    assert rows[1]["client_val_ppl"] == pytest.approx([own[k] for k in rows[1]["clients"]], rel=1e-4)
    plain.model.load_state_dict(plain.theta, strict=False)
    assert rows[1]["val_ppl"] == pytest.approx(plain.perplexity(data.validation[:2]), rel=1e-4)
    losses, n = rows[1]["client_train_loss"], [len(data.train[k]) for k in rows[1]["clients"]]
    assert rows[1]["train_loss"] == pytest.approx(np.average(losses, weights=n))
    assert rows[1]["tokens"] == 9 * H * B * T and rows[1]["bytes_up"] == 9 * 4 * sum(t.numel() for t in theta.values())


def test_moments_that_clients_keep(data, tmp_path, monkeypatch):
    """AdamW: a client's moments go on, those of a client that is left out start anew."""
    plain = Plain(data.train, 1e-3, "adamw")
    plain.betas = (0.7, 0.99)
    later = {*plain.sampled(1), *plain.sampled(2)}
    bad = {next(place for place, k in enumerate(plain.sampled(0)) if k in later)}  # one that comes again
    spoil(monkeypatch, bad)
    theta, _ = run(fed_avg, tmp_path, FEDERATED + "--lr 1e-3 --beta1 0.7 --beta2 0.99")
    plain.rounds(lambda k, *_: len(data.train[k]), bad)
    plain.agrees(theta, 1e-2)  # where a gradient is near 0, AdamW's first steps have the sign of its rounding


def test_moments_that_clients_share(data, tmp_path, monkeypatch):
    """Every client of a round begins with the server's m, v and step; a client that is left out is not in them."""
    plain = Plain(data.train, 1e-3, "adamw")
    spoil(monkeypatch, BAD)
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

    plain.rounds(lambda k, *_: len(data.train[k]), BAD, step)
    plain.agrees(theta, 1e-2)
    assert rows[1]["bytes_up"] == 3 * 9 * 4 * sum(t.numel() for t in theta.values()) == rows[1]["bytes_down"]


def test_a_run_goes_on_with_the_moments_that_clients_share(tmp_path, monkeypatch):
    words, steps, seen = f"{FEDERATED} --save-freq 1 --client-state pooled", fed_core.local_steps, []
    whole, _ = run(fed_avg, tmp_path / "whole", words)

    def breaks(*things, **options):
        seen.append(0)
        if len(seen) == 5:  # in the second round
            raise KeyboardInterrupt
        return steps(*things, **options)

    monkeypatch.setattr(fed_core, "local_steps", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(fed_avg, tmp_path / "half", words)
    theta, _ = run(fed_avg, tmp_path / "half", f"{words} --resume")
    assert all(torch.equal(theta[name], whole[name]) for name in whole)


@pytest.mark.parametrize("form", ["heavy_ball", "ema"])
def test_fed_momentum(form, data, tmp_path, monkeypatch):
    v = {}

    def step(theta, delta):
        for n in theta:
            v[n] = 0.9 * v.get(n, 0.0) + (1.0 if form == "heavy_ball" else 0.1) * delta[n]
        return {n: theta[n] + 0.7 * v[n] for n in theta}

    plain = Plain(data.train)
    spoil(monkeypatch, BAD)
    theta, _ = run(fed_momentum, tmp_path, f"{FEDERATED} {SGD} --momentum-form {form} --server-lr 0.7")
    plain.rounds(lambda k, *_: len(data.train[k]), BAD, step)
    plain.agrees(theta)


def test_fed_entropy(data, tmp_path, monkeypatch):
    plain, seen = Plain(data.train), {}

    def weigh(k, theta_k, t):
        blocks = data.held_out[k]
        rows = stream(SEED, "entropy", t, k).choice(len(blocks), 8, replace=False)
        log_p = torch.log_softmax(plain.logits(blocks[rows]), -1)
        seen[k] = -(log_p.exp() * log_p).sum(-1).mean().item()
        return math.exp(-seen[k] / 0.01)

    spoil(monkeypatch, BAD)
    theta, rows = run(fed_entropy, tmp_path, f"{FEDERATED} {SGD} --temperature 0.01 --server-lr 0.7")
    plain.rounds(weigh, BAD, slower)
    plain.agrees(theta, 2e-3)
    assert rows[1]["client_entropy"] == pytest.approx([seen[k] for k in rows[1]["clients"]], rel=1e-5)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_fed_fisher(labels, data, tmp_path, monkeypatch):
    plain = Plain(data.train)
    spoil(monkeypatch, BAD)
    more = f"{SGD} --fisher-samples 3 --fisher-labels {labels} --fisher-damping 0.2 --server-lr 0.7"
    theta, rows = run(fed_fisher, tmp_path, FEDERATED + more)
    plain.rounds(lambda k, _, t: plain.precision(k, t, labels), BAD, slower)
    # one drawn label of 96 at the border to its neighbour moves theta by 0.05, the labels of another client by 0.5
    plain.agrees(theta, 1e-3 if labels == "data" else 0.15)
    assert rows[1]["bytes_up"] == 2 * rows[1]["bytes_down"]  # the weights and their precision


def test_central_trains_on_the_clients_text_in_one_order(data, tmp_path):
    """Five steps of central training are torch's AdamW on the union of the shards; what is saved and logged of them."""
    theta, rows = run(central, tmp_path, f"{TINY} --rounds 5 --val-freq 5 --lr 0.001 --save-deltas")
    plain = Plain([torch.cat(data.train)], 1e-3, "adamw", steps=1)
    for _ in range(5):
        before, plain.theta = plain.theta, plain.local(0)
    plain.agrees(theta, 1e-2)
    last, before = plain.theta["backbone.layers.0.mixer.A_log"], before["backbone.layers.0.mixer.A_log"]
    for kind, expected in (("params", last), ("deltas", last - before)):
        saved = np.load(tmp_path / "r" / "server" / kind / "step_000005.npz")["layers.0.A_log"]
        np.testing.assert_allclose(saved, expected, rtol=1e-2)
    norms = rows[1]["delta_norms"]
    assert list(norms) == [f"layers.0.{name}" for name in ("dt_bias", "A_log", "D", "in_proj")]
    assert norms["layers.0.A_log"] == pytest.approx((last - before).norm().item(), rel=1e-2)


# ---- the rate of each step, clipping


def torch_rates(kind, total, base=0.5, warmup=2, lowest=0.1):
    """The rates that torch's schedulers give for the flags of SCHEDULE."""
    optimizer = torch.optim.SGD([torch.zeros(1)], base)
    lrs = torch.optim.lr_scheduler
    rise = lrs.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    if kind == "cosine":
        fall = lrs.CosineAnnealingLR(optimizer, total - warmup, lowest)
    else:
        fall = lrs.LinearLR(optimizer, 1.0, lowest / base, total - warmup)
    whole, rates = lrs.SequentialLR(optimizer, [rise, fall], [warmup]), []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        whole.step()
    return rates


SCHEDULE = "--warmup-steps 2 --min-lr 0.1 --max-grad-norm 0.3 --lr-scheduler "


@pytest.mark.parametrize("module, kind", [(fed_avg, "cosine"), (fed_momentum, "linear"), (central, "cosine")])
def test_schedule_and_clipping_are_torchs(module, kind, data, tmp_path):
    words, blocks = f"{SCHEDULE}{kind} --server-lr 0.7", data.train
    if module is central:
        words, blocks = f"{TINY} --rounds 6 --val-freq 6 --lr 0.5 {SCHEDULE}{kind}", [torch.cat(data.train)]
    elif module is fed_avg:
        words = f"{FEDERATED} {SGD} {words}"
    else:
        words = f"{FEDERATED} {SGD} {words} --server-momentum 0"
    steps = 1 if module is central else H
    plain = Plain(
        blocks, kind="adamw" if module is central else "sgd", steps=steps, rates=torch_rates(kind, 6), clip=0.3
    )
    theta, _ = run(module, tmp_path, words)
    if module is central:
        for t in range(6):
            plain.theta = plain.local(0, t)
    else:
        plain.rounds(lambda k, *_: len(data.train[k]), step=slower)
    plain.agrees(theta, 1e-2 if module is central else 2e-4)


def test_the_servers_rate_follows_the_schedule(data, tmp_path):
    """Clients' SGD at a constant rate, bias-corrected Adam at the server: torch's Adam on the mean update."""
    rates = torch_rates("cosine", 6, base=0.01, lowest=0.002)[::H]  # as the share of --lr that a round begins with
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

    words = f"{SGD} --lr-scheduler cosine --warmup-steps 2 --min-lr 0.1 --scheduled server "
    words += "--server-optimizer adam --server-bias-correction --server-lr 0.01 --server-beta2 0.999 --server-tau 1e-8"
    theta, _ = run(fed_momentum, tmp_path, f"{FEDERATED} {words}")
    plain.rounds(lambda k, *_: len(data.train[k]), step=step)
    plain.agrees(theta, 1e-2)


def test_central_training_that_diverges_is_told_from_one_that_failed(tmp_path):
    with pytest.raises(RunFailed, match="not finite: lower --lr"):
        run(central, tmp_path, f"{TINY} --rounds 9 --val-freq 1 --lr 1e9")
    assert not_finite(json.loads((tmp_path / "r" / "run.json").read_text()))


def test_rates_that_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="--min-lr 0.9 is above --lr 0.5: lower it"):
        flags(fed_avg, f"{FEDERATED} {SGD} --lr-scheduler linear --min-lr 0.9")
    assert plan_rounds(flags(fed_avg, f"{FEDERATED} --warmup-steps 6"), [9] * K)[0] == 3
    with pytest.raises(UsageError, match="--warmup-steps 7 is more than the run's 6 steps: lower it"):
        run(fed_avg, tmp_path, f"{FEDERATED} --warmup-steps 7")
    assert not list(tmp_path.iterdir())


# ---- where a run starts, and what it leaves


def test_a_run_starts_from_another_ones_weights(data, tmp_path):
    start, _ = run(central, tmp_path / "a", f"{TINY} --rounds 3 --val-freq 3 --lr 0.01")
    there = tmp_path / "a" / "r"
    words = f"--dataset demo --sequence-length {T} --batch-size {B} --num-clients 3 --threads 1 --val-sequences 2 "
    words += f"--prompt= --rounds 1 --client-val-sequences 0 --init-from {there}"
    last = read_metrics(there)[-1]["val_loss"]
    _, rows = run(fed_avg, tmp_path / "b", f"{words} --seed 9")
    assert rows[0]["val_loss"] == last
    _, rows = run(
        fed_entropy, tmp_path / "c", f"{words}/final --tokenizer bpe:{V} --d-model 32 --config pure_ssm_1_layer"
    )
    assert rows[0]["val_loss"] == last
    said = json.loads((tmp_path / "b" / "r" / "run.json").read_text())
    assert (said["args"]["d_state"], said["args"]["headdim"], said["args"]["tokenizer"]) == (16, 16, f"{there}/final")
    for more, line in (
        ("--d-state 8", f"--d-state 8 contradicts --init-from {there}, which has 16: drop --d-state 8"),
        ("--config pure_ssm_4_layer", "--layers 4 contradicts --init-from .* which has 1"),
        (
            "--tokenizer bpe:300",
            rf"--tokenizer bpe:300 \(\w{{12}}\) is not that of --init-from {there} \(\w{{12}}\): drop",
        ),
        (f"--init-from {tmp_path}", f"--init-from {tmp_path} has no model .*: give the folder of a finished run"),
        (f"--init-from {'x' * 5000}", "has no model .*: give the folder of a finished run"),
    ):
        with pytest.raises(UsageError, match=line):
            run(fed_avg, tmp_path / "d", f"{words} {more}")
    assert not (tmp_path / "d").exists()


def test_a_start_from_what_transformers_wrote(tmp_path):
    """Its vocabulary is known with the padding only."""
    sizes = {"d_model": 32, "d_state": 16, "headdim": 16, "expand": 3, "ngroups": 2, "d_conv": 3}
    theirs = make_model(Mamba2Config(vocab_size=397, **sizes), seed=5)
    save_pretrained(theirs, None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["mamba_ssm"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    args = flags(fed_avg, f"--dataset demo --init-from {tmp_path}")
    assert args.tokenizer == "bpe:1024"
    model = start_model(args, SimpleNamespace(vocab_size=397), "cpu")
    assert model.config == replace(theirs.config, pad_vocab_size_multiple=400)
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(model(ids), theirs(ids))
    for size in (401, 200):
        with pytest.raises(UsageError, match=f"has {size} tokens, the model of --init-from .* 400: give its own"):
            start_model(args, SimpleNamespace(vocab_size=size), "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": "32"}))
    with pytest.raises(UsageError, match="has no model .*d_model is 32"):
        flags(fed_avg, f"--dataset demo --init-from {tmp_path}")


def test_final_holds_the_best_weights_if_asked(data, tmp_path):
    words = f"{FEDERATED} --lr 0.3 --val-freq 1"  # of which the second round is worse than the first
    theta = {rounds: run(fed_avg, tmp_path / f"{rounds}", f"{words} --rounds {rounds}")[0] for rounds in (1, 2)}
    after_one = json.loads((tmp_path / "1" / "r" / "run.json").read_text())["results"]["test_ppl_last"]
    run(fed_avg, tmp_path / "best", f"{words} --rounds 2 --final best")
    for name, rounds in (("2", 2), ("best", 1)):
        folder = tmp_path / name / "r"
        final = load_pretrained(folder / "final").state_dict()
        assert all(torch.equal(final[n].double(), t) for n, t in theta[rounds].items())
        results = json.loads((folder / "run.json").read_text())["results"]
        assert results["best_round"] == 1 and results["test_ppl_best"] == after_one != results["test_ppl_last"]
        assert results["final_round"] == rounds


# ---- pieces


def test_the_plan_of_rounds():
    n, words = [40, 40], f"{TINY} --local-updates {H} "
    args = flags(fed_avg, words + "--participation 0.6 --rounds 7")
    assert plan_rounds(args, n) == (7, 14)
    args = flags(fed_avg, words + "--n-epochs 1.05")
    assert plan_rounds(args, n) == (11, 21)  # the last round has what is left of the budget
    with pytest.raises(Exception, match="client 1 has 1 sequences.*--batch-size 2"):
        plan_rounds(args, [5, 1])


def test_sizes_by_default():
    for data, d_model in (("demo", 128), ("wikitext2", 512)):
        args = flags(central, f"--dataset {data}")
        assert (args.d_model, args.layers, args.d_state, args.headdim) == (d_model, 1, 128, 64)


def test_gradient_watch_is_the_mean_of_the_last_ten_cosines():
    weights = Weights(torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(2))}))
    watch, angles = central.GradientWatch(weights), np.cumsum(np.linspace(0, 0.5, 15))
    assert watch.mean_cosine() is None
    for i, angle in enumerate(angles):
        weights.parameters["w"].grad = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)])
        watch.see()
        if i in (0, 8):  # a checkpoint in between
            state, watch = watch.state_dict(), central.GradientWatch(weights)
            watch.load_state_dict(state)
    assert watch.mean_cosine() == pytest.approx(np.cos(np.diff(angles)[-10:]).mean())


def test_best_keeps_a_copy_of_the_first_lowest():
    best, theta = Best(), torch.zeros(2)
    losses = (1.0, math.nan, 3.0, 2.0, 2.0, 2.5)  # of which the first is before training
    for t, loss in enumerate(losses):
        theta.fill_(t)
        best.offer(t, loss, theta)
    again = Best()
    again.load_state_dict(best.state_dict())
    assert (again.round, again.loss) == (best.round, best.loss) == (3, 2.0) and again.theta.tolist() == [3, 3]
    lines = [{"round": t, "loss": str(x) if math.isnan(x) else x, "score": -x} for t, x in enumerate(losses)]
    assert best_line(lines, "loss") == best_line(lines, "score", highest=True) == lines[3]
    assert best_line(lines[:1], "loss") == lines[0] and best_line(lines[:2], "loss") == lines[1]


def test_training_history_has_the_sources_fields():
    line = {"round": 8, "steps": 8, "val_ppl": 5.0, "train_ppl": 6.0, "client_entropy": [1.0, None, 2.0]}
    history = training_history("fed_entropy", [{**line, "client_val_ppl": [7.0, 8.0], "generated": "x"}, {"round": 9}])
    assert history["global_step"] == [8, None] and history["server_val_ppl"] == [5.0, None]
    assert history["client_val_ppls"] == [[7.0, 8.0], []] and history["avg_client_entropy"] == [1.5, None]
    assert set(training_history("central", [line])) == {
        "step", "val_loss", "val_ppl", "train_loss", "generated", "grad_cosine", "delta_norms",
    }  # fmt: skip
