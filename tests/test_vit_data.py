"""vit_sparse_fl's data: the demo, CIFAR-100's files and how they break, splits, augmentation, clients."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comparing import check_partition

from common.cli import UsageError
from common.seeding import stream
from common.sharding import class_counts
from vit_sparse_fl import data, demo_images, flags, train_federated


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A CIFAR-100 of 400 + 100 images."""
    monkeypatch.setattr(data, "CIFAR_COUNTS", {"train": 400, "test": 100})
    monkeypatch.setenv("FEDQUARTET_DATA", str(tmp_path))
    generator = stream(0, "small cifar")
    return {
        "train_images": generator.integers(0, 256, (400, 3, 32, 32), dtype=np.uint8),
        "train_labels": np.repeat(np.arange(100, dtype=np.uint8), 4),
        "test_images": generator.integers(0, 256, (100, 3, 32, 32), dtype=np.uint8),
        "test_labels": np.arange(100, dtype=np.uint8),
    }


def refuse(match, *args, **kwargs):
    with pytest.raises(UsageError, match=match) as error:
        data.load_images(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------- demo


def test_the_demo_has_the_same_pixels_on_every_machine():
    # Any change of the pictures changes the figures of every demo run.
    assert data.load_images("demo", seed=3).fingerprint["sha256"] == {
        "train_images": "350923671ef91f706ece8432b43defcc6e43e1d9360bded05dbe4c23aab69ddb",
        "train_labels": "fb2b60d4e9643a223e4cd4b663fbb76884de02ae7e73ea20fa609aa9c7b264a0",
        "test_images": "b5b55e2c552ec7113c717c08efedbd3b11de9eb2610e0f2a9fa8ae3187b3bb81",
        "test_labels": "10f923f89c9a99234be36ad5496fdc84803c694d1768874f56d658a626dd988d",
    }


# --------------------------------------------------------------------------------------- splits and classes


def labelled(images, labels):
    """Pairs (an image's bytes, its label)."""
    return [(image.numpy().tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]


def test_the_validation_split_is_stratified_disjoint_and_follows_the_seed():
    first, again, other = (data.load_images("demo", seed) for seed in (0, 0, 1))
    assert torch.equal(first.validation, again.validation) and torch.equal(first.train_labels, again.train_labels)
    assert not torch.equal(first.validation, other.validation)
    images, labels, _, _ = demo_images.demo_images()
    both = labelled(first.train, first.train_labels) + labelled(first.validation, first.validation_labels)
    assert len(both) == len(labels) and dict(both) == dict(labelled(torch.tensor(images), labels))
    larger = data.load_images("demo", 0, val_split=0.2)
    assert torch.equal(torch.bincount(larger.validation_labels), torch.full((100,), 16))


def test_a_range_of_classes_is_numbered_from_0_and_shares_the_split():
    whole, half = data.load_images("demo", 5), data.load_images("demo", 5, classes=range(50, 100))
    assert half.n_classes == 50 and half.fingerprint["classes"] == [50, 100]
    assert half.fingerprint["counts"] == {"train": 3600, "validation": 400, "test": 1000}
    for name in ("train", "validation", "test"):
        labels = getattr(whole, f"{name}_labels")
        assert torch.equal(getattr(half, name), getattr(whole, name)[labels >= 50])
        assert torch.equal(getattr(half, f"{name}_labels"), labels[labels >= 50] - 50)
    two = data.load_images("demo", 5, classes={7, 2})
    assert two.n_classes == 2 and two.fingerprint["classes"] == [2, 7] and set(two.train_labels.tolist()) == {0, 1}
    assert torch.equal(two.test[two.test_labels == 1], whole.test[whole.test_labels == 7])


def test_the_rest_are_the_classes_that_the_start_was_not_trained_on(tmp_path):
    args = SimpleNamespace(classes="rest", init_from=str(tmp_path), dataset="demo")
    for given, rest in (([25, 75], {*range(25), *range(75, 100)}), ([0, 50], {*range(50, 100)})):
        (tmp_path / "run.json").write_text(json.dumps({"args": {"classes": given}}))
        assert data.classes_of(args) == rest
    assert data.classes_of(SimpleNamespace(classes=(3, 5))) == range(3, 5)
    for given, words in ((None, "is no run on --classes A:B"), ([0, 100], "trained on all 100 classes")):
        (tmp_path / "run.json").write_text(json.dumps({"args": {"classes": given}}))
        with pytest.raises(UsageError, match=words):
            data.classes_of(args)
    with pytest.raises(UsageError, match="--init-from RUN"):
        flags.parse(train_federated.build_parser(), ["--classes", "rest"])


# --------------------------------------------------------------------------------------------------- files


def test_an_npz_is_read(small, tmp_path):
    path = tmp_path / "cifar100.npz"
    np.savez_compressed(path, fine_to_coarse=np.zeros(100), **small)
    splits = data.load_images("cifar100", 0, val_split=0.25)  # the folder from FEDQUARTET_DATA
    assert splits.fingerprint["source"] == str(path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [300, 100, 100]
    assert torch.equal(splits.test, torch.from_numpy(small["test_images"]))
    assert torch.equal(splits.validation_labels.bincount(), torch.ones(100, dtype=torch.int64))
    truth = dict(labelled(torch.from_numpy(small["train_images"]), small["train_labels"]))
    assert all(truth[image] == label for image, label in labelled(splits.train, splits.train_labels))


def test_an_npz_that_is_damaged_or_something_else(small, tmp_path):
    path = tmp_path / "cifar100.npz"
    np.savez(path, **small)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    path.write_bytes(bytes(content))
    assert str(path) in refuse("cannot read .*: get the file again", "cifar100", 0)
    np.savez(path, **{k: v for k, v in small.items() if k != "test_labels"})
    refuse("test_labels.*it must hold", "cifar100", 0)
    for key, wrong, found in (
        ("train_images", small["train_images"].transpose(0, 2, 3, 1), r"uint8 \(400, 32, 32, 3\), not uint8 \(400, 3"),
        ("test_images", small["test_images"] / np.float32(255), r"test_images is float32"),
        ("train_labels", small["train_labels"] + np.uint8(1), "train_labels"),
        ("train_labels", np.array([None] * 400), "cannot read"),  # numpy would have to unpickle it
    ):
        np.savez(path, **{**small, key: wrong})
        refuse(found, "cifar100", 0)


def test_torchvisions_own_folder_is_read(small, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    files = {}
    for split in ("train", "test"):
        labels = small[f"{split}_labels"].tolist()
        files[split] = {"data": small[f"{split}_images"].reshape(len(labels), -1), "fine_labels": labels}
    files["meta"] = {"fine_label_names": [str(c) for c in range(100)]}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    refuse("cifar-100-python is incomplete or damaged .*: remove it", "cifar100", 0)  # not its checksums
    monkeypatch.setattr(CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    from_folder = data.load_images("cifar100", 0)
    assert from_folder.fingerprint["source"] == str(folder)
    np.savez(tmp_path / "cifar100.npz", **small)
    from_npz = data.load_images("cifar100", 0)
    assert from_folder.fingerprint["sha256"] == from_npz.fingerprint["sha256"]
    assert torch.equal(from_folder.train, from_npz.train)


# ------------------------------------------------------------------------------------------------- batches


def make_images(n, size=32):
    return torch.from_numpy(stream(0, "images").integers(0, 256, (n, 3, size, size), dtype=np.uint8))


@pytest.mark.parametrize("size", [16, 224])
def test_prepare_resizes_like_pillow(size):
    """Pillow's bicubic, on float images so that nothing is rounded, is what torchvision's transforms of DINO call."""
    image = pytest.importorskip("PIL.Image")
    images = make_images(2)
    out = data.prepare(images, size)
    assert out.shape == (2, 3, size, size)
    for b, c in ((0, 0), (1, 2)):
        plane = image.fromarray(images[b, c].numpy().astype(np.float32)).resize((size, size), image.BICUBIC)
        expected = (np.asarray(plane) / 255 - data.MEAN[c]) / data.STD[c]
        assert np.abs(out[b, c].numpy() - expected).max() < 1e-4


# ------------------------------------------------------------------------------------------------- clients


def dealt(labels, sharding, num_clients, seed=0, **flags):
    given = {"nc": 10, "alpha": 0.5, "batch_size": 8, **flags}
    return data.deal(SimpleNamespace(sharding=sharding, num_clients=num_clients, seed=seed, **given), labels)


def test_clients_are_dealt_by_the_flags_and_the_seed():
    labels = data.load_images("demo", 0).train_labels
    for sharding in flags.SHARDINGS:
        parts, notes = dealt(labels, sharding, 20, seed=1)
        check_partition(parts, 7200)
        assert len(notes) == 1 and notes[0].startswith(f"20 clients, {min(map(len, parts))} images or more, ")
        again, other = dealt(labels.numpy(), sharding, 20, seed=1)[0], dealt(labels, sharding, 20, seed=2)[0]
        first, again, other = ([part.tolist() for part in parts] for parts in (parts, again, other))
        assert first == again != other
    has = class_counts(dealt(labels, "non_iid", 20)[0], labels, 100) > 0
    assert (has.sum(axis=1) == 10).all() and (has.sum(axis=0) == 2).all()
    for batch in (8, 20):  # a batch at least
        assert min(map(len, dealt(labels, "dirichlet", 100, alpha=0.01, batch_size=batch)[0])) == batch


def test_mixup_mixes_each_image_and_label_with_another_of_the_batch():
    pixels, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 4, 4])
    x, y = data.mixed(pixels, labels, 5, 0.7, stream(3, "mixup"))
    again = stream(3, "mixup")
    lam, order = again.beta(0.7, 0.7), again.permutation(6).tolist()
    for i, j in enumerate(order):
        assert torch.allclose(x[i], lam * pixels[i] + (1 - lam) * pixels[j])
        wanted = torch.zeros(5)
        wanted[labels[i]] += lam
        wanted[labels[j]] += 1 - lam
        assert torch.allclose(y[i], wanted)
