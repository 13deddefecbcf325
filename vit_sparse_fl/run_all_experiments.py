"""Runs every experiment of this study, one process each, draws the figures and prints one table.

    python vit_sparse_fl/run_all_experiments.py --full --num-runs 3        # the source's configuration: a GPU, days
    python vit_sparse_fl/run_all_experiments.py --stand-in --jobs 2        # the measured study: a laptop, hours
    python vit_sparse_fl/run_all_experiments.py --preset rates --tune      # rates of every row, see rates.py
    python vit_sparse_fl/run_all_experiments.py --quick                    # all of it, small, offline: minutes
    python vit_sparse_fl/run_all_experiments.py --full --plan              # only checks and shows the commands

Finished runs are skipped and broken ones go on, so that the command can be given again at any time.
"""

from dataclasses import dataclass, replace

from common import grid, tuning
from common.cli import UsageError, non_negative_int, positive_int, run_main
from common.grid import Preset, Setting
from vit_sparse_fl import rates
from vit_sparse_fl.flags import NATIVE
from vit_sparse_fl.mask_flags import STRATEGIES

SHOW = (
    ("plots/vit.py", "--data-dir", "{output}", "--out-dir", "{output}/figures"),
    ("plots/tables.py", "vit_sparse_fl", "--data-dir", "{output}"),
)
GROUPS = ("centralized", "federated", "sparse", "extension")
# flags that are handed to every run; those that a stand-in decides itself come first
GIVEN = ("dataset", "classes", "model", "weights", "init_from", "image_size", "data_root", "device", "amp", "config")


# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Sizes:
    """What the presets differ in; flags as text."""

    central: str = ""
    federated: str = ""  # for federated and sparse runs, without the number of rounds
    sparse: str = ""  # for sparse runs besides
    topk: str = ""  # for the run without a mask, which trains densely and sends a part
    rounds: int = 500
    nc: tuple = (50, 10, 5, 1)
    j: tuple = (8, 16)
    sparsities: tuple = (("least_sensitive", (0.5, 0.7, 0.95, 0.99)),)
    calibration_rounds: tuple = (1, 2, 3, 5, 6, 7, 8, 9, 10)
    beyond: bool = True  # calibration on clients and the source's calibration too
    lower: tuple = ()  # dense FedAvg where the common learning rate is too high: (nc1 or J16, the rate)


# a few epochs on the same ten classes come first: under a mask a ViT with random weights learns nothing
QUICK_PRETRAIN = "--epochs 3 --warmup-epochs 1 --lr 0.1 --early-stopping-patience 0 --seed 0"
QUICK = Sizes(
    central="--epochs 6 --warmup-epochs 1 --lr 0.1",
    federated="--num-clients 20 --participation-rate 0.25 --freeze-head --lr 0.1 --eval-every 2",
    sparse="--fisher-samples 64 --lr 0.5",
    topk="--lr 0.1",
    rounds=8,
    nc=(5, 1),
    j=(8,),
    sparsities=(("least_sensitive", (0.5,)),),
    calibration_rounds=(1,),
)
# a ViT of half a million weights, trained on classes 0 to 49, then federated on the other 50; the head, fitted by ridge
# regression, is frozen everywhere but where the name says otherwise, so that dense and sparse runs differ in one factor
TINY = "--dataset cifar100 --model tiny --threads 1 --amp auto --dropout 0"
PRETRAIN = "--classes 0:50 --epochs 60 --lr 0.1 --early-stopping-patience 0 --seed 0"
OTHER_HALF = "--classes 50:100 --head ridge --batch-size 32 --early-stopping-patience 0"
STAND_IN = Sizes(
    central=f"{OTHER_HALF} --epochs 20 --lr 0.03 --warmup-epochs 0",
    federated=f"{OTHER_HALF} --freeze-head --lr 0.1 --eval-every 10 --save-every 40",
    rounds=120,
    nc=(25, 5, 1),
    sparsities=(("least_sensitive", (0.5, 0.99)), ("random", (0.5, 0.99))),
    calibration_rounds=(1, 10),
    beyond=False,
    lower=(("nc1", "0.01"), ("J16", "0.03")),
)


def settings(sizes):
    """Every setting, one factor at a time from IID, J = 4, dense."""
    federated, rounds = sizes.federated.split(), ["--num-rounds", sizes.rounds]

    def dense(name, *words, rounds=rounds):
        return Setting(name, "vit_sparse_fl/train_federated.py", (*federated, *rounds, *words), "federated")

    def sparse(name, *words, group="sparse"):
        words = (*federated, *rounds, *sizes.sparse.split(), *words)
        return Setting(name, "vit_sparse_fl/train_federated_sparse.py", words, group)

    def steps(j):
        return {"rounds": ["--num-rounds", max(1, sizes.rounds * 4 // j), "--local-steps", j]}

    yield Setting("centralized", "vit_sparse_fl/train_centralized.py", tuple(sizes.central.split()), "centralized")
    yield dense("fedavg_iid")
    for nc in sizes.nc:
        yield dense(f"fedavg_nc{nc}", "--sharding", "non_iid", "--nc", nc)
    for j in sizes.j:
        yield dense(f"fedavg_J{j}", **steps(j))
    for strategy in STRATEGIES:
        group = "sparse" if strategy == "least_sensitive" else "extension"
        yield sparse(f"{strategy}_s0.9", "--mask-strategy", strategy, group=group)
    for strategy, values in sizes.sparsities:
        for s in values:
            yield sparse(f"{strategy}_s{s:g}", "--mask-strategy", strategy, "--sparsity-ratio", s)
    for n in sizes.calibration_rounds:
        yield sparse(f"calibration_rounds_{n}", "--calibration-rounds", n)
    for strategy in ("least_sensitive", "random"):
        yield sparse(f"{strategy}_s0.9_nc5", "--mask-strategy", strategy, "--sharding", "non_iid", "--nc", 5)
    if "--freeze-head" in federated:
        yield dense("fedavg_iid_head_trained", "--no-freeze-head")
    yield sparse("topk_s0.9", "--upload", "topk", "--mask-strategy", "random", *sizes.topk.split(), group="extension")
    if "--mask-scope" not in sizes.sparse:
        yield sparse("per_layer", "--mask-scope", "layer", group="extension")
    for name, lr in sizes.lower:
        more = ["--sharding", "non_iid", "--nc", 1, "--lr", lr] if name == "nc1" else ["--lr", lr]
        yield dense(f"fedavg_{name}_lr{lr}", *more, **(steps(16) if name == "J16" else {}))
    if sizes.beyond:
        yield sparse("calibration_seed", "--calibration", "seed", group="extension")
        yield sparse("on_clients", "--calibrate-on", "clients", group="extension")


SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 32 --dropout 0 --threads 1"
PRESETS = {
    "full": Preset((), tuple(settings(Sizes()))),
    "quick": Preset(SMALL.split(), tuple(settings(QUICK)), seeds=(0,)),
    "stand-in": Preset(TINY.split(), tuple(settings(STAND_IN))),
    "rates": Preset(
        TINY.split(), tuple(rates.settings()), seeds=tuple(range(6)), objective="val_accuracy", higher=True
    ),
    # the stand-in for a GPU: the ViT sees 64 patches instead of 16
    "stand-in-gpu": Preset((*TINY.split(), "--image-size", "64"), tuple(settings(replace(STAND_IN, rounds=500)))),
}


# for a GPU: ViT-S/8 at 64 px
PRESETS["rates-gpu"] = replace(
    PRESETS["rates"], shared=tuple(TINY.replace("tiny", "small").split()), settings=tuple(rates.settings(rank=26))
)


# ------------------------------------------------------------------------------------------------ the runner


def plan(args):
    """The runs that the flags ask for; those of a stand-in and of --quick start from one more, which comes first."""
    preset, output = PRESETS[args.preset], args.output_dir
    shared = [*preset.shared, *grid.given(args, GIVEN), "--num-runs", "1"]
    chosen = grid.select(preset.settings, [*(args.only or ()), *(g for g in GROUPS if getattr(args, f"only_{g}"))])
    of_its_own = args.init_from or args.weights or args.model not in (None, *NATIVE)
    if args.preset == "full" or args.preset == "quick" and of_its_own:
        return grid.expand(chosen, shared, args.seeds, output)
    if args.preset == "quick":
        return after(QUICK_PRETRAIN, chosen, shared, args.seeds, output, "--head", "keep")
    if decided := [name for name in GIVEN[:6] if getattr(args, name)]:
        asked = f"--preset {args.preset}" if "rates" in args.preset else "--stand-in"
        raise UsageError(f"{asked} decides --{decided[0].replace('_', '-')} itself: drop the flag, or use --full")
    if "rates" in args.preset:
        return rates.plan(args, chosen, shared)
    return after(PRETRAIN, chosen, shared, args.seeds, output)


def after(words, chosen, shared, seeds, output, *more):
    """The pretraining with these flags, and the runs that start from it."""
    place = ["--output-dir", output, "--run-name", "pretrain", "--resume"]
    first = grid.Run("pretrain", ("vit_sparse_fl/train_centralized.py", *shared, *words.split(), *place))
    shared = [*shared, "--init-from", f"{output}/pretrain", *more]
    return [first, *grid.expand(chosen, shared, seeds, output, needs="pretrain")]


def main(args):
    return tuning.run_study(args, PRESETS[args.preset], plan(args), SHOW)


def build_parser():
    parser = grid.build_parser(
        __doc__.split("\n")[0], PRESETS, "full", "results/vit_{preset}", output_names=["--checkpoint-dir"]
    )
    size = parser.add_mutually_exclusive_group()
    for name, text in (
        ("full", "the source's configuration"),
        ("quick", "all of it with a few rounds, on ten classes of the demo"),
        ("stand-in", "the measured study: a small ViT trained on half the classes"),
        ("stand-in-gpu", "the same with larger images and more rounds"),
    ):
        size.add_argument(f"--{name}", action="store_const", dest="preset", const=name, help=text)
    for group in GROUPS:
        parser.add_argument(f"--only-{group}", action="store_true", help=f"only the group {group} (may be combined)")
    parser.add_argument("--num-runs", type=positive_int, metavar="N", help="so many seeds, from --seed on")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="the first seed")
    run = parser.add_argument_group("given to every run")
    run.add_argument("--dataset", help="cifar100 or demo")
    run.add_argument("--classes", metavar="A:B", help="only the classes A to B-1")
    run.add_argument("--model", metavar="NAME", help="dino_vits16, tiny, small, a folder or a name on the hub")
    run.add_argument("--weights", metavar="FILE", help="DINO's own checkpoint")
    run.add_argument("--init-from", metavar="RUN", help="start from the weights of another run")
    run.add_argument("--image-size", type=positive_int, metavar="S", help="pixels")
    run.add_argument("--data-root", "--data-dir", metavar="DIR", help="where the data set is")
    run.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--amp", choices=["off", "auto", "bf16", "fp16"], help="precision of the products")
    run.add_argument("--config", metavar="FILE", help="yaml file with defaults for the flags")
    return parser


def parse(argv=None):
    args = build_parser().parse_args(argv)
    if not args.seeds:
        count = args.num_runs or len(PRESETS[args.preset].seeds)
        args.seeds = list(range(args.seed, args.seed + count))
    return grid.complete(args, PRESETS)


if __name__ == "__main__":
    run_main(lambda argv: main(parse(argv)), None)
