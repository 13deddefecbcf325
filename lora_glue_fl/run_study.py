"""Runs the study of this folder's README: central LoRA and six rules, one factor at a time, several seeds.

    python lora_glue_fl/run_study.py --model PATH --jobs 2                       # a laptop: subsets, 6 rounds
    python lora_glue_fl/run_study.py --preset full --model_size base             # a GPU: whole tasks, 30 rounds
    python lora_glue_fl/run_study.py --preset quick                              # most of it, small, offline: minutes
    python lora_glue_fl/run_study.py --preset replay --model PATH --jobs 2       # does the averaging error cost loss?
    python lora_glue_fl/run_study.py --preset trajectories --model PATH --tune --tune-seed 101   # then without both
    python lora_glue_fl/run_study.py --model PATH --plan                         # only checks and shows the commands

`replay`: from a checkpoint (a round of naive, 3 clients, IID, of the same rank) one round of naive with --replay at
half the rate: local epochs x Dirichlet's alpha with 10 clients of equal size at rank 4, and at alpha 0.3 rank 16 and 3
clients of as many steps as 10 have in 4 epochs.
`trajectories`: eight rules from one trained head, 10 clients of equal size, alpha 0.3, rank 8, each at the rate that
--tune found on examples that no client has (seed 101, whose shards are as skewed as those of the measured seeds; those
of 100, the default, are the mildest); naive and residual at 3e-4 too, a fifth above their best; three for 8 rounds;
five with 3 of the 10 clients a round, at the same rates, 3 seeds. Both presets pool by the mean over tokens, as the
stand-in encoder was trained.

The other presets' base: 3 clients, IID, rank 4. Beside it, each alone: 20 clients; Dirichlet shards; higher learning
rates; rank 16; clients of different ranks; the balanced split. Each run is one of the scripts beside this file, in a
process of its own; finished runs are skipped and broken ones go on, so that the command can be given again at any time.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from common import grid, tuning
from common.cli import UsageError, run_main
from common.grid import Preset, Setting
from lora_glue_fl.flags import add_data_flags, add_model_flags, size_label

LORA = "--lora-r 4 --svd-rank 4 --lora-alpha 8 --alpha 8".split()
SIX = ("svd", "naive", "ffa", "stack", "residual", "rolora")
ALPHA = 0.3  # of the Dirichlet shards


@dataclass(frozen=True)
class Case:
    """What is varied: clients, how examples are dealt to them, the rules that run, flags beside LORA.

    alpha, sizes: of Dirichlet shards; start: the case whose runs all begin with; rates: {rule: what --tune tries};
    seeds: as `Setting`; tuned_as: the case whose rules' rates its own take.
    """

    clients: int = 3
    mode: str = "iid"
    rules: tuple = SIX
    words: tuple = ()
    alpha: float = ALPHA
    sizes: str = "dirichlet"
    start: str = ""
    rates: dict = field(default_factory=dict)
    tuned_as: str = ""
    seeds: int | None = None


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
ONE_FACTOR = tuple(CASES)


def replay_case(epochs, alpha=ALPHA, clients=10, rank=4):
    """One round of naive with --replay. alpha: of equal clients, None: IID."""
    words = f"--replay --local-epochs {epochs} --learning-rate 1e-3 --lora-r {rank} --lora-alpha {2 * rank}".split()
    dealt, start = ("iid",) if alpha is None else ("dirichlet",), "checkpoint" if rank == 4 else f"checkpoint_r{rank}"
    return Case(clients, *dealt, ("naive",), tuple(words), alpha or ALPHA, "equal", start)


EPOCHS = (1, 4, 16)
ALPHAS = {"iid": None, "a0.3": 0.3, "a0.1": 0.1}
REPLAY = {f"replay_e{e}_{name}": replay_case(e, a) for e in EPOCHS for name, a in ALPHAS.items()}
# beside e4_a0.3, at as many steps a client: 100 of 8 examples; 3 clients have 667 examples each, 10 have 200
REPLAY |= {"replay_e4_r16": replay_case(4, rank=16), "replay_e1.2_k3": replay_case(1.2, clients=3)}
# one round: from the end of three, at 2e-3, every further round raised the validation loss, IID too
CASES["checkpoint"] = Case(rules=("naive",))
CASES["checkpoint_r16"] = Case(rules=("naive",), words=tuple("--lora-r 16 --lora-alpha 32".split()))
CASES |= REPLAY

EIGHT = (*SIX, "rotate", "head")
EQUAL = {"clients": 10, "mode": "dirichlet", "sizes": "equal"}
RANK8 = tuple("--lora-r 8 --svd-rank 8 --lora-alpha 16 --alpha 16".split())
WARM = tuple("--local-epochs 4 --rounds 2 --learning-rate 5e-3".split())
RATES = dict.fromkeys(("svd", "naive", "residual", "rotate"), (2.5e-4, 5e-4, 1e-3))
RATES |= dict.fromkeys(("ffa", "stack", "rolora"), (5e-4, 1e-3, 2e-3)) | {"head": (2.5e-3, 5e-3, 1e-2)}
CASES["warm"] = Case(**EQUAL, rules=("head",), words=(*RANK8, *WARM))
# one local epoch: after four the averaging error is no larger (results/replay.jsonl), and the loss rose from round 2 on
CASES["skew"] = Case(**EQUAL, rules=EIGHT, words=RANK8, start="warm", rates=RATES)
# twice as many rounds, and a little more than the best rate: whether what naive lacks is more than a lag
TWICE, FASTER = (*RANK8, "--rounds", "8"), (*RANK8, "--learning-rate", "3e-4")
CASES["skew_8"] = Case(**EQUAL, rules=("naive", "svd", "residual"), words=TWICE, start="warm", tuned_as="skew")
CASES["skew_longer"] = Case(**EQUAL, rules=("naive", "residual"), words=FASTER, start="warm")
SOME = (*RANK8, "--participation", "0.3")
FIVE = ("naive", "svd", "residual", "rotate", "head")
CASES["skew_some"] = Case(**EQUAL, rules=FIVE, words=SOME, start="warm", tuned_as="skew", seeds=3)


@dataclass(frozen=True)
class Sizes:
    """tasks: (task, examples of its training split or None for all, cases), in the order of the runs; one_seed: tasks
    and cases of which only the first seed runs; falling: central training also at a rate that falls to 0; held_out:
    training examples that no client has."""

    tasks: tuple
    rounds: int
    one_seed: tuple = ()
    falling: bool = True
    held_out: int = 0


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
FULL = Sizes(tuple((task, None, ONE_FACTOR) for task in ("rte", "mrpc", "cola", "stsb", "sst2")), 30, falling=False)
QUICK = Sizes((("sst2", 600, ("base", "clients20", "dirichlet", "balanced", "rank16", "ranks")),), 5)

AGAIN = Sizes((("sst2", 2000, ("checkpoint", "checkpoint_r16", *REPLAY)),), 1)
TRAJECTORIES = Sizes((("sst2", 2000, ("warm", "skew", "skew_8", "skew_longer", "skew_some")),), 4, held_out=1000)

CONSTANT = "--batch-size 8 --lr-scheduler constant --threads 1"
MEAN = f"--learning-rate 2e-3 --amp auto --pooling mean {CONSTANT}".split()
PRESETS = {
    "small": Preset(f"--learning-rate 2e-3 --amp auto {CONSTANT}".split(), SMALL),
    "full": Preset("--learning-rate 4e-4 --warmup-ratio 0.06 --amp auto".split(), FULL),
    "replay": Preset(MEAN, AGAIN),
    "trajectories": Preset(MEAN, TRAJECTORIES, seeds=(0, 1, 2, 3, 4), objective="held_out_loss"),
    "quick": Preset(f"--model tiny --dataset demo --learning-rate 1e-2 {CONSTANT}".split(), QUICK, seeds=(0,)),
}
SHOW = (
    ("plots/glue.py", "--data-dir", "{output}", "--out-dir", "{output}/figures"),
    ("plots/tables.py", "lora_glue_fl", "--data-dir", "{output}"),
)


def settings(args, sizes):
    """Task by task, case by case: central LoRA and the rules."""
    for task, examples, cases in sizes.tasks:
        for case in cases:
            wanted = {*(args.settings or cases), *(CASES[one].start for one in args.settings or ())}
            if (args.tasks and task not in args.tasks) or case not in wanted:
                continue
            seeds = 1 if task in sizes.one_seed or case in sizes.one_seed else CASES[case].seeds
            if case == "base":
                yield central(args, task, examples, sizes.rounds, seeds)
                if sizes.falling:
                    yield central(args, task, examples, sizes.rounds, seeds, "linear")
            for rule in CASES[case].rules:
                words = ["--task-name", task, "--aggregate", rule, "--rounds", sizes.rounds]
                words += ["--shard-dir", shard_folder(args, task, case, "{seed}"), "--eval-each-round"]
                words += ["--keep", "last", "--no-save-clients", *LORA, *CASES[case].words]
                if start := start_of(task, case):
                    words += ["--init-from", f"{args.output_dir}/{start}_seed_{{seed}}"]
                tune = {"learning-rate": CASES[case].rates[rule]} if CASES[case].rates else {}
                of = CASES[case].tuned_as and f"{task}_{CASES[case].tuned_as}_{rule}"
                name = f"{task}_{case}_{rule}"
                yield Setting(name, "lora_glue_fl/fedavg_rounds.py", tuple(words), case, seeds, tune, tuned_as=of)


def start_of(task, case):
    """The setting that a case's runs begin with, if any."""
    start = CASES[case].start
    return start and f"{task}_{start}_{CASES[start].rules[0]}"


def central(args, task, examples, rounds, seeds, scheduler=None):
    """Central LoRA: as many passes over the same examples.

    scheduler: another one than the federated runs'. At a constant rate the averaging of clients has what a falling rate
    gives, and central training has not: the two together bracket the ceiling.
    """
    words = ["--task-name", task, "--do-train", "--do-eval", *LORA[:2], *LORA[4:6], "--num-train-epochs", rounds]
    words += ["--max-examples", examples] if examples else []
    words += ["--lr-scheduler", scheduler] if scheduler else []
    name = f"{task}_{size_label(args)}/central" + (f"_{scheduler}" if scheduler else "")
    return Setting(name, "lora_glue_fl/main_glue_lora.py", tuple(words), "central", seeds)


def shard_folder(args, task, case, seed):
    """Where a case's manifests are."""
    one = CASES[case]
    how = f"{one.mode}_{one.alpha:g}_equal" if one.mode == "dirichlet" and one.sizes == "equal" else one.mode
    return Path(args.output_dir) / "shards" / f"{task}_{how}_k{one.clients}_seed_{seed}"


def make_shards(args):
    """Writes every case's manifests that are not there yet, once all tasks are read."""
    from common.checkpoint import read_json
    from lora_glue_fl.glue_data import load_task
    from lora_glue_fl.shards import make_client_splits, save_shard_manifests  # torch, which --help must not wait for

    sizes = PRESETS[args.preset].settings
    tasks = [one for one in sizes.tasks if not args.tasks or one[0] in args.tasks]
    names = dict.fromkeys(task for task, *_ in tasks)
    read = {task: load_task(task, args.dataset, args.data_root, args.cache_dir, splits=("train",)) for task in names}
    for task, examples, cases in tasks:
        for case in cases:
            for seed in args.seeds:
                folder, one = shard_folder(args, task, case, seed), CASES[case]
                if (folder / "summary.json").exists():
                    there = read_json(folder / "summary.json")
                    counts = there["meta"].get("max_examples"), len(there.get("held_out", ()))
                    if counts != (examples, sizes.held_out):
                        raise UsageError(
                            f"{folder} has shards of {counts[0] or 'all'} examples, {counts[1]} held out, not of "
                            f"{examples or 'all'} and {sizes.held_out}: give another --output-dir"
                        )
                else:
                    about = {"dirichlet_alpha": one.alpha, "sizes": one.sizes, "max_examples": examples}
                    about |= {"min_samples": 32, "data": read[task], "seed": seed, "held_out_examples": sizes.held_out}
                    split = make_client_splits(task, one.clients, one.mode, **about)
                    save_shard_manifests(folder, split)


def plan(args):
    """The runs that the flags ask for."""
    every = {one.name: one for one in settings(args, PRESETS[args.preset].settings)}
    chosen = grid.select(every.values(), args.only)
    starts = {one.name: start_of(one.name.split("_")[0], one.group) for one in chosen if one.group in CASES}
    first = [every[name] for name in dict.fromkeys(filter(None, starts.values())) if every[name] not in chosen]
    runs = grid.expand([*first, *chosen], *given(args))
    needs = [starts.get(run.setting.name) for run in runs]
    of = [f"{start}{run.name.removeprefix(run.setting.name)}" for run, start in zip(runs, needs, strict=True)]
    return [replace(run, needs=name) if start else run for run, start, name in zip(runs, needs, of, strict=True)]


def given(args):
    """What `common.grid.expand` takes besides settings: shared flags, seeds, output folder."""
    names = ["dataset", "model", "model_size", "data_root", "cache_dir", "device"]
    return [*PRESETS[args.preset].shared, *grid.given(args, names)], args.seeds, args.output_dir


def without_shards(args):
    """A run for the check of data and model: the federated ones need shards, which are dealt when all is well."""
    sizes = PRESETS[args.preset].settings
    task, examples, _ = next(one for one in sizes.tasks if not args.tasks or one[0] in args.tasks)
    return grid.expand([central(args, task, examples, sizes.rounds, 1)], *given(args))


def main(args):
    shards = partial(make_shards, args)
    return tuning.run_study(args, PRESETS[args.preset], plan(args), SHOW, prepare=shards, also=without_shards(args))


def build_parser():
    parser = grid.build_parser(__doc__.split("\n")[0], PRESETS, "small", "results/glue_{preset}")
    add_model_flags(parser)
    add_data_flags(parser)
    parser.set_defaults(dataset=None)  # glue; quick: demo
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all of the preset)")
    parser.add_argument(
        "--settings", nargs="+", choices=list(CASES), metavar="NAME", help=f"only these of {', '.join(CASES)}"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser


def parse(argv=None):
    args = grid.complete(build_parser().parse_args(argv), PRESETS)
    known = list(dict.fromkeys(task for task, _, _ in PRESETS[args.preset].settings.tasks))
    if unknown := sorted(set(args.tasks or ()) - set(known)):
        raise UsageError(f"--tasks {' '.join(unknown)}: not in the preset; choose from {', '.join(known)}")
    args.dataset = args.dataset or ("demo" if args.preset == "quick" else "glue")
    if args.preset == "quick" and not (args.model or args.model_size):
        args.model = "tiny"
    return args


if __name__ == "__main__":
    run_main(lambda argv: main(parse(argv)), None)
