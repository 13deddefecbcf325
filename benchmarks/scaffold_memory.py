"""SCAFFOLD's control variates of many clients, on the CPU or in a file each: memory, disk, time of a client's turn.

    python benchmarks/scaffold_memory.py
    python benchmarks/scaffold_memory.py --clients 100 --per-round 10

The template is LoRA of rank 8 on distilgpt2's c_attn and c_proj. Every client takes part once, --per-round at a time,
without training: `correction`, `offer`, `close_round`; then, with --checkpoint, one checkpoint of all clients is
written. Memory (Linux): the growth of a fresh process's peak, and of what it holds at the end; pages of files that are
read count as long as they are mapped. Time: medians over clients (correction and offer) and over rounds (close_round
per client). Files go to --folder (default: the system's temporary folder) and are deleted.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import checkpoint
from common.before.scaffold import ControlVariates
from common.parallel import Lanes
from common.seeding import torch_stream

LAYERS = {"attn.c_attn": (2304, 768), "attn.c_proj": (768, 768), "mlp.c_proj": (768, 3072)}  # d x k
BLOCKS = 6


def make_template(rank):
    shapes = {f"{i}.{name}": shape for i in range(BLOCKS) for name, shape in LAYERS.items()}
    A = {f"A.{layer}": torch.zeros(rank, k) for layer, (_, k) in shapes.items()}
    return A | {f"B.{layer}": torch.zeros(d, rank) for layer, (d, _) in shapes.items()}


def measure(place, options):
    """In a fresh process: prints peak and final growth of memory, disk in use, times; a line of numbers."""
    template = make_template(options.rank)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        take_turns(template, 1, 1, Path(scratch) / "warm")  # imports, first allocations
        folder = Path(scratch) / "variates" if place == "folder" else None
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        before = memory("VmRSS")
        variates, turns, closings = take_turns(template, options.clients, options.per_round, folder)
        if options.checkpoint:
            clients = variates.lasting["control_variates"].client_states()
            checkpoint.save(Path(scratch) / "checkpoint", {}, {}, clients)
        peak, last = memory("VmHWM") - before, memory("VmRSS") - before
        disk = sum(f.stat().st_size for f in folder.iterdir()) / 2**20 if folder else 0.0
    print(peak, last, disk, statistics.median(turns) * 1e3, statistics.median(closings) * 1e3)


def take_turns(template, clients, per_round, folder):
    """Every client once. Returns the variates, seconds of a client's turn, seconds of close_round per client."""
    variates = ControlVariates(template, clients, folder)
    turns, closings = [], []
    for first in range(0, clients, per_round):
        lanes = Lanes(range(first, min(first + per_round, clients)), sticky=True)
        for k in lanes:
            generator = torch_stream(0, "scaffold_memory", client=k)
            gradient = {n: torch.randn(t.shape, generator=generator) for n, t in template.items()}
            started = time.perf_counter()
            variates.correction(k)
            variates.offer(k, gradient)
            turns.append(time.perf_counter() - started)
        started = time.perf_counter()
        variates.close_round(lanes)
        closings.append((time.perf_counter() - started) / len(lanes))
    return variates, turns, closings


def memory(field):
    """VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--folder", help="where files go")
    parser.add_argument("--place", choices=["cpu", "folder"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.place:
        measure(options.place, options)
        return
    weights = sum(t.numel() for t in make_template(options.rank).values())
    print(
        f"torch {torch.__version__}, {options.clients} clients, {options.per_round} a round, {weights:,} weights "
        f"({weights * 4 / 2**20:.2f} MiB in fp32), checkpoint {'written' if options.checkpoint else 'not written'}"
    )
    print("place      peak MiB  at end MiB  on disk MiB  correction + offer ms  close_round ms a client")
    for place in ("cpu", "folder"):
        words = [sys.executable, __file__, *sys.argv[1:], "--place", place]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peak, last, disk, turn, closing = (float(word) for word in done.stdout.split())
        print(f"{place:8} {peak:10.1f} {last:11.1f} {disk:12.1f} {turn:22.1f} {closing:24.1f}")


if __name__ == "__main__":
    main()
