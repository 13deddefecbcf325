"""Runs the study of this folder's README: every method, schedule and seed, one process a run.

    python mamba_fl/run_study.py --preset gap --jobs 2          # a laptop; --tune before it finds the rates anew
    python mamba_fl/run_study.py --preset source --jobs 1       # the source's 1-layer configuration
    python mamba_fl/run_study.py --preset quick                 # all of it, small, offline: minutes
    python mamba_fl/run_study.py --preset gap --plan            # only checks and shows the commands

Each run is one of the scripts beside this file; finished runs are skipped and broken ones go on, so that the command
can be given again at any time. results.jsonl in the output folder is the log behind the table.
"""

from dataclasses import replace

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


# ---- gap: is the federated gap an optimiser gap? Every row has a rate of its own (--tune) and as many steps

LUS = (1, 8, 64, 256)
SEEDS = (0, 1, 2, 3, 4)
TUNED = "mamba_fl/results/tuning/gap.json"  # the rates that --tune found, on seed 100
TUNED_DEMO = "mamba_fl/results/tuning/gap_demo.json"
TUNED_SOURCE = "mamba_fl/results/tuning/source_tuned.json"
ADAM_LR = (8e-3, 1.6e-2, 3.2e-2)
GAP = "--lr-scheduler cosine --amp auto"
WIKITEXT = "--d-model 64 --tokenizer bpe:2048 --val-sequences 128 --warmup-steps 77 --held-out-sequences 16"
DEMO = "--dataset demo --d-model 64 --val-sequences 64 --warmup-steps 26 --held-out-sequences 4"
# Adam at the server on one gradient of each client: --lr is the gradient's factor, which Adam divides out again
POOLED_GRADIENT = "--client-optimizer sgd --lr 1 --weight-decay 0 --scheduled server --server-optimizer adam"
POOLED_GRADIENT += " --server-tau 1e-8"


def row(name, line, steps, lu=None, batch=None, seeds=5, tuned_as="", **tune):
    """A row of the gap's table. line: script and flags; steps: of a client; lu: local updates, None for central
    training; batch: size, where it is another than the script's: as many tokens then, in fewer steps; tuned_as: the
    row whose rate it takes."""
    script, *words = line.split()
    if batch:
        fewer = batch // (4 if lu else 16)
        steps //= fewer
        words += ["--batch-size", str(batch), "--warmup-steps", str(steps // 10)]
    words += ["--rounds", str(steps // (lu or 1)), "--val-freq", str(max(1, steps // 4 // (lu or 1)))]
    words += ["--local-updates", str(lu), "--client-val-sequences", "0"] if lu else []
    grids = {} if tuned_as else {flag.replace("_", "-"): values for flag, values in (tune or {"lr": ADAM_LR}).items()}
    return Setting(name, f"mamba_fl/{script}.py", tuple(words), name.partition("_")[0], seeds, grids, tuned_as=tuned_as)


def forms(steps, states, lus, seeds=5):
    """FedAvg with the forms of --client-state."""
    return [
        row(f"{state}_lu{lu}", f"fed_avg --client-state {state}", steps, lu, seeds=seeds)
        for state in states
        for lu in lus
    ]


def gap(steps=768):
    """WikiText-2, an epoch: the claims."""
    yield row("central", "central", steps)
    yield from forms(steps, ("keep", "pooled"), LUS)


def more(steps=768):
    """Other forms and methods on the same text and steps."""
    yield from forms(steps, ("average",), (8,))
    corrected = f"fed_momentum {POOLED_GRADIENT} --server-bias-correction --server-beta2 0.999"
    yield row("server_adam_lu1", corrected, steps, 1, server_lr=ADAM_LR)
    yield from forms(steps, ("average", "reset", "fedadamw"), (64,), seeds=3)
    yield from forms(steps, ("keep",), (steps,), seeds=3)  # averaged once, as often as the source's --sync epoch
    diloco = "fed_momentum --server-optimizer nesterov --server-lr 0.3"
    yield row("diloco_lu64", diloco, steps, 64, seeds=3, lr=ADAM_LR, server_lr=(0.1, 0.3, 0.7))


def topics(steps=768):
    """Clients that differ: articles by topic, 64 local steps. Rows that change no client's step take FedAvg's rate."""
    by_topic = "--sharding topics"
    yield row("topics_central", f"central {by_topic}", steps, seeds=3, tuned_as="central")
    for state in ("keep", "pooled"):
        yield row(f"topics_{state}", f"fed_avg {by_topic} --client-state {state}", steps, 64, seeds=3)
    for name, line in (
        ("entropy", "fed_entropy"),
        ("fisher", "fed_fisher --fisher-samples 16"),
        ("personal_ssm", "fed_avg --personal ssm"),
        ("personal_conv", "fed_avg --personal conv"),
    ):
        yield row(f"topics_{name}", f"{line} {by_topic}", steps, 64, seeds=3, tuned_as="topics_keep")


def longer(steps=3 * 768):
    """Three epochs, at the rates of one."""
    for one in (row("central", "central", steps), *forms(steps, ("keep",), (1, 64))):
        words = (*one.words, "--warmup-steps", str(steps // 10))
        yield replace(one, name=f"three_{one.name}", words=words, group="three", seeds=3, tune={}, tuned_as=one.name)


def gap_demo(steps=256):
    """The demo, on so few texts that 256 steps are nine epochs: what else there is to vary at one local step, and the
    server's momentum."""
    for batch in (None, 8, 16):
        wide, own = (f"_batch_{4 * batch}", f"_batch_{batch}") if batch else ("", "")
        yield row(f"central{wide}", "central", steps, batch=batch and 4 * batch)
        for state, words in (("keep", ""), ("pooled", " --client-state pooled")):
            yield row(f"{state}_lu1{own}", f"fed_avg{words}", steps, 1, batch)
    yield row("central_b2_0.99", "central --beta2 0.99", steps)
    yield row("keep_lu1_b2_0.99", "fed_avg --beta2 0.99", steps, 1)
    for correction in ("", " --server-bias-correction"):
        for b2 in ("0.99", "0.999"):
            name = f"server_adam_{'corrected' if correction else 'plain'}_b2_{b2}"
            line = f"fed_momentum {POOLED_GRADIENT} --server-beta2 {b2}{correction}"
            yield row(name, line, steps, 1, server_lr=ADAM_LR)
    for name, words in (("", ""), ("_b1_0", " --beta1 0")):  # momentum at the server besides, or instead
        yield row(f"ema{name}_lu1", f"fed_momentum --momentum-form ema{words}", steps, 1)
    yield row("keep_lu64", "fed_avg", steps, 64)
    for lu in (1, 64):
        both = {"lr": ADAM_LR, "server_lr": (0.1, 0.3, 1.0)}
        yield row(f"heavy_ball_lu{lu}", "fed_momentum --server-lr 0.3", steps, lu, **both)
    for name in ("fed_entropy", "fed_fisher --fisher-samples 4"):
        yield row(f"{name[4:].partition(' ')[0]}_lu1", name, steps, 1, tuned_as="keep_lu1")


def source_layers(steps=34):
    """The source's three configurations over a sixteenth of the epoch: the rates of 1 layer, one seed."""
    methods = (
        ("central", "central", None, "central"),
        ("keep", "fed_avg", 1, "keep"),
        ("fisher", "fed_fisher --fisher-samples 2", 1, "keep"),
    )
    for layers in (1, 2, 4):
        for name, line, lu, rate_of in methods:
            taken = "" if (layers, name) == (1, rate_of) else f"layers_1_{rate_of}"
            name, line = f"layers_{layers}_{name}", f"{line} --layers {layers}"
            yield row(name, line, steps, lu, seeds=1, tuned_as=taken, lr=(2e-3, 4e-3, 8e-3))


SOURCE = "--layers 1 --amp auto --val-freq 60 --val-sequences 256 --threads 1"
SOURCE_METHODS = {name: METHODS[name] for name in ("central", "fed_avg_lu1", "fed_avg_lu8")}
SOURCE_METHODS |= {"fed_fisher": "fed_fisher --fisher-samples 2"}
QUICK = "--dataset demo --n-epochs 1 --lr 5e-3 --val-freq 5 --val-sequences 32"
NO_SAMPLES = ["--threads", "1", "--prompt", ""]

PRESETS = {
    "gap": Preset((*f"{WIKITEXT} {GAP}".split(), *NO_SAMPLES), tuple(gap()), SEEDS, tuned=TUNED),
    "gap-more": Preset(
        (*f"{WIKITEXT} {GAP}".split(), *NO_SAMPLES), (*more(), *topics(), *longer()), SEEDS, tuned=TUNED
    ),
    "gap-demo": Preset((*f"{DEMO} {GAP}".split(), *NO_SAMPLES), tuple(gap_demo()), SEEDS, tuned=TUNED_DEMO),
    "source-tuned": Preset(
        f"--val-sequences 64 --warmup-steps 3 --held-out-sequences 0 {GAP}".split() + NO_SAMPLES,
        tuple(source_layers()),
        tuned=TUNED_SOURCE,
    ),
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
    parser = grid.build_parser(__doc__.split("\n")[0], PRESETS, "gap", "results/{preset}", output_names=["--data-dir"])
    parser.add_argument("--data-root", "--cache-dir", metavar="DIR", help="where the data sets are")
    return parser


def parse(argv=None):
    return grid.complete(build_parser().parse_args(argv), PRESETS)


if __name__ == "__main__":
    run_main(lambda argv: main(parse(argv)), None)
