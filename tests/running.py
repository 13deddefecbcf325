"""How the tests run a script of mamba_fl in this process, at tiny size."""

import importlib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from common.cli import checked, run_main
from mamba_fl.flags import complete_flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["central", "fed_avg", "fed_momentum", "fed_entropy", "fed_fisher"]

TINY = (
    "--dataset demo --tokenizer bpe:400 --d-model 32 --d-state 16 --headdim 16 --sequence-length 32 --batch-size 2 "
    "--num-clients 3 --val-sequences 6 --client-val-sequences 2 --threads 1 --val-freq 2 --rounds 6"
).split()


def flags(script, *more):
    tiny = list(TINY)
    if script == "central":
        at = tiny.index("--client-val-sequences")
        del tiny[at : at + 2]
    return [*tiny, *map(str, more)]


def call(script, *more, bare=False):
    """A script in this process. Returns its exit code."""
    module = importlib.import_module(f"mamba_fl.{script}")
    args = module.build_parser().parse_args([str(m) for m in more] if bare else flags(script, *more))
    with pytest.raises(SystemExit) as stop:
        run_main(module.main, checked(complete_flags, args))
    return stop.value.code


def final_weights(folder):
    return load_file(folder / "final" / "model.safetensors")
