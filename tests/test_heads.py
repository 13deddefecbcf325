"""The head of vit_sparse_fl/vit.py: ridge against scikit-learn, its scale against the NLL."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from vit_sparse_fl import vit
from vit_sparse_fl.vit import PENALTIES, ridge_head, sums_bytes


class Headed(torch.nn.Module):
    def __init__(self, size=12, classes=4):
        super().__init__()
        self.classifier = torch.nn.Linear(size, classes)

    def accuracy(self, features, labels):
        return (self.classifier(features).argmax(1) == labels).double().mean().item()


def made(n=60, size=12, classes=4, seed=0):
    """Features around a centre for each class, all 3 off the origin, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    means = np.random.default_rng(99).normal(size=(classes, size))
    features = means[labels] + rng.normal(size=(n, size)) + 3.0
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels)


def test_ridge_head_is_sklearns():
    features, labels = made()
    model, x, y = Headed(), features.double().numpy(), np.eye(4)[labels.numpy()]
    l2, scale = ridge_head(model, features, labels, (features, labels))
    weight, bias = model.classifier.weight.detach().numpy() / scale, model.classifier.bias.detach().numpy() / scale
    ridge = Ridge(alpha=l2).fit(x, y)
    np.testing.assert_allclose(weight, ridge.coef_, atol=2e-6)
    np.testing.assert_allclose(bias, ridge.intercept_, atol=2e-6)


def test_ridge_scale_is_the_best_temperature():
    held, model = made(seed=1), Headed()
    ridge_head(model, *made(), held)
    z = model.classifier(held[0]).detach()
    nll = {f: F.cross_entropy(f * z, held[1]).item() for f in (0.95, 1.0, 1.05)}
    assert min(nll, key=nll.get) == 1.0


def test_ridge_chooses_its_penalty_on_validation(monkeypatch):
    features, labels = made(n=16)
    held, model = made(n=400, seed=1), Headed()
    chosen, _ = ridge_head(model, features, labels, held)
    best = model.accuracy(*held)
    unit = torch.linalg.eigvalsh(torch.cov(features.double().T, correction=0) * 16).mean().item()
    tried = []
    for penalty in PENALTIES:
        monkeypatch.setattr(vit, "PENALTIES", (penalty,))
        ridge_head(model, features, labels, held)
        tried.append(model.accuracy(*held))
    assert best == max(tried) > min(tried)
    assert chosen == pytest.approx(unit * PENALTIES[tried.index(max(tried))])


def test_what_clients_send_is_the_sums():
    """X'X (symmetric), its sums, X'Y and the sums of Y, the number of images: fp64."""
    assert sums_bytes(Headed().classifier) == 8 * (12 * 13 // 2 + 12 * 4 + 12 + 4 + 1)
