"""The rows of run_experiments.py.

quick    3 algorithms x 4 partitions, 6 rounds, the tiny model on the demo, which it trains on 50 texts first, for
         adapters cannot move a model whose frozen embeddings are random
main     3 algorithms x 4 partitions x participation 0.3, 0.5, 1.0
failure  3 algorithms x (alpha 0.01; participation 0.1; learning rate 1e-3; 5 local epochs), topic skew
study    one factor at a time from FedAvg, topic skew, alpha 0.1
regimes  when training on labels breaks, and what repairs it: every row at its own rate (--tune, then without). The base
         is where FedAvg breaks and still learns: AG News' labels, all parameters, 10 clients of as many texts, topic
         skew of alpha 0.3, 50 local AdamW steps a round; beside it alpha 0.03, a topic or two a client. A client makes
         STEPS steps of 8 texts, whatever H is. The map was fixed first; the other rows after its tuning runs, before
         any run of the table; `longer` when FedAvg's map and SCAFFOLD at 4 rounds were known. Groups:

         map       when does it break? H x alpha; 5 seeds at H 50, where claims rest on them, else 3
         repair    which algorithm repairs it, and what does it cost where there is nothing to repair (IID)?
         longer    is a break, or what SCAFFOLD does to it, one of the first rounds only? Three times the rounds
         lora      does an adapter break as all parameters do?
         clients   a share of the clients; unequal sizes; SGD at the clients, SCAFFOLD's own setting
         alone     at alpha 0.03: a model for each topic's clients, each client alone
         ends      central training: as many steps, of the texts of ten clients (more: ten times the steps, of 8 texts)

Rates are tuned (seed 100) by the validation accuracy: by the loss, rates would win at which a model of skewed clients
says the prior and no more. Rows that take another's rate: alpha 1 that of IID at its H; IID under SCAFFOLD, and
`alone`, FedAvg's under IID; a share of the clients, unequal sizes and three times the rounds that of the row they vary;
FedProx and the server's optimisers FedAvg's, at which their second flag is tuned. regimes-more has what says less.
"""

from plots.runner import preset, row

TRAIN = "llm_noniid/train.py"
ALGORITHMS, PARTITIONS = ("fedavg", "fedprox", "scaffold"), ("iid", "topic_skew", "style_skew", "token_skew")
SMALL = "--threads 1 --eval-every 1"

# ---- the source's, and one factor at a time


def partitions(names=PARTITIONS, suffix="", words="", needs=(), mu=""):
    """The three algorithms on partitions."""
    lines = {f"{a}_{p}{suffix}": f"--algorithm {a} --partition {p} {words}" for p in names for a in ALGORITHMS}
    more = {name: f" --mu {mu}" if mu and "fedprox" in name else "" for name in lines}
    return {
        name: row(f"{TRAIN} {line}{more[name]}", name.partition("_")[0], needs=needs) for name, line in lines.items()
    }


# as wide and deep as train.py's tiny, trained on a few texts of the demo; at train.py's mu FedProx is FedAvg in every
# digit shown
QUICK = partitions(needs=("models/tiny",), mu=1)
WORDS = "--dataset demo --tokenizer bpe:1024 --d-model 64 --layers 2 --heads 2 --max-samples 50 --epochs 30"
WORDS += " --learning-rate 1e-2 --max-length 64 --threads 1 --overwrite --out {output}/models/tiny"
QUICK["models/tiny"] = row(f"llm_noniid/pretrain.py {WORDS}", "first", tag="", record="pretraining.json")
MAIN, FAILURE = {}, {}
for share in ("0.3", "0.5", "1.0"):
    MAIN |= partitions(PARTITIONS, f"_participation_{share}", f"--participation-rate {share}")
for end, words in (
    ("alpha_0.01", "--alpha 0.01"),
    ("participation_0.1", "--participation-rate 0.1"),
    ("lr_1e-3", "--learning-rate 1e-3"),
    ("epochs_5", "--local-steps 0 --local-epochs 5"),
):
    FAILURE |= partitions(["topic_skew"], f"_{end}", words)

SKEW = f"{TRAIN} --algorithm fedavg --partition topic_skew"
STUDY_ROWS = partitions()
STUDY_ROWS |= {f"fedavg_alpha_{alpha}": row(f"{SKEW} --alpha {alpha}", "fedavg") for alpha in ("100", "1", "0.01")}
STUDY_ROWS |= {f"fedavg_participation_{m}": row(f"{SKEW} --participation-rate {m}", "fedavg") for m in ("0.3", "0.1")}
for rate in ("0.03", "0.3"):
    for partition in ("topic_skew", "iid"):
        line = f"{TRAIN} --algorithm fedavg --partition {partition} --learning-rate {rate}"
        STUDY_ROWS[f"fedavg_{partition}_lr_{rate}"] = row(line, "fedavg", 2)
STUDY_ROWS["fedavg_local_steps_50"] = row(f"{SKEW} --local-steps 50", "fedavg")
STUDY_ROWS |= {f"fedavg_clusters_{kind}": row(f"{SKEW} --cluster {kind}", "fedavg") for kind in ("updates", "labels")}
for name in ("local", "central"):
    STUDY_ROWS[name] = row(f"{TRAIN} --algorithm {name} --partition topic_skew", name)
for name in ("iid", "topic_skew"):
    line = f"{TRAIN} --algorithm fedavg --partition {name} --dataset wikitext"
    STUDY_ROWS[f"fedavg_{name}_wikitext"] = row(line, "fedavg", 1)

# ---- regimes

STEPS = 200  # of a client in a run
SHARED = (
    "--threads 1 --dataset ag_news --model distilgpt2 --target label --train full --dropout 0 --max-samples 8000 "
    "--max-length 40 --eval-samples 500 --probe-samples 32 --num-clients 10 --batch-size 8 --learning-rate 1e-3 "
    "--amp auto"
)
EVERY = {10: 5, 50: 1, 100: 1}  # rounds between evaluations
ADAMW, ADAPTER, SGD = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (0.03, 0.1, 0.3)
SECOND = {  # what is tuned at FedAvg's rate
    "fedprox": {"mu": (0.01, 0.1, 1.0)},
    "fedadam": {"server-lr": (1e-3, 3e-3, 1e-2)},
    "fedavgm": {"server-lr": (0.1, 0.3, 1.0)},
}
BASE, EXTREME = 0.3, 0.03  # alphas


def one(group, algorithm="fedavg", alpha=BASE, h=50, words="", seeds=3, rates=ADAMW, rate_of=""):
    """One row. alpha: of topic skew, None for IID; rates: of the clients, that are tried, unless they are those of
    `rate_of`; None: the one among `words`."""
    line = f"{TRAIN} --algorithm {algorithm} --local-steps {h} --num-rounds {STEPS // h} --eval-every {EVERY[h]} "
    line += "--partition iid" if alpha is None else f"--partition topic_skew --alpha {alpha:g}"
    line += "" if alpha is None or "--sizes" in words else " --sizes equal"
    tune = {"learning-rate": rates} if rates and not rate_of else SECOND.get(algorithm, {})
    return row(f"{line} {words}", group, seeds, tune, rate_of)


def skew(alpha):
    return "iid" if alpha is None else f"alpha_{alpha:g}"


def cell(algorithm, h, alpha):
    """The name of a row of the map or a repair."""
    return f"{algorithm}_h{h}_{skew(alpha)}"


def repairs(names, alphas, h=50, seeds=3):
    """Other algorithms in cells of the map."""
    taken = {(n, a): cell("fedavg", h, a) if n in SECOND or a is None else "" for n in names for a in alphas}
    return {cell(n, h, a): one("repair", n, a, h, seeds=seeds, rate_of=of) for (n, a), of in taken.items()}


def longer(name, alpha, lr=None):
    """A row of `map` or `repair` over three times the rounds. lr: another rate than its."""
    words = f"--num-rounds 12 --eval-every 3{f' --learning-rate {lr:g}' if lr else ''}"
    of = cell(name, 50, alpha)
    rate = {"rates": None} if lr else {"rate_of": of}
    return {f"{of}_rounds_12" + (f"_lr_{lr:g}" if lr else ""): one("longer", name, alpha, words=words, **rate)}


def pair(prefix, group, name, words, rates=ADAMW, takes=False):
    """A row at BASE and one under IID."""
    return {
        f"{prefix}_{name}_{skew(a)}": one(
            group, name, a, words=words, rates=rates, rate_of=cell(name, 50, a) if takes else ""
        )
        for a in (BASE, None)
    }


LORA, PLAIN = "--train lora --lora-dropout 0 --learning-rate 3e-3", "--client-optimizer sgd --learning-rate 0.1"
SHARE = "--participation-rate 0.3 --num-rounds 12 --eval-every 3"  # a client makes 180 steps, in the mean
IID = cell("fedavg", 50, None)
REGIMES = {
    cell("fedavg", h, alpha): one(
        "map",
        alpha=alpha,
        h=h,
        seeds=5 if h == 50 and alpha != 1.0 else 3,
        rate_of=cell("fedavg", h, None) if alpha == 1.0 else "",
    )
    for h in EVERY
    for alpha in (None, 1.0, BASE, EXTREME)
}
REGIMES |= repairs(["scaffold"], (BASE, EXTREME), seeds=5) | repairs(["scaffold"], (None,))
REGIMES |= repairs(("fedprox", "fedadam"), (BASE,))
REGIMES |= longer("fedavg", BASE) | longer("fedavg", None) | longer("scaffold", BASE)
REGIMES |= pair("lora", "lora", "fedavg", LORA, ADAPTER) | pair("participation", "clients", "fedavg", SHARE, takes=True)
REGIMES |= {
    "sizes_alpha_0.3": one("clients", words="--sizes dirichlet", rate_of=cell("fedavg", 50, BASE)),
    "clusters_labels": one("alone", alpha=EXTREME, words="--cluster labels", rate_of=IID),
    "local": one("alone", "local", EXTREME, rate_of=IID),
    # its steps a round are ten times as many (train.py's)
    "central_steps": one("ends", "central", None, words="--local-steps 5 --batch-size 80"),
}
MORE = repairs(["scaffold"], (BASE,), h=100) | repairs(["fedavgm"], (BASE,))
# at 4 rounds no rate is far from chance, so here both
MORE |= longer("fedavg", EXTREME) | longer("scaffold", EXTREME)
MORE |= longer("fedavg", EXTREME, 1e-3) | longer("scaffold", EXTREME, 3e-4)
MORE |= pair("participation", "clients", "scaffold", SHARE, takes=True) | pair(
    "lora", "lora", "scaffold", LORA, ADAPTER
)
MORE |= pair("sgd", "clients", "fedavg", PLAIN, SGD) | pair("sgd", "clients", "scaffold", PLAIN, SGD)
MORE["central_examples"] = one("ends", "central", None, words="--local-steps 50 --batch-size 8")

NAMES = "_{row}_{dataset}_{model}"
SIZES = "--local-steps 10 --num-rounds 12 --max-samples 4000 --eval-samples 300 --probe-samples 32 --max-length 64"
FEW = "--local-steps 5 --num-rounds 6 --max-samples 300 --eval-samples 60 --max-length 64 --probe-samples 8"
HUB = "--dataset ag_news --model distilgpt2"
BEST = {"objective": "val_accuracy", "higher": True, "tuned": "llm_noniid/results/tuning/regimes.json"}
STUDY = {
    "presets": {
        "quick": preset(
            QUICK,
            f"{SMALL} --dataset demo --model {{output}}/models/tiny {FEW} --learning-rate 1e-2",
            (42,),
            name=f"quick{NAMES}",
        ),
        "main": preset(MAIN, HUB, (42,), name=f"main{NAMES}"),
        "failure": preset(FAILURE, HUB, (42,), name=f"failure{NAMES}"),
        "study": preset(STUDY_ROWS, f"{SMALL} {HUB} {SIZES} --learning-rate 3e-3", name=f"study{NAMES}"),
        "regimes": preset(REGIMES, SHARED, range(5), name=f"regimes{NAMES}", **BEST),
        "regimes-more": preset(MORE, SHARED, range(3), name=f"regimes-more{NAMES}", **BEST),
    },
    "default": "quick",
    "output": "results",
    "show": [
        f"llm_noniid/run_experiments.py --mode {mode} --results-dir {{output}}" for mode in ("compare", "analyze")
    ],
}
