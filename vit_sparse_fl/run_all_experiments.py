"""Runs every experiment of this study, one process each, draws the figures and prints one table.

    python vit_sparse_fl/run_all_experiments.py --full --num-runs 3        # the source's configuration: a GPU, days
    python vit_sparse_fl/run_all_experiments.py --stand-in --jobs 2        # the measured study: a laptop, hours
    python vit_sparse_fl/run_all_experiments.py --quick                    # all of it, small, offline: minutes
    python vit_sparse_fl/run_all_experiments.py --full --plan              # only shows the commands

Finished runs are skipped and broken ones go on, so that the command can be given again at any time.
"""

from common import grid
from common.cli import UsageError, non_negative_int, positive_int, run_main
from vit_sparse_fl.settings import PRESETS, PRETRAIN

SHOW = (
    ("plots/vit.py", "--data-dir", "{output}", "--out-dir", "{output}/figures"),
    ("plots/tables.py", "vit_sparse_fl", "--data-dir", "{output}"),
)
GROUPS = ("centralized", "federated", "sparse", "extension")
# flags that are handed to every run; those that a stand-in decides itself come first
GIVEN = ("dataset", "classes", "model", "weights", "init_from", "image_size", "data_root", "device", "amp", "config")


def plan(args):
    """The runs that the flags ask for; those of a stand-in start from one more run, which comes first."""
    preset, output = PRESETS[args.preset], args.output_dir
    shared = [*preset.shared, *grid.given(args, GIVEN), "--num-runs", "1"]
    chosen = grid.select(preset.settings, [*(args.only or ()), *(g for g in GROUPS if getattr(args, f"only_{g}"))])
    if not args.preset.startswith("stand-in"):
        return grid.expand(chosen, shared, args.seeds, output)
    if decided := [name for name in GIVEN[:6] if getattr(args, name)]:
        raise UsageError(f"--stand-in decides --{decided[0].replace('_', '-')} itself: drop the flag, or use --full")
    place = ["--output-dir", output, "--run-name", "pretrain", "--resume"]
    first = grid.Run("pretrain", ("vit_sparse_fl/train_centralized.py", *shared, *PRETRAIN.split(), *place))
    shared += ["--init-from", f"{output}/pretrain"]
    return [first, *grid.expand(chosen, shared, args.seeds, output, needs="pretrain")]


def main(args):
    return grid.run_study(args, plan(args), SHOW)


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
    run.add_argument("--model", metavar="NAME", help="dino_vits16, tiny, a folder or a name on the hub")
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
