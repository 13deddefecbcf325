"""CIFAR-100 (or the demo images) as uint8 tensors, dealt to clients; augmentation in batches, on the device."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch.nn import functional

from common import sharding as shards
from common.cli import UsageError
from common.hub import answers, reading
from common.seeding import stream
from common.text import data_folder
from vit_sparse_fl import demo_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which DINO was trained with
PAD = 4  # pixels on each side before the random crop
CLASSES = demo_images.CLASSES  # CIFAR-100's too
CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
PLACES = ("cifar100.npz", "cifar100/cifar100.npz", "cifar-100/cifar100.npz")


@dataclasses.dataclass(frozen=True)
class ImageSplits:
    """Images uint8 [n, 3, 32, 32] (RGB) and labels int64 [n] from 0 of three splits; fingerprint: for run.json."""

    train: torch.Tensor
    train_labels: torch.Tensor
    validation: torch.Tensor
    validation_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    n_classes: int
    fingerprint: dict

    def to(self, device):
        """The same splits with their tensors on `device`."""
        tensors = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


def load_images(dataset, seed, val_split=0.1, classes=None, data_root=None):
    """The data of a run as `ImageSplits`.

    dataset: "cifar100", which is under `common.text.data_folder` one of PLACES or torchvision's own folder
    cifar-100-python, else torchvision downloads that; "demo": generated.
    val_split: the share of the training images that is held out, stratified, by `seed`.
    classes: those that are kept, numbered from 0 (None: all). The split is made before, so that runs on different
    classes hold out the same images.
    Raises UsageError for missing data, a file that is not CIFAR-100, and a share or classes out of range.
    """
    if dataset == "demo":
        arrays, source = demo_images.demo_images(), "generated"
    else:
        arrays, source = _cifar100(data_folder(data_root))
    chosen = np.array(sorted(range(CLASSES) if classes is None else classes))
    low, high = int(chosen[0]), int(chosen[-1]) + 1
    if high > CLASSES:
        raise UsageError(f"the classes up to {high} are not in {dataset}: choose FROM:TO within 0:{CLASSES}")
    images, labels, test, test_labels = arrays
    held_out = round(val_split * len(labels))
    if not 0 < held_out < len(labels):
        raise UsageError(f"--val-split {val_split} of {len(labels)} training images: choose a share between 0 and 1")

    kept, validation = shards.stratified(
        labels, [len(labels) - held_out, held_out], stream(seed, "validation split"), what="training images"
    )
    splits = {}
    for name, pixels, truth, rows in (
        ("train", images, labels, kept),
        ("validation", images, labels, validation),
        ("test", test, test_labels, np.arange(len(test_labels))),
    ):
        rows = rows[np.isin(truth[rows], chosen)]
        if len(rows) == 0:
            raise UsageError(f"no image of the classes in the {name} split: raise --val-split ({val_split})")
        splits[name] = torch.from_numpy(pixels[rows])
        splits[f"{name}_labels"] = torch.from_numpy(np.searchsorted(chosen, truth[rows]).astype(np.int64))
    contents = {name: np.ascontiguousarray(array, dtype=np.uint8) for name, array in zip(ARRAYS, arrays, strict=True)}
    return ImageSplits(
        **splits,
        n_classes=len(chosen),
        fingerprint={
            "dataset": dataset,
            "source": source,
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
            "classes": [low, high] if len(chosen) == high - low else chosen.tolist(),
            "val_split": val_split,
            "counts": {name: len(splits[name]) for name in ("train", "validation", "test")},
        },
    )


def classes_of(args):
    """What `load_images` keeps: --classes, of "rest" the classes that the run of --init-from was not trained on.

    Raises UsageError where that run does not say, or had all of them.
    """
    if args.classes != "rest":
        return args.classes and range(*args.classes)
    try:
        low, high = json.loads(Path(args.init_from, "run.json").read_text(encoding="utf-8"))["args"]["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        message = f"--classes rest: --init-from {args.init_from} is no run on --classes A:B: give its folder"
        raise UsageError(message) from None
    if not (rest := {*range(CLASSES)} - {*range(low, high)}):
        raise UsageError(f"--classes rest: {args.init_from} was trained on all {CLASSES} classes: give A:B")
    return rest


def _cifar100(root):
    """((train_images, train_labels, test_images, test_labels), where they are from)."""
    for place in PLACES:
        if (root / place).is_file():
            path = root / place
            with reading(f"cannot read {path}", f"it must hold {', '.join(ARRAYS)}: get the file again"):
                with np.load(path, allow_pickle=False) as file:
                    arrays = [file[name] for name in ARRAYS]
            break
    else:
        arrays, path = _torchvision(root)
    for name, array in zip(ARRAYS, arrays, strict=True):
        count, pixels = CIFAR_COUNTS[name.partition("_")[0]], name.endswith("images")
        wanted = (count, 3, 32, 32) if pixels else (count,)
        if array.shape != wanted or array.max() >= (256 if pixels else CLASSES) or array.dtype.kind not in "iu":
            raise UsageError(f"{path}: {name} is {array.dtype} {array.shape}, not uint8 {wanted}: get the file again")
    return arrays, str(path)


def _torchvision(root):
    """The same four arrays from torchvision's own folder, downloaded where it is not there, and where it is."""
    from torchvision.datasets import CIFAR100  # only here: it takes a second to import

    folder = root / CIFAR100.base_folder
    if not folder.is_dir() and not answers(CIFAR100.url):  # torchvision itself would wait for minutes
        raise UsageError(
            f"no CIFAR-100 under {root} and it cannot be downloaded: put cifar100.npz or torchvision's folder "
            f"{folder.name} there, or give --data-root, or take --dataset demo"
        )
    arrays = []
    with reading(f"{folder} is incomplete or damaged", "remove it and get it again, or put cifar100.npz there"):
        if not folder.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".cifar-100.lock"):  # of several processes one downloads
                CIFAR100(str(root), download=True)
        for train in (True, False):  # torchvision checks the files' MD5 before it reads them
            split = CIFAR100(str(root), train=train)
            arrays += [np.ascontiguousarray(split.data.transpose(0, 3, 1, 2)), np.array(split.targets, dtype=np.uint8)]
    return arrays, folder


def prepare(images, image_size):
    """Images as the model takes them: uint8 [B, 3, H, W] -> float32 [B, 3, S, S], normalised and resized.

    Bicubic with antialiasing: when enlarging that changes nothing but the kernel's parameter, to the -0.5 of PIL, with
    which DINO was trained (torch has -0.75 without it).
    """
    mean, std = torch.tensor((MEAN, STD), device=images.device)
    scale, shift = 1 / (255 * std), mean / std
    pixels = images.to(torch.float32) * scale[:, None, None] - shift[:, None, None]
    if pixels.shape[-2:] != (image_size, image_size):
        pixels = functional.interpolate(pixels, size=(image_size, image_size), mode="bicubic", antialias=True)
    return pixels  # [B, 3, S, S]


def augment(images, image_size, generator):
    """`prepare` of uint8 [B, 3, H, W] after a random crop (4 black pixels on each side) and a random horizontal flip.

    generator: numpy's, two draws, on the CPU whatever the device, so that both devices see the same pictures.
    """
    batch, channels, height, width = images.shape
    corner = torch.from_numpy(generator.integers(2 * PAD + 1, size=(2, batch, 1))).to(images.device)
    flip = torch.from_numpy(generator.integers(2, size=(batch, 1), dtype=np.int8)).to(images.device).bool()
    across = torch.arange(width, device=images.device)
    rows = corner[0] + torch.arange(height, device=images.device)  # [B, H]
    columns = corner[1] + torch.where(flip, across.flip(0), across)  # [B, W]
    padded = functional.pad(images, (PAD, PAD, PAD, PAD))  # [B, 3, H + 8, W + 8]
    source = (rows[:, :, None] * padded.shape[-1] + columns[:, None, :]).view(batch, 1, height * width)
    crops = padded.flatten(2).gather(2, source.expand(batch, channels, height * width))  # [B, 3, H * W]
    return prepare(crops.view(images.shape), image_size)


def mixed(pixels, labels, n_classes, alpha, generator):
    """mixup (Zhang et al. 2018): (pixels [B, 3, S, S], labels as shares of classes [B, C]) of a batch and its like.

    x = lam x_i + (1 - lam) x_j,  y = lam onehot(y_i) + (1 - lam) onehot(y_j),  j a permutation, lam ~ Beta(a, a)
    """
    lam = generator.beta(alpha, alpha)
    order = torch.from_numpy(generator.permutation(len(labels))).to(labels.device)
    shares = functional.one_hot(labels, n_classes).to(pixels.dtype)  # [B, C]
    return tuple(lam * t + (1 - lam) * t[order] for t in (pixels, shares))


def deal(args, labels):
    """(parts, notes): the images of each client (sorted int64 arrays; in central training all) and lines for the log.

    Args: labels: int64 [n]. Raises UsageError where a client has fewer images than a batch.
    """
    labels, generator, notes = np.asarray(labels), stream(args.seed, "sharding"), []
    how = vars(args).get("sharding")
    if how is None:
        parts = [np.arange(len(labels))]
    elif how == "iid":
        parts = shards.iid(len(labels), args.num_clients, generator, what="images")
    elif how == "non_iid":
        parts = shards.classes(labels, args.num_clients, args.nc, generator, what="images")
    else:
        parts, notes = shards.dirichlet(labels, args.num_clients, args.alpha, generator, args.batch_size, what="images")
    fewest, k = min((len(rows), k) for k, rows in enumerate(parts))
    if fewest < args.batch_size:
        raise UsageError(
            f"client {k} has {fewest} images, fewer than --batch-size {args.batch_size}: lower that or --num-clients, "
            "or deal the images more evenly"
        )
    if how:
        classes = [len(np.unique(labels[rows])) for rows in parts]
        have = f"{fewest} images or more, {min(classes)} to {max(classes)} classes each"
        notes = [*notes, f"{len(parts)} clients, {have}"]
    return parts, notes
