"""Runs this study's experiments, one process a run, and reports on them.

    python llm_noniid/run_experiments.py --mode quick --model tiny --dataset demo    # minutes, offline
    python llm_noniid/run_experiments.py --mode main                                 # the source's grid: a GPU
    python llm_noniid/run_experiments.py --mode failure                              # the source's failure settings
    python llm_noniid/run_experiments.py --mode study --model models/small --jobs 2  # the README's study: 2 hours
    python llm_noniid/run_experiments.py --mode compare                              # tables of what is there
    python llm_noniid/run_experiments.py --mode analyze                              # report.html

quick    3 algorithms x 4 partitions, 5 rounds
main     3 algorithms x 4 partitions x participation 0.3, 0.5, 1.0
failure  3 algorithms x (alpha 0.01; participation 0.1; learning rate 1e-3; 5 local epochs), topic skew
study    one factor at a time from FedAvg, topic skew, alpha 0.1: the partitions with 3 algorithms, alpha 100, 1, 0.01,
         participation 0.3, 0.1, higher learning rates (IID too), 5 times the local steps, clusters, local and central
         training, WikiText-2 beside AG News, maps of the failures of FedAvg and SCAFFOLD

Each mode also has a run of one step of no size, for the model's loss before training. Flags that are not listed are
train.py's and go to every run; a grid's own win. Finished runs are skipped and broken ones go on, so that the command
can be given again at any time.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from common.cli import Parser, RunFailed, UsageError, non_negative_int, positive_float, positive_int, run_main
from llm_noniid import launching, report
from llm_noniid.failure_map import ALPHAS
from llm_noniid.models import label
from llm_noniid.outcomes import START_RATE
from llm_noniid.partition import PARTITIONS

ALGORITHMS = ("fedavg", "fedprox", "scaffold")
SMALL = ["--threads", "1", "--eval-every", "1", "--local-steps"]
PRESETS = {  # flags of every run of a mode, below those of the command line
    "quick": [
        *[*SMALL, "5", "--num-rounds", "5", "--max-samples", "500", "--eval-samples", "100"],
        *["--learning-rate", "1e-3"],
    ],
    "main": [],
    "failure": [],
    "study": [
        *[*SMALL, "10", "--num-rounds", "12", "--max-samples", "4000", "--eval-samples", "300"],
        *["--probe-samples", "32", "--max-length", "64", "--learning-rate", "3e-3"],
    ],
}
GIVEN = "model dataset data_root cache_dir max_samples local_steps num_rounds device amp".split()
SET_HERE = "algorithm partition seed run_name name overwrite resume cluster mu".split()
MORE_STEPS = 5  # times the local steps: the study's 5 local epochs
MAP_BUDGET = 10  # runs of each of the study's failure maps
MAP_RANGE = (1 / 3, 300)  # of the study's maps, times the learning rate


@dataclass(frozen=True)
class Setting:
    """A setting of a grid: its name without the seed, its flags, how many of the seeds it takes (None: all)."""

    name: str
    words: tuple
    seeds: int | None = None


def grid(mode, base, rates=None):
    """The settings of a mode. Args: base: train.py's flags as they are without the grid's own; rates: of the study."""
    yield start(base)
    if mode == "quick":
        yield from partitions(PARTITIONS)
    elif mode == "main":
        for rate in ("0.3", "0.5", "1.0"):
            yield from partitions(PARTITIONS, f"_participation_{rate}", "--participation-rate", rate)
    elif mode == "failure":
        for name, *words in (
            ("alpha_0.01", "--alpha", "0.01"),
            ("participation_0.1", "--participation-rate", "0.1"),
            ("lr_1e-3", "--learning-rate", "1e-3"),
            ("epochs_5", "--local-steps", "0", "--local-epochs", "5"),
        ):
            yield from partitions(["topic_skew"], f"_{name}", *words)
    else:
        yield from study(base, rates)


def start(base):
    """A run that only says what the model's loss is before training."""
    words = ["--partition", "iid", "--learning-rate", f"{START_RATE / 1e10:g}", "--num-rounds", "1"]
    return Setting("start", (*words, "--local-steps", "1", "--eval-every", "1"))


def partitions(names, suffix="", *words):
    """The three algorithms on partitions."""
    for partition in names:
        for algorithm in ALGORITHMS:
            own = ("--algorithm", algorithm, "--partition", partition, *words)
            yield Setting(f"{algorithm}_{partition}{suffix}", own)


def study(base, rates=None):
    """One factor at a time from FedAvg, topic skew; see this module's docstring."""
    yield from partitions(PARTITIONS)
    fedavg = ("--algorithm", "fedavg", "--partition", "topic_skew")
    for alpha in (100, 1, 0.1, 0.01):
        if alpha != base.alpha:
            yield Setting(f"fedavg_alpha_{alpha:g}", (*fedavg, "--alpha", f"{alpha:g}"))
    for share in (1.0, 0.3, 0.1):
        if share != base.participation_rate:
            yield Setting(f"fedavg_participation_{share:g}", (*fedavg, "--participation-rate", f"{share:g}"))
    for rate in rates or (10 * base.learning_rate, 100 * base.learning_rate):
        if rate != base.learning_rate:
            for partition in ("topic_skew", "iid"):
                words = ("--algorithm", "fedavg", "--partition", partition, "--learning-rate", f"{rate:g}")
                yield Setting(f"fedavg_{partition}_lr_{rate:g}", words, 2)
    steps = ("--local-steps", str(MORE_STEPS * base.local_steps))
    if not base.local_steps:
        steps = ("--local-epochs", f"{MORE_STEPS * base.local_epochs:g}")
    yield Setting(f"fedavg_{steps[0][2:].replace('-', '_')}_{steps[1]}", (*fedavg, *steps))
    for kind in ("updates", "labels"):
        yield Setting(f"fedavg_clusters_{kind}", (*fedavg, "--cluster", kind))
    for algorithm in ("local", "central"):
        yield Setting(algorithm, ("--algorithm", algorithm, "--partition", "topic_skew"))
    if base.dataset == "ag_news":
        for partition in ("iid", "topic_skew"):
            words = ("--algorithm", "fedavg", "--partition", partition, "--dataset", "wikitext")
            yield Setting(f"fedavg_{partition}_wikitext", words, 1)


def plan(args, given):
    """(name, folder, command line after `python`) of every run of --mode, seed by seed within each setting."""
    output = Path(args.results_dir)
    for name in GIVEN:
        if getattr(args, name) is not None:
            given = [*given, f"--{name.replace('_', '-')}", str(getattr(args, name))]
    shared = [*PRESETS[args.mode], *given]
    base = launching.train_flags(shared)
    seeds = args.seeds or ([0, 1, 2] if args.mode == "study" else [42])
    of = f"{base.dataset}_{label(base.model)}"
    runs = []
    for setting in grid(args.mode, base, args.learning_rates):
        for seed in seeds[: setting.seeds]:
            name = f"{args.mode}_{setting.name}_{of}_seed_{seed}"
            words = [*shared, *setting.words, "--seed", str(seed)]
            if "fedprox" in setting.words and args.mu is not None:
                words += ["--mu", f"{args.mu:g}"]
            words += ["--output-dir", str(output), "--run-name", name, "--resume"]
            runs.append((name, output / name, ["llm_noniid/train.py", *words]))
    if args.mode == "study" and args.map_budget:
        low, high = (f"{base.learning_rate * factor:g}" for factor in MAP_RANGE)
        for algorithm in ("fedavg", "scaffold"):
            name = f"failure_map_{algorithm}_{of}"
            words = ["--algorithm", algorithm, "--axis", "learning_rate", "--low", low, "--high", high]
            words += ["--alphas", *(f"{alpha:g}" for alpha in ALPHAS), "--budget", str(args.map_budget)]
            words += ["--seed", str(seeds[0]), "--output-dir", str(output / name), "--start-run", str(runs[0][1])]
            runs.append(
                (name, output / name, ["llm_noniid/failure_map.py", *words, *_without(shared, "learning_rate")])
            )
    return runs


def _without(words, name):
    """The words without a flag and its value: the failure map sets it."""
    kept, skip = [], False
    for word in words:
        flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and flag in (name, "alpha"):
            skip = "=" not in word
        elif skip:
            skip = False
        else:
            kept.append(word)
    return kept


def main(args, given):
    output = Path(args.results_dir)
    if args.mode in ("compare", "analyze"):
        if given:
            raise UsageError(f"{given[0]}: --mode {args.mode} runs nothing, so it takes no flag of train.py: drop it")
        if args.mode == "compare":
            print(report.text(output))
        else:
            print(report.write(output, output / "report.html"))
        return
    runs = plan(args, given)
    if args.plan:
        for _, folder, command in runs:
            print(f"# {launching.took(folder)}\npython {shlex.join(command)}")
        return
    failed = launching.run_all(runs, output, args.jobs)
    output.mkdir(parents=True, exist_ok=True)
    launching.collect(output, output / "results.jsonl")
    if len(failed) < len(runs):
        print(report.text(output))
        print(report.write(output, output / "report.html"))
    if failed:
        raise RunFailed(f"{len(failed)} of {len(runs)} runs did not finish ({', '.join(failed)}): see {output}/output")
    print(output)


def build_parser():
    parser = Parser(__doc__.split("\n")[0] + " Flags that are not listed are train.py's and go to every run.")
    modes = [*PRESETS, "compare", "analyze"]
    parser.add_argument("--mode", choices=modes, default="quick", help="what to run, or to say of what was run")
    parser.add_argument("--seeds", type=non_negative_int, nargs="+", metavar="N", help="default: 42; study: 0 1 2")
    parser.add_argument("--jobs", type=positive_int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--plan", action="store_true", help="print the commands, how long each took, and do nothing")
    parser.add_argument(
        "--results-dir", "--output-dir", default="results", metavar="DIR", help="where run folders and report.html are"
    )
    parser.add_argument(
        "--learning-rates", type=positive_float, nargs="+", metavar="X", help="of the study (default: 10, 100 times)"
    )
    parser.add_argument(
        "--map-budget", type=non_negative_int, default=MAP_BUDGET, metavar="N", help="runs of each failure map; off: 0"
    )
    parser.add_argument("--mu", type=positive_float, metavar="X", help="of the fedprox runs (default: train.py's)")
    run = parser.add_argument_group("given to every run (default: the mode's, else train.py's)")
    run.add_argument("--model", metavar="NAME", help="distilgpt2, gpt2, tinyllama, qwen-0.5b, tiny, a folder")
    run.add_argument("--dataset", metavar="NAME", help="ag_news, wikitext or demo")
    run.add_argument("--data-root", metavar="DIR", help="where the data are")
    run.add_argument("--cache-dir", metavar="DIR", help="tokens")
    run.add_argument("--max-samples", type=non_negative_int, metavar="N", help="training texts; 0: all")
    run.add_argument("--local-steps", type=non_negative_int, metavar="H", help="steps a round; 0: local epochs")
    run.add_argument("--num-rounds", type=positive_int, metavar="T", help="rounds")
    run.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--amp", metavar="NAME", help="off, auto, bf16, fp16")
    return parser


def parse(argv=None):
    """(own flags, train.py's flags as words)."""
    args, given = build_parser().parse_known_args(argv)
    launching.refuse(given, [*SET_HERE, "participation_rate"] if args.mode == "main" else SET_HERE)
    return args, given


if __name__ == "__main__":
    run_main(lambda argv: main(*parse(argv)), None)
