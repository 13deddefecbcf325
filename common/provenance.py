"""Where a run comes from, its commit and versions, and where its metrics are sent besides (--track)."""

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def git_commit():
    """The commit of this source tree, with `+changes` where tracked files differ from it; None outside git."""

    def git(*words):
        line = ["git", "-C", Path(__file__).resolve().parent, *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions():
    """Versions and kinds of what decides the bits of a run."""
    of = {"python": platform.python_version(), "machine": platform.machine()}
    for package in "torch numpy transformers tokenizers safetensors peft torchvision mamba-ssm".split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            of[package] = metadata.version(package)
    return {**of, "cpu": processor()}


def processor():
    """The kind of processor that torch computes for, such as "AVX512 AMX": another one adds in another order."""
    about = Path("/proc/cpuinfo")
    amx = about.exists() and "amx_tile" in about.read_text()
    return torch.backends.cpu.get_cpu_capability() + amx * " AMX"


def tracker(args, folder, command):
    """A function that takes a line of metrics, for --track; None when off."""
    if args.track == "off":
        return None
    if args.track == "wandb":
        import wandb

        project = getattr(args, "wandb_project", "fedquartet")
        session = wandb.init(project=project, id=folder.name, config=vars(args), resume="allow")
        return lambda line: session.log(line, step=line["round"])
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(line):
        for key, value in line.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"{command}/{key}", value, line["round"])
        writer.flush()

    return write
