"""How the tests run a script of mamba_fl in this process."""

from pathlib import Path

from safetensors.torch import load_file

from common.runlog import read_metrics
from mamba_fl.flags import complete_flags

ROOT = Path(__file__).resolve().parents[1]


def flags(module, words):
    return complete_flags(module.build_parser().parse_args(words.split()))


def run(module, folder, words):
    """(theta after the last round {name: fp64}, lines of metrics.jsonl) of a run in `folder`/r."""
    module.main(flags(module, f"{words} --output-dir {folder} --run-name r"))
    theta = load_file(folder / "r" / "checkpoint" / "theta.safetensors")
    return {name: t.double() for name, t in theta.items()}, read_metrics(folder / "r")
