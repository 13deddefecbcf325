"""vit_sparse_fl/ridge.py against numpy's least squares and scikit-learn, and its scale against the NLL."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from common.cli import UsageError
from vit_sparse_fl import vit
from vit_sparse_fl.ridge import ridge_head
from vit_sparse_fl.vit import make_model


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    """ "tiny" in this file: 1 block of width 12."""
    sizes = dict(patch_size=4, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24)
    monkeypatch.setattr(vit, "TINY", sizes)


def ridge_data(n=60, d=12, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    means = np.random.default_rng(99).normal(size=(classes, d))
    x = means[labels] + rng.normal(size=(n, d)) + 3.0
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


def test_ridge_head_is_ridge_regression():
    features, labels = ridge_data()
    model = make_model("tiny", image_size=32, n_classes=4)
    result = ridge_head(model, features, labels, l2=2.5)
    # Least squares with sqrt(l2) rows below, the intercept unpenalised: numpy's solution.
    x = np.hstack([features.double().numpy(), np.ones((60, 1))])
    rows = np.sqrt(2.5) * np.eye(13)[:12]
    targets = np.vstack([np.eye(4)[labels.numpy()], np.zeros((12, 4))])
    wanted, *_ = np.linalg.lstsq(np.vstack([x, rows]), targets, rcond=None)
    got = torch.cat([model.classifier.weight, model.classifier.bias[:, None]], 1).detach().double() / result["scale"]
    np.testing.assert_allclose(got.numpy().T, wanted, atol=2e-6)
    assert result["l2"] == 2.5


def test_ridge_head_is_sklearns():
    features, labels = ridge_data()
    model = make_model("tiny", image_size=32, n_classes=4)
    scale = ridge_head(model, features, labels, l2=2.5)["scale"]
    ridge = Ridge(alpha=2.5).fit(features.double().numpy(), np.eye(4)[labels.numpy()])
    np.testing.assert_allclose(model.classifier.weight.detach().numpy() / scale, ridge.coef_, atol=2e-6)
    np.testing.assert_allclose(model.classifier.bias.detach().numpy() / scale, ridge.intercept_, atol=2e-6)


def test_ridge_scale_is_the_best_temperature():
    features, labels = ridge_data()
    validation = ridge_data(seed=1)
    model = make_model("tiny", image_size=32, n_classes=4)
    result = ridge_head(model, features, labels, validation=validation)
    z = model.classifier(validation[0]).detach()
    nll = {f: F.cross_entropy(f * z, validation[1]).item() for f in (0.95, 1.0, 1.05)}
    assert min(nll, key=nll.get) == 1.0
    assert result["val_accuracy"] == (z.argmax(1) == validation[1]).double().mean().item()
    train = model.classifier(features).argmax(1)
    assert result["train_accuracy"] == (train == labels).double().mean().item()


def test_ridge_chooses_its_penalty_on_validation():
    features, labels = ridge_data(n=16)
    validation = ridge_data(n=400, seed=1)
    model = make_model("tiny", image_size=32, n_classes=4)
    chosen = ridge_head(model, features, labels, validation=validation)
    unit = torch.linalg.eigvalsh(torch.cov(features.double().T, correction=0) * 16).mean().item()
    tried = [
        ridge_head(model, features, labels, l2=unit * 10.0**e, validation=validation)["val_accuracy"]
        for e in range(-6, 2)
    ]
    assert chosen["val_accuracy"] == max(tried) > min(tried)
    assert chosen["l2"] == pytest.approx(unit * 10.0 ** (tried.index(max(tried)) - 6))


def test_ridge_with_constant_features_and_wrong_labels():
    model = make_model("tiny", image_size=32, n_classes=4)
    ridge_head(model, torch.ones(5, 12), torch.tensor([0, 1, 1, 3, 1]))
    assert torch.isfinite(model.classifier.weight).all()
    assert model.classifier(torch.ones(1, 12)).argmax().item() == 1
    with pytest.raises(UsageError, match="labels reach 4, the head has 4"):
        ridge_head(model, torch.ones(2, 12), torch.tensor([0, 4]))
