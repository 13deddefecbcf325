"""Runs the study of this folder's README: central LoRA and the six rules, one factor at a time, several seeds.

    python lora_glue_fl/run_study.py --model PATH --jobs 2                       # a laptop: subsets, 6 rounds
    python lora_glue_fl/run_study.py --preset full --model_size base             # a GPU: whole tasks, 30 rounds
    python lora_glue_fl/run_study.py --model tiny --dataset demo --preset quick  # all of it, small, offline
    python lora_glue_fl/run_study.py --model PATH --plan                         # only shows the commands

The base: 3 clients, IID, rank 4. Beside it, each alone: 20 clients; Dirichlet shards; higher learning rates; rank 16;
clients of different ranks; the balanced split. Each run is one of the scripts beside this file, in a process of its
own; finished runs are skipped and broken ones go on, so that the command can be given again at any time.
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.lowrank import RULES
from common.checkpoint import read_json
from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int, run_main
from common.curves import read_metrics
from common.launching import one_run, told, took
from lora_glue_fl.data_prep import DATASETS, load_task
from lora_glue_fl.models import size_label
from lora_glue_fl.sharding import make_client_splits, save_shard_manifests

HERE = Path(__file__).resolve().parent
LORA = ["--lora-r", "4", "--svd-rank", "4", "--lora-alpha", "8", "--alpha", "8"]
# settings: name -> (clients, sharding mode, rules, flags beside LORA)
SETTINGS = {
    "base": (3, "iid", RULES, []),
    "clients20": (20, "iid", RULES, []),
    "dirichlet": (3, "dirichlet", RULES, ["--eval-clients"]),
    "lr6e-3": (3, "iid", RULES, ["--learning-rate", "6e-3"]),
    "lr2e-2": (3, "iid", RULES, ["--learning-rate", "2e-2"]),
    "balanced": (20, "iid", ("svd",), ["--svd-split", "balanced"]),
    "rank16": (
        3,
        "iid",
        ("svd", "naive"),
        ["--lora-r", "16", "--svd-rank", "16", "--lora-alpha", "32", "--alpha", "32"],
    ),
    "ranks": (3, "iid", ("svd", "stack"), ["--client-ranks", "2", "4", "8"]),
}
ALPHA = 0.3  # of the Dirichlet shards


@dataclass
class Preset:
    """tasks: (task, examples of its training split or None for all, settings), in the order of the runs; rounds;
    one_seed: tasks and settings of which only the first seed runs; shared: flags of every run."""

    tasks: list
    rounds: int
    one_seed: tuple = ()
    shared: list = field(default_factory=list)


PRESETS = {
    "small": Preset(
        [
            ("sst2", 2000, ("base", "clients20", "dirichlet")),
            ("mrpc", 1200, ("base",)),
            ("rte", 600, ("base",)),
            ("sst2", 2000, ("lr6e-3", "lr2e-2", "balanced", "rank16", "ranks")),
            ("cola", 1500, ("base",)),
            ("stsb", 1000, ("base",)),
        ],
        6,
        ("cola", "stsb", "rank16", "ranks", "lr6e-3", "lr2e-2"),
        [
            "--batch-size",
            "8",
            "--learning-rate",
            "2e-3",
            "--lr-scheduler",
            "constant",
            "--amp",
            "auto",
            "--threads",
            "1",
        ],
    ),
    "full": Preset(
        [(task, None, tuple(SETTINGS)) for task in ("rte", "mrpc", "cola", "stsb", "sst2")],
        30,
        (),
        ["--learning-rate", "4e-4", "--warmup-ratio", "0.06", "--amp", "auto"],
    ),
    "quick": Preset([("sst2", 300, tuple(SETTINGS))], 2, (), ["--learning-rate", "1e-2", "--threads", "1"]),
}


def main(args):
    preset = PRESETS[args.preset]
    output = Path(args.output_dir or f"results/glue_{args.preset}")
    known = list(dict.fromkeys(task for task, _, _ in preset.tasks))
    unknown = sorted(set(args.tasks or ()) - set(known))
    if unknown:
        raise UsageError(f"--tasks {' '.join(unknown)}: not in the preset; choose from {', '.join(known)}")
    runs = list(plan(args, preset, output))
    if args.plan:
        for _, folder, command in runs:
            print(f"# {took(folder)}\npython {shlex.join(command)}")
        return
    make_shards(args, preset, output)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [name for name, code in pool.map(lambda run: one_run(*run, output), runs) if code]
    collect(output, output / "results.jsonl")
    plots = HERE.parent / "plots"
    figures = [sys.executable, str(plots / "glue_figures.py"), "--data-dir", str(output)]
    subprocess.run([*figures, "--out-dir", str(output / "figures")], check=False)
    table = [sys.executable, str(plots / "glue_table.py"), "--data-dir", str(output), "--markdown"]
    code = subprocess.run(table, check=False).returncode
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish ({', '.join(failed)}): see {output}/output")
    if code:
        raise RunFailed(f"the runs are finished but plots/glue_table.py ended with exit code {code}")
    print(output)


def plan(args, preset, output):
    """(name, run folder, command line after `python`) of every run: task by task, setting by setting, seed by seed."""
    given = ["--dataset", args.dataset]
    for flag in ("model", "model_size", "data_root", "cache_dir", "device"):
        if getattr(args, flag):
            given += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
    shared = [*given, *preset.shared]
    for task, examples, settings in preset.tasks:
        if args.tasks and task not in args.tasks:
            continue
        for setting in settings:
            if args.settings and setting not in args.settings:
                continue
            once = task in preset.one_seed or setting in preset.one_seed
            for seed in args.seeds[:1] if once else args.seeds:
                common = [*shared, "--task-name", task, "--seed", str(seed), "--output-dir"]
                if setting == "base":
                    label = size_label(args)
                    yield central(task, examples, preset, common, output, seed, label)
                    if "constant" in preset.shared:
                        yield central(task, examples, preset, common, output, seed, label, "linear")
                for rule in SETTINGS[setting][2]:
                    yield federated(task, setting, rule, preset, common, output, seed)


def central(task, examples, preset, common, output, seed, label, scheduler=None):
    """Central LoRA: as many passes over the same examples.

    scheduler: another one than the federated runs'. At a constant rate the averaging of clients has what a falling rate
    gives, and central training has not: the two together bracket the ceiling.
    """
    name = f"central_{scheduler}_seed_{seed}" if scheduler else f"central_seed_{seed}"
    line = ["lora_glue_fl/main_glue_lora.py", *common, str(output), "--run-name", name, "--do-train", "--do-eval"]
    line += [*LORA[:2], *LORA[4:6], "--num-train-epochs", str(preset.rounds)]
    if examples:
        line += ["--max-examples", str(examples)]
    if scheduler:
        line += ["--lr-scheduler", scheduler]
    return f"{task}_{name}", output / f"{task}_{label}" / name, line


def federated(task, setting, rule, preset, common, output, seed):
    """One rule in one setting."""
    name = f"{task}_{setting}_{rule}_seed_{seed}"
    own = SETTINGS[setting][3]
    line = ["lora_glue_fl/fedavg_rounds.py", *common, str(output), "--run-name", name, "--aggregate", rule]
    line += ["--shard-dir", str(shard_folder(output, task, setting, seed)), "--rounds", str(preset.rounds)]
    line += ["--eval-each-round", "--keep", "last", "--no-save-clients", *LORA, *own]
    return name, output / name, line


def shard_folder(output, task, setting, seed):
    """Where a setting's manifests are."""
    k, mode, _, _ = SETTINGS[setting]
    return output / "shards" / f"{task}_{mode}_k{k}_seed_{seed}"


def make_shards(args, preset, output):
    """Writes every setting's manifests that are not there yet."""
    for task, examples, settings in preset.tasks:
        if args.tasks and task not in args.tasks:
            continue
        data = load_task(task, args.dataset, args.data_root, args.cache_dir, splits=("train",))
        for setting in settings:
            k, mode, _, _ = SETTINGS[setting]
            for seed in args.seeds:
                folder = shard_folder(output, task, setting, seed)
                if (folder / "summary.json").exists():
                    continue
                about = {"dirichlet_alpha": ALPHA, "min_samples": 32, "max_examples": examples, "data": data}
                save_shard_manifests(folder, make_client_splits(task, k, mode, seed=seed, **about))


def collect(output, path):
    """Writes a line of JSON per finished run under `output`: flags, commit, versions, data, results, curve."""
    dropped = ("seconds", "examples_per_second", "clients", "left_out_updates")
    with open(path, "w", encoding="utf-8") as file:
        for folder in sorted(manifest.parent for manifest in output.rglob("run.json")):
            run = read_json(folder / "run.json")
            if run["status"] != "finished":
                continue
            places = ("shard_dir", "model", "tokenizer", "cache_dir")
            kept = told(run, "git_commit", "versions", "resolved", "results", places=places)
            kept["data"] = {key: run["data"].get(key) for key in ("sha256", "clients", "mode", "examples")}
            curve = [{k: v for k, v in line.items() if k not in dropped} for line in read_metrics(folder)]
            name = str(folder.relative_to(output))
            file.write(json.dumps({"name": name, "command": run["command"], **kept, "curve": curve}) + "\n")


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small", help="small: a laptop's sizes")
    parser.add_argument("--model-size", choices=["base", "large"], help="roberta-base or roberta-large")
    parser.add_argument("--model", metavar="NAME", help="another encoder: a folder, a name on the hub, or tiny")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all of the preset)")
    parser.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), metavar="NAME", help=f"only these of {', '.join(SETTINGS)}"
    )
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", default=[0, 1, 2], metavar="N", help="seeds")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time, of one thread each")
    parser.add_argument("--plan", action="store_true", help="print the commands, how long each took, and do nothing")
    parser.add_argument("--output-dir", metavar="DIR", help="run folders (default: results/glue_PRESET)")
    parser.add_argument("--dataset", choices=DATASETS, default="glue", help="demo is generated and needs no network")
    parser.add_argument("--data-root", metavar="DIR", help="where the data sets are")
    parser.add_argument("--cache-dir", metavar="DIR", help="tokenised data")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
