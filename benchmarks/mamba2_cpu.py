"""Mamba-2 on a CPU: this project's model against transformers', and its loss against the plain cross-entropy.

    python benchmarks/mamba2_cpu.py                     # about two minutes on 2 cores
    python benchmarks/mamba2_cpu.py --threads 1 --lengths 256 --batch 1

Every contestant takes its turn in every round, so that what else the machine does falls on all alike. A time is the
median over rounds, a ratio the median over rounds of the ratio within a round. Memory is the growth of the peak
resident set during one step (gradients included, parameters not), each in a process of its own.
"""

import contextlib
import logging
import multiprocessing
import resource
import statistics
import time

from common.cli import Parser, positive_int, run_main


def parse_args():
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--batch", type=positive_int, default=8)
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[128, 256])
    parser.add_argument("--d-model", type=positive_int, default=256)
    parser.add_argument("--layers", type=positive_int, default=2)
    parser.add_argument("--vocab", type=positive_int, default=1024, help="of the model part")
    parser.add_argument("--tokens", type=positive_int, default=1024, help="of the loss part")
    return parser.parse_args()


if __name__ == "__main__":  # above the imports that take seconds: --help and a typo are answered at once
    args = parse_args()

import torch
import torch.nn.functional as F
from transformers import Mamba2Config as TransformersConfig
from transformers import Mamba2ForCausalLM

from common.allocator import reuse_large_memory
from mamba_fl.cross_entropy import linear_cross_entropy
from mamba_fl.mamba2 import Mamba2Config, Mamba2LM, auto_chunk


def main(args):
    reuse_large_memory()  # as the scripts do; it serves all contestants
    logging.disable(logging.WARNING)  # transformers says once per layer that it runs without kernels
    tasks = [(f"model, {args.batch} x {length} tokens", models(args, length)) for length in args.lengths]
    tasks += [(f"loss, {args.tokens} x 50,264 logits, {name}", losses(args, amp)) for name, amp in precisions()]
    # Memory first: a forked process must not inherit the threads of a pool that has run.
    memory = [{name: peak_memory(make, args.threads) for name, make in task.items()} for _, task in tasks]
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, forward + backward")
    for (title, task), peaks in zip(tasks, memory, strict=True):
        report(title, measure(task, args.rounds), peaks)


def models(args, length):
    """name -> function that makes a step: the same weights' sizes, the same tokens, the loss over all of them."""
    ids, labels = torch.randint(0, args.vocab, (2, args.batch, length), generator=torch.Generator().manual_seed(0))

    def theirs(chunk):
        def make():
            heads = 2 * args.d_model // 64
            config = TransformersConfig(
                hidden_size=args.d_model, num_hidden_layers=args.layers, num_heads=heads, head_dim=64, n_groups=1,
                state_size=128, vocab_size=args.vocab, tie_word_embeddings=True, chunk_size=chunk, use_cache=False,
            )  # fmt: skip
            model = Mamba2ForCausalLM(config)

            def step():
                model.zero_grad()
                logits = model(ids).logits.flatten(0, 1)
                F.cross_entropy(logits, labels.flatten(), reduction="sum").backward()

            return step

        return make

    def ours():
        model = Mamba2LM(Mamba2Config(d_model=args.d_model, n_layer=args.layers, vocab_size=args.vocab))

        def step():
            model.zero_grad()
            model.nll(ids, labels).backward()

        return step

    return {
        "transformers, chunk 256 (its default)": theirs(256),
        "transformers, chunk 64": theirs(64),
        f"ours, chunk auto ({auto_chunk(length)})": ours,
    }


def precisions():
    yield "fp32", False
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield "bf16", True


def losses(args, amp):
    def contestant(loss):
        def make():
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(args.tokens, 512, generator=generator, requires_grad=True)
            weight = torch.randn(50264, 512, generator=generator).mul_(0.02).requires_grad_()
            labels = torch.randint(0, 50257, (args.tokens,), generator=generator)
            autocast = torch.autocast("cpu", torch.bfloat16) if amp else contextlib.nullcontext()

            def step():
                hidden.grad = weight.grad = None
                with autocast:
                    value = loss(hidden, weight, labels)
                (value / args.tokens).backward()

            return step

        return make

    def plain(hidden, weight, labels):
        logits = F.linear(hidden, weight)[:, :50257].float()
        return F.cross_entropy(logits, labels, reduction="sum")

    def fused(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, vocab_size=50257)

    return {"plain cross-entropy": contestant(plain), "linear_cross_entropy": contestant(fused)}


def measure(task, rounds):
    """name -> seconds of every round; two rounds before them warm up."""
    steps = {name: make() for name, make in task.items()}
    seconds = {name: [] for name in steps}
    for i in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(make, threads):
    """MiB by which the peak resident set grows during a step."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(threads)
        step = make()
        before = resident_set()
        step()
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) - before)

    process = context.Process(target=child)
    process.start()
    process.join()
    return receiver.recv()


def resident_set():
    """MiB of this process in memory now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def report(title, seconds, peaks):
    print(f"\n{title}", flush=True)
    names = list(seconds)
    for name, times in seconds.items():
        ratios = []
        for other in names[: names.index(name)]:
            ratio = statistics.median(a / b for a, b in zip(seconds[other], times, strict=True))
            ratios.append(f"{ratio:.2f} x {other}")
        line = f"  {name:38} {statistics.median(times) * 1e3:8.1f} ms {peaks[name]:7.0f} MiB"
        print(line + ("   speed " + ", ".join(ratios) if ratios else ""), flush=True)


if __name__ == "__main__":
    run_main(main, args)
