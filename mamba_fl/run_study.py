"""Runs the study of this folder's README: every method, schedule and seed, one process a run.

    python mamba_fl/run_study.py --preset small --jobs 2        # a laptop
    python mamba_fl/run_study.py --preset source --jobs 1       # the source's 1-layer configuration
    python mamba_fl/run_study.py --preset quick                 # all of it, small, offline: minutes
    python mamba_fl/run_study.py --preset small --plan          # only checks and shows the commands

Each run is one of the scripts beside this file; finished runs are skipped and broken ones go on, so that the command
can be given again at any time. results.jsonl in the output folder is the log behind the table.
"""

from common import grid, tuning
from common.cli import run_main
from common.grid import Preset, Setting

SHOW = (("plots/tables.py", "mamba_fl", "--data-dir", "{output}"),)

METHODS = {  # script and flags; lu8: 8 local steps
    "central": "central",
    "fed_avg_lu1": "fed_avg",
    "fed_avg_lu8": "fed_avg {lu8}",
    "fed_momentum_source": "fed_momentum --momentum-form ema",
    "fed_momentum_diloco": "fed_momentum {lu8} --server-optimizer nesterov --server-lr 0.7",
    "fed_momentum_server_adam": "fed_momentum --client-optimizer sgd --lr 1 --weight-decay 0 --server-optimizer adam "
    "--server-lr 5e-3 --server-beta2 0.99 --server-tau 1e-8",
    "fed_entropy": "fed_entropy",
    "fed_fisher": "fed_fisher",
}
AVERAGED_ONCE_AN_EPOCH = ("fed_avg_lu1", "fed_avg_lu8", "fed_momentum_source", "fed_entropy", "fed_fisher")
METHODS |= {f"{name}_sync_epoch": f"{METHODS[name]} --sync epoch" for name in AVERAGED_ONCE_AN_EPOCH}


def settings(methods, val_freq):
    """{name: script and flags} as settings. val_freq: of the runs with 8 local steps, whose rounds are longer."""
    lu8 = f"--local-updates 8 --val-freq {val_freq}"
    lines = {name: line.format(lu8=lu8).split() for name, line in methods.items()}
    return tuple(Setting(name, f"mamba_fl/{script}.py", words) for name, (script, *words) in lines.items())


# small: d_model 128 and a vocabulary of 4,096: two to five minutes a run on one core
SMALL = "--d-model 128 --tokenizer bpe:4096 --n-epochs 0.5 --lr 5e-3 --amp auto --val-freq 80 --val-sequences 256"
SOURCE = "--layers 1 --amp auto --val-freq 60 --val-sequences 256 --threads 1"
SOURCE_METHODS = {name: METHODS[name] for name in ("central", "fed_avg_lu1", "fed_avg_lu8")}
SOURCE_METHODS |= {"fed_fisher": "fed_fisher --fisher-samples 2"}
QUICK = "--dataset demo --n-epochs 1 --lr 5e-3 --val-freq 5 --val-sequences 32"
NO_SAMPLES = ["--threads", "1", "--prompt", ""]

PRESETS = {
    "small": Preset((*SMALL.split(), *NO_SAMPLES), settings(METHODS, val_freq=10)),
    "source": Preset(SOURCE.split(), settings(SOURCE_METHODS, val_freq=10)),
    "quick": Preset((*QUICK.split(), *NO_SAMPLES), settings(METHODS, val_freq=1), seeds=(0,)),
}


def plan(args):
    """The runs that the flags ask for."""
    preset = PRESETS[args.preset]
    shared = [*preset.shared, *grid.given(args, ["data_root"])]
    return grid.expand(grid.select(preset.settings, args.only), shared, args.seeds, args.output_dir)


def main(args):
    return tuning.run_study(args, PRESETS[args.preset], plan(args), SHOW)


def build_parser():
    parser = grid.build_parser(
        __doc__.split("\n")[0], PRESETS, "small", "results/{preset}", output_names=["--data-dir"]
    )
    parser.add_argument("--data-root", "--cache-dir", metavar="DIR", help="where the data sets are")
    return parser


def parse(argv=None):
    return grid.complete(build_parser().parse_args(argv), PRESETS)


if __name__ == "__main__":
    run_main(lambda argv: main(parse(argv)), None)
