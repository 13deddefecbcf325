"""Figures of lora_glue_fl; its table: plots/glue_runs.py.

    python plots/glue.py --data-dir out_fedavg --out-dir results/plots          # all that the runs allow
    python plots/glue.py metric error --data-dir lora_glue_fl/results/small.jsonl --tasks rte

    metric     metric.png: each task's headline metric on its validation examples against rounds, from before training
               on (round 0, where it is logged); lines at the share of the most frequent label, where the metric is
               accuracy and run.json says it, and at the last metric of runs that train the head only
    losses     losses.png: validation loss after the last round minus naive's, seed by seed: mean, 95 % interval of a
               paired t test, a dot a seed
    error      aggregation error of what is served against rounds (error_rounds.png), clients (error_clients.png), rank
               (error_rank.png), the latter two means over a run's rounds:

                   ||served - mean(BA)|| / ||mean(BA)||, mean(BA) = sum_k p_k s_k B_k A_k, in percent, over all layers

               Rules whose error stays below 0.1 % everywhere (what rounding leaves) share one line; a panel of them
               alone is not drawn.
    bytes      the metric against what has been sent, all clients and rounds so far, in 10^6 bytes: by the clients
               (bytes_up.png); both ways (bytes_both.png): stack and residual send the base model's update down
    clients    clients.png, after the last round: every client of every seed as a dot, their mean as a bar, the global
               model as a marker; clients_rounds.png: the global model minus the mean of its clients, in points
    replay     loss against the error of runs with --replay (plots/glue_replay.py)

A panel per task and federation (clients and how the examples were dealt to them), a line per aggregation rule: the mean
over seeds, its band or bar one standard deviation each way; central training is a horizontal line at its last metric.
Correlations are shown times 100. Figures of one model and adapter size: a further group has a figure of its own.
"""

import re
from dataclasses import replace
from itertools import cycle

import numpy as np

from common.cli import run_main
from common.curves import GREY, number, plain_ticks
from plots import glue_replay
from plots.glue_runs import (
    ERROR,
    EXACT,
    GAIN,
    METRICS,
    SENT_BOTH,
    SENT_UP,
    STUDY,
    TABLE,
    TASKS,
    VALIDATION,
    add_tasks,
    base_of,
    figures_of,
    headline,
    of_tasks,
    order,
    prepared,
)
from plots.runs import LeftOut, describe, shared_setting
from plots.seeds import interval, label, lines_of, paired
from plots.style import (
    BANDS,
    BARS,
    Figure,
    all_curves,
    axes_of,
    bars,
    draw_along,
    draw_figures,
    draw_rounds,
    figure_parser,
    finish,
    looks_of,
    name_places,
    reference_lines,
    sideways,
)

__all__ = ["FIGURES", "STUDY", "TABLE"]

# ---- the panels of a figure


def having(field=None, lines=1, over_rounds=False, axis=(), control=False):
    """A select of the runs with a field in so many lines of metrics.jsonl (None: of all) and of the central ones.

    over_rounds: of panels in which a curve has the headline metric after two rounds or more; axis: settings on the
    panels' axis, of the rules at two places of it or more; control: runs that train the head only are references.
    """

    def rounds(panel):
        evaluated = [curve.evaluated(headline(panel.setting)) for curve in panel.curves]
        return max(np.isfinite(values.mean(axis=0)[at > 0]).sum() for at, values in evaluated)

    def select(runs, notes):
        there = [run for run in runs if run.central or not field or sum(field in row for row in run.rows) >= lines]
        figures = figures_of(there, notes, axis)
        for panel in (panel for _, panels in figures for panel in panels if axis):
            panel.curves = [curve for line in lines_of(panel.curves) if len(line) > 1 for curve in line]
            label(panel.curves)
        if control:
            figures = [(setting, list(map(with_control, panels))) for setting, panels in figures]
        if field == ERROR:
            figures = [(setting, inexact(setting, panels, notes)) for setting, panels in figures]
        figures = [(s, [p for p in panels if (rounds(p) > 1 if over_rounds else p.curves)]) for s, panels in figures]
        return [(setting, panels) for setting, panels in figures if panels]

    return select


def panelled(title, draw_panel, spread=BANDS, height=2.9, note=lambda panels: "", **more):
    """A draw with draw_panel(axis, panel, looks, panels, **more) for each panel; note: a line of the caption."""

    def draw(setting, panels, args):
        figure, axes = axes_of(panels, height, 1.6, [(p.setting["task"], p.title.partition(", ")[2]) for p in panels])
        looks = looks_of(all_curves(panels))
        for axis, panel in zip(axes, panels, strict=True):
            draw_panel(axis, panel, looks, panels, **more)
        about, keys = shared_setting(setting, all_curves(panels)), (*setting, "rounds", "local_epochs", "learning_rate")
        return finish(figure, axes, title, about, keys, panels, spread, [note(panels)])

    return draw


# ---- metric against rounds and bytes


def with_control(panel):
    """The panel with its runs that train the head only among its references, where other rules are in it."""
    rules, heads = ([curve for curve in panel.curves if (curve.kind == "head") == head] for head in (False, True))
    return replace(panel, curves=rules, references=[*panel.references, *heads]) if rules else panel


def last_lines(axis, panel):
    """A horizontal line at the last metric of each reference; that of all weights is black, the head's dashes short."""
    dashes = {
        "central": cycle([(8, 2), (8, 2, 2, 2), (8, 2, 2, 2, 2, 2)]),
        "full": cycle([(1, 3), (1, 1)]),
        "head": cycle([(3, 2), (3, 4)]),
    }
    looks = {}
    for curve in panel.references:
        color = "black" if curve.kind == "full" else GREY
        looks[curve.label] = {"color": color, "linestyle": (0, next(dashes[curve.kind]))}
    reference_lines(axis, panel.references, headline(panel.setting), 100, looks=looks)


def majority_line(axis, panel):
    """A thin line at the accuracy of the most frequent label, where a run of the panel says how frequent labels are."""
    facts = [run.facts.get("label_counts") or {} for curve in (*panel.references, *panel.curves) for run in curve.runs]
    counts = next((some[split] for some in facts for split in VALIDATION if split in some), None)
    if counts and headline(panel.setting) == "val_accuracy":
        share, task = 100 * max(counts) / sum(counts), panel.setting["task"]
        words = f"Majority label, {TASKS.get(task, task)} ({share:.1f} %)"
        axis.axhline(share, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1, label=words)


def draw_metric(axis, panel, looks, _, x="round", x_factor=1.0):
    last_lines(axis, panel)
    majority_line(axis, panel)
    draw_rounds(axis, panel.curves, looks, headline(panel.setting), 100, x, x_factor)
    axis.set_ylabel(METRICS[headline(panel.setting)])


def draw_bytes(axis, panel, looks, panels, field, x_label):
    """Against these bytes; logarithmic where two rules' totals differ by more than a factor of five."""
    draw_metric(axis, panel, looks, panels, field, 1e-6)
    totals = [total for curve in panel.curves for total in curve.results(field)]
    if max(totals) > 5 * min(totals) > 0:
        axis.autoscale(axis="x")
        axis.set_xscale("log")
        plain_ticks(axis.xaxis, *axis.get_xlim(), most=6)
    axis.set_xlabel(x_label)


# ---- the loss against naive's


def apart_of_naive(panel):
    """{rule's curve: [S] validation loss minus naive's} of the last round, where two seeds or more have both."""
    naive = base_of(panel.curves, "naive")
    if naive is None:
        return {}
    every = {curve: paired(curve, naive, "val_loss") for curve in panel.curves if curve is not naive}
    return {curve: apart for curve, apart in every.items() if len(apart) > 1 and np.isfinite(apart).all()}


def with_naive(runs, notes):
    figures = [(s, [p for p in panels if apart_of_naive(p)]) for s, panels in figures_of(runs, notes)]
    return [(setting, panels) for setting, panels in figures if panels]


def draw_losses(axis, panel, looks, _):
    rows = apart_of_naive(panel)
    for i, (curve, apart) in enumerate(rows.items()):
        axis.plot(apart, i + 0.25 * sideways(len(apart)), ".", color=GREY, markersize=4, zorder=2, label="a seed")
        bar = np.abs(np.reshape(interval(apart), (2, 1)) - apart.mean())
        look = looks[curve.label] | {"linestyle": "", "capsize": 3, "markersize": 6, "zorder": 3}
        axis.errorbar(apart.mean(), i, xerr=bar, **look)
    axis.axvline(0, color=GREY, linewidth=1, zorder=1)
    axis.set_yticks(range(len(rows)), [re.sub(r" \(.*?\)", "", curve.label) for curve in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlabel("Validation loss minus naive's (nats)")


# ---- the error of what is served


def exact_rules(panels):
    """{label: largest error} of the rules whose error is below EXACT in every panel, round and seed."""
    largest = {}
    for curve in all_curves(panels):
        # a value that is not finite is not exact
        errors = np.nan_to_num(curve.evaluated(ERROR)[1], nan=np.inf)
        largest[curve.label] = max(largest.get(curve.label, 0.0), errors.max(initial=0.0))
    return {name: error for name, error in largest.items() if error < EXACT}


def inexact(setting, panels, notes):
    """The panels with a rule that is not exact in it; a note names the others."""
    chosen = [panel for panel in panels if {curve.label for curve in panel.curves} - exact_rules([panel]).keys()]
    why = f"the error of its rules is below {100 * EXACT:g} %"
    notes += [LeftOut(panel.title, why, setting=setting) for panel in panels if panel not in chosen and panel.curves]
    return chosen


def exact_note(panels):
    exact = exact_rules(panels)
    return f"exact (error at most {100 * max(exact.values()):.1g} %): {', '.join(exact)}" if exact else ""


def zero_line(axis, panel, exact):
    """A line at 0 that stands for the exact rules; the axis begins a little below it."""
    if any(curve.label in exact for curve in panel.curves):
        axis.axhline(0, color=GREY, linewidth=2.2, label="Exact rules, see above", zorder=1)
    axis.autoscale_view()
    top = max(axis.get_ylim()[1], 100 * EXACT)
    axis.set_ylim(-0.04 * top, top)


def draw_error(axis, panel, looks, panels):
    exact = exact_rules(panels)
    draw_rounds(axis, [curve for curve in panel.curves if curve.label not in exact], looks, ERROR, 100)
    zero_line(axis, panel, exact)
    axis.set_ylabel("Aggregation error (%)")


def draw_error_along(axis, panel, _, panels, x_label):
    """The mean error of a run's rounds against a setting."""
    exact = exact_rules(panels)
    draw_along(
        axis,
        panel.curves,
        lambda curve: 100 * curve.mean_over_rounds(ERROR),
        lambda curve: place_name(curve.place, panels),
        lambda curve: [order(*item) for item in curve.place.items()],
        exact,
    )
    zero_line(axis, panel, exact)
    axis.set_xlabel(x_label)
    axis.set_ylabel("Aggregation error (%), mean of rounds")


def place_name(place, panels):
    """`4`, or `4 (alpha 8)` on two lines where alpha differs too."""
    first, *rest = place
    several = [key for key in rest if len({curve.place[key] for curve in all_curves(panels)}) > 1]
    more = describe(STUDY, place, several) if several else ""
    return f"{place[first]}\n({more})" if more else str(place[first])


# ---- the clients' own models


def draw_clients(axis, panel, looks, _):
    """At each place the clients of all seeds to the left, the global model to the right."""
    last_lines(axis, panel)
    field = headline(panel.setting)
    for i, curve in enumerate(panel.curves):
        lines = [[row for row in run.rows if GAIN in row][-1] for run in curve.runs]
        clients = 100 * np.array([number(value) for line in lines for value in line[f"client_{field}"]])
        x = i - 0.2 + 0.22 * sideways(len(clients))
        axis.plot(x, clients, ".", color=GREY, markersize=4, zorder=2, label="a client's own model")
        mean = {"color": "black", "linewidth": 1.6, "zorder": 3, "label": "mean of the clients"}
        axis.hlines(clients.mean(), i - 0.36, i - 0.04, **mean)
        look = looks[curve.label] | {"linestyle": "", "capsize": 3, "markersize": 7, "zorder": 4}
        served = 100 * np.array([number(line[field]) for line in lines])
        bars(axis, [i + 0.2], [served], always=False, label=f"{curve.label}, global", **look)
    # a star for a variant, whose marker the legend names
    name_places(axis, [c.name.partition(" (")[0] + "*" * (c.label != c.name) for c in panel.curves])
    axis.set_ylabel(METRICS[field])


def draw_gains(axis, panel, looks, _):
    axis.axhline(0, color=GREY, linewidth=1, zorder=1)
    draw_rounds(axis, panel.curves, looks, GAIN, 100)
    axis.set_ylabel(f"Global - clients (points)\n{METRICS[headline(panel.setting)].partition(' (')[0]}")


# ---- the figures

LOGGED = "runs of fedavg_rounds.py with"
EACH = f"{LOGGED} --eval-each-round"
SENT = f"{EACH}, with bytes_up and bytes_down in metrics.jsonl"
WITH_ERROR = f"{LOGGED} {ERROR} above {100 * EXACT:g} % in metrics.jsonl"
ERRORS, METRICS_SENT = "Error of what is served", "Validation metric against bytes sent, all clients"
BY_CLIENTS = panelled(ERRORS, draw_error_along, BARS, note=exact_note, x_label="Clients")
BY_RANK = panelled(ERRORS, draw_error_along, BARS, note=exact_note, x_label="Rank r of the adapters")
INTERVALS = "bars: 95 % interval of a paired t test"
LOSSES = panelled("Validation loss against naive's, last round", draw_losses, INTERVALS, 3.2)
UP = panelled(METRICS_SENT, draw_bytes, field=SENT_UP, x_label="Sent by clients (MB)")
BOTH = panelled(METRICS_SENT, draw_bytes, field=SENT_BOTH, x_label="Sent up and down (MB)")
LAST = panelled("Clients' own models and the global one, last round", draw_clients, BARS, 3.0)
GAINS = panelled("Global model minus the mean of its clients", draw_gains)
NUMBERS, RANKS = having(ERROR, axis=("clients",)), having(ERROR, axis=("rank", "lora_alpha"))
FIGURES = {
    "metric": [
        Figure("metric", having(over_rounds=True, control=True), panelled("Validation metric", draw_metric), EACH)
    ],
    "losses": [Figure("losses", with_naive, LOSSES, f"{LOGGED} --aggregate naive and another rule, two seeds of both")],
    "error": [
        Figure("error_rounds", having(ERROR), panelled(ERRORS, draw_error, note=exact_note), WITH_ERROR),
        Figure("error_clients", NUMBERS, BY_CLIENTS, f"{WITH_ERROR} and two numbers of clients"),
        Figure("error_rank", RANKS, BY_RANK, f"{WITH_ERROR} and two values of --lora-r"),
    ],
    "bytes": [
        Figure("bytes_up", having(SENT_UP, over_rounds=True, control=True), UP, SENT),
        Figure("bytes_both", having(SENT_BOTH, over_rounds=True, control=True), BOTH, SENT),
    ],
    "clients": [
        Figure("clients", having(GAIN), LAST, f"{LOGGED} --eval-clients"),
        Figure("clients_rounds", having(GAIN, 2, over_rounds=True), GAINS, f"{EACH} and --eval-clients"),
    ],
    "replay": glue_replay.FIGURES,
}


def build_parser():
    return figure_parser(STUDY, FIGURES, add_tasks)


def main(args):
    study = replace(STUDY, prepared=lambda runs, notes: of_tasks(prepared(runs, notes), args.tasks))
    draw_figures(study, FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
