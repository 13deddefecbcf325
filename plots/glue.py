"""Figures and table of lora_glue_fl.

    python plots/glue.py --data-dir out_fedavg --out-dir results/plots          # all that the runs allow
    python plots/glue.py metric error --data-dir lora_glue_fl/results/small.jsonl --tasks rte
    python plots/tables.py lora_glue_fl --data-dir out_fedavg --against svd

    metric     metric.png: each task's headline metric on its validation examples against rounds
    error      aggregation error of what is served against rounds (error_rounds.png), clients (error_clients.png), rank
               (error_rank.png), the latter two means over a run's rounds:

                   ||served - mean(BA)|| / ||mean(BA)||, mean(BA) = sum_k p_k s_k B_k A_k, in percent, over all layers

               Rules whose error stays below 0.1 % everywhere (what rounding leaves) share one line.
    bytes      the metric against what has been sent, all clients and rounds so far, in 10^6 bytes: by the clients
               (bytes_up.png); both ways (bytes_both.png): stack and residual send the base model's update down
    clients    clients.png, after the last round: every client of every seed as a dot, their mean as a bar, the global
               model as a marker; clients_rounds.png: the global model minus the mean of its clients, in points

A panel per task and federation (clients and how the examples were dealt to them), a line per aggregation rule: the mean
over seeds, its band or bar one standard deviation each way; central training is a horizontal line at its last metric.
Correlations are shown times 100. Figures of one model and adapter size: a further group has a figure of its own.
"""

from dataclasses import replace

import numpy as np

from common.cli import run_main
from common.curves import GREY, number
from plots.glue_runs import FIGURE, STUDY, TABLE, add_tasks, figures_of, headline, metric_label, of_tasks, order
from plots.seeds import label, lines_of
from plots.style import (
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
    plain_ticks,
    reference_lines,
    sideways,
)


def panelled(title, draw_panel, spread="bands", height=2.9, note=lambda panels: ""):
    """A draw of a figure with draw_panel(axis, panel, looks, panels) for each panel; note: a line of the caption."""

    def draw(setting, panels, args):
        figure, axes = axes_of(panels, height, 1.6, [(p.setting["task"], p.title.partition(", ")[2]) for p in panels])
        looks = looks_of(all_curves(panels))
        for axis, panel in zip(axes, panels, strict=True):
            draw_panel(axis, panel, looks, panels)
        also = ("rounds", "local_epochs", "learning_rate")  # in the caption where all panels agree
        values = {key: {panel.setting.get(key) for panel in panels} for key in also}
        shared = setting | {key: value for key, (value, *more) in values.items() if not more}
        return finish(figure, axes, title, shared, (*FIGURE, *also), panels, spread, [note(panels)])

    return draw


def central_lines(axis, panel):
    """A horizontal line at the last metric of each central curve; that of all weights is black."""
    dashes = {"central": [(0, (6, 2)), (0, (2, 2)), (0, (9, 2, 2, 2))], "full": [(0, (1, 3)), (0, (1, 1))]}
    looks = {}
    for curve in panel.references:
        color = "black" if curve.kind == "full" else GREY
        looks[curve.label] = {"color": color, "linestyle": dashes[curve.kind][0]}
        dashes[curve.kind] = dashes[curve.kind][1:] + dashes[curve.kind][:1]
    reference_lines(axis, panel.references, headline(panel.setting), 100, looks=looks)


# ---- metric against rounds and bytes


def with_metric(runs, notes):
    """Figures of the panels in which a curve has the metric after two rounds or more."""

    def rounds(panel):
        evaluated = [curve.evaluated(headline(panel.setting)) for curve in panel.curves]
        return max(np.isfinite(values.mean(axis=0)[at > 0]).sum() for at, values in evaluated)

    chosen = [(s, [panel for panel in panels if rounds(panel) > 1]) for s, panels in figures_of(runs, notes)]
    return [(setting, panels) for setting, panels in chosen if panels]


def draw_metric(axis, panel, looks, _):
    central_lines(axis, panel)
    draw_rounds(axis, panel.curves, looks, headline(panel.setting), 100)
    axis.set_ylabel(metric_label(headline(panel.setting)))


def with_bytes(name):
    """A select of the runs that counted these bytes; lines get `bytes_both`. Nothing is sent before round 1."""

    def both(run):
        rows = [row | {"bytes_both": number(row.get("bytes_up")) + number(row.get("bytes_down"))} for row in run.rows]
        return replace(run, rows=[row for row in rows if row.get("round") or run.central])

    def select(runs, notes):
        runs = [both(run) for run in runs]
        return with_metric([r for r in runs if r.central or np.isfinite(number(r.rows[-1].get(name)))], notes)

    return select


def draw_bytes(name, x_label):
    """Against these bytes; logarithmic where two rules' totals differ by more than a factor of five."""

    def draw_panel(axis, panel, looks, _):
        central_lines(axis, panel)
        draw_rounds(axis, panel.curves, looks, headline(panel.setting), 100, name, 1e-6)
        totals = [run.rows[-1][name] for curve in panel.curves for run in curve.runs]
        if max(totals) > 5 * min(totals) > 0:
            axis.autoscale(axis="x")
            axis.set_xscale("log")
            plain_ticks(axis.xaxis, *axis.get_xlim(), most=6)
        axis.set_xlabel(x_label)
        axis.set_ylabel(metric_label(headline(panel.setting)))

    return panelled("Validation metric against bytes sent, all clients", draw_panel)


# ---- the error of what is served

ERROR = "aggregation_error"
EXACT = 1e-3


def with_error(*axis):
    """A select of the runs that have the error; with an axis, of the rules at two places of it or more."""

    def select(runs, notes):
        chosen = []
        for setting, panels in figures_of([run for run in runs if any(ERROR in row for row in run.rows)], notes, axis):
            for panel in panels if axis else ():
                panel.curves = [curve for line in lines_of(panel.curves) if len(line) > 1 for curve in line]
                label(panel.curves)
            if panels := [panel for panel in panels if panel.curves]:
                chosen.append((setting, panels))
        return chosen

    return select


def exact_rules(panels):
    """{label: largest error} of the rules whose error is below EXACT in every panel, round and seed."""
    largest = {}
    for curve in all_curves(panels):
        # a value that is not finite is not exact
        errors = np.nan_to_num(curve.evaluated(ERROR)[1], nan=np.inf)
        largest[curve.label] = max(largest.get(curve.label, 0.0), errors.max(initial=0.0))
    return {name: error for name, error in largest.items() if error < EXACT}


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


def draw_error_along(x_label, tick_of):
    """The mean error of a run's rounds against a setting. tick_of(place, panels) -> the text of a tick."""

    def draw_panel(axis, panel, _, panels):
        exact = exact_rules(panels)
        draw_along(
            axis,
            panel.curves,
            lambda curve: 100 * curve.mean_over_rounds(ERROR),
            lambda curve: tick_of(curve.place, panels),
            lambda curve: [order(*item) for item in curve.place.items()],
            exact,
        )
        zero_line(axis, panel, exact)
        axis.set_xlabel(x_label)
        axis.set_ylabel("Aggregation error (%), mean of rounds")

    return panelled("Error of what is served", draw_panel, "bars", note=exact_note)


def rank_name(place, panels):
    """`4`, or `4 (alpha 8)` on two lines where alpha differs too."""
    alpha = place["lora_alpha"]
    several = len({curve.place["lora_alpha"] for curve in all_curves(panels)}) > 1
    return str(place["rank"]) + (f"\n(alpha {alpha:g})" if several and alpha is not None else "")


# ---- the clients' own models

GAIN = "global_minus_clients"


def with_gain(run):
    """The run with GAIN, the global headline metric minus the mean of the clients', in every line that has both."""
    rows, field = [], headline(run.setting)
    for row in run.rows:
        clients = row.get(f"client_{field}")
        if field in row and isinstance(clients, list) and clients:
            row = row | {GAIN: number(row[field]) - float(np.mean([number(value) for value in clients]))}
        rows.append(row)
    return replace(run, rows=rows)


def with_clients(runs, notes, lines=1):
    """Figures of the runs with the clients' metric beside the global one in so many lines."""
    runs = [with_gain(run) for run in runs]
    chosen = [run for run in runs if run.central or sum(GAIN in row for row in run.rows) >= lines]
    return (figures_of if lines == 1 else with_metric)(chosen, notes)


def draw_clients(axis, panel, looks, _):
    """At each place the clients of all seeds to the left, the global model to the right."""
    central_lines(axis, panel)
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
    axis.set_ylabel(metric_label(field))


def draw_gains(axis, panel, looks, _):
    axis.axhline(0, color=GREY, linewidth=1, zorder=1)
    draw_rounds(axis, panel.curves, looks, GAIN, 100)
    axis.set_ylabel(f"Global - clients (points)\n{metric_label(headline(panel.setting)).partition(' (')[0]}")


# ---- all of them

LOGGED = "runs of fedavg_rounds.py with"
EACH = f"{LOGGED} --eval-each-round"
SENT = f"{EACH}, with bytes_up and bytes_down in metrics.jsonl"
WITH_ERROR = f"{LOGGED} {ERROR} in metrics.jsonl"
LAST, OVER = "Clients' own models and the global one, last round", "Global model minus the mean of its clients"
BY_CLIENTS = draw_error_along("Clients", lambda place, _: str(place["clients"]))
BY_RANK = draw_error_along("Rank r of the adapters", rank_name)
FIGURES = {
    "metric": [Figure("metric", with_metric, panelled("Validation metric", draw_metric), EACH)],
    "error": [
        Figure(
            "error_rounds",
            with_error(),
            panelled("Error of what is served", draw_error, note=exact_note),
            WITH_ERROR,
        ),
        Figure("error_clients", with_error("clients"), BY_CLIENTS, f"{WITH_ERROR} and two numbers of clients"),
        Figure("error_rank", with_error("rank", "lora_alpha"), BY_RANK, f"{WITH_ERROR} and two values of --lora-r"),
    ],
    "bytes": [
        Figure("bytes_up", with_bytes("bytes_up"), draw_bytes("bytes_up", "Sent by clients (MB)"), SENT),
        Figure("bytes_both", with_bytes("bytes_both"), draw_bytes("bytes_both", "Sent up and down (MB)"), SENT),
    ],
    "clients": [
        Figure("clients", with_clients, panelled(LAST, draw_clients, "bars", 3.0), f"{LOGGED} --eval-clients"),
        Figure(
            "clients_rounds",
            lambda runs, notes: with_clients(runs, notes, lines=2),
            panelled(OVER, draw_gains),
            f"{EACH} and --eval-clients",
        ),
    ],
}


__all__ = ["FIGURES", "STUDY", "TABLE"]


def build_parser():
    return figure_parser(STUDY, FIGURES, add_tasks)


def main(args):
    study = replace(STUDY, prepared=lambda runs, notes: of_tasks(runs, args.tasks))
    draw_figures(study, FIGURES, args, FIGURE)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
