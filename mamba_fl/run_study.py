"""Runs the grids of this study: every row at its own rate, one process a run.

    python mamba_fl/run_study.py --preset gap --jobs 2          # a laptop; --tune before it finds the rates anew
    python mamba_fl/run_study.py --preset source --jobs 1       # the source's 1-layer configuration
    python mamba_fl/run_study.py --preset quick                 # small, offline: minutes
    python mamba_fl/run_study.py --preset gap --plan            # only shows the commands

gap           is the federated gap an optimiser gap? WikiText-2, an epoch
gap-more      other forms and methods, three epochs
averages      what H local steps cost, and what buys it back: rounds by drift, groups of parameters, rarer moments
gap-demo      the demo, on so few texts that 256 steps are nine epochs: what else there is to vary at one local step
source-tuned  the source's configurations over a sixteenth of the epoch, at the rates of 1 layer, one seed
source        the source's rate for all rows
"""

from common.cli import run_main
from plots import runner
from plots.runner import preset, row

LR = {"lr": (8e-3, 1.6e-2, 3.2e-2)}
SERVER_LR = {"server-lr": LR["lr"]}
TEXT = "--lr-scheduler cosine --amp auto --threads 1 --prompt ''"
WIKITEXT = f"--d-model 64 --tokenizer bpe:2048 --val-sequences 128 --warmup-steps 77 {TEXT}"
SHORT = "--val-sequences 64 --warmup-steps 3"
QUICK = "--dataset demo --n-epochs 1 --lr 5e-3 --val-freq 5 --val-sequences 32 --threads 1 --prompt ''"
DEMO = f"--dataset demo --d-model 64 --val-sequences 64 --warmup-steps 26 {TEXT}"
# Adam at the server on one gradient of each client: --lr is the gradient's factor, which Adam divides out again
POOLED = "fed_momentum --client-optimizer sgd --lr 1 --weight-decay 0 --scheduled server --server-optimizer adam"
POOLED += " --server-tau 1e-8"
NESTEROV = "fed_momentum --server-optimizer nesterov --server-lr"


def of_steps(line, steps, lu=None, batch=None, group="", seeds=5, tune=LR, rate_of="", warmup=None):
    """A row of so many steps of a client. lu: local updates, None for central training; batch: size, where it is
    another than the script's: as many tokens then, in fewer steps; rate_of: the row whose rate it takes."""
    script, _, words = line.partition(" ")
    if batch:
        steps //= batch // (4 if lu else 16)
        words, warmup = f"{words} --batch-size {batch}", steps // 10
    words += f" --warmup-steps {warmup}" if warmup else ""
    words += f" --rounds {steps // (lu or 1)} --val-freq {max(1, steps // 4 // (lu or 1))}"
    words += f" --local-updates {lu} --client-val-sequences 0" if lu else ""
    group = group or line.split()[0]
    return row(f"mamba_fl/{script}.py {words}", group, seeds, {} if rate_of else tune, rate_of)


def fed_avg(state, steps, lu, **more):
    return of_steps(f"fed_avg --client-state {state}", steps, lu, group=more.pop("group", state), **more)


GAP = {"central": of_steps("central", 768)}
GAP |= {f"{state}_lu{lu}": fed_avg(state, 768, lu) for state in ("keep", "pooled") for lu in (1, 8, 64, 256)}

BOTH = LR | {"server-lr": (0.1, 0.3, 0.7)}
CORRECTED = f"{POOLED} --server-bias-correction --server-beta2 0.999"
THREE = {"group": "three", "seeds": 3, "warmup": 230}
MORE = {
    "server_adam_lu1": of_steps(CORRECTED, 768, 1, group="server", tune=SERVER_LR),
    "reset_lu64": fed_avg("reset", 768, 64, seeds=3),
    "keep_lu768": fed_avg("keep", 768, 768, seeds=3),  # averaged once
    "diloco_lu64": of_steps(f"{NESTEROV} 0.3", 768, 64, group="diloco", seeds=3, tune=BOTH),
    "three_central": of_steps("central", 2304, rate_of="central", **THREE),
    **{f"three_keep_lu{lu}": fed_avg("keep", 2304, lu, rate_of=f"keep_lu{lu}", **THREE) for lu in (1, 64)},
}

# What averages cost in bytes, and what buys back the gap: 768 / LU averages of the embedding, and of the rest as many
# or, by group, eight times as many; AdamW's moments a client's own, or pooled at every sixth average of the embedding
RATES = {"lr": (1.6e-2, 3.2e-2), "server-lr": (1, 1.3)}
AVERAGES = {"central": of_steps("central --lr 0.032", 768, tune={})}  # the rate that gap's --tune found
AVERAGES["alone"] = of_steps("central --batch-size 4", 768, tune=LR)  # a client's batch and nothing to average
for lu in (64, 24, 8):
    for state in ("keep", "pooled"):
        for what, share in (("all", 1), ("group", 8)):
            words = f"fed_avg --client-state {state} --server-lr 1"
            words += f" --average-every embedding={lu}" if share > 1 else ""
            words += f" --moments-every {6 * share}" if state == "pooled" else ""
            for by in ("steps", "drift") if lu > share else ("steps",):  # of one step a round there is one kind
                tuned = {"tune": RATES} if by == "steps" else {"rate_of": f"{state}_{what}_steps_lu{lu}"}
                line = f"{words} --rounds-by drift" if by == "drift" else words
                AVERAGES[f"{state}_{what}_{by}_lu{lu}"] = of_steps(line, 768, lu // share, group=f"lu{lu}", **tuned)
# which group must be averaged often? All but the projections are 1.3 % of theta
SMALL = {"rate_of": "keep_all_steps_lu8"}
for part, rates in {"projections": {"tune": RATES}, "conv": SMALL, "recurrence": SMALL, "norms": SMALL}.items():
    line = f"fed_avg --server-lr 1 --average-every {part}=64"
    AVERAGES[f"{part}_lu64"] = of_steps(line, 768, 8, group="held", **rates)

DEMO_ROWS = {}
for own in (None, 8, 16):  # a client's batch; central training's is that of all four
    wide, batch = (f"_batch_{4 * own}", f"_batch_{own}") if own else ("", "")
    DEMO_ROWS[f"central{wide}"] = of_steps("central", 256, batch=own and 4 * own)
    for state in ("keep", "pooled"):
        DEMO_ROWS[f"{state}_lu1{batch}"] = fed_avg(state, 256, 1, batch=own)
DEMO_ROWS["central_b2_0.99"] = of_steps("central --beta2 0.99", 256)
DEMO_ROWS["keep_lu1_b2_0.99"] = of_steps("fed_avg --beta2 0.99", 256, 1, group="keep")
for how, words in (("plain", ""), ("corrected", " --server-bias-correction")):
    for b2 in ("0.99", "0.999"):
        line = f"{POOLED} --server-beta2 {b2}{words}"
        DEMO_ROWS[f"server_adam_{how}_b2_{b2}"] = of_steps(line, 256, 1, group="server", tune=SERVER_LR)
for name, words in (("", ""), ("_b1_0", " --beta1 0")):  # momentum at the server besides, or instead
    DEMO_ROWS[f"ema{name}_lu1"] = of_steps(f"fed_momentum --momentum-form ema{words}", 256, 1, group="ema")
DEMO_ROWS["keep_lu64"] = fed_avg("keep", 256, 64)
for lu in (1, 64):
    rates = LR | {"server-lr": (0.1, 0.3, 1.0)}
    DEMO_ROWS[f"heavy_ball_lu{lu}"] = of_steps("fed_momentum --server-lr 0.3", 256, lu, group="heavy", tune=rates)
DEMO_ROWS["entropy_lu1"] = of_steps("fed_entropy", 256, 1, rate_of="keep_lu1")
DEMO_ROWS["fisher_lu1"] = of_steps("fed_fisher --fisher-samples 4", 256, 1, rate_of="keep_lu1")

SOURCE_TUNED = {}
FEW = {"group": "layers", "seeds": 1, "tune": {"lr": (2e-3, 4e-3, 8e-3)}}
for n in (1, 2, 4):
    central, keep = ("", "") if n == 1 else ("layers_1_central", "layers_1_keep")
    depth = {
        "central": of_steps(f"central --layers {n}", 34, rate_of=central, **FEW),
        "keep": of_steps(f"fed_avg --layers {n}", 34, 1, rate_of=keep, **FEW),
        "fisher": of_steps(f"fed_fisher --fisher-samples 2 --layers {n}", 34, 1, rate_of="layers_1_keep", **FEW),
    }
    SOURCE_TUNED |= {f"layers_{n}_{name}": one for name, one in depth.items()}


def source(names, val_freq):
    """The source's methods by their names; val_freq: of those with 8 local steps, whose rounds are longer."""
    lu8 = f"--local-updates 8 --val-freq {val_freq}"
    adam = "--client-optimizer sgd --lr 1 --weight-decay 0 --server-optimizer adam --server-lr 5e-3"
    lines = {
        "central": "central.py ",
        "fed_avg_lu1": "fed_avg.py ",
        "fed_avg_lu8": f"fed_avg.py {lu8}",
        "fed_momentum_source": "fed_momentum.py --momentum-form ema",
        "fed_momentum_diloco": f"fed_momentum.py {lu8} --server-optimizer nesterov --server-lr 0.7",
        "fed_momentum_server_adam": f"fed_momentum.py {adam} --server-beta2 0.99 --server-tau 1e-8",
        "fed_entropy": "fed_entropy.py ",
        "fed_fisher": "fed_fisher.py ",
    }
    return {name: row(f"mamba_fl/{lines[name]}") for name in names or lines}


SOURCE = source(("central", "fed_avg_lu1", "fed_avg_lu8"), 10)
SOURCE["fed_fisher"] = row("mamba_fl/fed_fisher.py --fisher-samples 2")
RESULTS = "mamba_fl/results/tuning"
PRESETS = {
    "gap": preset(GAP, WIKITEXT, range(5), tuned=f"{RESULTS}/gap.json"),
    "gap-more": preset(MORE, WIKITEXT, range(5), tuned=f"{RESULTS}/gap.json"),
    "averages": preset(AVERAGES, WIKITEXT, range(5), tuned=f"{RESULTS}/averages.json"),
    "gap-demo": preset(DEMO_ROWS, DEMO, range(5), tuned=f"{RESULTS}/gap_demo.json"),
    "source-tuned": preset(SOURCE_TUNED, f"{SHORT} {TEXT}", tuned=f"{RESULTS}/source_tuned.json"),
    "source": preset(SOURCE, "--layers 1 --amp auto --val-freq 60 --val-sequences 256 --threads 1"),
    "quick": preset(source((), 1), QUICK, seeds=(0,)),
}
STUDY = {
    "presets": PRESETS,
    "default": "gap",
    "output": "results/{preset}",
    "show": ["plots/tables.py mamba_fl --data-dir {output}"],
}


def main(argv=None):
    parser = runner.build_parser(STUDY, __doc__.split("\n")[0], output_names=["--data-dir"])
    return runner.run_study(STUDY, *parser.parse_known_args(argv))


if __name__ == "__main__":
    run_main(main, None)
