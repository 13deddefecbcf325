"""Three parts against what they replace, one claim each: time ratios within one run, and how far results lie apart.

    python benchmarks/parts.py                                 # all three, one thread: a minute
    python benchmarks/parts.py mamba --length 128 --threads 2

mamba    a training step of mamba_fl's model on a CPU, whose backward is written by hand, over transformers' Mamba-2
         at its default chunk of 256 and at 64
lora     the truncation of a mean of LoRA products through QR (`common.products`, fp64) over the dense SVD of the
         product, formed and factored in fp64
fisher   the per-sample Fisher of a ViT, by `common.fisher`'s loop and vmap, over the batch-1 loop with `.backward()`

Every contestant takes its turn in every repeat, so that what else the machine does falls on all alike; a ratio is the
median over repeats of the ratio within a repeat.
"""

import logging
import statistics
import time

import torch
from torch.nn import functional as F

from common.cli import Parser, positive_int, run_main
from common.fisher import diagonal_fisher
from common.products import Product, truncate
from common.seeding import torch_stream
from common.vector import Weights

REPEATS, WIDTH, IMAGES = 5, 768, 64  # of all; of a square layer; that the Fisher is of


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which (default: all)")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--length", type=positive_int, default=256, help="mamba: tokens of each of 8 sequences")
    return parser


def main(args):
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} thread(s), medians of {REPEATS} repeats")
    for name in args.parts or PARTS:
        ours, contestants, apart = PARTS[name](args)
        seconds = in_turn(contestants)
        print(f"{name}: {ours} {1e3 * statistics.median(seconds[ours]):.1f} ms{apart()}")
        for other, times in seconds.items():
            if other != ours:
                ratio = statistics.median(b / a for a, b in zip(seconds[ours], times, strict=True))
                print(f"  {other}: {ratio:.2f} times as long")


def in_turn(contestants):
    """{name: seconds of each repeat}; one before them warms up."""
    seconds = {name: [] for name in contestants}
    for _ in range(REPEATS + 1):
        for name, step in contestants.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def mamba(args):
    from transformers import Mamba2Config as TransformersConfig
    from transformers import Mamba2ForCausalLM

    from mamba_fl.mamba2 import Mamba2Config, Mamba2LM

    logging.disable(logging.WARNING)  # transformers says once per layer that it runs without kernels
    ids, labels = torch.randint(0, 1024, (2, 8, args.length), generator=torch_stream(0, "tokens"))

    def theirs(chunk):
        config = TransformersConfig(
            hidden_size=256, num_hidden_layers=2, num_heads=8, head_dim=64, n_groups=1, state_size=128, vocab_size=1024,
            tie_word_embeddings=True, chunk_size=chunk, use_cache=False,
        )  # fmt: skip
        model = Mamba2ForCausalLM(config)

        def step():
            model.zero_grad()
            F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()

        return step

    model = Mamba2LM(Mamba2Config(d_model=256, n_layer=2, vocab_size=1024))

    def ours():
        model.zero_grad()
        model.nll(ids, labels).backward()

    steps = {"ours": ours, "transformers, chunk 256": theirs(256), "transformers, chunk 64": theirs(64)}
    return "ours", steps, lambda: f" (8 x {args.length} tokens, forward and backward)"


def lora(_):
    """10 clients' factors of rank 8 around a common start, as after local training."""
    generator, rank = torch_stream(0, "factors"), 8

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    A, B = draw(rank, WIDTH) / WIDTH**0.5, draw(WIDTH, rank) * 1e-2
    parts = [(A + 0.2 * draw(rank, WIDTH) / WIDTH**0.5, B + 5e-3 * draw(WIDTH, rank)) for _ in range(10)]

    def through_qr():
        total = Product(WIDTH, WIDTH)
        for one, other in parts:
            total.add(one, other, 0.1)
        small_A, small_B = truncate(total, rank, 1.0)
        return small_B.double() @ small_A.double()

    def dense():
        U, S, Vh = torch.linalg.svd(sum(0.1 * b.double() @ a.double() for a, b in parts), full_matrices=False)
        return U[:, :rank] * S[:rank] @ Vh[:rank]

    def apart():
        expected = dense()
        off = (through_qr() - expected).norm() / expected.norm()
        return f" ({WIDTH} x {WIDTH}; apart by {off:.0e} of the norm)"

    return "through QR", {"through QR": through_qr, "dense SVD": dense}, apart


def fisher(_):
    from vit_sparse_fl.vit import make_model

    model = make_model("tiny", image_size=32, n_classes=100)
    generator = torch_stream(0, "images")
    with torch.no_grad():  # a new head may be zero: no gradient would come through
        model.classifier.weight.normal_(0, 0.05, generator=generator)
    weights = Weights(model, dict(model.named_parameters()))
    images = torch.randn(IMAGES, 3, 32, 32, generator=generator)
    labels = torch.arange(IMAGES) % 100

    def nll(model, sample):
        return F.cross_entropy(model(sample[0][None]), sample[1][None])

    def ours(method):
        # the fused attention kernels have no rule for vmap
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return diagonal_fisher(model, weights, nll, (images, labels), method=method)

    def batch_one():
        model.eval()
        total = torch.zeros_like(weights.theta)
        for image, label in zip(images, labels, strict=True):
            model.zero_grad()
            nll(model, (image, label)).backward()
            for name, square in weights.named(total).items():
                square.add_(weights.parameters[name].grad.square(), alpha=1 / len(images))
        return total

    steps = {"vmap": lambda: ours("vmap"), "loop": lambda: ours("loop"), "batch-1 loop": batch_one}

    def apart():
        expected = batch_one()
        off = (ours("vmap") - expected).abs().max() / expected.max()
        return f" ({IMAGES} images, tiny; off by {off:.0e} of the largest)"

    return "vmap", steps, apart


PARTS = {"mamba": mamba, "lora": lora, "fisher": fisher}

if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
