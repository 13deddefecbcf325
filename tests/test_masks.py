"""Masks: exact k with a fixed tie-break, calibration over rounds as written down, sensitivities per sample, files."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from common.cli import RunFailed, UsageError
from common.seeding import stream
from common.vector import Weights
from vit_sparse_fl import masks as m
from vit_sparse_fl.vit import make_model


class Small(torch.nn.Module):
    """A classifier with every kind of parameter: convolution, linear, norm, class token, positions, head."""

    def __init__(self, classes=5):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, 6))
        self.positions = torch.nn.Parameter(torch.randn(1, 5, 6))
        self.patches = torch.nn.Conv2d(3, 6, 4, stride=4)
        self.norm = torch.nn.LayerNorm(6)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6))
        self.dropout = torch.nn.Dropout(0.5)
        self.classifier = torch.nn.Linear(6, classes)

    def forward(self, pixels):
        x = self.patches(pixels).flatten(2).transpose(1, 2)  # [B, 4, 6]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions  # [B, 5, 6]
        x = x + self.mlp(self.norm(x))
        return self.classifier(self.dropout(torch.tanh(x.mean(1))))  # [B, C]


NAMES = "patches.weight patches.bias norm.weight norm.bias mlp.0.weight mlp.0.bias mlp.2.weight mlp.2.bias".split()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def images():
    return torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def weights(model):
    """Of what a mask covers."""
    parameters = dict(model.named_parameters())
    return Weights(model, {name: parameters[name] for name in NAMES})


@pytest.fixture
def sizes(weights):
    return [shape.numel() for shape in weights.shapes.values()]


def random_scores(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def by_sorting(scores, k, largest=False, allowed=None):
    """The k first places of a stable sort, in plain Python."""
    free = range(len(scores)) if allowed is None else allowed.nonzero().view(-1).tolist()
    values = scores.tolist()
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[sorted(free, key=lambda i: -values[i] if largest else values[i])[:k]] = True
    return kept


def make(theta, sizes, strategy, sparsity, scores=lambda at, r: random_scores(len(at), r), seed=0, **rule):
    """The mask of a strategy by name, images replaced by random scores."""
    chosen = m.STRATEGIES[strategy]
    if not chosen.images:
        sample = m.Sample(None, SimpleNamespace(theta=theta, size=len(theta)), stream(seed, "random mask"))
        scores, rule = lambda *_: chosen.scores(sample), {**rule, "rounds": 1}
    return m.calibrate(theta, scores, sizes, sparsity=sparsity, largest=chosen.largest, **rule)


def test_maskable_are_the_modules_weights_but_not_head_tokens_and_frozen_ones(model):
    model.classifier.requires_grad_(False)
    assert m.maskable(model) == NAMES
    model.patches.requires_grad_(False)
    model.mlp[0].bias.requires_grad_(False)
    assert m.maskable(model) == [n for n in NAMES if not n.startswith("patches") and n != "mlp.0.bias"]
    real = make_model("tiny", image_size=32, n_classes=10)
    names = m.maskable(real)
    others = [name for name, _ in real.named_parameters() if name not in names]
    assert len(others) == 2 and all(part in " ".join(others) for part in ("cls_token", "position_embeddings"))
    assert any("projection" in name for name in names)


# ---- choose


KINDS = {
    "ties": lambda scores: (scores * 4).floor(),
    "zeros": lambda scores: torch.where(scores < 0.4, 0.0, scores),  # `<= quantile` would keep all of these 40 %
    "fp64": lambda scores: 1 + scores.double() * 1e-12,  # differences that fp32 cannot see
    "signed zeros": lambda scores: torch.where(scores < 0.5, -0.0, 0.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_k_by_rank_with_ties_in_order(sizes, kind):
    n = sum(sizes)
    scores = KINDS[kind](random_scores(n))
    for keep in (0.0, 0.1, 0.99, 1.0):
        for largest in (False, True):
            mask = m.choose(scores, keep, sizes, largest=largest)
            assert mask.dtype == torch.bool
            assert torch.equal(mask, by_sorting(scores, round(keep * n), largest)), (keep, largest)


def test_layer_scope_is_exact_in_every_tensor(weights, sizes):
    scores = random_scores(weights.size) * torch.cat([torch.full((n,), 1.0 + i) for i, n in enumerate(sizes)])
    allowed = m.choose(random_scores(weights.size, 1), 0.6, sizes, scope="layer")
    for free in (torch.ones_like(allowed), allowed):
        mask = m.choose(scores, 0.3, sizes, scope="layer", allowed=free)
        for part, score, open_ in zip(*(v.split(sizes) for v in (mask, scores, free)), strict=True):
            assert torch.equal(part, by_sorting(score, round(0.3 * len(score)), False, open_))
    # The global threshold is another: scales differ between tensors.
    named = weights.named(m.choose(scores, 0.3, sizes))
    assert named["patches.weight"].double().mean() > 0.35 and named["mlp.2.weight"].double().mean() < 0.2


def test_scores_that_are_not_finite():
    for bad in (torch.nan, torch.inf):
        scores = random_scores(20)
        scores[3] = bad
        with pytest.raises(RunFailed, match="scores of 1 weights are not finite"):
            m.choose(scores, 0.5, [20])


# ---- calibrate


def test_talos_keeps_the_fractions_damps_the_excluded_and_never_readmits(weights, sizes):
    theta, seen = weights.snapshot(), []

    def scores(at, r):
        seen.append(at.clone())
        return random_scores(len(at), r)

    mask = make(theta, sizes, "least_sensitive", 0.9, scores, rounds=4)
    kept = None
    for r in range(4):
        assert torch.equal(seen[r], theta if kept is None else torch.where(kept, theta, theta * 0.1))
        kept = by_sorting(random_scores(len(theta), r), round(0.1 ** ((r + 1) / 4) * len(theta)), False, kept)
    assert len(seen) == 4 and torch.equal(mask, kept) and int(mask.sum()) == round(0.1 * len(theta))
    # Rounds matter: a single threshold on the last scores is another mask.
    assert not torch.equal(mask, m.choose(random_scores(len(theta), 3), 0.1, sizes))


def test_random_masks_are_keyed_and_even(weights, sizes):
    a, again, b = (make(weights.theta, sizes, "random", 0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, again) and 0.2 < (a & b).sum() / (a | b).sum() < 0.45  # a third is expected
    parts = make(torch.zeros(400_000), [100_000, 300_000], "random", 0.9).split([100_000, 300_000])
    assert all(abs(part.double().mean() - 0.1) < 0.005 for part in parts)  # sd 0.001


def test_nothing_to_keep_is_an_error():
    with pytest.raises(UsageError, match="keeps 0 of"):
        m.check_mask(SimpleNamespace(sparsity_ratio=0.99), 6, 10)


def test_calibration_rows():
    disjoint = m.calibration_rows(100, 20, 3, seed=5, method="seed")
    assert [len(r) for r in disjoint] == [20] * 3 and len(set(torch.cat(disjoint).tolist())) == 60
    assert [len(r) for r in m.calibration_rows(100, 512, 3, seed=5, method="seed")] == [33] * 3
    again = m.calibration_rows(100, 20, 4, seed=5)
    assert all(torch.equal(r, again[0]) for r in again) and torch.equal(again[0], disjoint[0])
    assert len(m.calibration_rows(100, 512, 4, seed=5)[0]) == 100
    assert not torch.equal(m.calibration_rows(100, 20, 1, seed=6)[0], again[0])
    with pytest.raises(UsageError, match="5 images"):
        m.calibration_rows(5, 8, 10, seed=0, method="seed")


# ---- sensitivity


def batch_one(model, weights, function, images, labels):
    """Mean of squared gradients by `.backward()` on one image at a time, [n] in fp64."""
    model.eval()
    total = torch.zeros(weights.size, dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        function(model(image[None])[0], label).backward()
        total += torch.cat([p.grad.double().reshape(-1) for p in weights.parameters.values()]) ** 2 / len(images)
    model.zero_grad(set_to_none=True)
    return total


def scored(model, weights, images, labels=None, **sample):
    """`sensitivity` on given labels, or on labels drawn from the model."""
    given = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    sample = {"form": "logit" if labels is None else "nll"} | sample
    sample = m.Sample(model, weights, images=images, labels=given, **sample)
    return m.sensitivity(sample)


def nll(z, y):
    return F.cross_entropy(z[None], y[None])


def near(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance * expected.max().item())
    return True


@pytest.mark.parametrize("method", ["loop", "vmap"])
@pytest.mark.parametrize("real", [False, True], ids=["small", "vit"])
def test_sensitivity_is_the_batch_one_loop(model, weights, images, method, real, monkeypatch):
    monkeypatch.setattr(m, "SMALL", weights.size * 100 if method == "vmap" else 0)
    if real:
        model = make_model("tiny", image_size=32, n_classes=5, seed=3)
        with torch.no_grad():  # a new head is zero in places: no gradient would come through
            model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        parameters = dict(model.named_parameters())
        weights = Weights(model, {name: parameters[name] for name in m.maskable(model)})
    labels = torch.arange(len(images)) % 5
    ours = scored(model, weights, images, labels)
    expected = batch_one(model, weights, nll, images, labels)
    assert near(ours, expected)
    F.cross_entropy(model(images), labels).backward()
    of_batch = sum(p.grad.double().square().sum() for p in weights.parameters.values())
    assert of_batch < 0.7 * expected.sum()  # the square of a batch's mean is another, smaller thing


def test_drawn_labels_and_their_logits(model, weights, images):
    """The label is drawn from the model's softmax, and the gradient is that of its logit, not of its NLL."""
    with torch.no_grad():
        p = model.eval()(images).double().softmax(-1).cumsum(-1)
    u = stream(0, "labels").random(len(images))
    labels = torch.tensor([int(np.searchsorted(p[i].numpy(), u[i], side="right")) for i in range(len(images))])
    assert len(set(labels.tolist())) > 1
    ours = scored(model, weights, images, draws=stream(0, "labels"))
    assert near(ours, batch_one(model, weights, lambda z, y: z[y], images, labels))


def test_images_in_parts_and_prepared(model, weights, images, monkeypatch):
    labels, before = torch.arange(7) % 5, weights.snapshot()
    whole = scored(model, weights, images, labels, prepare=lambda x: x * 2)
    monkeypatch.setattr(m, "BATCH", 2)
    assert near(scored(model, weights, images, labels, prepare=lambda x: x * 2), whole.double())
    assert torch.equal(weights.theta.view(torch.int32), before.view(torch.int32))
    assert near(whole, batch_one(model, weights, nll, images * 2, labels))


# ---- sets of masks, and files

SHAPES = {"norm.bias": (6,), "mlp.0.weight": (8, 6), "mlp.0.bias": (8,), "one": (5,)}


def test_merge_and_places():
    a, b = (torch.tensor(bits, dtype=torch.bool) for bits in ([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0]))
    assert m.merge([a, b], "union").tolist() == [True, True, True, False, True, False]
    assert m.merge([a, b, a], "intersection").tolist() == [True, False, False, False, True, False]
    assert m.index_bytes(a) == 1 and m.index_bytes(torch.zeros_like(a)) == 0
    assert m.index_bytes(torch.arange(6400) < 10) == 40 and m.index_bytes(torch.arange(6400) < 1000) == 800


def test_mask_file_comes_back_or_is_refused_by_name(tmp_path):
    draw, path = torch.Generator().manual_seed(0), tmp_path / "mask.safetensors"
    masks = {name: torch.rand(shape, generator=draw) < 0.3 for name, shape in SHAPES.items()}
    save_file(masks, path)
    for shapes in (SHAPES, dict(reversed(SHAPES.items()))):  # in the order that is asked for
        assert torch.equal(m.load_mask(path, shapes), torch.cat([masks[name].reshape(-1) for name in shapes]))
    with pytest.raises(UsageError, match="no mask of this model"):
        m.load_mask(path, SHAPES | {"mlp.0.weight": (9, 6)})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UsageError, match="no mask of this model"):
        m.load_mask(path, SHAPES)
