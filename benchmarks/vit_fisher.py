"""What a mask's sensitivities cost: the per-sample Fisher of a ViT, over a batch-1 loop and over a training epoch.

    python benchmarks/vit_fisher.py
    python benchmarks/vit_fisher.py --model facebook/dino-vits16 --image-size 224 --samples 16

`loop` and `vmap` are the methods of common/fisher.py. The batch-1 loop is what it has to equal: `.backward()` and a
square for each image alone. The epoch trains on the same images once: batches of 64, SGD with momentum. All four
are timed in turn in one process; ratios are of medians.
"""

import argparse
import statistics
import time


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="as --model of the scripts")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=None, help="samples at once under vmap")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", help="default: cuda, where there is one")
    return parser.parse_args()


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    options = parse_args()

import torch
from torch.nn import functional as F

from common.seeding import stream
from common.vector import Weights
from vit_sparse_fl.masks import Sample, maskable, sensitivity
from vit_sparse_fl.vit import make_model


def batch_one(model, weights, images, labels):
    """The textbook loop."""
    model.eval()
    total = torch.zeros_like(weights.theta)
    sums = weights.named(total)
    for i in range(len(images)):
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        for name, p in weights.parameters.items():
            sums[name].add_(p.grad.square(), alpha=1 / len(images))
    model.zero_grad(set_to_none=True)
    return total


def epoch(model, optimizer, images, labels, batch_size):
    model.train()
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)


def timed(function, *args, **kwargs):
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    result = function(*args, **kwargs)
    wait()
    return time.perf_counter() - start, result


def difference(a, b):
    """The largest difference, in units of its tensor's largest score; not of key biases, whose gradient is rounding."""
    return max(float((a[n] - b[n]).abs().max() / b[n].max().clamp(min=1e-12)) for n in a if "k_proj.bias" not in n)


def main(options):
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    model = make_model(options.model, image_size=options.image_size, n_classes=100).to(options.device)
    with torch.no_grad():  # a new head may be zero: no gradient would come through
        model.classifier.weight.copy_(
            torch.from_numpy(stream(0, "head").normal(0, 0.05, tuple(model.classifier.weight.shape)))
        )
    named = dict(model.named_parameters())
    weights = Weights(model, {name: named[name] for name in maskable(model)})
    shape = (options.samples, 3, options.image_size, options.image_size)
    images = torch.from_numpy(stream(0, "images").standard_normal(shape, dtype="float32")).to(options.device)
    labels = torch.arange(options.samples, device=options.device) % 100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # lr 0: all repeats see the same weights

    def ours(method):
        sample = Sample(model, weights, None, images, labels, form="nll")
        return sensitivity(sample, method, options.chunk_size)

    scores = {}
    seconds = {"loop": [], "vmap": [], "batch one": [], "epoch": []}
    for _ in range(options.repeats + 1):
        for method in ("loop", "vmap"):
            spent, scores[method] = timed(ours, method)
            seconds[method].append(spent)
        seconds["batch one"].append(timed(batch_one, model, weights, images, labels)[0])
        seconds["epoch"].append(timed(epoch, model, optimizer, images, labels, options.batch_size)[0])
    expected = batch_one(model, weights, images, labels)
    median = {name: statistics.median(spent[1:]) for name, spent in seconds.items()}
    print(
        f"{options.model} at {options.image_size} px, {weights.size:,} maskable weights, {options.samples} samples, "
        f"{options.device}, {options.threads} threads"
    )
    print(f"batch-1 loop {median['batch one']:.3f} s, training epoch {median['epoch']:.3f} s")
    for method, score in scores.items():
        off = difference(weights.named(score), weights.named(expected))
        print(
            f"{method}: {median[method]:.3f} s, {median[method] / median['batch one']:.2f} of the batch-1 loop, "
            f"{median[method] / median['epoch']:.2f} epochs, differs by {off:.1e}"
        )


if __name__ == "__main__":
    main(options)
