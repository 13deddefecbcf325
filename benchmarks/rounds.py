"""What a federated round costs over the bare optimiser steps in it, for each study at its stand-in's size.

    python benchmarks/rounds.py                          # all four, one process and two; about 5 minutes
    python benchmarks/rounds.py vit_sparse_fl --processes 1 2 4
    python benchmarks/rounds.py --memory                 # peak memory of 100 clients against 10

The rounds are the scripts' own, without evaluation and checkpoint. After each, its batches are trained again in a bare
loop; its time, and that of making the batches, is the floor. Both alternate in one run. With several processes the
floor is the sum over processes, each alone on the machine in its turn: the steps on one thread.
"""

import contextlib
import multiprocessing
import resource
import statistics
import tempfile
import time

import torch

from common import parallel, runlog
from common.cli import Parser, positive_int, run_main
from common.processes import run_federated

REPEATS = 7  # timed rounds
NAMES = ("mamba_fl", "vit_sparse_fl", "lora_glue_fl", "llm_noniid")


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", choices=[*NAMES, []], help="which (default: all)")
    parser.add_argument("--processes", type=positive_int, nargs="+", default=[1, 2], metavar="N", help="each in turn")
    parser.add_argument("--memory", action="store_true", help="peak memory of 100 clients against 10")
    return parser


class Done(Exception):
    """Enough rounds."""


def mamba(clients, folder):
    from mamba_fl import fed_avg, fed_core
    from mamba_fl.flags import complete_flags

    words = f"--dataset demo --tokenizer bpe:4096 --num-clients {clients} --local-updates 8 --lr 1e-4 --rounds 1000 "
    words += "--val-freq 1000 --client-val-sequences 0"
    args = fed_avg.build_parser().parse_args(words.split() + ["--output-dir", folder])
    return fed_core, complete_flags(args), fed_avg.main


def vit(clients, folder):
    from vit_sparse_fl import study, train_federated
    from vit_sparse_fl.flags import parse

    words = f"--dataset demo --model tiny --batch-size 32 --num-clients {clients} --participation-rate 1 --dropout 0 "
    words += "--local-steps 4 --num-rounds 1000 --eval-every 1000 --lr 1e-3"
    args = parse(train_federated.build_parser(), [*words.split(), "--output-dir", folder, "--run-name", "r"])
    return study, args, train_federated.train


def glue(clients, folder):
    from lora_glue_fl import fed_core, fedavg_rounds, sharding
    from lora_glue_fl.flags import complete_rounds

    shards = ["--task-name", "rte", "--dataset", "demo", "--k", str(clients), "--out-dir", f"{folder}/shards"]
    sharding.main(sharding.build_parser().parse_args(shards))
    words = "--model tiny --dataset demo --task-name rte --lora-r 4 --svd-rank 4 --rounds 1000 --batch-size 8 "
    words += "--no-save-clients --keep last --learning-rate 1e-3"
    words = [*words.split(), "--shard-dir", f"{folder}/shards", "--output-root", folder]
    args = complete_rounds(fedavg_rounds.build_parser().parse_args(words))
    return fed_core, args, fedavg_rounds.main


def noniid(clients, folder):
    from llm_noniid import fed_core, flags, train

    words = f"--model tiny --dataset demo --num-clients {clients} --local-steps 10 --num-rounds 1000 --eval-every 1000 "
    words += "--partition iid --learning-rate 1e-3"
    parser = train.build_parser()
    args = flags.parse(parser, [*words.split(), "--results-dir", folder])
    return fed_core, args, train.main


STUDIES = dict(zip(NAMES, (mamba, vit, glue, noniid), strict=True))


class Clock:
    """Times the rounds of a script and the bare steps in them."""

    def __init__(self, module, repeats, keep):
        self.repeats, self.real, self.keep = repeats, module.local_steps, keep
        self.calls, self.batching = [], 0.0
        self.rounds, self.floors = [], []
        module.local_steps = self.local_steps

    def local_steps(self, loss, steps, weights, optimizer, **options):
        if not self.keep:  # batches and optimisers of all clients would be most of the peak
            return self.real(loss, steps, weights, optimizer, **options)
        started = time.perf_counter()
        steps = list(steps)
        self.batching += time.perf_counter() - started
        self.calls.append((loss, steps, list(weights.parameters.values()), optimizer, options.get("max_norm", 0.0)))
        return self.real(loss, steps, weights, optimizer, **options)

    def each_round(self, run):
        """Instead of `Run.rounds`: times what stands in the loop, then the bare steps."""
        for t in range(self.repeats + 1):
            self.calls, self.batching = [], 0.0
            parallel.barrier()
            started = time.perf_counter()
            yield t
            parallel.barrier()
            seconds = time.perf_counter() - started
            floor = 0.0
            for rank in range(parallel.world().size):
                if rank == parallel.world().rank:
                    started = time.perf_counter()
                    self.bare()
                    floor = time.perf_counter() - started + self.batching
                parallel.barrier()
            floor = sum(parallel.all_gather(floor))
            if t:  # the first is for warming up
                self.rounds.append(seconds)
                self.floors.append(floor)
        raise Done

    def bare(self):
        for loss, steps, leaves, optimizer, max_norm in self.calls:
            for step in steps:
                optimizer.zero_grad(set_to_none=True)
                batch = step[0][1] if isinstance(step, list) else step
                loss(*batch).backward()
                if max_norm:
                    torch.nn.utils.clip_grad_norm_(leaves, max_norm)
                optimizer.step()


def count_only(run, t, theta, evaluate):
    """Instead of `Run.report`: no evaluation, no checkpoint."""
    clients, run.clients = run.clients, None
    if clients is not None:
        run.count(bytes_up=0, left_out_updates=len(clients.left_out))


def measure(study, clients, processes, memory):
    """One study on some processes: prints medians and ratio, or the peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        module, args, main = STUDIES[study](clients, folder)
        args.threads, args.processes = 1, processes

        def timed(args):
            clock = Clock(module, 1 if memory else REPEATS, keep=not memory)
            runlog.Run.rounds, runlog.Run.report = lambda run: clock.each_round(run), count_only
            with contextlib.suppress(Done):
                main(args)
            if parallel.is_main():
                peak = f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
                said = peak if memory else in_words(clock)
                print(f"{study:14s} {clients:4d} clients  {processes} processes  {said}", flush=True)

        run_federated(timed, args, clients)


def in_words(clock):
    rounds, floors = statistics.median(clock.rounds), statistics.median(clock.floors)
    ratios = sorted(r / f for r, f in zip(clock.rounds, clock.floors, strict=True))
    spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    return f"steps {1000 * floors:8.1f} ms  round {1000 * rounds:8.1f} ms  ratio {spread}"


def main(options):
    fresh = multiprocessing.get_context("spawn")  # a process for each: a peak is a process's own
    for study in options.studies or NAMES:
        sizes = [10, 100] if options.memory else [4 if study == "mamba_fl" else 10]  # the demo text feeds no more
        for processes in [1] if options.memory else options.processes:
            for clients in sizes:
                one = fresh.Process(target=measure, args=(study, clients, processes, options.memory))
                one.start()
                one.join()


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
