"""Runs the study of this folder's README: every method, schedule and seed, one run after the other.

    python mamba_fl/run_study.py --preset small --jobs 2        # a laptop
    python mamba_fl/run_study.py --preset source --jobs 1       # the source's 1-layer configuration
    python mamba_fl/run_study.py --preset small --plan          # only shows the commands

Each run is one of the scripts beside this file, in a process of its own; runs that are finished are skipped and
broken ones go on, so that the command can be given again at any time. The table is plots/tables.py's.
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.checkpoint import read_json
from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int, run_main
from common.curves import read_metrics
from common.launching import start, told

HERE = Path(__file__).resolve().parent

# d_model 128 and a vocabulary of 4,096: two to five minutes a run on one core
SMALL = ["--d-model", "128", "--tokenizer", "bpe:4096", "--n-epochs", "0.5", "--lr", "5e-3", "--amp", "auto"]
SMALL += ["--val-freq", "80", "--val-sequences", "256", "--threads", "1", "--prompt", ""]
SOURCE = ["--layers", "1", "--amp", "auto", "--val-freq", "60", "--val-sequences", "256", "--threads", "1"]

SERVER_ADAM = ["--client-optimizer", "sgd", "--lr", "1", "--weight-decay", "0", "--server-optimizer", "adam"]
SERVER_ADAM += ["--server-lr", "5e-3", "--server-beta2", "0.99", "--server-tau", "1e-8"]
DILOCO = ["--local-updates", "8", "--val-freq", "10", "--server-optimizer", "nesterov", "--server-lr", "0.7"]
LU8 = ["--local-updates", "8", "--val-freq", "10"]
EPOCH = ["--sync", "epoch"]

# name of the run -> script and what it has beside the preset
PRESETS = {
    "small": (
        SMALL,
        {
            "central": ["central"],
            "fed_avg_lu1": ["fed_avg"],
            "fed_avg_lu8": ["fed_avg", *LU8],
            "fed_momentum_source": ["fed_momentum", "--momentum-form", "ema"],
            "fed_momentum_diloco": ["fed_momentum", *DILOCO],
            "fed_momentum_server_adam": ["fed_momentum", *SERVER_ADAM],
            "fed_entropy": ["fed_entropy"],
            "fed_fisher": ["fed_fisher"],
            "fed_avg_lu1_sync_epoch": ["fed_avg", *EPOCH],
            "fed_avg_lu8_sync_epoch": ["fed_avg", *LU8, *EPOCH],
            "fed_momentum_source_sync_epoch": ["fed_momentum", "--momentum-form", "ema", *EPOCH],
            "fed_entropy_sync_epoch": ["fed_entropy", *EPOCH],
            "fed_fisher_sync_epoch": ["fed_fisher", *EPOCH],
        },
    ),
    "source": (
        SOURCE,
        {
            "central": ["central"],
            "fed_avg_lu1": ["fed_avg"],
            "fed_avg_lu8": ["fed_avg", *LU8],
            "fed_fisher": ["fed_fisher", "--fisher-samples", "2"],
        },
    ),
}


def main(args):
    output = Path(args.output_dir or f"results/{args.preset}")
    unknown = sorted(set(args.only or ()) - set(PRESETS[args.preset][1]))
    if unknown:
        known = ", ".join(PRESETS[args.preset][1])
        raise UsageError(f"--only {' '.join(unknown)}: not in the preset {args.preset}; choose from {known}")
    runs = [
        (f"{name}_seed_{seed}", command)
        for seed in args.seeds
        for name, command in commands(args.preset, args.only, seed, output, args.data_root)
    ]
    if args.plan:
        for _, command in runs:
            print("python", shlex.join(command))
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [name for name, code in pool.map(lambda run: one_run(*run, output), runs) if code]
    collect(output, output / "results.jsonl")
    summary = [sys.executable, str(HERE.parent / "plots" / "tables.py"), "mamba_fl", "--data-dir", str(output)]
    tabulated = subprocess.run(summary, check=False).returncode
    if tabulated and not failed:
        raise RunFailed(f"the runs are finished but plots/tables.py ended with exit code {tabulated}")
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish ({', '.join(failed)}): see {output}/logs")


def commands(preset, only, seed, output, data_root=None):
    """(name, command line after `python`) of every run of the preset with this seed."""
    shared, methods = PRESETS[preset]
    for name, (script, *own) in methods.items():
        if only and name not in only:
            continue
        line = [f"mamba_fl/{script}.py", *shared, *own, "--seed", str(seed)]
        line += ["--output-dir", str(output), "--run-name", f"{name}_seed_{seed}"]
        yield name, line + (["--data-root", data_root] if data_root else [])


def one_run(name, command, output):
    """Runs one command (again, if it was broken off), its output in `output`/logs. Returns (name, exit code)."""
    log = output / "logs" / f"{name}.log"
    code = start([*command, "--resume"], log)
    print(f"{name}: {'finished' if code == 0 else f'exit code {code}, see {log}'}", flush=True)
    return name, code


def collect(output, path):
    """Writes a line of JSON per finished run under `output`: name, command, flags, commit, versions, results, curve.

    That is the log behind a table: small enough to keep in the repository (mamba_fl/results).
    """
    with open(path, "w", encoding="utf-8") as file:
        for folder in sorted(manifest.parent for manifest in output.glob("*/run.json")):
            run = read_json(folder / "run.json")
            if run["status"] != "finished":
                continue
            kept = told(run, "git_commit", "versions", "resolved", "processes", "results")
            fields = ("round", "tokens", "train_loss", "val_loss", "val_ppl", "val_bits_per_byte")
            curve = [{field: line[field] for field in fields} for line in read_metrics(folder)]
            line = {
                "name": folder.name,
                "command": run["command"],
                **kept,
                "data": run["data"]["sha256"],
                "curve": curve,
            }
            file.write(json.dumps(line) + "\n")


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="small: a laptop's sizes")
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time, of one thread each")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these (names as --plan shows; default: all)")
    parser.add_argument("--plan", action="store_true", help="print the commands and do nothing")
    parser.add_argument("--output-dir", "--data-dir", metavar="DIR", help="run folders (default: results/PRESET)")
    parser.add_argument("--data-root", "--cache-dir", metavar="DIR", help="where the data sets are")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
