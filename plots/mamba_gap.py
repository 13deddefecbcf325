"""Figures of mamba_fl's question: what is left of the federated gap when every row has its own rate.

    python plots/mamba_gap.py --data-dir mamba_fl/results/gap.jsonl mamba_fl/results/gap_tuning.jsonl

    gap         5_gap.png: FedAvg's test perplexity over central training's against the local updates (LU), a line for
                each form of --client-state: left at the rate that is best for central training, right each at its own
    frontier    6_frontier.png: test perplexity against the bytes that a client sends and receives
    rates       7_rates.png: validation perplexity against the rate, on the seed of --tune

The runs of --tune are those of a seed that has several rates of one row; they are in no mean and no interval.
"""

from collections import Counter, defaultdict

import numpy as np
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from common.cli import run_main
from common.curves import log_axis, new_figure, number, set_title
from plots import style
from plots.mamba import STUDY
from plots.runs import describe
from plots.seeds import interval
from plots.style import CENTRAL, Figure, each_group, look

FORMS = {  # --client-state: how its line is called
    "keep": "each client its own (keep)",
    "average": "averaged",
    "pooled": "of the pooled batch (pooled)",
    "reset": "none (reset)",
    "fedadamw": "FedAdamW",
}
CENTRALLY = ("central", 0)
VARIED = {"client_state", "local_updates", "lr", "rounds", "alpha_global", "val_freq"}


def cells(runs):
    """{(form, LU): {rate: {seed: run}}} of FedAvg, CENTRALLY of central training: what else differs, most have alike.

    As many tokens as most of FedAvg's runs have.
    """
    plain = [run for run in runs if run.central or run.kind == "fed_avg"]

    def rest(run):
        return run.central, frozenset((k, str(v)) for k, v in run.variant if k not in VARIED), run.result("tokens")

    federated = Counter(rest(run) for run in plain if not run.central)
    if not federated:
        return {}
    most = federated.most_common(1)[0][0]
    central = Counter(rest(run) for run in plain if run.central and run.result("tokens") == most[2])
    chosen = {most, *(rest for rest, _ in central.most_common(1))}
    found = defaultdict(lambda: defaultdict(dict))
    for run in plain:
        if rest(run) in chosen:
            place = CENTRALLY if run.central else (run.args["client_state"], run.args["local_updates"])
            found[place][run.args["lr"]][run.seed] = run
    return found if CENTRALLY in found else {}


def tuning_seeds(found):
    """The seeds that have several rates of one row."""
    counts = Counter((place, seed) for place, rates in found.items() for seeds in rates.values() for seed in seeds)
    return {seed for (_, seed), n in counts.items() if n > 1}


def measured(found):
    """{(form, LU): {seed: run}} of the seeds that no rate was tuned on."""
    tuned, kept = tuning_seeds(found), {}
    for place, rates in found.items():
        if seeds := {s: run for runs in rates.values() for s, run in runs.items() if s not in tuned}:
            kept[place] = seeds
    return kept


def tried(found):
    """{(form, LU): {rate: validation perplexity}} of the seed that rates were tuned on."""
    tuned = tuning_seeds(found)
    seed = min(tuned) if tuned else None
    every = {
        place: {lr: number(runs[seed].rows[-1]["val_ppl"]) for lr, runs in sorted(rates.items()) if seed in runs}
        for place, rates in found.items()
    }
    return {place: rates for place, rates in every.items() if rates}


def ratio(runs, central, name="test_ppl_last"):
    """(mean, low, high) of a result's ratio to central training's: the geometric mean over the seeds that both have,
    and the 95 % interval of a paired t test of its logarithm."""
    logs = np.array([np.log(run.result(name) / central[s].result(name)) for s, run in runs.items() if s in central])
    return tuple(np.exp([logs.mean(), *interval(logs)]))


# ---- drawing


def lines(places):
    """(form, its LUs) of the forms that there are, in the order of FORMS."""
    for form in FORMS:
        if lus := sorted(lu for name, lu in places if name == form):
            yield form, lus


def own(form):
    return look(list(FORMS).index(form)) | {"markersize": 6}


def lu_axis(axis, places, label="Local updates a round (LU)"):
    lus = sorted({lu for form, lu in places if form in FORMS})
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(lus))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(label)


def draw_gap(setting, found, args):
    kept, rates = measured(found), tried(found)
    figure, axes = new_figure(columns=2, width=8.4, height=3.9, sharey=True)
    left, right = axes[0]
    if central := {lr: ppl for lr, ppl in rates[CENTRALLY].items() if np.isfinite(ppl)}:
        best = min(central, key=central.get)
        for form, lus in lines(rates):
            at = [lu for lu in lus if best in rates[form, lu]]
            left.plot(at, [rates[form, lu][best] / central[best] for lu in at], **own(form))
        left.set_title(f"All at central's best rate, {best:g} (one seed, validation)", fontsize=9.5)
    for form, lus in lines(kept):
        points = np.array([ratio(kept[form, lu], kept[CENTRALLY]) for lu in lus])  # [LU, 3]
        bars = np.abs(points[:, 1:] - points[:, :1]).T
        right.errorbar(lus, points[:, 0], bars, capsize=3, label=FORMS[form], **own(form))
    counts = sorted({len(seeds) for seeds in kept.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    right.set_title(f"Each at its own best rate ({seeds} seeds, bars: 95 % interval)", fontsize=9.5)
    for axis in (left, right):
        axis.axhline(1, color="black", linewidth=0.9, linestyle=(0, (6, 2)))
        lu_axis(axis, kept)
        axis.tick_params(labelleft=True)
    left.set_ylabel("Perplexity over central training's")
    right.legend(title="AdamW's moments", title_fontsize=9)
    titled(figure, "FedAvg against central training on as many tokens", setting)
    return figure


def draw_frontier(setting, found, args):
    kept = measured(found)
    figure, axes = new_figure(width=5.6, height=4.2)
    axis, everything = axes[0, 0], []
    for form, lus in lines(kept):
        points = []
        for lu in lus:
            ppl = [run.result("test_ppl_last") for run in kept[form, lu].values()]
            points.append((sent(next(iter(kept[form, lu].values()))), np.mean(ppl)))
            axis.annotate(f"{lu}", points[-1], (3, 4), textcoords="offset points", fontsize=7.5)
        everything += points
        axis.plot(*zip(*points, strict=True), label=FORMS[form], **own(form))
    central = np.mean([run.result("test_ppl_last") for run in kept[CENTRALLY].values()])
    axis.axhline(central, label="central training", color=CENTRAL["color"], linestyle=(0, (6, 2)))
    axis.set_xscale("log")
    log_axis(axis, min(central, *(y for _, y in everything)), max(y for _, y in everything))
    axis.set_xlabel("Sent and received by a client (MB); numbers: LU")
    axis.set_ylabel("Test perplexity, mean over seeds")
    axis.legend(title="AdamW's moments", title_fontsize=9)
    titled(figure, "Perplexity against bytes", setting)
    return figure


def sent(run):
    """Megabytes that a client sends and receives in a run."""
    last = run.rows[-1]
    return (last["bytes_up"] + last["bytes_down"]) / run.args["num_clients"] / 1e6


def draw_rates(setting, found, args):
    rates = tried(found)
    lus = sorted({lu for form, lu in rates if form in FORMS})
    figure, axes = new_figure(columns=len(lus), width=2.6 * len(lus) + 1, height=3.6, sharey=True)
    for axis, lu in zip(axes[0], lus, strict=True):
        named = {"central": rates[CENTRALLY]} | {form: rates[form, lu] for form in FORMS if (form, lu) in rates}
        for form, points in named.items():
            finite = {lr: ppl for lr, ppl in points.items() if np.isfinite(ppl)}
            look_of = CENTRAL | {"linestyle": "-"} if form == "central" else own(form)
            axis.plot(list(finite), list(finite.values()), label=FORMS.get(form, "central training"), **look_of)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{1e3 * x:g}")
        axis.set_yscale("log")
        axis.set_title(f"LU {lu}", fontsize=9.5)
        axis.set_xlabel("AdamW's rate (1e-3)")
    axes[0, 0].set_ylabel("Validation perplexity")
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    titled(figure, "Perplexity against the rate, one seed", setting)
    return figure


def titled(figure, title, setting):
    set_title(figure, f"{title}\n{describe(STUDY, setting)}")


NEEDS = "runs of fed_avg.py and central.py with as many tokens, each with a seed that --tune did not use"


def drawn(needs_tuning, needs_seeds):
    """What `each_group` chooses: the cells of a group, where they have what the figure needs."""

    def choose(runs, notes):
        found = cells(runs)
        seeds = measured(found) if found else {}
        if not found or (needs_tuning and not tuning_seeds(found)):
            return None
        return found if not needs_seeds or (CENTRALLY in seeds and len(seeds) > 2) else None

    return each_group(choose)


FIGURES = {
    "gap": [Figure("5_gap", drawn(True, True), draw_gap, f"{NEEDS}, and runs of --tune")],
    "frontier": [Figure("6_frontier", drawn(False, True), draw_frontier, NEEDS)],
    "rates": [Figure("7_rates", drawn(True, False), draw_rates, "runs of run_study.py --tune")],
}


def build_parser():
    return style.figure_parser(STUDY, FIGURES)


def main(args):
    style.draw_figures(STUDY, FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
