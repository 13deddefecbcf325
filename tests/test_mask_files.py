"""Sets of masks (union, overlap, counts), and mask files that come back whole or are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.cli import UsageError
from vit_sparse_fl import masks as m
from vit_sparse_fl.mask_files import load_mask, save_mask, sparsity_of

SHAPES = {"norm.bias": (6,), "mlp.0.weight": (8, 6), "mlp.0.bias": (8,), "patches.weight": (6, 3, 4, 4), "one": (5,)}


def test_merge_jaccard_and_counts():
    a, b = (torch.tensor(bits, dtype=torch.bool) for bits in ([1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0]))
    assert m.merge([a, b], "union").tolist() == [True, True, True, False, True, False]
    assert m.merge([a, b, a], "intersection").tolist() == [True, False, False, False, True, False]
    assert m.jaccard(a, b) == 0.5 and m.jaccard(a, a) == 1.0
    assert m.kept_per_layer({"x.weight": a[:4].view(2, 2), "x.bias": a[4:]}) == {"x": 0.5}
    assert m.kept_apart({"x.weight": a[:4], "y.weight": a[4:6]}) == {"weights": int(a[:6].sum()) / 6}
    assert m.kept_apart({"x.weight": a[:4], "x.bias": a[4:]})["biases"] == int(a[4:].sum()) / len(a[4:])
    nothing = torch.zeros_like(a)
    assert m.jaccard(nothing, nothing) == 1.0 and m.jaccard(a, nothing) == 0.0
    assert m.index_bytes(a) == 1 and m.index_bytes(nothing) == 0
    assert m.index_bytes(torch.arange(6400) < 10) == 40 and m.index_bytes(torch.arange(6400) < 1000) == 800


# ---- files


@pytest.fixture
def saved(tmp_path):
    draw = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(shape, generator=draw) < 0.3 for name, shape in SHAPES.items()}
    masks["norm.bias"][:] = True
    masks["mlp.0.bias"][:] = False
    about = {"strategy": "random", "sparsity": 0.7, "scope": "global", "seed": 4}
    save_mask(tmp_path / "mask.safetensors", masks, about)
    return masks, about, tmp_path / "mask.safetensors"


def test_mask_file_comes_back_with_its_provenance(saved):
    masks, about, path = saved
    loaded, found = load_mask(path, SHAPES)
    assert torch.equal(loaded, torch.cat([mask.reshape(-1) for mask in masks.values()]))
    other = dict(reversed(SHAPES.items()))  # in the order that is asked for
    assert torch.equal(load_mask(path, other)[0], torch.cat([masks[name].reshape(-1) for name in other]))
    assert sparsity_of(path) == round(1 - loaded.double().mean().item(), 4)
    assert {key: found[key] for key in about} == about
    assert found["kept"] == {name: int(mask.sum()) for name, mask in masks.items()}
    assert found["kept_per_layer"] == m.kept_per_layer(masks) and found["kept_apart"] == m.kept_apart(masks)
    assert sum(bits.numel() for bits in load_file(path).values()) == sum(-(-b.numel() // 8) for b in masks.values())
    assert [f.name for f in path.parent.iterdir()] == ["mask.safetensors"]


def test_mask_of_another_model_is_refused_by_name(saved):
    _, _, path = saved
    with pytest.raises(UsageError, match=r"another model: mlp\.0\.weight is 8x6 in the mask, 9x6 in the model$"):
        load_mask(path, SHAPES | {"mlp.0.weight": (9, 6)})
    with pytest.raises(UsageError, match=r"mlp\.4\.bias is missing in the mask, 3 in the model$"):
        load_mask(path, SHAPES | {"mlp.4.bias": (3,)})
    with pytest.raises(UsageError, match=r"norm\.bias is 6 in the mask, missing in the model$"):
        load_mask(path, {name: shape for name, shape in SHAPES.items() if name != "norm.bias"})
    with pytest.raises(UsageError, match=r" and 2 more$"):
        load_mask(path, {name: (1, *shape) for name, shape in SHAPES.items()})


def test_damaged_mask_files_are_refused(saved, tmp_path):
    _, _, path = saved
    raw = path.read_bytes()
    with pytest.raises(UsageError, match="there is no mask"):
        load_mask(tmp_path / "other.safetensors", SHAPES)
    for broken in (raw[: len(raw) // 2], raw[:-1], b"", b"no safetensors at all"):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match="is damaged"):
            load_mask(path, SHAPES)
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 16]))
    with pytest.raises(UsageError, match="SHA-256"):
        load_mask(path, SHAPES)
    save_file({"norm.bias": torch.ones(6)}, path)
    with pytest.raises(UsageError, match="but no mask"):
        load_mask(path, SHAPES)
    save_file(
        {"norm.bias": torch.ones(1, dtype=torch.uint8)},
        path,
        metadata={"mask": json.dumps({"shapes": {"norm.bias": [6]}, "kept": {}, "sha256": "0"})},
    )
    with pytest.raises(UsageError, match="SHA-256"):
        load_mask(path, {"norm.bias": (6,)})
