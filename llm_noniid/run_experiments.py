"""Runs this study's experiments, one process a run, and reports on them.

    python llm_noniid/run_experiments.py --mode quick                                # minutes, offline
    python llm_noniid/run_experiments.py --mode main                                 # the source's grid: a GPU
    python llm_noniid/run_experiments.py --mode failure                              # the source's failure settings
    python llm_noniid/run_experiments.py --mode study --model models/small --jobs 2  # the README's study: 2 hours
    python llm_noniid/run_experiments.py --mode regimes --model models/small --tune # then without --tune
    python llm_noniid/run_experiments.py --mode compare                              # tables of what is there
    python llm_noniid/run_experiments.py --mode analyze                              # report.html

quick    3 algorithms x 4 partitions, 6 rounds, the tiny model on the demo, which it trains on 50 texts first, for
         adapters cannot move a model whose frozen embeddings are random
main     3 algorithms x 4 partitions x participation 0.3, 0.5, 1.0
failure  3 algorithms x (alpha 0.01; participation 0.1; learning rate 1e-3; 5 local epochs), topic skew
study    one factor at a time from FedAvg, topic skew, alpha 0.1: the partitions with 3 algorithms, alpha 100, 1, 0.01,
         participation 0.3, 0.1, higher learning rates (IID too), 5 times the local steps, clusters, local and central
         training, WikiText-2 beside AG News
regimes  when label skew breaks it, and what repairs it: the rows of regimes.py, each with rates of its own (first
         --tune, then without); regimes-more has those of less weight

--preset is another spelling of --mode. Flags that are not listed are train.py's and go to every run; a grid's own win.
Finished runs are skipped and broken ones go on, so that the command can be given again at any time.
"""

from dataclasses import replace
from pathlib import Path

from common import grid, tuning
from common.cli import UsageError, non_negative_int, positive_float, positive_int, run_main
from common.grid import Preset, Setting
from llm_noniid import flags, regimes
from llm_noniid.flags import PARTITIONS

SHOW = tuple(
    ("llm_noniid/run_experiments.py", "--mode", mode, "--results-dir", "{output}") for mode in ("compare", "analyze")
)
GIVEN = "model dataset data_root cache_dir max_samples local_steps num_rounds device amp".split()
SET_HERE = "algorithm partition seed run_name name overwrite resume cluster mu".split()
ALGORITHMS = ("fedavg", "fedprox", "scaffold")
MORE_STEPS = 5  # times the local steps: the study's 5 local epochs
QUICK_MU = 1.0  # at train.py's 0.01 FedProx is FedAvg in every digit shown

# ---- the grids: each setting is a tuple of flags of train.py


def setting(name, algorithm, partition, *words, seeds=None):
    """One setting of train.py."""
    words = ("--algorithm", algorithm, "--partition", partition, *map(str, words))
    return Setting(name, "llm_noniid/train.py", words, algorithm, seeds)


def partitions(names=PARTITIONS, suffix="", *words):
    """The three algorithms on partitions."""
    return [setting(f"{a}_{p}{suffix}", a, p, *words) for p in names for a in ALGORITHMS]


def study(base, rates):
    """One factor at a time. base: train.py's flags; rates: learning rates."""
    yield from partitions()
    for alpha in (100, 1, 0.1, 0.01):
        if alpha != base.alpha:
            yield setting(f"fedavg_alpha_{alpha:g}", "fedavg", "topic_skew", "--alpha", f"{alpha:g}")
    for share in (1.0, 0.3, 0.1):
        if share != base.participation_rate:
            words = ("--participation-rate", f"{share:g}")
            yield setting(f"fedavg_participation_{share:g}", "fedavg", "topic_skew", *words)
    for rate in rates or (10 * base.learning_rate, 100 * base.learning_rate):
        if rate != base.learning_rate:
            for partition in ("topic_skew", "iid"):
                words = ("--learning-rate", f"{rate:g}")
                yield setting(f"fedavg_{partition}_lr_{rate:g}", "fedavg", partition, *words, seeds=2)
    steps = ("--local-steps", MORE_STEPS * base.local_steps)
    if not base.local_steps:
        steps = ("--local-epochs", f"{MORE_STEPS * base.local_epochs:g}")
    yield setting(f"fedavg_{steps[0][2:].replace('-', '_')}_{steps[1]}", "fedavg", "topic_skew", *steps)
    for kind in ("updates", "labels"):
        yield setting(f"fedavg_clusters_{kind}", "fedavg", "topic_skew", "--cluster", kind)
    for algorithm in ("local", "central"):
        yield setting(algorithm, algorithm, "topic_skew")
    if base.dataset == "ag_news":
        for partition in ("iid", "topic_skew"):
            yield setting(f"fedavg_{partition}_wikitext", "fedavg", partition, "--dataset", "wikitext", seeds=1)


SMALL = "--threads 1 --eval-every 1"
PRESETS = {
    "quick": Preset(
        f"{SMALL} --dataset demo --local-steps 5 --num-rounds 6 --max-samples 300 --eval-samples 60 --max-length 64 "
        "--probe-samples 8 --learning-rate 1e-2".split(),
        lambda base, rates: partitions(),
        seeds=(42,),
    ),
    "main": Preset(
        (),
        lambda base, rates: [
            one
            for share in ("0.3", "0.5", "1.0")
            for one in partitions(PARTITIONS, f"_participation_{share}", "--participation-rate", share)
        ],
        seeds=(42,),
    ),
    "failure": Preset(
        (),
        lambda base, rates: [
            *partitions(["topic_skew"], "_alpha_0.01", "--alpha", "0.01"),
            *partitions(["topic_skew"], "_participation_0.1", "--participation-rate", "0.1"),
            *partitions(["topic_skew"], "_lr_1e-3", "--learning-rate", "1e-3"),
            *partitions(["topic_skew"], "_epochs_5", "--local-steps", "0", "--local-epochs", "5"),
        ],
        seeds=(42,),
    ),
    "study": Preset(
        f"{SMALL} --local-steps 10 --num-rounds 12 --max-samples 4000 --eval-samples 300 --probe-samples 32 "
        "--max-length 64 --learning-rate 3e-3".split(),
        study,
    ),
    "regimes": Preset(
        tuple(regimes.SHARED.split()),
        lambda base, rates: regimes.regimes(),
        tuple(range(5)),
        "val_accuracy",
        higher=True,
    ),
    "regimes-more": Preset(
        tuple(regimes.SHARED.split()), lambda base, rates: regimes.more(), tuple(range(3)), "val_accuracy", higher=True
    ),
}

# ---- the runs


def plan(args, words):
    """The runs that the flags ask for. words: train.py's flags beside those that are listed here."""
    preset, output, first = PRESETS[args.preset], Path(args.output_dir), []
    shared = [*preset.shared, *words, *grid.given(args, GIVEN)]
    base = flags.parse(flags.build_parser("Flags of train.py"), shared)
    if args.preset == "quick" and args.model in (None, "tiny"):
        base.model = str(output / "models" / "tiny")
        first = [base_model(base)]
        shared += ["--model", base.model]
    of = f"{base.dataset}_{Path(base.model).name}"
    mu = args.mu or (QUICK_MU if args.preset == "quick" else None)
    chosen = [
        replace(one, words=(*one.words, "--mu", f"{mu:g}")) if mu and one.group == "fedprox" else one
        for one in grid.select(preset.settings(base, args.learning_rates), args.only)
    ]
    name = f"{args.preset}_{{setting}}_{of}_seed_{{seed}}"
    runs = grid.expand(chosen, shared, args.seeds, output, name, needs=first[0].name if first else "")
    return first + runs


def base_model(base):
    """The run that makes quick's model: as wide and deep as train.py's tiny, trained on a few texts of the demo."""
    words = "--dataset demo --tokenizer bpe:1024 --d-model 64 --layers 2 --heads 2 --max-samples 50 --epochs 30"
    words += f" --learning-rate 1e-2 --max-length {base.max_length} --threads 1 --overwrite --out"
    line = ("llm_noniid/pretrain.py", *words.split(), base.model)
    return grid.Run("models/tiny", line, record="pretraining.json")


def with_untrained_model(runs):
    """For the check of the data: a run with train.py's tiny model, where the grid's own is not trained yet."""
    run, made = runs[-1], Path(runs[0].command[-1])
    if not run.needs or made.exists():
        return []
    words = ("tiny" if word == str(made) else word for word in run.command)
    return [grid.Run(run.name, (*words, "--run-name", "check"))]


def main(args, words):
    if args.preset in PRESETS:
        runs = plan(args, words)
        return tuning.run_study(args, PRESETS[args.preset], runs, SHOW, also=with_untrained_model(runs))
    if words:
        raise UsageError(f"{words[0]}: --mode {args.preset} runs nothing, so it takes no flag of train.py: drop it")
    from llm_noniid import report  # scipy and all of plots/, which --help must not wait for

    output = Path(args.output_dir)
    print(report.text(output) if args.preset == "compare" else report.write(output, output / "report.html"))


def build_parser():
    text = __doc__.split("\n")[0] + " Flags that are not listed are train.py's and go to every run."
    modes = [*PRESETS, "compare", "analyze"]
    parser = grid.build_parser(text, modes, "quick", "results", preset_names=["--mode"], output_names=["--results-dir"])
    parser.add_argument(
        "--learning-rates", type=positive_float, nargs="+", metavar="X", help="of the study (default: 10, 100 times)"
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
    args, words = build_parser().parse_known_args(argv)
    flags.refuse(words, [*SET_HERE, "participation_rate"] if args.preset == "main" else SET_HERE)
    return grid.complete(args, PRESETS), words


if __name__ == "__main__":
    run_main(lambda argv: main(*parse(argv)), None)
