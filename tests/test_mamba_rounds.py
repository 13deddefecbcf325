"""Rounds as the scripts of mamba_fl assemble them, against plain loops in fp64; the pieces of mamba_fl/fed_core.py.

The loops use torch, the model, the data and the keys of the random streams, nothing of the rounds' code.
"""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.runlog import read_metrics
from common.seeding import stream
from common.vector import Weights
from mamba_fl import central, fed_avg, fed_entropy, fed_fisher, fed_momentum
from mamba_fl.best import Best
from mamba_fl.data import build_data
from mamba_fl.fed_core import plan_rounds
from mamba_fl.flags import complete_flags
from mamba_fl.gradient_watch import GradientWatch, update_norms
from mamba_fl.history import training_history
from mamba_fl.ssm_config import make_config, make_model

V, T, B, H, K, SEED = 400, 32, 2, 2, 5, 3
TINY = f"--dataset demo --tokenizer bpe:{V} --d-model 32 --d-state 16 --headdim 16 --sequence-length {T} "
TINY += f"--batch-size {B} --local-updates {H} --num-clients {K} --sharding iid --participation 0.6 --threads 1 "
TINY += f"--rounds 3 --seed {SEED} --val-freq 3 --val-sequences 2 --client-val-sequences 0 --prompt= "


@pytest.fixture(scope="module")
def data():
    return build_data("demo", f"bpe:{V}", T, K, "iid", SEED, None)


def run(module, folder, more="", bad=(), monkeypatch=None):
    """(theta after the last round {name: fp64}, lines of metrics.jsonl). bad: places of clients that turn NaN."""
    steps = module.local_steps
    seen = []

    def local_steps(loss, batches, weights, *rest, **options):
        done = steps(loss, batches, weights, *rest, **options)
        if len(seen) in bad:
            weights.theta[7] = math.nan
        seen.append(0)
        return done

    monkeypatch.setattr(module, "local_steps", local_steps)
    args = module.build_parser().parse_args(
        [*TINY.split(), "--output-dir", str(folder), "--run-name", "r", *more.split()]
    )
    module.main(complete_flags(args))
    theta = load_file(folder / "r" / "checkpoint" / "theta.safetensors")
    return {name: t.double() for name, t in theta.items()}, read_metrics(folder / "r")


class Plain:
    """The reference: an fp64 model, torch.optim, and the draws by their keys."""

    def __init__(self, data, lr=0.5, kind="sgd", steps=H):
        config = make_config(n_layer=1, vocab_size=V, d_model=32, d_state=16, headdim=16, expand=2, chunk="auto")
        self.model = make_model(config, kernel="torch", device="cpu", seed=SEED)
        self.theta = {name: p.detach().double() for name, p in self.model.named_parameters()}
        self.model.double()
        self.data, self.lr, self.kind, self.steps = data, lr, kind, steps
        self.turns, self.states = defaultdict(int), {}

    def sampled(self, t):
        return sorted(stream(SEED, "participation", t).choice(K, 3, replace=False).tolist())

    def logits(self, blocks):
        return self.model(blocks[:, :-1])[..., :V].double()

    def nll(self, blocks):
        labels = blocks[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(self.logits(blocks).flatten(0, 1), labels, reduction="sum")

    def local(self, k, t):
        """theta_k after H steps."""
        blocks = self.data.train[k]
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.theta[name])
        rest = [p for n, p in self.model.named_parameters() if n.endswith(("dt_bias", "A_log", "D"))]
        first = [p for n, p in self.model.named_parameters() if not n.endswith(("dt_bias", "A_log", "D"))]
        groups = [{"params": first, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        optimizer = (torch.optim.AdamW if self.kind == "adamw" else torch.optim.SGD)(groups, lr=self.lr, foreach=False)
        if k in self.states:
            optimizer.load_state_dict(self.states[k])
        order = [i for e in range(2) for i in stream(SEED, "batches", e, k).permutation(len(blocks))]
        at = self.turns[k] * self.steps * B
        for step in range(self.steps):
            rows = order[at + step * B : at + (step + 1) * B]
            optimizer.zero_grad()
            (self.nll(blocks[rows]) / (B * T)).backward()
            optimizer.step()
        self.states[k] = optimizer.state_dict() if self.kind == "adamw" else None
        if self.kind != "adamw":
            self.states.pop(k)
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def rounds(self, weigh, bad=(), step=lambda theta, delta: {n: theta[n] + delta[n] for n in theta}):
        """theta after three rounds: weigh(k, theta_k, t) gives each client's weight, a number or {name: tensor}."""
        place = 0
        for t in range(3):
            top, bottom = {n: 0.0 for n in self.theta}, {n: 0.0 for n in self.theta}
            for k in self.sampled(t):
                theta_k = self.local(k, t)
                if place not in bad:
                    w = weigh(k, theta_k, t)
                    for n in self.theta:
                        w_n = w[n] if isinstance(w, dict) else w
                        top[n], bottom[n] = top[n] + w_n * (theta_k[n] - self.theta[n]), bottom[n] + w_n
                else:
                    self.states.pop(k, None)
                place += 1
            for k in self.sampled(t):
                self.turns[k] += 1
            self.theta = step(self.theta, {n: top[n] / bottom[n] for n in self.theta})
        return self.theta


def agree(theta, expected, start, tolerance=2e-4):
    """The movements agree to a share of their size: a plain fault in a weight or a draw moves them by percents."""
    moved, missed = (
        sum((a[n] - b[n]).square().sum() for n in a) ** 0.5 for a, b in ((expected, start), (theta, expected))
    )
    assert moved > 0.01 and missed < tolerance * moved, (missed / moved).item()


SGD = "--client-optimizer sgd --lr 0.5"
BAD = {4}  # the second client of the second round


def test_fed_avg(data, tmp_path, monkeypatch):
    plain = Plain(data)
    start = dict(plain.theta)
    assert len({tuple(plain.sampled(t)) for t in range(3)}) > 1 and len({len(b) for b in data.train}) == K
    theta, rows = run(fed_avg, tmp_path, SGD, BAD, monkeypatch)
    agree(theta, plain.rounds(lambda k, *_: len(data.train[k]), BAD), start)
    assert [row["round"] for row in rows] == [0, 3] and rows[1]["left_out"] == [[2, plain.sampled(1)[1]]]
    assert rows[1]["clients"] == plain.sampled(2) and "train_loss" not in rows[0]
    losses, n = rows[1]["client_train_loss"], [len(data.train[k]) for k in rows[1]["clients"]]
    assert rows[1]["train_loss"] == pytest.approx(np.average(losses, weights=n))
    assert rows[1]["tokens"] == 9 * H * B * T and rows[1]["bytes_up"] == 9 * 4 * sum(t.numel() for t in theta.values())


def test_uniform_weights_and_moments_that_clients_keep(data, tmp_path, monkeypatch):
    """AdamW: a client's moments go on, those of a client that is left out start anew."""
    plain = Plain(data, 1e-3, "adamw")
    later = {*plain.sampled(1), *plain.sampled(2)}
    bad = {next(place for place, k in enumerate(plain.sampled(0)) if k in later)}  # one that comes again
    start = dict(plain.theta)
    theta, _ = run(fed_avg, tmp_path, "--lr 1e-3 --client-weights uniform", bad, monkeypatch)
    # where a gradient is near 0, AdamW's first steps have the sign of its rounding
    agree(theta, plain.rounds(lambda *_: 1.0, bad), start, 1e-2)


@pytest.mark.parametrize("form", ["heavy_ball", "ema"])
def test_fed_momentum(form, data, tmp_path, monkeypatch):
    v = {}

    def step(theta, delta):
        for n in theta:
            v[n] = 0.9 * v.get(n, 0.0) + (1.0 if form == "heavy_ball" else 0.1) * delta[n]
        return {n: theta[n] + 0.7 * v[n] for n in theta}

    plain = Plain(data)
    start = dict(plain.theta)
    theta, _ = run(fed_momentum, tmp_path, f"{SGD} --momentum-form {form} --server-lr 0.7", BAD, monkeypatch)
    agree(theta, plain.rounds(lambda k, *_: len(data.train[k]), BAD, step), start)


@pytest.mark.parametrize("prior", ["none", "examples"])
def test_fed_entropy(prior, data, tmp_path, monkeypatch):
    plain = Plain(data)
    start, seen = dict(plain.theta), {}

    def weigh(k, theta_k, t):
        log_p = torch.log_softmax(plain.logits(data.held_out[k]), -1)
        seen[k] = -(log_p.exp() * log_p).sum(-1).mean().item()
        return math.exp(-seen[k] / 0.01) * (len(data.train[k]) if prior == "examples" else 1.0)

    more = f"{SGD} --temperature 0.01 --entropy-samples 0 --entropy-prior {prior}"
    theta, rows = run(fed_entropy, tmp_path, more, BAD, monkeypatch)
    agree(theta, plain.rounds(weigh, BAD), start, 2e-3)
    assert rows[1]["client_entropy"] == pytest.approx([seen[k] for k in rows[1]["clients"]], rel=1e-5)


def test_fed_fisher(data, tmp_path, monkeypatch):
    plain = Plain(data)
    start = dict(plain.theta)

    def weigh(k, theta_k, t):
        blocks = data.train[k]
        rows = np.sort(stream(SEED, "fisher", t, k).choice(len(blocks), 3, replace=False))
        fisher = {n: torch.zeros_like(p) for n, p in theta_k.items()}
        for row in rows:
            plain.model.zero_grad()
            plain.nll(blocks[row : row + 1]).backward()
            for n, p in plain.model.named_parameters():
                fisher[n] += p.grad**2 / 3
        mean = sum(f.sum() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
        return {n: len(blocks) * (f + 0.2 * mean) for n, f in fisher.items()}

    more = f"{SGD} --fisher-samples 3 --fisher-labels data --fisher-damping 0.2"
    theta, rows = run(fed_fisher, tmp_path, more, BAD, monkeypatch)
    agree(theta, plain.rounds(weigh, BAD), start, 1e-3)
    assert rows[1]["bytes_up"] == 2 * rows[1]["bytes_down"]  # the weights and their precision


# ---- pieces


def flags(more="", module=fed_avg):
    return complete_flags(module.build_parser().parse_args([*TINY.split(), *more.split()]))


def test_the_plan_of_rounds():
    n = [40, 40]
    assert plan_rounds(flags("--rounds 7"), n) == (7, 14, 20)  # an epoch is of the data, not of the rounds asked for
    args = flags("--participation 1")
    args.rounds, args.n_epochs = None, 1.05
    assert plan_rounds(args, n) == (11, 21, 10)  # the last round has what is left of the budget
    with pytest.raises(Exception, match="client 1 has 1 sequences.*--batch-size 2"):
        plan_rounds(args, [5, 1])


def test_client_weights_and_entropy_prior_are_one_thing():
    for more, prior in (("", "none"), ("--client-weights uniform", "none"), ("--client-weights examples", "examples")):
        assert flags(more, fed_entropy).entropy_prior == prior
    assert flags("--entropy-prior examples", fed_entropy).client_weights == "examples"
    with pytest.raises(Exception, match="contradict"):
        flags("--entropy-prior none --client-weights examples", fed_entropy)


def test_central_trains_on_the_clients_text_in_one_order(data, tmp_path):
    """Five steps of central training are torch's AdamW on the union of the shards."""
    words = f"{TINY} --rounds 5 --val-freq 5 --lr 0.001 --output-dir {tmp_path} --run-name r".split()
    drop = ("--local-updates", "--participation", "--client-val-sequences")
    words = [w for i, w in enumerate(words) if w not in drop and words[i - 1] not in drop]
    central.main(complete_flags(central.build_parser().parse_args(words)))
    plain = Plain(data, 1e-3, "adamw", steps=1)
    start = dict(plain.theta)
    plain.data = type("Union", (), {"train": [torch.cat(data.train)]})
    for t in range(5):
        plain.turns[0] = t
        plain.theta = plain.local(0, t)
    theta = load_file(tmp_path / "r" / "checkpoint" / "theta.safetensors")
    agree({n: p.double() for n, p in theta.items()}, plain.theta, start, 1e-2)


def test_gradient_watch_is_the_mean_of_the_last_ten_cosines():
    weights = Weights(torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(2))}))
    watch, angles = GradientWatch(weights), np.cumsum(np.linspace(0, 0.5, 15))
    assert watch.mean_cosine() is None
    for i, angle in enumerate(angles):
        weights.parameters["w"].grad = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle)])
        watch.see()
        if i in (0, 8):  # a checkpoint in between
            state, watch = watch.state_dict(), GradientWatch(weights)
            watch.load_state_dict(state)
    assert watch.mean_cosine() == pytest.approx(np.cos(np.diff(angles)[-10:]).mean())
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert update_norms({name: torch.zeros(2, 2)}, {name: torch.full((2, 2), 3.0)}) == {"layers.0.in_proj": 6.0}


def test_best_keeps_a_copy_of_the_first_lowest():
    best, theta = Best(), torch.zeros(2)
    for t, loss in enumerate((math.nan, 3.0, 2.0, 2.0, 2.5)):
        theta.fill_(t)
        best.offer(t, loss, theta)
    again = Best()
    again.load_state_dict(best.state_dict())
    assert (again.round, again.loss) == (best.round, best.loss) == (2, 2.0) and again.theta.tolist() == [2, 2]


def test_training_history_has_the_sources_fields():
    line = {"round": 8, "steps": 8, "val_ppl": 5.0, "train_ppl": 6.0, "client_entropy": [1.0, None, 2.0]}
    history = training_history("fed_entropy", [{**line, "client_val_ppl": [7.0, 8.0], "generated": "x"}])
    assert history["global_step"] == [8] and history["server_val_ppl"] == [5.0]
    assert history["client_val_ppls"] == [[7.0, 8.0]] and history["avg_client_entropy"] == [1.5]
    assert set(training_history("central", [line])) == {
        "step", "val_loss", "val_ppl", "train_loss", "generated", "grad_cosine", "delta_norms",
    }  # fmt: skip
