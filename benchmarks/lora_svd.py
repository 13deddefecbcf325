"""Truncating a mean of LoRA products: through QR, by the dense SVD, by torch.svd_lowrank. Time, memory, error.

    python benchmarks/lora_svd.py
    python benchmarks/lora_svd.py --clients 50 --shapes 768x768

One layer, r 8, 10 clients unless said otherwise: `common.products` (fp64) against Delta = sum p_k s B_k A_k formed as
a matrix and given to torch.linalg.svd in fp32 (what peft's add_weighted_adapter does) and fp64, or to torch.svd_lowrank
(fp32, q = r + 8, 2 iterations). Forming Delta counts. All are timed in turn in one process, medians; "times ours" is
a ratio of times. Excess: ||Delta - served|| over that of the best rank r, minus 1. Memory (Linux): the growth of a
fresh process that already has the factors and has warmed up on a small layer, to its peak.
"""

import argparse
import statistics
import subprocess
import sys
import time

SHAPES = {"768x768": "roberta-base, query", "3072x768": "roberta-base, mlp", "1024x1024": "roberta-large, query"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="layers, d x k")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    options = parse_args()

import torch

from common.products import Product, truncate
from common.seeding import torch_stream


def make_parts(d, k, options):
    """Clients' factors around a common start, as after local training; fp32."""
    generator = torch_stream(0, f"lora_svd {d} {k}")

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    r = options.rank
    A, B = draw(r, k) / k**0.5, draw(d, r) * 1e-2
    p = 1 / options.clients
    return [(p, 1.0, A + 0.2 * draw(r, k) / k**0.5, B + 5e-3 * draw(d, r)) for _ in range(options.clients)]


def through_qr(parts, rank):
    (*_, A, B), *_ = parts
    total = Product(len(B), A.shape[1])
    for p, s, A, B in parts:
        total.add(A, B, p * s)
    A, B, _ = truncate(total, rank, 1.0)
    return A, B


def form(parts, dtype):
    return sum((p * s) * (B.to(dtype) @ A.to(dtype)) for p, s, A, B in parts)


def dense(parts, rank, dtype):
    U, S, Vh = torch.linalg.svd(form(parts, dtype), full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


def dense_fp32(parts, rank):
    return dense(parts, rank, torch.float32)


def dense_fp64(parts, rank):
    return dense(parts, rank, torch.float64)


def svd_lowrank(parts, rank):
    U, S, V = torch.svd_lowrank(form(parts, torch.float32), q=rank + 8, niter=2)
    return V[:, :rank].T, U[:, :rank] * S[:rank]


METHODS = {f.__name__: f for f in (through_qr, dense_fp32, dense_fp64, svd_lowrank)}


def memory(method, shape, options):
    """The peak's growth in MiB, in a fresh process."""
    words = ["--peak", method, "--shapes", shape, "--clients", str(options.clients), "--rank", str(options.rank)]
    words += ["--threads", str(options.threads)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_peak(options):
    d, k = (int(n) for n in options.shapes[0].split("x"))
    parts = make_parts(d, k, options)
    METHODS[options.peak](make_parts(32, 32, options), options.rank)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here: that of importing torch is higher
    before = peak_memory()
    METHODS[options.peak](parts, options.rank)
    print(peak_memory() - before)


def peak_memory():
    """The process's peak resident memory in MiB. (getrusage's would include the parent's, across exec.)"""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def main(options):
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options)
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), rank {options.rank}, {options.clients} clients")
    for shape in options.shapes:
        d, k = (int(n) for n in shape.split("x"))
        parts = make_parts(d, k, options)
        seconds = {name: [] for name in METHODS}
        factors = {}
        through_qr(parts, options.rank)  # warms up
        for _ in range(options.repeats):
            for name, method in METHODS.items():
                start = time.perf_counter()
                factors[name] = method(parts, options.rank)
                seconds[name].append(time.perf_counter() - start)
        target = form(parts, torch.float64)
        missed = {name: (target - B.double() @ A.double()).norm().item() for name, (A, B) in factors.items()}
        ours = statistics.median(seconds["through_qr"])
        print(f"{shape} ({SHAPES.get(shape, 'another layer')})")
        for name in METHODS:
            median = statistics.median(seconds[name])
            excess = missed[name] / missed["dense_fp64"] - 1
            print(
                f"  {name:12} {median * 1e3:9.1f} ms   {median / ours:6.1f} times ours   "
                f"{memory(name, shape, options):6.1f} MiB   excess {excess:.1e}"
            )


if __name__ == "__main__":
    main(options)
