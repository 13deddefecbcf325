"""Runs every experiment of this study, one process each, draws the figures and prints one table.

    python vit_sparse_fl/run_all_experiments.py --full --num-runs 3        # the source's configuration: a GPU, days
    python vit_sparse_fl/run_all_experiments.py --preset rates --tune      # the measured study: see rates.py
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
# flags that are handed to every run; those that `rates` decides itself come first
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
    sparsities: tuple = (0.5, 0.7, 0.95, 0.99)
    calibration_rounds: tuple = (1, 2, 3, 5, 6, 7, 8, 9, 10)


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
    sparsities=(0.5,),
    calibration_rounds=(1,),
)
# the measured study's: a ViT of half a million weights
TINY = "--dataset cifar100 --model tiny --threads 1 --amp auto --dropout 0"


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
    for s in sizes.sparsities:
        yield sparse(f"least_sensitive_s{s:g}", "--mask-strategy", "least_sensitive", "--sparsity-ratio", s)
    for n in sizes.calibration_rounds:
        yield sparse(f"calibration_rounds_{n}", "--calibration-rounds", n)
    for strategy in ("least_sensitive", "random"):
        yield sparse(f"{strategy}_s0.9_nc5", "--mask-strategy", strategy, "--sharding", "non_iid", "--nc", 5)
    if "--freeze-head" in federated:
        yield dense("fedavg_iid_head_trained", "--no-freeze-head")
    yield sparse("topk_s0.9", "--upload", "topk", "--mask-strategy", "random", *sizes.topk.split(), group="extension")
    yield sparse("per_layer", "--mask-scope", "layer", group="extension")
    yield sparse("calibration_seed", "--calibration", "seed", group="extension")
    yield sparse("on_clients", "--calibrate-on", "clients", group="extension")


SMALL = "--dataset demo --model tiny --classes 0:10 --batch-size 32 --dropout 0 --threads 1"
PRESETS = {
    "full": Preset((), tuple(settings(Sizes()))),
    "quick": Preset(SMALL.split(), tuple(settings(QUICK)), seeds=(0,)),
    "rates": Preset(
        TINY.split(), tuple(rates.settings()), seeds=tuple(range(6)), objective="val_accuracy", higher=True
    ),
}


# for a GPU: ViT-S/8 at 64 px
PRESETS["rates-gpu"] = replace(
    PRESETS["rates"], shared=tuple(TINY.replace("tiny", "small").split()), settings=tuple(rates.settings(rank=26))
)


# ------------------------------------------------------------------------------------------------ the runner


def plan(args):
    """The runs that the flags ask for; those of --quick and of rates start from others, which come first."""
    preset, output = PRESETS[args.preset], args.output_dir
    shared = [*preset.shared, *grid.given(args, GIVEN), "--num-runs", "1"]
    chosen = grid.select(preset.settings, [*(args.only or ()), *(g for g in GROUPS if getattr(args, f"only_{g}"))])
    of_its_own = args.init_from or args.weights or args.model not in (None, *NATIVE)
    if args.preset == "full" or args.preset == "quick" and of_its_own:
        return grid.expand(chosen, shared, args.seeds, output)
    if args.preset == "quick":
        return pretrained(chosen, shared, args.seeds, output)
    if decided := [name for name in GIVEN[:6] if getattr(args, name)]:
        words = f"--preset {args.preset} decides --{decided[0].replace('_', '-')} itself"
        raise UsageError(f"{words}: drop the flag, or use --full")
    return rates.plan(args, chosen, shared)


def pretrained(chosen, shared, seeds, output):
    """The pretraining of --quick, and the runs that start from it."""
    place = ["--output-dir", output, "--run-name", "pretrain", "--resume"]
    first = grid.Run("pretrain", ("vit_sparse_fl/train_centralized.py", *shared, *QUICK_PRETRAIN.split(), *place))
    shared = [*shared, "--init-from", f"{output}/pretrain", "--head", "keep"]
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
