"""vit_sparse_fl's data: the demo, CIFAR-100's files and how they break, splits, augmentation, clients."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.cli import UsageError
from common.seeding import stream
from common.sharding import check, class_counts
from vit_sparse_fl import data, demo_images, flags, train_federated

KEYS = ("train_images", "train_labels", "test_images", "test_labels")


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


def test_the_demo_holds_what_is_promised():
    splits = data.load_images("demo", seed=0)
    for name, each in (("train", 72), ("validation", 8), ("test", 20)):
        images, labels = getattr(splits, name), getattr(splits, f"{name}_labels")
        assert images.dtype == torch.uint8 and images.shape == (100 * each, 3, 32, 32) and images.is_contiguous()
        assert labels.dtype == torch.int64 and torch.equal(torch.bincount(labels), torch.full((100,), each))
        assert len(labels[:512].unique()) > 90  # not class after class
    facts = json.loads(json.dumps(splits.fingerprint))
    assert facts["counts"] == {"train": 7200, "validation": 800, "test": 2000} and facts["dataset"] == "demo"
    assert facts["source"] == "generated" and facts["classes"] == [0, 100] and facts["val_split"] == 0.1
    moved = splits.to("meta")
    assert moved.train.is_meta and moved.test_labels.is_meta and moved.n_classes == 100


def test_the_demo_has_the_same_pixels_on_every_machine():
    # Any change of the pictures changes the figures of every demo run.
    assert data.load_images("demo", seed=3).fingerprint["sha256"] == {
        "train_images": "350923671ef91f706ece8432b43defcc6e43e1d9360bded05dbe4c23aab69ddb",
        "train_labels": "fb2b60d4e9643a223e4cd4b663fbb76884de02ae7e73ea20fa609aa9c7b264a0",
        "test_images": "b5b55e2c552ec7113c717c08efedbd3b11de9eb2610e0f2a9fa8ae3187b3bb81",
        "test_labels": "10f923f89c9a99234be36ad5496fdc84803c694d1768874f56d658a626dd988d",
    }


def test_the_demo_has_no_image_twice_and_cannot_be_written_to():
    train, _, test, _ = demo_images.demo_images()
    assert len({image.tobytes() for image in train} | {image.tobytes() for image in test}) == 10_000
    with pytest.raises(ValueError, match="read-only"):
        train[0] = 0
    data.load_images("demo", seed=0).train.zero_()  # a copy
    assert demo_images.demo_images()[0].any()


def test_shapes_are_their_own_mirror_images_and_differ():
    line = np.linspace(-1.1, 1.1, 23, dtype=np.float32)
    v, u = np.meshgrid(line, line, indexing="ij")
    drawn = [demo_images.inside(shape, u, v) > 0.01 for shape in range(demo_images.SHAPES)]
    for i, one in enumerate(drawn):
        assert np.array_equal(one, one[:, ::-1]) and one.sum() > 30
        assert all((one != other).mean() > 0.05 for other in drawn[:i])
    assert len(set(demo_images.COLOURS)) == 10


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
    whole, half = data.load_images("demo", 5), data.load_images("demo", 5, classes=(50, 100))
    assert half.n_classes == 50 and half.fingerprint["classes"] == [50, 100]
    assert half.fingerprint["counts"] == {"train": 3600, "validation": 400, "test": 1000}
    for name in ("train", "validation", "test"):
        labels = getattr(whole, f"{name}_labels")
        assert torch.equal(getattr(half, name), getattr(whole, name)[labels >= 50])
        assert torch.equal(getattr(half, f"{name}_labels"), labels[labels >= 50] - 50)
    same = data.load_images("demo", 5, classes=frozenset(range(50, 100)))
    assert torch.equal(same.train, half.train) and torch.equal(same.test_labels, half.test_labels)
    two = data.load_images("demo", 5, classes=frozenset([7, 2]))
    assert two.n_classes == 2 and two.fingerprint["classes"] == [2, 7] and set(two.train_labels.tolist()) == {0, 1}
    assert torch.equal(two.test[two.test_labels == 1], whole.test[whole.test_labels == 7])
    one = data.load_images("demo", 5, classes=(3, 4))
    assert one.n_classes == 1 and not one.train_labels.any()


def test_the_rest_are_the_classes_that_the_start_was_not_trained_on(tmp_path):
    args = SimpleNamespace(classes="rest", init_from=str(tmp_path), dataset="demo")
    for given, rest in (([25, 75], {*range(25), *range(75, 100)}), ([0, 50], {*range(50, 100)})):
        (tmp_path / "run.json").write_text(json.dumps({"args": {"classes": given}}))
        assert data.classes_of(args) == rest
    assert data.classes_of(SimpleNamespace(classes=(3, 5))) == (3, 5)
    for given, words in ((None, "is no run on --classes A:B"), ([0, 100], "trained on all 100 classes")):
        (tmp_path / "run.json").write_text(json.dumps({"args": {"classes": given}}))
        with pytest.raises(UsageError, match=words):
            data.classes_of(args)
    with pytest.raises(UsageError, match="--init-from RUN, which is not given"):
        flags.parse(train_federated.build_parser(), ["--classes", "rest"])


def test_arguments_out_of_range():
    for classes in ((-1, 5), (5, 5), (50, 101)):
        refuse(rf"classes {classes[0]}:{classes[1]} .* within 0:100", "demo", 0, classes=classes)
    for share in (0.0, 1.0, -0.1, 1e-9, float("nan")):
        refuse("--val-split .* choose a share between 0 and 1", "demo", 0, val_split=share)


# --------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "place, save",
    [
        ("cifar100.npz", np.savez),
        ("cifar100/cifar100.npz", np.savez_compressed),
        ("cifar-100/cifar100.npz", np.savez),
    ],
)
def test_an_npz_is_read(small, tmp_path, place, save):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    save(path, fine_to_coarse=np.zeros(100), **small)
    splits = data.load_images("cifar100", 0, val_split=0.25)  # the folder from FEDQUARTET_DATA
    assert splits.fingerprint["source"] == str(path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [300, 100, 100]
    assert torch.equal(splits.test, torch.from_numpy(small["test_images"]))
    assert torch.equal(splits.validation_labels.bincount(), torch.ones(100, dtype=torch.int64))
    truth = dict(labelled(torch.from_numpy(small["train_images"]), small["train_labels"]))
    assert all(truth[image] == label for image, label in labelled(splits.train, splits.train_labels))


def test_an_npz_with_labels_as_int64_is_the_same_data(small, tmp_path):
    np.savez(tmp_path / "cifar100.npz", **small)
    first = data.load_images("cifar100", 0)
    np.savez(tmp_path / "cifar100.npz", **{k: v.astype(np.int64) if "labels" in k else v for k, v in small.items()})
    assert data.load_images("cifar100", 0).fingerprint == first.fingerprint


def test_a_truncated_npz(small, tmp_path):
    path = tmp_path / "cifar100.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, **small)
        whole = path.read_bytes()
        for kept in (0, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:kept])
            assert str(path) in refuse("cannot read .*: get the file again", "cifar100", 0)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1  # one bit
        path.write_bytes(bytes(flipped))
        refuse("cannot read .*: get the file again", "cifar100", 0)


def test_an_npz_that_is_something_else(small, tmp_path):
    path = tmp_path / "cifar100.npz"
    for key in KEYS:
        np.savez(path, **{k: v for k, v in small.items() if k != key})
        refuse(f"lacks {key}: it must hold", "cifar100", 0)
    for key, wrong, found in (
        ("train_images", small["train_images"][:399], r"uint8 \[399, 3, 32, 32\], not uint8 \[400, 3, 32, 32\]"),
        ("train_images", small["train_images"].transpose(0, 2, 3, 1), r"uint8 \[400, 32, 32, 3\]"),
        ("test_images", small["test_images"] / np.float32(255), r"test_images is float32"),
        ("test_labels", small["test_labels"][:, None], r"test_labels is uint8 \[100, 1\]"),
        ("train_labels", small["train_labels"].astype(float), "train_labels is float64"),
        ("train_labels", small["train_labels"] + np.uint8(1), "train_labels goes from 1 to 100, not from 0 to 99"),
        ("test_labels", small["test_labels"].astype(np.int8) - np.int8(1), "goes from -1 to 98"),
    ):
        np.savez(path, **{**small, key: wrong})
        refuse(found, "cifar100", 0)
    np.savez(path, **{**small, "train_labels": np.array([None] * 400)})  # numpy would have to unpickle it
    refuse("cannot read", "cifar100", 0)
    path.write_bytes(b"")
    np.save(path.open("wb"), small["train_images"])
    refuse("cannot read", "cifar100", 0)
    np.savez(path, **small)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content + b"!" * (name == "test_labels.npy"))
    refuse("test_labels is followed by other bytes", "cifar100", 0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"not an array")
    refuse("cannot read", "cifar100", 0)


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


def test_no_data_and_no_network(small, tmp_path, monkeypatch):
    message = refuse("no CIFAR-100 under", "cifar100", 0)
    assert str(tmp_path) in message and "cifar100.npz" in message and "--dataset demo" in message
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("torchvision.datasets.CIFAR100.url", "http://127.0.0.1:9/nothing.tar.gz")
    refuse("no CIFAR-100 under", "cifar100", 0, data_root=tmp_path / "new")
    assert os.listdir(tmp_path) == []  # nothing is written


def test_a_download_that_breaks_leaves_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "answers", lambda address: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR100.url", "http://127.0.0.1:9/nothing.tar.gz")
    refuse("torchvision could not download CIFAR-100 into .*: try again", "cifar100", 0)
    assert os.listdir(tmp_path) == []


def test_a_download_is_put_in_place_whole(small, tmp_path, monkeypatch):
    def download(self):
        Path(self.root, "cifar-100-python").mkdir()
        Path(self.root, "cifar-100-python.tar.gz").touch()
        raise SystemExit  # what follows is torchvision's own reading

    monkeypatch.setattr("torchvision.datasets.CIFAR100.download", download)
    with pytest.raises(SystemExit):
        data.download_cifar100(tmp_path)
    assert os.listdir(tmp_path) == []  # broken off: nothing stays
    monkeypatch.setattr("torchvision.datasets.CIFAR100.__init__", lambda self, root, download: _unpack(root))
    data.download_cifar100(tmp_path)
    assert os.listdir(tmp_path) == ["cifar-100-python"]
    data.download_cifar100(tmp_path)  # another process was faster
    assert (tmp_path / "cifar-100-python" / "train").read_text() == "1"


def _unpack(root):
    Path(root, "cifar-100-python").mkdir()
    Path(root, "cifar-100-python", "train").write_text("1")


# ------------------------------------------------------------------------------------------------- batches


def make_images(n, size=32):
    return torch.from_numpy(stream(0, "images").integers(0, 256, (n, 3, size, size), dtype=np.uint8))


def normalised(images):
    return (images.double() / 255 - torch.tensor(data.MEAN).view(3, 1, 1)) / torch.tensor(data.STD).view(3, 1, 1)


def test_prepare_normalises():
    images = make_images(5)
    out = data.prepare(images, 32)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), normalised(images), atol=1e-5)


@pytest.mark.parametrize("size", [16, 48, 224])
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


def test_augment_is_a_crop_of_the_padded_image_and_perhaps_flipped():
    images = make_images(64)
    out = data.augment(images, 32, stream(0, "augment", 3, 1))
    padded = functional.pad(images, (4, 4, 4, 4))
    seen = []
    for i in range(64):
        for top in range(9):
            for left in range(9):
                crop = padded[i, :, top : top + 32, left : left + 32]
                for flipped, view in enumerate((crop, crop.flip(-1))):
                    if torch.equal(data.prepare(view[None], 32)[0], out[i]):
                        seen.append((i, top, left, flipped))
    assert [i for i, *_ in seen] == list(range(64))  # exactly one crop each
    places = np.array(seen)[:, 1:]
    assert places.min(axis=0).tolist() == [0, 0, 0] and places.max(axis=0).tolist() == [8, 8, 1]
    assert 16 < places[:, 2].sum() < 48 and len(np.unique(places[:, :2], axis=0)) > 30


def test_augment_follows_its_generator_and_resizes_afterwards():
    images = make_images(8)
    before = images.clone()
    first, again, other = (data.augment(images, 32, stream(0, "augment", round)) for round in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    larger = data.augment(images, 64, stream(0, "augment", 1))
    expected = functional.interpolate(first, size=(64, 64), mode="bicubic", antialias=True)
    assert larger.shape == (8, 3, 64, 64) and torch.equal(larger, expected)
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_augment_on_cuda_sees_the_same_pictures():
    images = make_images(16)
    for size in (32, 96):
        on_cpu = data.augment(images, size, stream(0, "augment"))
        on_gpu = data.augment(images.cuda(), size, stream(0, "augment"))
        assert on_gpu.is_cuda and torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-4)


# ------------------------------------------------------------------------------------------------- clients


def dealt(labels, sharding, num_clients, seed=0, **flags):
    given = {"nc": 10, "alpha": 0.5, "batch_size": 8, **flags}
    return data.deal(SimpleNamespace(sharding=sharding, num_clients=num_clients, seed=seed, **given), labels)


def test_clients_are_dealt_by_the_flags_and_the_seed():
    labels = data.load_images("demo", 0).train_labels
    for sharding in flags.SHARDINGS:
        parts, notes = dealt(labels, sharding, 20, seed=1)
        check(parts, 7200)
        assert notes == []
        again, other = dealt(labels.numpy(), sharding, 20, seed=1)[0], dealt(labels, sharding, 20, seed=2)[0]
        first, again, other = ([part.tolist() for part in parts] for parts in (parts, again, other))
        assert first == again != other
    has = class_counts(dealt(labels, "non_iid", 20)[0], labels, 100) > 0
    assert (has.sum(axis=1) == 10).all() and (has.sum(axis=0) == 2).all()
    for batch in (8, 20):  # a batch at least
        assert min(map(len, dealt(labels, "dirichlet", 100, alpha=0.01, batch_size=batch)[0])) == batch


def test_clients_that_cannot_be_dealt():
    labels = np.repeat(np.arange(100), 5)
    for sharding, clients, given, match in (
        ("non_iid", 100, {"nc": 101}, "--nc 101 is outside 1 to 100"),
        ("non_iid", 3, {"nc": 30}, "--num-clients 3 x --nc 30 is 90: 10 of 100 classes have no client: "),
        ("iid", 501, {}, "500 images cannot be dealt to 501 clients: lower --num-clients"),
        ("dirichlet", 10, {"alpha": 0.0}, "--alpha 0.0 must be a positive number"),
    ):
        with pytest.raises(UsageError, match=match):
            dealt(labels, sharding, clients, **given)


def test_a_client_with_fewer_images_than_a_batch():
    data.check_batch_size([64, 70, 64], 64)
    with pytest.raises(UsageError, match="client 1 has 3 images, fewer than --batch-size 64, as have 2 of 3 clients"):
        data.check_batch_size([64, 3, 63], 64)


# ----------------------------------------------------------------------------------------------- real data


def test_the_real_data_is_the_published_one():
    root = os.environ.get("FEDQUARTET_DATA", "")
    if not any((Path(root) / place).is_file() for place in data.PLACES):
        pytest.skip("no cifar100.npz under FEDQUARTET_DATA")
    splits = data.load_images("cifar100", 0)
    sha256 = splits.fingerprint["sha256"]
    assert sha256["train_images"] == "de64658905c6b161606e3649ddafce7cf86c7634a0cf9116d518e64ef46a33c5"
    assert sha256["test_images"] == "14b806336dadb7a6f5dc292f1f40dd3e7f25f29087f08f34094bf909a73fa961"
    assert torch.equal(splits.train_labels.bincount(), torch.full((100,), 450))
    assert torch.equal(splits.validation_labels.bincount(), torch.full((100,), 50))
    assert len(splits.test) == 10_000


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
    logits = torch.randn(6, 5)
    parts = [functional.cross_entropy(logits, some, label_smoothing=0.1) for some in (labels, labels[order])]
    both = functional.cross_entropy(logits, y, label_smoothing=0.1)
    assert both.item() == pytest.approx((lam * parts[0] + (1 - lam) * parts[1]).item(), rel=1e-5)
