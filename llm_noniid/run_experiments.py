"""Runs this study's experiments, one process a run, and reports on them.

    python llm_noniid/run_experiments.py --mode quick                                # minutes, offline
    python llm_noniid/run_experiments.py --mode main                                 # the source's grid: a GPU
    python llm_noniid/run_experiments.py --mode failure                              # the source's failure settings
    python llm_noniid/run_experiments.py --mode study --model models/small --jobs 2  # one factor at a time: 2 hours
    python llm_noniid/run_experiments.py --mode regimes --model models/small --tune  # then without --tune
    python llm_noniid/run_experiments.py --mode compare                              # the tables of what is there
    python llm_noniid/run_experiments.py --mode analyze                              # report.html

--preset is another spelling of --mode. Flags that are not listed are train.py's and go to every run; a row's own win.
The rows:

quick    3 algorithms x 4 partitions, 6 rounds, the tiny model, which it trains on 50 texts of the demo first
main     3 algorithms x 4 partitions x participation 0.3, 0.5, 1.0
failure  3 algorithms x (alpha 0.01; participation 0.1; learning rate 1e-3; 5 local epochs), topic skew
study    one factor at a time from FedAvg, topic skew, alpha 0.1
regimes  when training on labels breaks, and what repairs it: every row at its own rate (--tune, then without), tuned by
         the validation accuracy (by the loss, rates would win at which a model of skewed clients says the prior and no
         more). Groups: map (H x alpha), repair (other algorithms), longer (three times the rounds), lora, clients (a
         share of them, unequal sizes), alone (models for a part of them), ends (central training); -more: what followed
rounds   40 rounds of FedAvg and SCAFFOLD, IID to alpha 0.03: rounds to 95 % of IID's accuracy, and what is left then;
         -more: FedAvg for 80 rounds, the bytes of SCAFFOLD (bytes); both with 50 local steps (steps)
"""

from common.cli import UsageError, run_main
from plots import runner
from plots.runner import preset, row

TRAIN = "llm_noniid/train.py"
ALGORITHMS, PARTITIONS = ("fedavg", "fedprox", "scaffold"), ("iid", "topic_skew", "style_skew", "token_skew")
SMALL = "--threads 1 --eval-every 1"


def partitions(names=PARTITIONS, suffix="", words="", needs=(), fedprox=""):
    """The three algorithms on partitions. fedprox: flags of FedProx besides."""
    lines = {(a, p): f"{TRAIN} --algorithm {a} --partition {p} {words}" for p in names for a in ALGORITHMS}
    lines |= {(a, p): f"{line} {fedprox}" for (a, p), line in lines.items() if a == "fedprox"}
    return {f"{a}_{p}{suffix}": row(line, a, needs=needs) for (a, p), line in lines.items()}


# at train.py's mu FedProx is FedAvg in every digit shown; the model is as train.py's tiny
QUICK = partitions(needs=("models/tiny",), fedprox="--mu 1")
WORDS = "--dataset demo --tokenizer bpe:1024 --d-model 64 --layers 2 --heads 2 --max-samples 50 --epochs 30"
WORDS += " --learning-rate 1e-2 --max-length 64 --threads 1 --overwrite --out {output}/models/tiny"
QUICK["models/tiny"] = row(f"llm_noniid/pretrain.py {WORDS}", "first", tag="", record="pretraining.json")
MAIN = {}
for share in ("0.3", "0.5", "1.0"):
    MAIN |= partitions(PARTITIONS, f"_participation_{share}", f"--participation-rate {share}")
TOPICS = ["topic_skew"]
FAILURE = partitions(TOPICS, "_alpha_0.01", "--alpha 0.01")
FAILURE |= partitions(TOPICS, "_participation_0.1", "--participation-rate 0.1")
FAILURE |= partitions(TOPICS, "_lr_1e-3", "--learning-rate 1e-3")
FAILURE |= partitions(TOPICS, "_epochs_5", "--local-steps 0 --local-epochs 5")

FACTORS = {  # name: algorithm and what is varied, how many seeds
    "fedavg_alpha_100": ("fedavg --partition topic_skew --alpha 100", 3),
    "fedavg_alpha_1": ("fedavg --partition topic_skew --alpha 1", 3),
    "fedavg_alpha_0.01": ("fedavg --partition topic_skew --alpha 0.01", 3),
    "fedavg_participation_0.3": ("fedavg --partition topic_skew --participation-rate 0.3", 3),
    "fedavg_participation_0.1": ("fedavg --partition topic_skew --participation-rate 0.1", 3),
    "fedavg_topic_skew_lr_0.03": ("fedavg --partition topic_skew --learning-rate 0.03", 2),
    "fedavg_iid_lr_0.03": ("fedavg --partition iid --learning-rate 0.03", 2),
    "fedavg_topic_skew_lr_0.3": ("fedavg --partition topic_skew --learning-rate 0.3", 2),
    "fedavg_iid_lr_0.3": ("fedavg --partition iid --learning-rate 0.3", 2),
    "fedavg_local_steps_50": ("fedavg --partition topic_skew --local-steps 50", 3),
    "fedavg_clusters_labels": ("fedavg --partition topic_skew --cluster labels", 3),
    "local": ("local --partition topic_skew", 3),
    "central": ("central --partition topic_skew", 3),
    "fedavg_iid_wikitext": ("fedavg --partition iid --dataset wikitext", 1),
    "fedavg_topic_skew_wikitext": ("fedavg --partition topic_skew --dataset wikitext", 1),
}
STUDY_ROWS = partitions() | {
    name: row(f"{TRAIN} --algorithm {line}", line.split()[0], seeds) for name, (line, seeds) in FACTORS.items()
}

# ---- regimes

STEPS = 200  # of a client in a run
SHARED = (
    "--threads 1 --dataset ag_news --model distilgpt2 --target label --train full --dropout 0 --max-samples 8000 "
    "--max-length 40 --eval-samples 500 --probe-samples 32 --num-clients 10 --batch-size 8 --learning-rate 1e-3 "
    "--amp auto"
)
EVERY = {10: 5, 50: 1, 100: 1}  # rounds between evaluations
BASE, EXTREME = 0.3, 0.03  # alphas
ADAMW = {"learning-rate": (3e-4, 1e-3, 3e-3)}
ADAPTER = {"learning-rate": (1e-3, 3e-3, 1e-2)}


def one(group, algorithm="fedavg", alpha=BASE, words="", h=50, seeds=3, tune=ADAMW, rate_of=""):
    """One row. alpha: of topic skew, None for IID; tune: what --tune tries, at the rate of the row `rate_of`."""
    line = f"{TRAIN} --algorithm {algorithm} --local-steps {h} --num-rounds {STEPS // h} --eval-every {EVERY[h]} "
    line += "--partition iid" if alpha is None else f"--partition topic_skew --alpha {alpha:g}"
    line += "" if alpha is None or "--sizes" in words else " --sizes equal"
    return row(f"{line} {words}", group, seeds, {} if rate_of and tune is ADAMW else tune, rate_of)


IID, SKEWED, SCAFFOLD = "fedavg_h50_iid", "fedavg_h50_alpha_0.3", "scaffold_h50_alpha_0.3"
LORA = "--train lora --lora-dropout 0 --learning-rate 3e-3"
LONGER = "--num-rounds 12 --eval-every 3"
SHARE, REGIMES = f"--participation-rate 0.3 {LONGER}", {}  # a client makes 180 steps, in the mean
for h, seeds in {10: 3, 50: 5, 100: 3}.items():
    REGIMES[f"fedavg_h{h}_iid"] = one("map", alpha=None, h=h, seeds=seeds)
    REGIMES[f"fedavg_h{h}_alpha_1"] = one("map", alpha=1, h=h, rate_of=f"fedavg_h{h}_iid")
    REGIMES[f"fedavg_h{h}_alpha_0.3"] = one("map", h=h, seeds=seeds)
    REGIMES[f"fedavg_h{h}_alpha_0.03"] = one("map", alpha=EXTREME, h=h, seeds=seeds)
REGIMES |= {
    "scaffold_h50_alpha_0.3": one("repair", "scaffold", seeds=5),
    "scaffold_h50_alpha_0.03": one("repair", "scaffold", EXTREME, seeds=5),
    "scaffold_h50_iid": one("repair", "scaffold", None, rate_of=IID),
    "fedprox_h50_alpha_0.3": one("repair", "fedprox", tune={"mu": (0.01, 0.1, 1.0)}, rate_of=SKEWED),
    "fedadam_h50_alpha_0.3": one("repair", "fedadam", tune={"server-lr": (1e-3, 3e-3, 1e-2)}, rate_of=SKEWED),
    f"{SKEWED}_rounds_12": one("longer", words=LONGER, rate_of=SKEWED),
    f"{IID}_rounds_12": one("longer", alpha=None, words=LONGER, rate_of=IID),
    f"{SCAFFOLD}_rounds_12": one("longer", "scaffold", words=LONGER, rate_of=SCAFFOLD),
    "lora_fedavg_alpha_0.3": one("lora", words=LORA, tune=ADAPTER),
    "lora_fedavg_iid": one("lora", alpha=None, words=LORA, tune=ADAPTER),
    "participation_fedavg_alpha_0.3": one("clients", words=SHARE, rate_of=SKEWED),
    "participation_fedavg_iid": one("clients", alpha=None, words=SHARE, rate_of=IID),
    "sizes_alpha_0.3": one("clients", words="--sizes dirichlet", rate_of=SKEWED),
    "clusters_labels": one("alone", alpha=EXTREME, words="--cluster labels", rate_of=IID),
    "local": one("alone", "local", EXTREME, rate_of=IID),
    "central_steps": one("ends", "central", None, "--local-steps 5 --batch-size 80"),  # train.py makes ten times 5
}
F3, S3 = "fedavg_h50_alpha_0.03", "scaffold_h50_alpha_0.03"
MORE = {
    "fedavgm_h50_alpha_0.3": one("repair", "fedavgm", tune={"server-lr": (0.1, 0.3, 1.0)}, rate_of=SKEWED),
    # at 4 rounds no rate is far from chance, so here both
    f"{F3}_rounds_12": one("longer", "fedavg", EXTREME, LONGER, rate_of=F3),
    f"{S3}_rounds_12": one("longer", "scaffold", EXTREME, LONGER, rate_of=S3),
    f"{F3}_rounds_12_lr_0.001": one("longer", "fedavg", EXTREME, f"{LONGER} --learning-rate 0.001", tune={}),
    f"{S3}_rounds_12_lr_0.0003": one("longer", "scaffold", EXTREME, f"{LONGER} --learning-rate 0.0003", tune={}),
    "participation_scaffold_alpha_0.3": one("clients", "scaffold", words=SHARE, rate_of=SCAFFOLD),
}

# skew's cost in rounds and what it costs for good: the same at all shares of clients
ROUNDS, PLATEAU = {}, "--num-rounds 40 --eval-every {every} --test-samples {tested} --probe-samples 0"
for share, words in (("all", PLATEAU), ("some", f"{PLATEAU} --participation-rate 0.3")):
    for algorithm in ("fedavg", "scaffold"):
        for alpha in (None, 1, BASE, 0.1, EXTREME):
            name = "iid" if alpha is None else f"alpha_{alpha:g}"
            ROUNDS[f"{algorithm}_{name}_{share}"] = one(share, algorithm, alpha, words, 10, 5)
FOLLOWED = {}
for alpha in (BASE, EXTREME):
    name, words = f"fedavg_alpha_{alpha:g}_all", f"{PLATEAU} --num-rounds 80"
    FOLLOWED[f"{name}_rounds_80"] = one("bytes", "fedavg", alpha, words, 10, 5, rate_of=name)
for algorithm in ("fedavg", "scaffold"):  # under skew no higher rate of AdamW was ever their best
    rates = {"learning-rate": (9e-5, 3e-4, 1e-3)}
    FOLLOWED[f"{algorithm}_alpha_0.03_all_h50"] = one("steps", algorithm, EXTREME, PLATEAU, 50, 5, rates)

SIZES = "--local-steps 10 --num-rounds 12 --max-samples 4000 --eval-samples 300 --probe-samples 32 --max-length 64"
FEW = "--local-steps 5 --num-rounds 6 --max-samples 300 --eval-samples 60 --max-length 64 --probe-samples 8"
HUB = "--dataset ag_news --model distilgpt2"
TINY = f"{SMALL} --dataset demo --model {{output}}/models/tiny {FEW} --learning-rate 1e-2"
BEST = {"objective": "val_accuracy", "higher": True, "tuned": "llm_noniid/results/tuning/regimes.json"}
PLATEAUS = {"tuned": "llm_noniid/results/tuning/rounds.json"}
PRESETS = {
    "quick": preset(QUICK, TINY, (42,)),
    "main": preset(MAIN, HUB, (42,)),
    "failure": preset(FAILURE, HUB, (42,)),
    "study": preset(STUDY_ROWS, f"{SMALL} {HUB} {SIZES} --learning-rate 3e-3"),
    "regimes": preset(REGIMES, SHARED, range(5), **BEST),
    "regimes-more": preset(MORE, SHARED, range(3), **BEST),
    "rounds": preset(ROUNDS, SHARED, range(5), **BEST | PLATEAUS),
    "rounds-more": preset(FOLLOWED, SHARED, range(5), **BEST | PLATEAUS),
}


def values(seed, tuning):
    """Of the presets rounds: tuning looks at the end alone, and at no test text but one."""
    return {"every": 40, "tested": 1} if tuning else {"every": 2, "tested": 0}


STUDY = {
    "presets": {name: about | {"name": name + "_{row}_{dataset}_{model}"} for name, about in PRESETS.items()},
    "default": "quick",
    "output": "results",
    "values": values,
    "show": [f"llm_noniid/run_experiments.py --mode {m} --results-dir {{output}}" for m in ("compare", "analyze")],
}


def build_parser():
    modes = STUDY | {"presets": STUDY["presets"] | {"compare": {}, "analyze": {}}}
    return runner.build_parser(modes, __doc__.split("\n")[0], ["--mode"], ["--results-dir"])


def main(argv=None):
    from plots import report, tables  # only here: they take a while to import

    args, words = build_parser().parse_known_args(argv)
    if args.preset in STUDY["presets"]:
        return runner.run_study(STUDY, args, words)
    if words:
        raise UsageError(f"{words[0]}: --mode {args.preset} runs nothing, so it takes no flag of train.py: drop it")
    output = runner.output_of(STUDY, args)
    if args.preset == "analyze":
        print(report.write([output], output / "report.html"))
    else:
        tables.main(tables.build_parser().parse_args(["llm_noniid", "--data-dir", str(output)]))
    return 0


if __name__ == "__main__":
    run_main(main, None)
