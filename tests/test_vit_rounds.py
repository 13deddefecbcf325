"""vit_sparse_fl's rounds as the scripts assemble them, against plain loops of torch: unequal clients, one left out."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from common.seeding import key, stream
from vit_sparse_fl import (
    interference,
    replay,
    study,
    train_centralized,
    train_federated,
    train_federated_sparse,
    train_federated_topk,
)
from vit_sparse_fl.data import load_images
from vit_sparse_fl.flags import parse
from vit_sparse_fl.interference import held_rows
from vit_sparse_fl.masks import load_mask
from vit_sparse_fl.vit import make_model

SEED, CLIENTS, BATCH, STEPS, ROUNDS = 3, 6, 8, 2, 4
LR, MIN_LR = 0.05, 0.02
MOMENTUM, DECAY, SMOOTHING, DROPOUT = 0.8, 0.01, 0.1, 0.1
WORDS = (
    f"--dataset demo --model tiny --classes 0:4 --batch-size {BATCH} --threads 1 --amp off --seed {SEED} --lr {LR} "
    f"--momentum {MOMENTUM} --weight-decay {DECAY} --dropout {DROPOUT} --run-name r"
)
FEDERATED = (
    f"{WORDS} --num-clients {CLIENTS} --participation-rate 0.5 --local-steps {STEPS} --num-rounds {ROUNDS} "
    f"--sharding dirichlet --alpha 0.5 --eval-every 1 --min-lr {MIN_LR}"
)
LOST = 1  # the round in which a client's pixels are NaN


# ------------------------------------------------------------------------------------------- the plain form


def rate(t):
    """The learning rate of round t: a cosine to MIN_LR."""
    return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * t / ROUNDS)) / 2


def prepared(images):
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images / 255 - mean) / std


class Plain:
    """The study written out: one model, dictionaries of tensors, fp64 sums."""

    def __init__(self, trained=lambda name: True):
        self.data = load_images("demo", SEED, classes=range(4))
        self.model = make_model("tiny", image_size=32, n_classes=4, dropout=DROPOUT, seed=SEED)
        self.parameters = {name: p for name, p in self.model.named_parameters() if trained(name)}
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self.parameters)
        self.theta = {name: p.detach().double() for name, p in self.parameters.items()}
        self.seen = []  # of each round: (theta before it, {client: its weights})

    def chosen(self, t):
        return sorted(stream(SEED, "participation", t).choice(CLIENTS, CLIENTS // 2, replace=False).tolist())

    def taken(self, k, t):
        """Rounds before t in which client k took part."""
        return sum(k in self.chosen(r) for r in range(t))

    def batches(self, rows, k, t, first, steps):
        """Pass after pass, each shuffled; a random crop of the padded image, perhaps mirrored."""
        passes = [stream(SEED, "batches", e, k).permutation(len(rows)) for e in range(20)]
        order = np.concatenate(passes)[first * BATCH : (first + steps) * BATCH]
        draws = stream(SEED, "augment", t, k)
        for step in range(steps):
            images = rows[order[step * BATCH : (step + 1) * BATCH]]
            corners, flips = draws.integers(9, size=(2, BATCH, 1)), draws.integers(2, size=(BATCH, 1), dtype=np.int8)
            pictures = []
            for i, image in enumerate(images):
                padded = F.pad(self.data.train[image], (4, 4, 4, 4))
                top, left = corners[0, i, 0], corners[1, i, 0]
                crop = padded[:, top : top + 32, left : left + 32]
                pictures.append(crop.flip(-1) if flips[i, 0] else crop)
            yield prepared(torch.stack(pictures)), self.data.train_labels[images]

    def load(self, theta):
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(theta[name])

    def train(self, batches, k, t, rates, optimizer, mask=None):
        """Optimiser steps. Returns (the weights in fp64, the mean loss)."""
        self.model.train()
        torch.manual_seed(key(SEED, "dropout", t, k))
        losses = []
        for (pixels, labels), lr in zip(batches, rates, strict=True):
            loss = F.cross_entropy(self.model(pixels), labels, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            before = {name: p.detach().clone() for name, p in self.parameters.items()}
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            losses.append(loss.item())
            if mask is not None:  # what torch's step did to a masked weight is undone
                with torch.no_grad():
                    for name, p in self.parameters.items():
                        p.copy_(torch.where(mask[name], p, before[name]))
        return {name: p.detach().double() for name, p in self.parameters.items()}, sum(losses) / len(losses)

    def optimizer(self):
        return torch.optim.SGD(self.parameters.values(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)

    @torch.no_grad()
    def held_loss(self, theta, rows):
        """Mean cross-entropy on some validation images, without dropout and smoothing."""
        self.model.eval()
        self.load(theta)
        return F.cross_entropy(
            self.model(prepared(self.data.validation[rows])), self.data.validation_labels[rows]
        ).item()

    def rounds(self, shards, lost, mask=None, sent=None):
        """All rounds. lost: the client that is left out in round LOST; sent(delta): what goes up. Returns each round's
        mean training loss."""
        means = []
        for t in range(ROUNDS):
            lr = rate(t)
            self.seen.append((self.theta, {}))
            sums, losses, weight = {name: torch.zeros_like(w) for name, w in self.theta.items()}, 0.0, 0
            for k in self.chosen(t):
                if (t, k) == (LOST, lost):
                    continue
                self.load(self.theta)
                began = {name: p.detach().double() for name, p in self.parameters.items()}
                batches = self.batches(shards[k], k, t, self.taken(k, t) * STEPS, STEPS)
                theta_k, loss = self.train(batches, k, t, [lr] * STEPS, self.optimizer(), mask)
                delta = {name: theta_k[name] - began[name] for name in began}
                self.seen[t][1][k] = theta_k
                n_k = len(shards[k])
                for name, d in (sent(delta) if sent else delta).items():
                    sums[name] += n_k * d
                losses, weight = losses + n_k * loss, weight + n_k
            self.theta = {name: w.float().double() + sums[name] / weight for name, w in self.theta.items()}
            means.append(losses / weight)
        return means


# ------------------------------------------------------------------------------------------- the scripts


def call(script, words, monkeypatch, tmp_path, lost=None):
    """Runs a script in this process; client `lost` sees NaN in round LOST. Returns (folder, lines, shards)."""
    shards = {}

    def batches(made, k, t, first, steps):
        shards.update(enumerate(rows.numpy() for rows in made.rows))
        for pixels, labels in client_batches(made, k, t, first, steps):
            yield (pixels * math.nan if (t, k) == (LOST, lost) else pixels), labels

    client_batches, module = study.client_batches, study if hasattr(script, "client_update") else script
    monkeypatch.setattr(module, "client_batches", batches)
    monkeypatch.setattr(study, "draw_accuracy", lambda *_: None)
    script.main(parse(script.build_parser(), [*words.split(), "--output-dir", str(tmp_path)]))
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    return tmp_path / "r", lines, shards


def check(folder, plain, swapped=0):
    """The checkpoint's weights against the plain form's, and that these moved far more than the tolerance.

    swapped: so many may be others: at the edge of what is sent two that are nearly equal change places by rounding.
    """
    found, start = load_file(folder / "checkpoint" / "theta.safetensors"), Plain().theta
    assert found.keys() == plain.theta.keys()
    moved = max((plain.theta[name] - start[name]).abs().max().item() for name in found)
    assert moved > 1e-3
    off = {name: int(((found[name].double() - w).abs() >= 2e-4 * moved).sum()) for name, w in plain.theta.items()}
    assert sum(off.values()) <= swapped, off


def middle(plain, t):
    """The client of round t that is left out."""
    return plain.chosen(t)[1]


def test_fedavg(monkeypatch, tmp_path):
    plain = Plain()
    lost = middle(plain, LOST)
    monkeypatch.setattr(interference, "IMAGES", 8)
    folder, lines, shards = call(train_federated, f"{FEDERATED} --interference-every 2", monkeypatch, tmp_path, lost)
    assert len({len(rows) for rows in shards.values()}) > 2 and len({tuple(plain.chosen(t)) for t in range(ROUNDS)}) > 2
    means = plain.rounds(shards, lost)
    check(folder, plain)
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1))
    assert [line["lr"] for line in lines[1:]] == pytest.approx([rate(t) for t in range(ROUNDS)])
    assert [line["train_loss"] for line in lines[1:]] == pytest.approx(means, rel=1e-5)
    for t, line in enumerate(lines[1:]):
        assert line["clients"] == plain.chosen(t)
        assert [loss is None for loss in line["client_train_loss"]] == [(t, k) == (LOST, lost) for k in plain.chosen(t)]
    assert [line.get("left_out") for line in lines] == [None, None, [[LOST + 1, lost]], None, None]
    assert [line["left_out_updates"] for line in lines] == [0, 0, 1, 1, 1]
    assert ["interference" in line for line in lines] == [False, False, True, False, True]
    for t in (LOST, ROUNDS - 1):
        check_interference(lines[t + 1], plain, shards, t)


def check_interference(line, plain, shards, t):
    """What the clients of round t do to each other's losses, from the plain form's weights."""
    theta, of = plain.seen[t]
    about = SimpleNamespace(
        args=SimpleNamespace(seed=SEED), data=plain.data, rows=[torch.from_numpy(shards[k]) for k in range(CLIENTS)]
    )
    about.device = "cpu"
    held = {k: held_rows(about, k) for k in of}
    before = {i: plain.held_loss(theta, held[i]) for i in of}
    matrix = np.array([[plain.held_loss(w, held[i]) - before[i] for w in of.values()] for i in of])
    assert line["interference_clients"] == list(of)
    near = {"rel": 0.01, "abs": 2e-3 * np.abs(matrix).max()}
    assert np.array(line["interference"]) == pytest.approx(matrix, **near)
    assert line["interference_own"] == pytest.approx(np.diagonal(matrix).mean(), **near)
    assert line["interference_others"] == pytest.approx(matrix[~np.eye(len(of), dtype=bool)].mean(), **near)


def covered(name):
    return not name.startswith("classifier") and "token" not in name and "position_" not in name


def largest_of(tensors, share):
    """{name: bool}: the share of all weights with the largest absolute values."""
    values = torch.cat([w.abs().reshape(-1) for w in tensors.values()])
    order = np.argsort(-values.numpy(), kind="stable")[: round(share * len(values))]
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[order] = True
    parts = kept.split([w.numel() for w in tensors.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(tensors.items(), parts, strict=True)}


def test_sparse_fedavg(monkeypatch, tmp_path):
    plain = Plain(lambda name: covered(name) and "embeddings" not in name and ".0." not in name)
    lost = middle(plain, LOST)
    words = f"{FEDERATED} --mask-strategy highest_magnitude --sparsity-ratio 0.8 --freeze-layers 1"
    folder, lines, shards = call(train_federated_sparse, words, monkeypatch, tmp_path, lost)
    start, mask = dict(plain.theta), largest_of(plain.theta, 0.2)
    plain.rounds(shards, lost, mask)
    check(folder, plain)
    found = load_file(folder / "checkpoint" / "theta.safetensors")
    assert all(torch.equal(found[n].double()[~mask[n]], start[n][~mask[n]]) for n in mask)
    # drift: of the length of all weights, those too that are frozen
    frozen = sum(p.detach().double().square().sum() for p in plain.model.parameters() if not p.requires_grad)
    theta, of = plain.seen[-1]
    lengths = [sum((w[n] - theta[n]).square().sum() for n in theta).sqrt() for w in of.values()]
    whole = (sum(w.square().sum() for w in theta.values()) + frozen).sqrt()
    assert lines[-1]["drift"] == pytest.approx(float(sum(lengths) / len(lengths) / whole), rel=1e-3)


@pytest.mark.parametrize("how", ["talos", "seed"])
def test_the_mask_is_calibrated_on_validation_images(how, monkeypatch, tmp_path):
    """Squared gradients of one image at a time, in two rounds; talos: of a drawn label's logit, seed: of the loss."""
    words = f"{FEDERATED} --dropout 0.9 --num-rounds 1 --sparsity-ratio 0.8 --calibration {how} --fisher-samples 20"
    folder, _, _ = call(train_federated_sparse, f"{words} --calibration-rounds 2", monkeypatch, tmp_path)
    plain, talos = Plain(covered), how == "talos"
    size = 20 if talos else 16  # of 32 images, disjoint in two rounds
    plain.model.eval()

    def scores(theta, r):
        plain.load(theta)
        order, total = stream(SEED, "calibration").permutation(32), 0
        rows = order[:size] if talos else order[r * size : (r + 1) * size]
        for row, point in zip(rows, stream(SEED, "calibration labels", r).random(size), strict=True):
            z = plain.model(prepared(plain.data.validation[row])[None])[0]
            drawn = np.searchsorted(z.detach().double().softmax(0).cumsum(0).numpy(), point, side="right")
            value = z[drawn] if talos else F.cross_entropy(z, plain.data.validation_labels[row])
            parts = torch.autograd.grad(value, list(plain.parameters.values()))
            total = total + torch.cat([g.double().reshape(-1) for g in parts]) ** 2
        return total

    found = load_mask(folder / "mask.safetensors", {name: list(w.shape) for name, w in plain.theta.items()})
    if talos:  # of what the first round keeps, the rest a tenth as large meanwhile
        first = scores(plain.theta, 0)
        kept = first <= first.sort().values[round(0.2**0.5 * len(first)) - 1]
        parts = kept.split([w.numel() for w in plain.theta.values()])
        at = {n: torch.where(p.view(w.shape), w, 0.1 * w) for (n, w), p in zip(plain.theta.items(), parts, strict=True)}
        wanted = scores(at, 1).masked_fill(~kept, math.inf)
    else:
        wanted = scores(plain.theta, 0) + scores(plain.theta, 1)
    wanted = wanted <= wanted.sort().values[round(0.2 * len(wanted)) - 1]
    assert int((found != wanted).sum()) < 1e-3 * int(found.sum())


def cut(delta, share):
    """What is sent of a change at as many bytes as a mask's values of this share: its largest entries."""
    size = sum(w.numel() for w in delta.values())
    kept = largest_of(delta, (round(share * size) // 2) / size)
    return {name: torch.where(kept[name], d, 0.0) for name, d in delta.items()}


def test_topk_uploads(monkeypatch, tmp_path):
    plain = Plain(covered)
    lost = middle(plain, LOST)
    folder, lines, shards = call(train_federated_topk, f"{FEDERATED} --sparsity-ratio 0.8", monkeypatch, tmp_path, lost)
    plain.rounds(shards, lost, sent=lambda delta: cut(delta, 0.2))
    size = sum(w.numel() for w in plain.theta.values())
    check(folder, plain, swapped=size // 1000)
    assert lines[-1]["bytes_up"] == ROUNDS * 3 * 8 * (round(0.2 * size) // 2)
    # down: the whole model to who joins, else what is trained
    joined = len({k for t in range(ROUNDS) for k in plain.chosen(t)})
    model = 4 * sum(p.numel() for p in plain.model.parameters())
    assert lines[-1]["bytes_down"] == joined * model + (3 * ROUNDS - joined) * 4 * size


def test_replay(monkeypatch, tmp_path):
    """Every method's update of one round from one theta at each factor, and the run itself, which is FedAvg's."""
    monkeypatch.setattr(interference, "IMAGES", 8)
    words = f"{FEDERATED} --replay-every {ROUNDS} --factors 0.25 1 --sparsity-ratio 0.8 --fisher-samples 8"
    folder, lines, shards = call(replay, f"{words} --calibration-rounds 1", monkeypatch, tmp_path)
    assert ["replay" in line for line in lines] == [False, True, False, False, False]
    plain, found = Plain(covered), lines[1]["replay"]
    start, ids = dict(plain.theta), plain.chosen(0)
    plain.rounds(shards, None)
    check(folder, plain)

    about = SimpleNamespace(args=SimpleNamespace(seed=SEED), data=plain.data, device="cpu")
    about.rows = [torch.from_numpy(shards[k]) for k in range(CLIENTS)]
    held = [held_rows(about, k) for k in ids]
    before, length = np.array([plain.held_loss(start, rows) for rows in held]), norm(start)

    def trained(k, rate, mask=None):
        plain.load(start)
        batches = plain.batches(shards[k], k, 0, 0, STEPS)
        theta_k, _ = plain.train(batches, k, 0, [rate] * STEPS, plain.optimizer(), mask)
        return {name: w - start[name] for name, w in theta_k.items()}

    ways = {  # method: (client, factor) -> its update
        "dense": lambda k, f: trained(k, f * replay.RATES["dense"]),
        "shorter": lambda k, f: {name: f * d for name, d in trained(k, LR).items()},
        "topk": lambda k, f: cut(trained(k, f * replay.RATES["topk"]), 0.2),
        "highest_magnitude": lambda k, f: trained(k, f * replay.RATES["highest_magnitude"], largest_of(start, 0.2)),
    }
    assert set(ways) < set(found) == {*replay.RATES, "shorter"}
    for method, way in ways.items():
        for row, factor in zip(found[method], (0.25, 1.0), strict=True):
            steps = [way(k, factor) for k in ids]
            at = [{name: start[name] + d for name, d in step.items()} for step in steps]
            change = np.array(
                [[plain.held_loss(w, rows) - b for w in at] for rows, b in zip(held, before, strict=True)]
            )
            near = {"rel": 0.02, "abs": 5e-3 * np.abs(change).max()}
            assert row["factor"] == factor and row["gain"] == pytest.approx(-change.diagonal(), **near)
            others = [np.delete(change[:, j], j).mean() for j in range(len(ids))]
            assert row["others"] == pytest.approx(others, **near)
            assert row["drift"] == pytest.approx([norm(step) / length for step in steps], rel=1e-3)


def norm(tensors):
    return math.sqrt(sum(w.square().sum() for w in tensors.values()))


def test_central_training(monkeypatch, tmp_path):
    words = f"{WORDS} --epochs 2 --warmup-epochs 0 --scheduler cosine --min-lr {MIN_LR}"
    folder, lines, _ = call(train_centralized, words, monkeypatch, tmp_path)
    plain = Plain()
    steps = len(plain.data.train) // BATCH
    optimizer, rows, losses = plain.optimizer(), np.arange(len(plain.data.train)), []
    for epoch in range(2):
        lr = MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * epoch / 2)) / 2
        batches = plain.batches(rows, 0, epoch, epoch * steps, steps)
        plain.theta, loss = plain.train(batches, 0, epoch, [lr] * steps, optimizer)
        losses.append(loss)
    assert [line["train_loss"] for line in lines[1:]] == pytest.approx(losses, rel=1e-3)
    found = load_file(folder / "checkpoint" / "theta.safetensors")
    moved = max(p.abs().max().item() for p in plain.theta.values())
    assert all((found[name].double() - w).abs().max() < 5e-3 * moved for name, w in plain.theta.items())
