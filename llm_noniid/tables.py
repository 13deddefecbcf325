"""Tables of the runs in a folder: mean and sample standard deviation over seeds, a row for each setting.

`difference` is the loss less that of FedAvg in the same setting (of FedAvg itself: less that of the base, which is what
most runs share), taken seed by seed. `rounds to target`: the first evaluated round with the loss that the base's run of
the same seed has at the middle of its evaluations. `failed`: the alarm `diverged`, or a last loss that is not finite,
above the first evaluation's, or above the model's before training. cosine (mean over pairs of clients' updates, which
does not depend on how many clients there are and what they weigh, as drift does), gradient variance and 1 - CKA are
means over the evaluated rounds, `-` where one client is alone in each; all other numbers are the last evaluation's.
"""

import math
from collections import Counter
from pathlib import Path

from common.cli import UsageError
from llm_noniid.comparing import measure, spread
from llm_noniid.outcomes import Context, contexts, maps_of, read_maps, read_outcomes
from llm_noniid.verdicts import half_way, verdicts

HEAD = (
    *("setting", "loss (nats)", "difference", "perplexity", "bits per byte", "mean client", "worst client"),
    *("gap", "cosine", "gradient variance", "1 - CKA", "rounds to target", "failed", "alarms", "seeds", "minutes"),
)


def reference(context, factors):
    """{seed: Outcome}: what a setting's loss is compared with; {} where it is that itself."""
    if factors["algorithm"] != "fedavg" or factors["cluster"] != "none":
        other = {**{n: v for n, v in factors.items() if v is not None}, "algorithm": "fedavg", "cluster": "none"}
        return context.find(**other)
    base = context.find()
    return {} if any(run.factors == factors for run in base.values()) else base


def row(context, factors, runs):
    """The cells of one setting."""
    loss, other = measure(runs, "val_loss"), measure(reference(context, factors), "val_loss")
    away = {seed: max(0.0, 1 - v) for seed, v in measure(runs, "mean_cka", "mean").items()}
    base = context.find()
    differences = [loss[s] - other[s] for s in sorted(loss.keys() & other.keys()) if math.isfinite(loss[s] - other[s])]
    reached = [run.rounds_to(half_way(base[s])) for s, run in runs.items() if s in base and base[s].rows]
    seconds = {seed: run.results["seconds"] / 60 for seed, run in runs.items() if "seconds" in run.results}
    failed = sum(bool(run.failed) for run in runs.values())
    alarms = Counter(name for run in runs.values() for name in {alarm["detector"] for alarm in run.alarms})
    return (
        context.words(factors),
        spread(loss.values()),
        _signed(differences),
        spread([math.exp(v) if v < 700 else math.inf for v in loss.values()]),
        *(spread(measure(runs, name).values()) for name in ("val_bits_per_byte", "mean_client_val_loss")),
        *(spread(measure(runs, name).values()) for name in ("worst_client_val_loss", "generalization_gap")),
        *(spread(measure(runs, name, "mean").values(), 3) for name in ("update_cosine", "gradient_norm_variance")),
        spread(away.values(), 3),
        "/".join("never" if r is None else str(r) for r in reached) or "-",
        f"{failed} of {len(runs)}",
        ", ".join(f"{name} {n}" for name, n in sorted(alarms.items())) or "-",
        str(len(runs)),
        spread(seconds.values(), 2),
    )


def _signed(values):
    text = spread(values, 3)
    return f"+{text}" if values and sum(values) > 0 else text


def rows(context):
    """The rows of a context, the head first."""
    return [HEAD, *(row(context, factors, runs) for factors, runs in context.groups())]


def read(folder):
    """(list of contexts, notes) of a folder. Raises UsageError where it is not there or has no finished run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"--results-dir {folder} is not a folder: run an experiment first, or name where they are")
    runs, notes = read_outcomes(folder)
    if not runs:
        more = f" ({notes[0]})" if notes else ""
        raise UsageError(
            f"no finished run of train.py in {folder}{more}: run an experiment first, or see --results-dir"
        )
    return contexts(runs), notes


def markdown(lines):
    """Rows of cells, the head first, as a Markdown table."""
    head, *rest = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rest))


def text(folder):
    """The tables of all contexts as Markdown, and the verdicts of the largest."""
    found, notes = read(folder)
    maps, more = read_maps(folder)
    main = main_context(found)
    parts = [f"### {context.title()}\n\n{markdown(rows(context))}" for context in found]
    lines = [("question", "claim", "verdict")] + [
        (v.question, v.claim, v.status) for v in verdicts(main, maps_of(main, maps))
    ]
    return "\n\n".join([*parts, f"### Verdicts\n\n{markdown(lines)}", *notes, *more])


def main_context(found) -> Context | None:
    """The context that verdicts are about: the one with most runs."""
    return found[0] if found else None
