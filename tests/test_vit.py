"""vit_sparse_fl/vit.py: the model against transformers', its files, freezing."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from common.cli import UsageError
from vit_sparse_fl import vit
from vit_sparse_fl.vit import freeze, init_from, make_model, save_pretrained

SMALL = dict(patch_size=4, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24)


tiny = partial(make_model, "tiny", image_size=32, n_classes=5)  # in this file: 2 blocks of width 12


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setattr(vit, "TINY", SMALL)


def refused(words, load, *args, **options):
    """Asserts that load(...) is refused in one line that has these words."""
    with pytest.raises(UsageError) as error:
        load(*args, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def dinos_interpolation(pos_embed, side, patch):
    """DINO's VisionTransformer.interpolate_pos_encoding, line by line."""
    n, dim = pos_embed.shape[1] - 1, pos_embed.shape[-1]
    w0 = side // patch + 0.1
    patch_pos = F.interpolate(
        pos_embed[:, 1:].reshape(1, int(math.sqrt(n)), int(math.sqrt(n)), dim).permute(0, 3, 1, 2),
        scale_factor=(w0 / math.sqrt(n), w0 / math.sqrt(n)),
        mode="bicubic",
    )
    return torch.cat((pos_embed[:, :1], patch_pos.permute(0, 2, 3, 1).view(1, -1, dim)), dim=1)


def pixels_of(side, n=3, seed=1):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_vit_s16_with_random_weights_needs_no_download_and_has_dinos_counts():
    model = make_model("dino_vits16", pretrained=False)
    assert sum(p.numel() for p in model.vit.parameters()) == 21_665_664
    assert sum(p.numel() for p in model.classifier.parameters()) == 38_500
    assert model.config.num_attention_heads == 6


# ---- the model


def test_tiny_is_drawn_by_key():
    a, b, c = (tiny(seed=s) for s in (1, 1, 2))
    torch.manual_seed(123)
    d = tiny(n_classes=9, seed=1)
    for name, p in a.state_dict().items():
        assert torch.equal(p, b.state_dict()[name])
        assert name.startswith("classifier") or torch.equal(p, d.state_dict()[name])
    assert not torch.equal(a.vit.layers[0].mlp.fc1.weight, c.vit.layers[0].mlp.fc1.weight)
    assert not torch.equal(a.classifier.weight, c.classifier.weight)


def test_keys_and_logits_are_transformers(tmp_path):
    model = tiny(image_size=24, seed=1).eval()
    assert list(model.state_dict()) == list(ViTForImageClassification(model.config).state_dict())
    save_pretrained(model, tmp_path)
    other = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    x = pixels_of(24)
    torch.testing.assert_close(model(x), other(x).logits, rtol=0, atol=1e-6)
    assert other.config.image_size == 24


def test_gradients_are_transformers(tmp_path):
    """The last block computes the CLS token only: gradients must not know."""
    model = tiny(dropout=0.0, seed=1)
    other = ViTForImageClassification(model.config)
    other.load_state_dict(model.state_dict())
    x, y = pixels_of(32), torch.tensor([0, 4, 2])
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(other(x).logits, y).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


# ---- folders, the hub, other runs


def test_model_from_a_folder_takes_the_backbone(tmp_path):
    torch.manual_seed(0)
    source = ViTForImageClassification(ViTConfig(image_size=32, num_labels=3, hidden_dropout_prob=0.1, **SMALL))
    source.save_pretrained(tmp_path)
    model = make_model(tmp_path, image_size=32, n_classes=5, seed=1)
    for name, p in source.vit.state_dict().items():
        assert torch.equal(p, model.vit.state_dict()[name])
    assert model.classifier.weight.shape == (5, 12)
    assert model.config.hidden_dropout_prob == 0
    assert make_model(tmp_path, image_size=16, n_classes=5).vit.embeddings.position_embeddings.shape == (1, 17, 12)


def test_folder_with_other_contents(tmp_path):
    model, file = tiny(), tmp_path / "model.safetensors"
    save_pretrained(model, tmp_path)
    tensors = load_file(file)
    tensors["vit.surprise"] = tensors.pop("vit.layernorm.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    for load in (partial(make_model, tmp_path, image_size=32), partial(init_from, model, tmp_path)):
        refused(["lack", "layernorm.bias"], load)


def test_init_from_another_run(tmp_path):
    source = tiny(seed=1).eval()
    save_pretrained(source, tmp_path / "run" / "final")
    same = tiny(seed=2).eval()
    assert init_from(same, tmp_path / "run") == []
    x = pixels_of(32)
    assert torch.equal(same(x), source(x))
    other = tiny(n_classes=8, seed=2).eval()
    head = other.classifier.weight.clone()
    (note,) = init_from(other, tmp_path / "run" / "final")
    assert "5 classes, this run 8" in note
    assert torch.equal(other.features(x), source.features(x))
    assert torch.equal(other.classifier.weight, head)
    larger = tiny(image_size=48, seed=2)
    init_from(larger, tmp_path / "run")
    wanted = dinos_interpolation(source.vit.embeddings.position_embeddings, 48, 4)
    assert torch.equal(larger.vit.embeddings.position_embeddings, wanted)


def test_init_from_another_architecture(tmp_path, monkeypatch):
    save_pretrained(tiny(), tmp_path)
    monkeypatch.setattr(vit, "TINY", SMALL | {"num_hidden_layers": 1})
    refused(["layers.1."], init_from, tiny(), tmp_path)
    refused(["holds no model", "final/"], init_from, tiny(), tmp_path / "nowhere")


# ---- freezing


def trainable(model):
    return {n.removeprefix("vit.") for n, p in model.named_parameters() if p.requires_grad}


def test_freeze():
    model = tiny()
    everything = trainable(model)
    first = {n for n in everything if n.startswith(("embeddings.", "layers.0."))}
    head = {"classifier.weight", "classifier.bias"}
    for kwargs, frozen in [
        (dict(layers=1), first),
        (dict(backbone=True), everything - head),
        (dict(head=True), head),
        (dict(head=True, layers=1), head | first),
        (dict(), set()),
    ]:
        freeze(model, **kwargs)
        assert trainable(model) == everything - frozen
    refused(["--freeze-layers 3, but the model has 2"], freeze, model, layers=3)
    refused(["nothing is left"], freeze, model, backbone=True, head=True)
