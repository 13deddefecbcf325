"""llm_noniid/train.py: whole rounds of every algorithm against a plain loop in fp64, its log against that loop too."""

import copy
import math

import numpy as np
import pytest
import torch
from noniid_script import done, failing, no_dropout, padded, parsed, token_rows, words
from safetensors.torch import load_file

from common.checkpoint import read_json
from common.runlog import read_metrics
from common.seeding import stream
from llm_noniid.data import load_texts
from llm_noniid.diagnostics import cluster_labels
from llm_noniid.partition import partition
from llm_noniid.text_model import load_text_model

pytestmark = pytest.mark.slow
SEED = 7  # of which each of three rounds draws other clients
SGD = "--client-optimizer sgd --learning-rate 0.1"
SGDM = "--client-optimizer sgdm --learning-rate 0.02"
WAYS = {
    "fedavg": f"--server-lr 1.3 --local-steps 0 --local-epochs 0.3 {SGD}",
    "fedprox": f"--algorithm fedprox --server-lr 0.5 --mu 20 {SGDM}",
    "scaffold": f"--algorithm scaffold --server-lr 1.5 {SGD}",
    "scaffold of adamw": "--algorithm scaffold",
    "fednova": f"--algorithm fednova --server-lr 0.7 --local-steps 0 --local-epochs 0.4 {SGDM}",
    "fedavgm": f"--algorithm fedavgm --server-lr 0.7 --server-momentum 0.8 {SGD}",
    "fedadam": f"--algorithm fedadam --server-lr 0.003 {SGD}",
    "local": f"--algorithm local {SGD}",
    "central": "--algorithm central",
    "clusters": f"--cluster labels --num-clusters 2 --server-lr 0.8 {SGD}",
}


class Plain:
    """The rounds in fp64, with torch, transformers and peft alone; `lines`: what a run should log of each.

    thetas: a list of {name: tensor}; of: which of them is client k's.
    """

    def __init__(self, args):
        self.a = a = args
        texts = load_texts("demo", max_samples=160, seed=SEED)
        parts, _ = partition(a, texts)
        self.rows, self.held = [], []
        for k, part in enumerate(parts):
            order = stream(SEED, "held out", 0, k).permutation(len(part))
            self.rows.append(np.sort(part[order[max(1, len(part) // 10) :]]))
            self.held.append(part[order[: max(1, len(part) // 10)]])
        if a.algorithm == "central":
            self.rows = [np.sort(np.concatenate(self.rows))]
        made = load_text_model(a, texts, torch.device("cpu"), None)
        self.tokens, self.eos = token_rows(made.tokenizer, texts.splits["train"], 32), made.tokenizer.eos_token_id
        self.scale, self.module = made.lora.scale, copy.deepcopy(made.module).double().train()
        learnt = [p for p in self.module.parameters() if p.requires_grad]
        by_id = {id(p): name for name, p in made.weights.parameters.items()}
        names = [by_id[id(p)] for p in made.module.parameters() if p.requires_grad]
        self.parameters = dict(zip(names, learnt, strict=True))
        start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.start, self.zeros = start, {name: torch.zeros_like(p) for name, p in start.items()}
        count = len(self.rows)
        self.of = list(range(count)) if a.algorithm == "local" else [0] * count
        if a.cluster == "labels":
            topics = [np.bincount(texts.labels["train"][mine], minlength=4) for mine in self.rows]
            self.of = cluster_labels(topics, 2).tolist()
        self.thetas = [start] * (max(self.of) + 1)
        self.n = [len(r) for r in self.rows]
        self.c, self.c_k = self.zeros, [self.zeros] * count
        self.v, self.m, self.optimizer = None, self.zeros, None
        self.lines = [self.round(t) for t in range(a.num_rounds)]

    def batches(self, k, t):
        a, mine = self.a, self.rows[k]
        an_epoch = math.ceil(len(mine) / a.batch_size)
        steps = a.local_steps or math.ceil(a.local_epochs * an_epoch)
        if a.algorithm == "central":
            steps *= 3  # clients a round
        orders = [stream(SEED, f"batches of epoch {e}", t, k).permutation(len(mine)) for e in range(steps)]
        cut = [mine[order[i : i + a.batch_size]] for order in orders for i in range(0, len(mine), a.batch_size)]
        return cut[:steps]

    def local(self, theta, k, t):
        """(theta_k, the mean raw gradient, the mean loss, steps, the mean norm of the raw gradients)."""
        a, w = self.a, self.parameters
        for name, p in w.items():
            p.data.copy_(theta[name])
        if a.algorithm == "central" and self.optimizer:
            optimizer = self.optimizer
        elif a.client_optimizer == "adamw":
            optimizer = torch.optim.AdamW(w.values(), lr=a.learning_rate)
        else:
            momentum = 0.9 if a.client_optimizer == "sgdm" else 0.0
            optimizer = torch.optim.SGD(w.values(), lr=a.learning_rate, momentum=momentum)
        self.optimizer = optimizer
        raw, losses, norms, batches = dict(self.zeros), [], [], self.batches(k, t)
        for rows in batches:
            optimizer.zero_grad()
            loss = self.module(**padded([self.tokens[i] for i in rows], self.eos)).loss
            losses.append(loss.item())
            loss.backward()
            norms.append(math.sqrt(sum(p.grad.square().sum() for p in w.values())))
            for name, p in w.items():
                raw[name] = raw[name] + p.grad / len(batches)
                if a.algorithm == "scaffold":
                    p.grad += self.c[name] - self.c_k[k][name]
                if a.algorithm == "fedprox":
                    p.grad += a.mu * (p.detach() - theta[name])
            optimizer.step()
        self.worked += sum(len(self.tokens[i]) - 1 for rows in batches for i in rows)
        theta_k = {name: p.detach().clone() for name, p in w.items()}
        return theta_k, raw, float(np.mean(losses)), len(batches), np.mean(norms)

    def round(self, t):
        a, self.worked = self.a, getattr(self, "worked", 0)
        if a.algorithm == "central":
            chosen = [0]
        else:
            chosen = sorted(stream(SEED, "participation", t).choice(4, 3, replace=False).tolist())
        out = chosen[:1] if t == 1 and a.algorithm != "central" else []
        work = {k: self.local(self.thetas[self.of[k]], k, t) for k in chosen}
        kept = [k for k in chosen if k not in out]
        line = {"clients": chosen, "client_train_loss": [None if k in out else work[k][2] for k in chosen]}
        line["train_loss"] = sum(self.n[k] * work[k][2] for k in kept) / sum(self.n[k] for k in kept)
        line["client_gradient_norm"] = [None if k in out else work[k][4] for k in chosen]
        line["tokens"], line["left_out"] = self.worked, [[t + 1, k] for k in out] or None
        if len(self.thetas) == 1 and a.algorithm != "central":
            line |= self.drift([work[k][0] for k in kept], [self.n[k] for k in kept])
        mine = {g: [k for k in kept if self.of[k] == g] for g in range(len(self.thetas))}
        self.thetas = [self.server(theta, mine[g], work) if mine[g] else theta for g, theta in enumerate(self.thetas)]
        if a.algorithm == "scaffold":
            change = self.mean([(self.n[k], self.minus(work[k][1], self.c_k[k])) for k in kept], sum(self.n))
            self.c = {name: c + change[name] for name, c in self.c.items()}
            for k in kept:
                self.c_k[k] = work[k][1]
        return line

    def server(self, theta, kept, work):
        a, total = self.a, sum(self.n[k] for k in kept)
        deltas = {k: self.minus(work[k][0], theta) for k in kept}
        if a.algorithm == "fednova":  # of momentum 0.9: [H - 0.9 (1 - 0.9^H) / 0.1] / 0.1
            steps = {k: (work[k][3] - 9 * (1 - 0.9 ** work[k][3])) / 0.1 for k in kept}
            effective = sum(self.n[k] * steps[k] for k in kept) / total
            delta = self.mean([(self.n[k] * effective / steps[k], deltas[k]) for k in kept], total)
        else:
            delta = self.mean([(self.n[k], deltas[k]) for k in kept], total)
        if a.algorithm == "fedavgm":
            self.m = {name: 0.8 * m + delta[name] for name, m in self.m.items()}
            delta = {name: 0.7 * m for name, m in self.m.items()}
        if a.algorithm == "fedadam":
            self.v = self.v or {name: z + 1e-6 for name, z in self.zeros.items()}
            self.m = {name: 0.9 * m + 0.1 * delta[name] for name, m in self.m.items()}
            self.v = {name: 0.99 * v + 0.01 * delta[name] ** 2 for name, v in self.v.items()}
            delta = {name: 0.003 * m / (self.v[name].sqrt() + 1e-3) for name, m in self.m.items()}
        eta = a.server_lr if a.algorithm not in ("fedavgm", "fedadam") else 1
        return {name: t + eta * delta[name] for name, t in theta.items()}

    def mean(self, pairs, total):
        return {name: sum(w * d[name] for w, d in pairs) / total for name in self.start}

    def minus(self, x, y):
        return {name: x[name] - y[name] for name in self.start}

    def updates(self, theta, thetas):
        """s (B_k A_k - B A) of all layers, a row a client."""

        def product(x):
            layers = [name[2:] for name in self.start if name[0] == "A"]
            return torch.cat([(self.scale * x[f"B.{n}"] @ x[f"A.{n}"]).flatten() for n in layers])

        return torch.stack([product(x) - product(theta) for x in thetas]).numpy()

    def drift(self, thetas, n):
        d, p = self.updates(self.thetas[0], thetas), np.array(n) / sum(n)
        mean = p @ d
        return {"relative_drift": math.sqrt(p @ ((d - mean) ** 2).sum(1)) / np.linalg.norm(mean)}


@pytest.mark.parametrize("way", WAYS)
def test_rounds_are_those_of_a_plain_loop(way, tmp_path, monkeypatch):
    no_dropout(monkeypatch)
    more = f"--seed {SEED} --participation-rate 0.7 --lora-dropout 0 --probe-samples 0 --eval-samples 4"
    more += f" --max-length 32 --local-steps 2 {WAYS[way]}"
    args = parsed(*words(tmp_path, "a", more))
    plain = Plain(args)
    failing(monkeypatch, {(t - 1, k) for line in plain.lines for t, k in line["left_out"] or ()})
    folder = done(tmp_path, "a", more)

    lines = read_metrics(folder)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    for line, expected in zip(lines[1:], plain.lines, strict=True):
        for name, value in expected.items():
            if name in ("left_out", "clients", "tokens"):
                wanted = value
            elif name in ("client_train_loss", "client_gradient_norm"):
                rel = 1e-5 if name == "client_train_loss" else 1e-3
                wanted = [of_one and pytest.approx(of_one, rel=rel) for of_one in value]
            else:
                wanted = pytest.approx(value, rel=1e-5 if name == "train_loss" else 1e-3)
            assert line.get(name) == wanted, name
    sent = {"local": 0, "central": 0, "scaffold": 8}.get(args.algorithm, 4)
    size = sum(t.numel() for t in plain.start.values())
    assert lines[-1]["bytes_up"] == lines[-1]["bytes_down"] == sent * size * sum(len(x["clients"]) for x in plain.lines)
    assert read_json(folder / "run.json")["clients"]["examples"] == [58, 25, 35, 42]

    saved = load_file(folder / "checkpoint" / "theta.safetensors")
    if args.cluster != "none" or args.algorithm == "local":
        assert read_json(folder / "partition.json")["group"] == plain.of and len(set(plain.of)) > 1
    assert saved.keys() == {f"{g}/{name}" for g in range(len(plain.thetas)) for name in plain.start}
    for g, theta in enumerate(plain.thetas):
        moved = math.sqrt(sum((theta[name] - t).square().sum() for name, t in plain.start.items()))
        apart = math.sqrt(sum((saved[f"{g}/{name}"] - t).square().sum() for name, t in theta.items()))
        # AdamW makes a step of nearly full size out of the rounding of a gradient that is nearly 0
        assert apart <= (1e-2 if args.client_optimizer == "adamw" else 1e-4) * moved
        assert moved > 1e-3 or args.algorithm == "local"
