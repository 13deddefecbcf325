"""Runs every experiment of this study, one process each, draws the figures and prints one table.

    python vit_sparse_fl/run_all_experiments.py --full --num-runs 3        # the source's configuration: a GPU, days
    python vit_sparse_fl/run_all_experiments.py --preset rates --tune      # the measured study: see grid.py
    python vit_sparse_fl/run_all_experiments.py --quick                    # small, offline: minutes
    python vit_sparse_fl/run_all_experiments.py --full --plan              # only shows the commands

Flags that are not listed are the scripts' and go to every run.
"""

from common.cli import non_negative_int, positive_int, run_main
from plots import runner
from vit_sparse_fl.grid import STUDY

GROUPS = ("centralized", "federated", "sparse", "extension")


def build_parser():
    parser = runner.build_parser(STUDY, __doc__.split("\n")[0], output_names=["--checkpoint-dir"])
    size = parser.add_mutually_exclusive_group()
    for name, text in (("full", "the source's configuration"), ("quick", "ten classes of the demo, a few rounds")):
        size.add_argument(f"--{name}", action="store_const", dest="preset", const=name, help=text)
    for group in GROUPS:
        parser.add_argument(f"--only-{group}", action="store_true", help=f"only the group {group} (may be combined)")
    parser.add_argument("--num-runs", type=positive_int, metavar="N", help="so many seeds, from --seed on")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="the first seed")
    return parser


def parse(argv=None):
    """(own flags, the scripts' flags as words)."""
    args, words = build_parser().parse_known_args(argv)
    args.only = [*(args.only or ()), *(group for group in GROUPS if getattr(args, f"only_{group}"))] or None
    count = args.num_runs or (len(STUDY["presets"][args.preset]["seeds"]) if args.seed else 0)
    args.seeds = args.seeds or list(range(args.seed, args.seed + count))
    return args, words


if __name__ == "__main__":
    run_main(lambda argv: runner.run_study(STUDY, *parse(argv)), None)
