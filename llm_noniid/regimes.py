"""The rows of `run_experiments.py --mode regimes`, fixed before they were run: when training on labels breaks.

The base is where FedAvg breaks and still learns: AG News' labels, all parameters, 10 clients of as many texts, topic
skew of alpha 0.3, 50 local AdamW steps a round; beside it alpha 0.03, a topic or two a client, where it learns next to
nothing. One factor at a time from there. A client makes `STEPS` steps of 8 texts, whatever H is (about two passes over
its 720 texts), and the run is evaluated after each 50 or 100 of them. The map was fixed first; the other rows after
its tuning runs (seed 100), before any run of the table; `longer` when FedAvg's map and SCAFFOLD at 4 rounds were known.

group      question
map        when does it break? H x alpha; 5 seeds at H 50, where claims rest on them, else 3
repair     which algorithm repairs it, and what does it cost where there is nothing to repair (IID)?
longer     is a break, or what SCAFFOLD does to it, one of the first rounds only? Three times the rounds
lora       does an adapter break as all parameters do?
clients    a share of the clients; unequal sizes; SGD at the clients, SCAFFOLD's own setting
personal   at alpha 0.03: a model for each topic's clients, a last block of each client, each client alone
watched    (regimes-more) do alarms of swings, slowness and drift warn? The map at H 10, evaluated each round
ends       central training: as many steps, of the texts of ten clients (regimes-more: ten times the steps, of 8 texts)

Broken is what `plots/noniid_costs.py` calls so, said before the runs: more than 5 points of accuracy below the control
(IID, all else alike), with a paired 95 % interval over the seeds that excludes 0. Rates are tuned (--tune, seed 100) by
the validation accuracy: by the loss, rates would win at which a model of skewed clients says the prior and no more.
Rows that take another's rate: alpha 1 that of IID at its H; IID under SCAFFOLD and FedAdamW, and what `personal` has,
FedAvg's under IID; a share of the clients, unequal sizes and three times the rounds that of the row they vary; FedProx
and the server's optimisers FedAvg's, at which their second flag is tuned.

`regimes` has 164 runs with the tuning, `regimes-more` 84, with the same base, for what says less: `--only` a group.
"""

from common.grid import Setting

STEPS = 200  # of a client in a run
SHARED = (
    "--threads 1 --dataset ag_news --target label --train full --dropout 0 --max-samples 8000 --max-length 40 "
    "--eval-samples 500 --probe-samples 32 --drift-samples 16 --num-clients 10 --batch-size 8 --learning-rate 1e-3 "
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


def row(group, name, algorithm="fedavg", alpha=BASE, h=50, words="", seeds=3, rates=ADAMW, objective="", tuned_as=""):
    """One row. alpha: of topic skew, None for IID; words: more flags; rates: of the clients, that are tried, unless
    they are those of `tuned_as`; None: the one among `words`."""
    line = f"--algorithm {algorithm} --local-steps {h} --num-rounds {STEPS // h} --eval-every {EVERY[h]} "
    line += "--partition iid" if alpha is None else f"--partition topic_skew --alpha {alpha:g}"
    line += "" if alpha is None or "--sizes" in words else " --sizes equal"
    tune = {"learning-rate": rates} if rates and not tuned_as else SECOND.get(algorithm, {})
    words = (*line.split(), *words.split())
    return Setting(name, "llm_noniid/train.py", words, group, seeds, tune, objective, tuned_as)


def cell(algorithm, h, alpha):
    """The name of a row of the map or a repair."""
    return f"{algorithm}_h{h}_{skew(alpha)}"


def skew(alpha):
    return "iid" if alpha is None else f"alpha_{alpha:g}"


def cells():
    """FedAvg over H and alpha."""
    for h in EVERY:
        for alpha in (None, 1.0, BASE, EXTREME):
            taken = cell("fedavg", h, None) if alpha == 1.0 else ""
            seeds = 5 if h == 50 and alpha != 1.0 else 3
            yield row("map", cell("fedavg", h, alpha), alpha=alpha, h=h, seeds=seeds, tuned_as=taken)


def repairs(names, alphas, h=50, seeds=3):
    """Other algorithms in cells of the map."""
    for name in names:
        for alpha in alphas:
            taken = cell("fedavg", h, alpha) if name in SECOND or alpha is None else ""
            yield row("repair", cell(name, h, alpha), name, alpha, h, seeds=seeds, tuned_as=taken)


def longer(names, alphas, times=3, lr=None):
    """Rows of `map` and `repair` over `times` the rounds. lr: another rate than theirs."""
    rounds = times * STEPS // 50
    words = f"--num-rounds {rounds} --eval-every {times * EVERY[50]}" + (f" --learning-rate {lr:g}" if lr else "")
    for name in names:
        for alpha in alphas:
            taken = cell(name, 50, alpha)
            called = f"{taken}_rounds_{rounds}" + (f"_lr_{lr:g}" if lr else "")
            rate = {"rates": None} if lr else {"tuned_as": taken}
            yield row("longer", called, name, alpha, words=words, **rate)


def adapters(name):
    words = "--train lora --lora-dropout 0 --learning-rate 3e-3"
    for alpha in (BASE, None):
        yield row("lora", f"lora_{name}_{skew(alpha)}", name, alpha, words=words, rates=ADAPTER)


def shares(name):
    """Three clients of ten a round, three times the rounds: a client makes 180 steps, in the mean."""
    words = f"--participation-rate 0.3 --num-rounds {3 * STEPS // 50} --eval-every {3 * EVERY[50]}"
    for alpha in (BASE, None):
        yield row(
            "clients", f"participation_{name}_{skew(alpha)}", name, alpha, words=words, tuned_as=cell(name, 50, alpha)
        )


def plain_sgd(name):
    words = "--client-optimizer sgd --learning-rate 0.1"
    for alpha in (BASE, None):
        yield row("clients", f"sgd_{name}_{skew(alpha)}", name, alpha, words=words, rates=SGD)


def watched(h=10):
    """Cells of the map evaluated each round. Alarms were removed by what they said on all of them but alpha 1."""
    for alpha in (None, 1.0, BASE, EXTREME):
        taken = cell("fedavg", h, alpha if alpha != 1.0 else None)
        yield row("watched", f"watched_{skew(alpha)}", alpha=alpha, h=h, words="--eval-every 1", tuned_as=taken)


def central(name, h, batch):
    """One model on all texts. h: its steps a round are ten times as many (train.py's)."""
    return row("ends", name, "central", alpha=None, words=f"--local-steps {h} --batch-size {batch}")


def regimes():
    """When does it break, and what repairs it?"""
    yield from cells()
    yield from repairs(("scaffold", "fedadamw"), (BASE, EXTREME), seeds=5)
    yield from repairs(("scaffold", "fedadamw"), (None,))
    yield from repairs(("fedprox", "fedadam"), (BASE,))
    yield from longer(("fedavg",), (BASE, None))
    yield from longer(("scaffold",), (BASE,))
    yield from adapters("fedavg")
    yield from shares("fedavg")
    yield row("clients", "sizes_alpha_0.3", words="--sizes dirichlet", tuned_as=cell("fedavg", 50, BASE))
    for name, algorithm, words in (
        ("clusters_labels", "fedavg", "--cluster labels"),
        ("personal_last", "fedavg", "--personal last --drift-samples 0"),
        ("local", "local", ""),
    ):
        yield row("personal", name, algorithm, EXTREME, words=words, tuned_as=cell("fedavg", 50, None))
    yield central("central_steps", 5, 80)


def more():
    """The rest."""
    yield from repairs(("scaffold",), (BASE,), h=100)
    yield from repairs(("fedavgm",), (BASE,))
    yield from longer(("fedavg", "scaffold"), (EXTREME,))  # at 4 rounds no rate is far from chance, so here both
    yield from longer(("fedavg",), (EXTREME,), lr=1e-3)
    yield from longer(("scaffold",), (EXTREME,), lr=3e-4)
    yield from shares("scaffold")
    yield from adapters("scaffold")
    yield from plain_sgd("fedavg")
    yield from plain_sgd("scaffold")
    yield central("central_examples", 50, 8)
    yield from watched()
