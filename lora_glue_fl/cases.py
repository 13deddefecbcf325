"""What `run_study.py` varies, one factor at a time from 3 clients, IID, rank 4; its presets."""

from dataclasses import dataclass

from common.grid import Preset
from common.lowrank import RULES

LORA = "--lora-r 4 --svd-rank 4 --lora-alpha 8 --alpha 8".split()
ALPHA = 0.3  # of the Dirichlet shards


@dataclass(frozen=True)
class Case:
    """What is varied: clients, how examples are dealt to them, the rules that run, flags beside LORA."""

    clients: int = 3
    mode: str = "iid"
    rules: tuple = tuple(RULES)
    words: tuple = ()


CASES = {
    "base": Case(),
    "clients20": Case(clients=20),
    "dirichlet": Case(mode="dirichlet", words=("--eval-clients",)),
    "lr6e-3": Case(words=("--learning-rate", "6e-3")),
    "lr2e-2": Case(words=("--learning-rate", "2e-2")),
    "balanced": Case(20, rules=("svd",), words=("--svd-split", "balanced")),
    "rank16": Case(rules=("svd", "naive"), words=tuple("--lora-r 16 --svd-rank 16 --lora-alpha 32 --alpha 32".split())),
    "ranks": Case(rules=("svd", "stack"), words=("--client-ranks", "2", "4", "8")),
}


@dataclass(frozen=True)
class Sizes:
    """tasks: (task, examples of its training split or None for all, cases), in the order of the runs; one_seed: tasks
    and cases of which only the first seed runs; falling: central training also at a rate that falls to 0."""

    tasks: tuple
    rounds: int
    one_seed: tuple = ()
    falling: bool = True


SMALL = Sizes(
    (
        ("sst2", 2000, ("base", "clients20", "dirichlet")),
        ("mrpc", 1200, ("base",)),
        ("rte", 600, ("base",)),
        ("sst2", 2000, ("lr6e-3", "lr2e-2", "balanced", "rank16", "ranks")),
        ("cola", 1500, ("base",)),
        ("stsb", 1000, ("base",)),
    ),
    rounds=6,
    one_seed=("cola", "stsb", "rank16", "ranks", "lr6e-3", "lr2e-2"),
)
FULL = Sizes(tuple((task, None, tuple(CASES)) for task in ("rte", "mrpc", "cola", "stsb", "sst2")), 30, falling=False)
QUICK = Sizes((("sst2", 600, ("base", "clients20", "dirichlet", "balanced", "rank16", "ranks")),), 5)

CONSTANT = "--batch-size 8 --lr-scheduler constant --threads 1"
PRESETS = {
    "small": Preset(f"--learning-rate 2e-3 --amp auto {CONSTANT}".split(), SMALL),
    "full": Preset("--learning-rate 4e-4 --warmup-ratio 0.06 --amp auto".split(), FULL),
    "quick": Preset(f"--model tiny --dataset demo --learning-rate 1e-2 {CONSTANT}".split(), QUICK, seeds=(0,)),
}
