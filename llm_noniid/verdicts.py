"""What the runs say to the study's four questions and the source's six expectations, each by a function of its own.

    for verdict in verdicts(context, maps):      # a `llm_noniid.outcomes.Context`; read failure_map.json files
        print(verdict.status, verdict.claim)

How settings are compared: `llm_noniid.comparing`.
"""

import math
from dataclasses import dataclass, field, replace

from llm_noniid import detectors
from llm_noniid.comparing import (
    CONFIRMED,
    FLOOR,
    REFUTED,
    UNDECIDED,
    UNMEASURED,
    Part,
    combine,
    compare,
    counted,
    majority,
    measure,
    part,
    sides,
    spread,
)

ALGORITHMS = {"fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD"}
SKEWS = {"topic_skew": "topic skew", "style_skew": "style skew", "token_skew": "token skew"}


@dataclass(frozen=True)
class Verdict:
    """A question or an expectation of the source, the claim that is judged, its status, the parts behind it."""

    question: str
    claim: str
    status: str
    parts: list = field(default_factory=list)


# ------------------------------------------------------------------------------------------- the four questions


def breaks_down(context, maps):
    """1: at the base's settings FedAvg fails at some alpha in most seeds. Beside it: whether its boundary falls."""
    alphas, parts = context.values("alpha"), []
    for alpha in reversed(alphas):
        runs = context.find(alpha=alpha)
        status, n = majority(runs, lambda run: run.failed)
        text = f"{counted(runs, n, 'failed')}; loss {spread(measure(runs, 'val_loss').values())}"
        parts.append(Part(f"FedAvg fails at alpha {alpha:g}", status, text))
    if len(alphas) > 1:
        ends = [measure(context.find(alpha=alpha), "val_loss") for alpha in (alphas[-1], alphas[0])]
        claim = f"the loss is higher at alpha {alphas[0]:g} than at {alphas[-1]:g}"
        parts.append(part(claim, *ends, "more", beside=True))
    for one in maps:
        parts.append(replace(boundary_falls(one), beside=True))  # one seed decides nothing
    return combine(parts, any_of=True), parts


def boundary_falls(one):
    """A `Part`: a failure map's boundary at the smallest alpha lies below that at the largest.

    Confirmed where the smallest alpha's failing value is at most the largest's working one, refuted where it is the
    other way round, else not decided. One seed.
    """
    what = {"learning_rate": "learning rate", "local_steps": "number of local steps"}[one["axis"]]
    claim = f"{ALGORITHMS.get(one['algorithm'], one['algorithm'])}: the {what} that breaks training falls with alpha"
    ends = sorted(one["boundary"], key=lambda b: b["alpha"])
    numbers = "; ".join(f"alpha {b['alpha']:g}: {_bracket(b)}" for b in ends) + " (one seed)"
    if len(ends) < 2:
        return Part(claim, UNMEASURED, numbers)
    return Part(claim, _below(ends[0], ends[-1]), numbers)


def _below(first, second):
    """Whether the first bracket's boundary is below the second's: a status. Brackets that overlap decide nothing."""
    if None not in (first["fails"], second["works"]) and first["fails"] <= second["works"]:
        return CONFIRMED
    if None not in (first["works"], second["fails"]) and first["works"] >= second["fails"]:
        return REFUTED
    return UNDECIDED


def _bracket(b):
    works, fails = (None if b[side] is None else f"{b[side]:g}" for side in ("works", "fails"))
    if works and fails:
        return f"between {works} and {fails}"
    return f"above {works}" if works else f"below {fails}" if fails else "unknown"


def skews_hurt(context, maps):
    """2: each skew ends with a higher loss than IID (FedAvg); gap and CKA beside."""
    iid, parts = context.find(partition="iid"), []
    for skew, name in SKEWS.items():
        runs = context.find(partition=skew)
        for field_, claim, wanted, unit, beside in (
            ("val_loss", "convergence: a higher loss", "more", "nats", False),
            ("worst_client_val_loss", "convergence: a higher loss of the worst client", "more", "nats", True),
            ("generalization_gap", "generalisation: a larger gap", "more", "nats", True),
        ):
            a, b = measure(iid, field_), measure(runs, field_)
            parts.append(part(f"{name}, {claim} than IID", a, b, wanted, unit, beside=beside))
        away = [_away(measure(these, "mean_cka")) for these in (iid, runs)]
        claim = f"{name}, representation: clients' hidden states further from the global model's (1 - CKA) than IID"
        parts.append(part(claim, *away, "more", "", ratio=True, beside=True))
    return combine(parts), parts


def _away(cka):
    return {seed: max(1 - value, 1e-12) for seed, value in cka.items()}


def algorithms_differ(context, maps):
    """3: on some partition FedProx or SCAFFOLD ends at another loss than FedAvg. Beside it: where they break."""
    parts = []
    for partition, name in {"iid": "IID", **SKEWS}.items():
        base = measure(context.find(partition=partition), "val_loss")
        for algorithm in ("fedprox", "scaffold"):
            other = measure(context.find(partition=partition, algorithm=algorithm), "val_loss")
            word, d, s = compare(base, other)
            status = {"": UNMEASURED, "open": UNDECIDED, "same": REFUTED}.get(word, CONFIRMED)
            numbers = "-" if not word else sides(base, other, d, s, len(base.keys() & other.keys()), "nats")
            claim = f"{name}: {ALGORITHMS[algorithm]}'s loss differs from FedAvg's by more than {FLOOR:g} nats"
            parts.append(Part(claim, status, numbers))
    for axis in ("learning_rate", "local_steps"):
        found = {one["algorithm"]: one for one in maps if one["axis"] == axis}
        for algorithm in sorted(found.keys() - {"fedavg"}) if "fedavg" in found else ():
            if found[algorithm]["setting"] == found["fedavg"]["setting"]:
                parts += boundaries_differ(found["fedavg"], found[algorithm])
    return combine(parts, any_of=True), parts


def boundaries_differ(one, other):
    """`Part`s, one for each alpha that both maps have: their brackets do not meet."""
    mine, theirs = ({b["alpha"]: b for b in m["boundary"]} for m in (one, other))
    parts = []
    for alpha in sorted(mine.keys() & theirs.keys(), reverse=True):
        a, b = mine[alpha], theirs[alpha]
        apart = CONFIRMED in (_below(a, b), _below(b, a))
        name = ALGORITHMS.get(other["algorithm"], other["algorithm"])
        claim = f"alpha {alpha:g}: {name} breaks at another {one['axis'].replace('_', ' ')} than FedAvg (one seed)"
        numbers = f"FedAvg {_bracket(a)}, {name} {_bracket(b)}"
        parts.append(Part(claim, CONFIRMED if apart else UNDECIDED, numbers, beside=True))
    return parts


def clusters_help(context, maps):
    """4: models of groups serve the clients' own texts better than the single model, by updates or by labels."""
    single, parts = context.find(), []
    for kind in ("updates", "labels"):
        grouped = context.find(cluster=kind)
        for name, beside in (("mean", False), ("worst", True)):
            a, b = (measure(runs, f"{name}_client_val_loss") for runs in (single, grouped))
            claim = f"clusters by {kind}: a lower loss of the {name} client, on its own texts"
            parts.append(part(claim, a, b, "less", beside=beside))
    for algorithm in ("local", "central"):
        other = context.find(algorithm=algorithm)
        a, b = (measure(runs, "mean_client_val_loss") for runs in (single, other))
        parts.append(part(f"{algorithm} training: a lower loss of the mean client", a, b, "less", beside=True))
    return combine(parts, any_of=True), parts


# ----------------------------------------------------------------------------------- the source's expectations


def iid_is_stable(context, maps):
    """IID: no run of any algorithm fails, diverges, oscillates or leaves updates out."""
    parts = []
    for algorithm, name in ALGORITHMS.items():
        runs = context.find(partition="iid", algorithm=algorithm)
        status, n = majority(runs, lambda run: run.unstable)
        status = {CONFIRMED: REFUTED, REFUTED: CONFIRMED}.get(status, status)
        loss = spread(measure(runs, "val_loss").values())
        parts.append(Part(f"{name} is stable", status, counted(runs, n, f"not stable; loss {loss}")))
    return combine(parts), parts


def topic_skew_breaks_fedavg(context, maps):
    """Topic skew: FedAvg fails in most seeds; FedProx and SCAFFOLD end lower."""
    runs = context.find()
    status, n = majority(runs, lambda run: run.failed)
    base = measure(runs, "val_loss")
    parts = [Part("FedAvg diverges", status, counted(runs, n, f"failed; loss {spread(base.values())}"))]
    for algorithm in ("fedprox", "scaffold"):
        other = measure(context.find(algorithm=algorithm), "val_loss")
        parts.append(part(f"{ALGORITHMS[algorithm]} ends at a lower loss than FedAvg", base, other, "less"))
    return combine(parts), parts


def style_skew_gives_variance(context, maps):
    """Style skew: gradient norms vary more over clients than under IID (FedAvg, mean over the rounds)."""
    a, b = (context.find(partition=name) for name in ("iid", "style_skew"))
    names = {
        "gradient_norm_variance": ("the clients' gradient norms vary more than under IID", False),
        "relative_drift": ("the clients drift further apart than under IID", True),
    }
    parts = [
        part(claim, measure(a, name, "mean"), measure(b, name, "mean"), "more", "", ratio=True, beside=beside)
        for name, (claim, beside) in names.items()
    ]
    return combine(parts), parts


def token_skew_biases_all(context, maps):
    """Token skew: each algorithm ends at a higher loss than the same algorithm under IID."""
    parts = []
    for algorithm, name in ALGORITHMS.items():
        a, b = (measure(context.find(partition=p, algorithm=algorithm), "val_loss") for p in ("iid", "token_skew"))
        parts.append(part(f"{name}: a higher loss than under IID", a, b, "more"))
    return combine(parts), parts


def few_clients_oscillate(context, maps):
    """The lowest participation: alarms of oscillation in most seeds, and a higher loss after as many rounds."""
    rates = context.values("participation_rate")
    full, few = (context.find(participation_rate=rate) for rate in (max(rates, default=1), min(rates, default=1)))
    if len(rates) < 2:
        few = {}
    rate = f"{min(rates):g}" if len(rates) > 1 else "low"
    swings = [{seed: v for seed, run in runs.items() if (v := _swing(run)) is not None} for runs in (full, few)]
    loss = [measure(runs, "val_loss") for runs in (full, few)]
    status, n = majority(few, lambda run: run.alarmed("oscillating"))
    speed = [_rounds_to_half(full, runs) for runs in (full, few)]
    parts = [
        Part(f"oscillation: the detector's alarm at participation {rate}", status, counted(few, n, "raised one")),
        part(
            "amplitude of the loss's second differences (descent bends too)",
            *swings,
            "more",
            "",
            ratio=True,
            beside=True,
        ),
        part(f"slow convergence: a higher loss at participation {rate} after as many rounds", *loss, "more"),
        Part("rounds to what full participation has after half of its", UNDECIDED, " → ".join(speed), beside=True),
    ]
    return combine(parts), parts


def _swing(run):
    """`detectors.amplitude` of the whole loss curve; None for fewer than 4 evaluations or one not finite."""
    values = run.curve("val_loss")[1]
    if len(values) < 4 or not all(map(math.isfinite, values)):
        return None
    return float(detectors.amplitude(values)[0])


def half_way(run):
    """A run's validation loss at the middle of its evaluations: the target of `rounds to target`."""
    values = run.curve("val_loss")[1]
    return values[(len(values) - 1) // 2] if values else None


def _rounds_to_half(full, runs):
    found = [run.rounds_to(half_way(full[seed])) for seed, run in runs.items() if seed in full and full[seed].rows]
    return ", ".join("never" if r is None else str(r) for r in found) or "-"


def high_rates_diverge(context, maps):
    """A high learning rate: some rate fails in most seeds, and more rates do (or it costs more) than under IID."""
    rates = context.values("learning_rate")
    skewed, iid = (
        {rate: context.find(learning_rate=rate, partition=p) for rate in rates} for p in ("topic_skew", "iid")
    )
    tried = {rate: majority(runs, lambda run: run.failed) for rate, runs in skewed.items() if runs}
    numbers = "; ".join(
        f"lr {rate:g}: {n} of {len(skewed[rate])} failed, loss {spread(measure(skewed[rate], 'val_loss').values())}"
        for rate, (_, n) in tried.items()
    )
    if len(tried) < 2:
        parts = [Part("some learning rate breaks training", UNMEASURED, numbers or "-")]
        return UNMEASURED, parts
    verdicts_ = [Part(f"lr {rate:g}", status, "") for rate, (status, _) in tried.items()]
    parts = [Part("some learning rate breaks training", combine(verdicts_, any_of=True), numbers)]
    return combine([*parts, _worse_under_skew(skewed, iid)]), [*parts, _worse_under_skew(skewed, iid)]


def _worse_under_skew(skewed, iid):
    """More runs fail under topic skew at the rates that both have; as many: the highest finite rate costs more."""
    both = [rate for rate in skewed if skewed[rate].keys() & iid[rate].keys()]
    claim = "especially under topic skew"
    if len(both) < 2:
        return Part(claim, UNMEASURED, "-")
    failed = [
        {
            rate: [bool(runs[rate][seed].failed) for seed in sorted(skewed[rate].keys() & iid[rate].keys())]
            for rate in both
        }
        for runs in (skewed, iid)
    ]
    counts = [sum(sum(flags) for flags in one.values()) for one in failed]
    pairs = sum(len(flags) for flags in failed[0].values())
    numbers = f"failed: {counts[0]} of {pairs} runs under topic skew, {counts[1]} of {pairs} under IID"
    most = max(len(flags) for flags in failed[0].values())
    if abs(counts[0] - counts[1]) >= max(2, most):  # as many as one whole learning rate
        return Part(claim, CONFIRMED if counts[0] > counts[1] else REFUTED, numbers)
    costs = []
    for rate in sorted(both, reverse=True):
        costs = [_cost(runs[both[0]], runs[rate]) for runs in (iid, skewed)]
        if rate > both[0] and all(costs) and all(math.isfinite(v) for c in costs for v in c.values()):
            compared = part(claim, *costs, "more")
            text = f"{numbers}; loss at lr {rate:g} above that at {both[0]:g}, IID → topic skew: {compared.numbers}"
            return Part(claim, compared.status, text)
    return Part(claim, UNDECIDED, numbers)


def _cost(low, high):
    a, b = measure(low, "val_loss"), measure(high, "val_loss")
    return {seed: b[seed] - a[seed] for seed in a.keys() & b.keys()}


QUESTIONS = (
    ("When does federated training break down?", "Heterogeneity makes FedAvg break down", breaks_down),
    (
        "Which splits hurt convergence, generalisation and representation?",
        "Each skew ends with a higher loss than IID",
        skews_hurt,
    ),
    (
        "How do FedAvg, FedProx and SCAFFOLD fail differently?",
        "They end at different losses on some partition",
        algorithms_differ,
    ),
    (
        "Can clustering of clients repair it?",
        "Models of groups serve the clients' own texts better than one model",
        clusters_help,
    ),
)
EXPECTATIONS = (
    ("IID baseline", "Stable convergence of all algorithms", iid_is_stable),
    ("Topic skew", "FedAvg diverges, FedProx and SCAFFOLD handle it better", topic_skew_breaks_fedavg),
    ("Style skew", "It causes gradient variance", style_skew_gives_variance),
    ("Token skew", "It biases all algorithms", token_skew_biases_all),
    ("Low participation", "Oscillation and slow convergence", few_clients_oscillate),
    ("High learning rate", "Divergence, especially under non-IID", high_rates_diverge),
)


def verdicts(context, maps=(), of=QUESTIONS + EXPECTATIONS):
    """A `Verdict` for each question and expectation. context None: nothing is there, all are not measured."""
    if context is None:
        return [Verdict(question, claim, UNMEASURED) for question, claim, _ in of]
    return [Verdict(question, claim, *judge(context, list(maps))) for question, claim, judge in of]
