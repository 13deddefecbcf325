"""Runs every experiment of this study, one process each, draws the figures and prints one table.

    python vit_sparse_fl/run_all_experiments.py --full --num-runs 3        # the source's configuration: a GPU, days
    python vit_sparse_fl/run_all_experiments.py --stand-in --jobs 2        # the measured study: a laptop, hours
    python vit_sparse_fl/run_all_experiments.py --quick --dataset demo --model tiny      # all of it, small, offline
    python vit_sparse_fl/run_all_experiments.py --full --plan              # only shows the commands

Finished runs are skipped and broken ones go on, so that the command can be given again at any time.
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.checkpoint import read_json, write_json
from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_int, run_main
from common.launching import one_run, told, took
from vit_sparse_fl.masks import STRATEGIES

HERE = Path(__file__).resolve().parent
GROUPS = ("centralized", "federated", "sparse", "extension")
# flags that are handed to every run
GIVEN = ("dataset", "classes", "model", "weights", "init_from", "image_size", "data_root", "device", "amp", "config")


@dataclass
class Sizes:
    """What the presets differ in; flags as lists of words."""

    common: list = field(default_factory=list)  # for every run
    central: list = field(default_factory=list)
    federated: list = field(default_factory=list)  # for federated and sparse runs, without the number of rounds
    sparse: list = field(default_factory=list)  # for sparse runs besides
    rounds: int = 500
    nc: tuple = (50, 10, 5, 1)
    j: tuple = (8, 16)
    sparsities: dict = field(default_factory=lambda: {"least_sensitive": (0.5, 0.7, 0.95, 0.99)})
    calibration_rounds: tuple = (1, 2, 3, 5, 6, 7, 8, 9, 10)
    beyond: bool = True  # calibration on clients and the source's calibration too
    lower: dict = field(
        default_factory=dict
    )  # dense FedAvg where the common learning rate is too high: nc1, J16 -> one
    pretrain: list | None = None  # a run that comes first, and that the others start from


SOURCE = Sizes()
QUICK = Sizes(
    central=["--epochs", "3", "--warmup-epochs", "1"],
    federated=["--eval-every", "2"],
    sparse=["--fisher-samples", "64"],
    rounds=8,
    sparsities={"least_sensitive": (0.5, 0.99)},
    calibration_rounds=(1,),
)
# a ViT of half a million weights, trained on classes 0 to 49, then federated on the other 50; the head, fitted by ridge
# regression, is frozen everywhere but where the name says otherwise, so that dense and sparse runs differ in one factor
TINY = ["--dataset", "cifar100", "--model", "tiny", "--threads", "1", "--amp", "auto", "--dropout", "0"]
OTHER_HALF = ["--classes", "50:100", "--head", "ridge", "--batch-size", "32", "--early-stopping-patience", "0"]
STAND_IN = Sizes(
    common=TINY,
    central=[*OTHER_HALF, "--epochs", "20", "--lr", "0.03", "--warmup-epochs", "0"],
    federated=[*OTHER_HALF, "--freeze-head", "--lr", "0.1", "--eval-every", "10", "--save-every", "40"],
    rounds=120,
    nc=(25, 5, 1),
    sparsities={"least_sensitive": (0.5, 0.99), "random": (0.5, 0.99)},
    calibration_rounds=(1, 10),
    beyond=False,
    lower={"nc1": "0.01", "J16": "0.03"},
    pretrain=["--classes", "0:50", "--epochs", "60", "--lr", "0.1", "--early-stopping-patience", "0", "--seed", "0"],
)
# the same for a GPU: the ViT sees 64 patches instead of 16
STAND_IN_GPU = replace(STAND_IN, common=[*TINY, "--image-size", "64"], rounds=500)


def plan(args):
    """The runs as (group, name, command line after `python`), in order."""
    sizes = STAND_IN if args.stand_in else STAND_IN_GPU if args.stand_in_gpu else QUICK if args.quick else SOURCE
    if sizes.pretrain is not None:
        fixed = [f for f in ("dataset", "classes", "model", "weights", "init_from", "image_size") if getattr(args, f)]
        if fixed:
            raise UsageError(f"--stand-in decides --{fixed[0].replace('_', '-')} itself: drop the flag, or use --full")
    wanted = [g for g in GROUPS if getattr(args, f"only_{g}")] or list(GROUPS)
    output = output_dir(args)
    shared = ["--output-dir", str(output), *sizes.common]
    for flag in GIVEN:
        if getattr(args, flag) is not None:
            shared += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]

    def run(group, name, script, *words):
        return (
            group,
            name,
            [f"vit_sparse_fl/{script}.py", *shared, *map(str, words), "--run-name", name, "--num-runs", "1"],
        )

    runs = []
    if sizes.pretrain is not None:
        runs.append(run("pretrain", "pretrain", "train_centralized", *sizes.pretrain))
        shared += ["--init-from", str(output / "pretrain")]
    for seed in range(args.seed, args.seed + args.num_runs):
        for group, name, script, *words in _settings(sizes):
            if group in wanted:
                runs.append(run(group, f"{name}_seed_{seed}", script, *words, "--seed", seed))
    return runs


def _settings(sizes):
    """(group, name, script, flags ...) of every setting, one factor at a time from IID, J = 4, dense."""
    federated = [*sizes.federated, "--num-rounds", sizes.rounds]
    sparse = ("train_federated_sparse", *sizes.sparse)
    yield "centralized", "centralized", "train_centralized", *sizes.central
    yield "federated", "fedavg_iid", "train_federated", *federated
    for nc in sizes.nc:
        yield "federated", f"fedavg_nc{nc}", "train_federated", *federated, "--sharding", "non_iid", "--nc", nc
    for j in sizes.j:
        fewer = max(1, sizes.rounds * 4 // j)
        scaled = [*sizes.federated, "--num-rounds", fewer, "--local-steps", j]
        yield "federated", f"fedavg_J{j}", "train_federated", *scaled
    for strategy in STRATEGIES:
        group = "sparse" if strategy == "least_sensitive" else "extension"
        yield group, f"{strategy}_s0.9", *sparse, *federated, "--mask-strategy", strategy
    for strategy, values in sizes.sparsities.items():
        for s in values:
            flags = [*federated, "--mask-strategy", strategy, "--sparsity-ratio", s]
            yield "sparse", f"{strategy}_s{s:g}", *sparse, *flags
    for rounds in sizes.calibration_rounds:
        yield "sparse", f"calibration_rounds_{rounds}", *sparse, *federated, "--calibration-rounds", rounds
    for strategy in ("least_sensitive", "random"):
        flags = [*federated, "--mask-strategy", strategy, "--sharding", "non_iid", "--nc", 5]
        yield "sparse", f"{strategy}_s0.9_nc5", *sparse, *flags
    if "--freeze-head" in federated:
        yield "federated", "fedavg_iid_head_trained", "train_federated", *federated, "--no-freeze-head"
    yield "extension", "topk_s0.9", *sparse, *federated, "--upload", "topk", "--mask-strategy", "random"
    yield "extension", "per_layer", *sparse, *federated, "--mask-scope", "layer"
    for name, lr in sizes.lower.items():
        one_class = ["--sharding", "non_iid", "--nc", 1]
        more = one_class if name == "nc1" else ["--local-steps", 16, "--num-rounds", max(1, sizes.rounds // 4)]
        yield "federated", f"fedavg_{name}_lr{lr}", "train_federated", *federated, *more, "--lr", lr
    if sizes.beyond:
        yield "extension", "calibration_seed", *sparse, *federated, "--calibration", "seed"
        yield "extension", "on_clients", *sparse, *federated, "--calibrate-on", "clients"


def output_dir(args):
    """Where the run folders go."""
    size = next((name for name in ("quick", "stand_in", "stand_in_gpu") if getattr(args, name)), "full")
    return Path(args.output_dir or f"results/vit_{size}")


def main(args):
    output, runs = output_dir(args), plan(args)
    if args.plan:
        for _, name, command in runs:
            print(f"# {name}: {took(output / name)}\npython {shlex.join(command)}")
        return
    first = [run for run in runs if run[0] == "pretrain"]
    rest = [run for run in runs if run[0] != "pretrain"]

    def code_of(run):
        _, name, command = run
        return one_run(name, output / name, command, output)

    failed = [name for name, code in map(code_of, first) if code]
    if not failed:
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = [name for name, code in pool.map(code_of, rest) if code]
    write_json(output / "all_results.json", collected(output))
    table = draw(output)
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish ({', '.join(failed)}): see {output}/output")
    if table:
        raise RunFailed(f"the runs are finished but plots/tables.py ended with exit code {table}")
    print(output)


def collected(output):
    """Every finished run under `output`: name, command, flags, commit, versions, results and curve, for JSON."""
    fields = ("round", "train_loss", "val_loss", "val_accuracy", "update_cosine", "gradient_diversity")
    fields += ("sign_conflict", "drift", "drift_to_mean", "bytes_up")
    found = []
    for folder in sorted(manifest.parent for manifest in output.glob("*/run.json")):
        run = read_json(folder / "run.json")
        if run["status"] != "finished":
            continue
        kept = told(run, "command", "git_commit", "versions", "resolved", "results", places=("init_from",))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curve = [{key: line[key] for key in fields if key in line} for line in lines]
        found.append({"name": folder.name, **kept, "curve": curve})
    return found


def draw(output):
    """Draws what the runs allow into `output`/figures and prints the table. Returns the table's exit code."""
    plots = HERE.parent / "plots"
    figures = [sys.executable, str(plots / "vit.py"), "--data-dir", str(output)]
    subprocess.run([*figures, "--out-dir", str(output / "figures")], check=False)
    table = [sys.executable, str(plots / "tables.py"), "vit_sparse_fl", "--data-dir", str(output)]
    return subprocess.run(table, check=False).returncode


def build_parser():
    parser = Parser(__doc__.split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full", action="store_true", help="the source's configuration (this is what runs without a flag)"
    )
    size.add_argument("--quick", action="store_true", help="all of it with a few rounds, to see that it works")
    size.add_argument(
        "--stand-in", action="store_true", help="the measured study: a small ViT trained on half the classes"
    )
    size.add_argument("--stand-in-gpu", action="store_true", help="the same with larger images and more rounds")
    for group in GROUPS:
        parser.add_argument(f"--only-{group}", action="store_true", help=f"only the group {group} (may be combined)")
    parser.add_argument("--num-runs", type=positive_int, default=3, metavar="N", help="seeds")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="the first seed")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--plan", action="store_true", help="print the commands, how long each took, and do nothing")
    parser.add_argument(
        "--output-dir", "--checkpoint-dir", metavar="DIR", help="run folders (default: results/vit_...)"
    )
    run = parser.add_argument_group("given to every run")
    run.add_argument("--dataset", help="cifar100 or demo")
    run.add_argument("--classes", metavar="A:B", help="only the classes A to B-1")
    run.add_argument("--model", metavar="NAME", help="dino_vits16, tiny, a folder or a name on the hub")
    run.add_argument("--weights", metavar="FILE", help="DINO's own checkpoint")
    run.add_argument("--init-from", metavar="RUN", help="start from the weights of another run")
    run.add_argument("--image-size", type=positive_int, metavar="S", help="pixels")
    run.add_argument("--data-root", "--data-dir", metavar="DIR", help="where the data set is")
    run.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--amp", choices=["off", "auto", "bf16", "fp16"], help="precision of the products")
    run.add_argument("--config", metavar="FILE", help="yaml file with defaults for the flags")
    return parser


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
