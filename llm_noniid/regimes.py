"""The rows of `run_experiments.py --mode regimes`, fixed before they were run: when training on labels breaks.

The base is where FedAvg was seen to break: AG News' labels, all parameters, 10 clients of as many texts, topic skew of
alpha 0.03, 50 local AdamW steps a round. One factor at a time from there. In every row a client that takes part in each
round makes `STEPS` steps of 8 texts, whatever H is, and has rates of its own (--tune). `regimes` has map and two
repairs, about 5 core-hours with the tuning; `regimes-more` has the rest, with the same base: `--only` a group of it.

group      question
map        when does it break? H x alpha
repair     which algorithm repairs it, and what does it cost where there is nothing to repair (IID)?
lora       does an adapter break as all parameters do?
clients    unequal sizes, a share of the clients, SGD at the clients (SCAFFOLD's own setting)
personal   models for groups or with a head of each client, by the mean client's loss
ends       training with all texts, and each client alone
"""

from common.grid import Setting

STEPS = 600  # of a client in a run
SHARED = (
    "--threads 1 --dataset ag_news --target label --train full --dropout 0 --max-samples 4000 --max-length 40 "
    "--eval-samples 300 --probe-samples 32 --num-clients 10 --batch-size 8 --learning-rate 1e-3 "
    "--amp auto"
)
EVERY = {10: 5, 50: 1, 200: 1}  # rounds between evaluations
ADAMW, ADAPTER, SGD = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (0.03, 0.1, 0.3)
MU, MOMENTUM_LR, ADAM_LR = (0.01, 0.1, 1.0), (0.1, 0.3, 1.0), (1e-3, 3e-3, 1e-2)
REPAIRS = {  # beside FedAvg: what is tuned after the clients' rate
    "scaffold": {},
    "fedadamw": {},
    "fedprox": {"mu": MU},
    "fedadam": {"server-lr": ADAM_LR},
    "fedavgm": {"server-lr": MOMENTUM_LR},
}
MEAN_CLIENT = "mean_client_val_loss"


def row(group, name, algorithm="fedavg", alpha=0.03, h=50, words="", seeds=3, rates=ADAMW, objective="", **tune):
    """One row. alpha: of topic skew, None for IID; words: more flags; rates: of the clients, that are tried."""
    line = f"--algorithm {algorithm} --local-steps {h} --num-rounds {STEPS // h} --eval-every {EVERY[h]} "
    line += "--partition iid" if alpha is None else f"--partition topic_skew --alpha {alpha:g}"
    line += "" if alpha is None or "--sizes" in words else " --sizes equal"
    grids = {"learning-rate": rates, **{flag.replace("_", "-"): values for flag, values in tune.items()}}
    return Setting(name, "llm_noniid/train.py", (*line.split(), *words.split()), group, seeds, grids, objective)


def cells(alphas):
    """FedAvg over H and alpha; five seeds at the base and at its control."""
    for h in EVERY:
        for alpha in alphas:
            boundary = h == 50 and alpha in (None, 0.03)
            yield row("map", f"fedavg_h{h}_{skew(alpha)}", alpha=alpha, h=h, seeds=5 if boundary else 3)


def skew(alpha):
    return "iid" if alpha is None else f"alpha_{alpha:g}"


def repairs(names, alphas, h=50):
    """Other algorithms in cells of the map."""
    for name in names:
        for alpha in alphas:
            yield row("repair", f"{name}_h{h}_{skew(alpha)}", name, alpha, h, **REPAIRS[name])


def adapters(names):
    for name in names:
        for alpha in (None, 0.03):
            words, rates = "--train lora --learning-rate 3e-3", ADAPTER
            yield row("lora", f"lora_{name}_{skew(alpha)}", name, alpha, words=words, rates=rates)


def shares(names, alphas):
    """Three clients of ten a round, as many rounds: each makes a third of the steps."""
    for name in names:
        for alpha in alphas:
            words = "--participation-rate 0.3"
            yield row("clients", f"participation_{name}_{skew(alpha)}", name, alpha, words=words)


def plain_sgd(names, alphas):
    for name in names:
        for alpha in alphas:
            words = "--client-optimizer sgd --learning-rate 0.1"
            yield row("clients", f"sgd_{name}_{skew(alpha)}", name, alpha, words=words, rates=SGD)


def sizes(alphas):
    for alpha in alphas:
        yield row("clients", f"sizes_{skew(alpha)}", alpha=alpha, words="--sizes dirichlet")


def personal(name, words):
    return row("personal", name, words=words, objective=MEAN_CLIENT)


def central(name, h, batch):
    """One model on all texts. h: its steps a round are ten times as many (train.py's)."""
    words = f"--local-steps {h} --batch-size {batch}"
    return row("ends", name, "central", alpha=None, words=words)


def regimes():
    """The first two questions: when, and what repairs it."""
    yield from cells((None, 0.1, 0.03))
    yield from repairs(("scaffold", "fedadamw"), (0.03, None))


def more():
    """The rest, the questions of more weight first."""
    yield from adapters(("fedavg", "scaffold"))
    yield from repairs(("fedprox", "fedadam", "fedavgm"), (0.03,))
    yield from shares(("fedavg", "scaffold", "fedadamw"), (0.03, None))
    yield personal("clusters_labels", "--cluster labels --num-clusters 4")
    yield central("central_steps", 5, 80)
    yield from sizes((0.03, 0.1))
    yield from plain_sgd(("fedavg", "scaffold"), (0.03, None))
    for h in (10, 200):
        yield from repairs(("scaffold", "fedadamw"), (0.03,), h)
    yield from repairs(("fedprox", "fedadam", "fedavgm"), (None,))
    yield from cells((100,))
    yield personal("clusters_updates", "--cluster updates --num-clusters 4")
    yield row("ends", "local", "local", objective=MEAN_CLIENT)
    yield central("central_examples", 50, 8)
