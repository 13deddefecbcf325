"""Figures of mamba_fl's question: what is left of the federated gap when every row has its own rate.

    python plots/mamba_gap.py --data-dir mamba_fl/results/gap.jsonl mamba_fl/results/tuning/gap.jsonl

    gap         5_gap.png: FedAvg's test perplexity over central training's against the local updates (LU), a line for
                each form of --client-state: left all at central training's lowest rate, right each at its best
    frontier    6_frontier.png: test perplexity against the bytes that a client sends and receives
    rates       7_rates.png: validation perplexity against the rate, on the seed of --tune

The runs of --tune are in no mean and no interval; x: not finite.
"""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np

from common.cli import run_main
from common.curves import log_axis, new_figure, number, set_title
from plots import style
from plots.mamba import STUDY, central_of
from plots.runs import describe
from plots.seeds import curves_of, ratio
from plots.style import CENTRAL, Figure, each_group, look

FORMS = {  # --client-state: how its line is called
    "keep": "each client its own (keep)",
    "average": "averaged",
    "pooled": "of the pooled batch (pooled)",
    "reset": "none (reset)",
    "fedadamw": "FedAdamW",
}
CENTRALLY = ("central", 0)
VARIED = {"client_state", "alpha_global", "local_updates", "lr", "rounds"}


def cells(runs, notes=None):
    """{(form, LU): {rate: its Curve}} of FedAvg, CENTRALLY of central training: of those alike in all else, most.

    Of two curves at one rate the one of more seeds.
    """
    curves = curves_of(runs, notes=notes)

    def rest(curve):
        return frozenset((k, v) for k, v in curve.args.items() if k not in VARIED), curve.results("tokens").mean()

    federated = [curve for curve in curves if curve.kind == "fed_avg"]
    if not federated:
        return {}
    most = Counter(map(rest, federated)).most_common(1)[0][0]
    federated = [curve for curve in federated if rest(curve) == most]
    if (central := central_of(federated[0], curves)) is None:
        return {}
    found = defaultdict(dict)
    for curve in federated + [curve for curve in curves if curve.central and rest(curve) == rest(central)]:
        args = curve.runs[0].args
        rates = found[CENTRALLY if curve.central else (args["client_state"], args["local_updates"])]
        if len(curve.runs) > len(getattr(rates.get(args["lr"]), "runs", ())):
            rates[args["lr"]] = curve
    return found


def measured(runs, notes=None):
    """{(form, LU): Curve}: each at the rate that has most seeds, of these the best on validation."""

    def order(curve):
        return -len(curve.runs), curve.results("final_val_ppl").mean()

    found = cells([run for run in runs if not run.tuning], notes)
    return {place: min(rates.values(), key=order) for place, rates in found.items()}


def tried(runs, notes=None):
    """{(form, LU): {rate: validation perplexity, nan: not finite}} of the runs of --tune."""
    found = cells([run for run in runs if run.tuning], notes)
    return {
        place: {lr: number(curve.runs[0].rows[-1]["val_ppl"]) for lr, curve in sorted(rates.items())}
        for place, rates in found.items()
    }


# ---- drawing


def lines(places):
    """(form, its LUs) of the forms that there are, in the order of FORMS."""
    for form in FORMS:
        if lus := sorted(lu for name, lu in places if name == form):
            yield form, lus


def own(form):
    return look(list(FORMS).index(form)) | {"markersize": 6}


def lu_axis(axis, places):
    lus = sorted({lu for form, lu in places if form in FORMS})
    axis.set_xscale("log", base=2)
    axis.set_xticks(lus, list(map(str, lus)))
    axis.minorticks_off()
    axis.set_xlabel("Local updates a round (LU)")


def draw_gap(setting, found, args):
    kept, rates = found
    figure, axes = new_figure(columns=2, width=6.9, height=3.5, sharey=True)
    left, right = axes[0]
    common = min(rates[CENTRALLY])
    for form, lus in lines(rates):
        at = [lu for lu in lus if common in rates[form, lu]]
        left.plot(at, [rates[form, lu][common] / rates[CENTRALLY][common] for lu in at], **own(form))
    left.set_title(f"All at one rate, {common:g} (validation)", fontsize=9)
    for form, lus in lines(kept):
        points = np.array([ratio(kept[form, lu], kept[CENTRALLY], "test_ppl_last") for lu in lus])  # [LU, 3]
        bars = np.abs(points[:, 1:] - points[:, :1]).T
        right.errorbar(lus, points[:, 0], bars, capsize=3, label=FORMS[form], **own(form))
    counts = sorted({len(curve.runs) for curve in kept.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    right.set_title(f"Each at its best rate ({seeds} seeds, 95 %)", fontsize=9)
    for axis in (left, right):
        axis.axhline(1, color="black", linewidth=0.9, linestyle=(0, (6, 2)))
        lu_axis(axis, kept)
        axis.tick_params(labelleft=True)
    left.set_ylabel("Perplexity over central training's")
    handles, labels = right.get_legend_handles_labels()
    left.legend(handles, labels, loc="upper left", title="AdamW's moments", title_fontsize=8, fontsize=8)
    titled(figure, "FedAvg against central training on as many tokens", setting)
    return figure


def draw_frontier(setting, found, args):
    kept, _ = found
    figure, axes = new_figure(width=5.6, height=4.2)
    axis, everything = axes[0, 0], []
    for form, lus in lines(kept):
        points = []
        for lu in lus:
            points.append((sent(kept[form, lu].runs[0]), kept[form, lu].results("test_ppl_last").mean()))
            axis.annotate(f"{lu}", points[-1], (3, 4), textcoords="offset points", fontsize=7.5)
        everything += points
        axis.plot(*zip(*points, strict=True), label=FORMS[form], **own(form))
    central = kept[CENTRALLY].results("test_ppl_last").mean()
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
    _, rates = found
    lus = sorted({lu for form, lu in rates if form in FORMS})
    figure, axes = new_figure(columns=len(lus), width=2.6 * len(lus) + 1, height=3.6, sharey=True)
    for axis, lu in zip(axes[0], lus, strict=True):
        named = {"central": rates[CENTRALLY]} | {form: rates[form, lu] for form in FORMS if (form, lu) in rates}
        for form, points in named.items():
            finite = {lr: ppl for lr, ppl in points.items() if np.isfinite(ppl)}
            look_of = CENTRAL | {"linestyle": "-"} if form == "central" else own(form)
            axis.plot(list(finite), list(finite.values()), label=FORMS.get(form, "central training"), **look_of)
            diverged = [lr for lr in points if lr not in finite]
            axis.plot(
                diverged, [0.97] * len(diverged), "x", color=look_of["color"], transform=axis.get_xaxis_transform()
            )
        axis.set_xscale("log", base=2)
        ticks = sorted({lr for points in named.values() for lr in points})[::2]
        axis.set_xticks(ticks, [f"{1e3 * lr:g}" for lr in ticks])
        axis.minorticks_off()
        axis.set_title(f"LU {lu}", fontsize=9.5)
        axis.set_xlabel("AdamW's rate (1e-3)")
    every = [ppl for points in rates.values() for ppl in points.values() if np.isfinite(ppl)]
    log_axis(axes[0, 0], min(every), max(every))
    axes[0, 0].set_ylabel("Validation perplexity")
    handles = {label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    titled(figure, "Perplexity against the rate, one seed", setting)
    return figure


def titled(figure, title, setting):
    set_title(figure, f"{title}\n{describe(STUDY, setting)}")


NEEDS = "runs of fed_avg.py and central.py with as many tokens, each with a seed that --tune did not use"


def drawn(needs_tuning, needs_seeds):
    """What `each_group` chooses: (curves, rates tried) of a group, where both have what the figure needs."""

    def choose(runs, notes):
        kept, rates = measured(runs, notes), tried(runs)
        lacks = (needs_seeds and len(kept) < 3) or (needs_tuning and CENTRALLY not in rates)
        return None if lacks else (kept, rates)

    return each_group(choose)


FIGURES = {
    "gap": [Figure("5_gap", drawn(True, True), draw_gap, f"{NEEDS}, and runs of --tune")],
    "frontier": [Figure("6_frontier", drawn(False, True), draw_frontier, NEEDS)],
    "rates": [Figure("7_rates", drawn(True, False), draw_rates, "runs of run_study.py --tune, also of central.py")],
}


def build_parser():
    return style.figure_parser(STUDY, FIGURES)


def main(args):
    style.draw_figures(replace(STUDY, tunes=True), FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
