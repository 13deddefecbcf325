"""The clients' own models against the global one, before and after the aggregation of a round.

    python plots/glue_clients.py --data-dir out_fedavg --out-dir results/plots

    clients.png          after the last round: every client of every seed as a dot, the clients' mean as a bar, the
                         global model as a marker (mean over seeds, one standard deviation each way)
    clients_rounds.png   the global model minus the mean of its clients, in points, against rounds

Both on the task's whole validation examples, for runs with --eval-clients. Above its clients, the global model is
better than what they trained in that round.
"""

import dataclasses

import numpy as np

from common.cli import run_main
from common.curves import GREY, number
from plots import glue_metric
from plots.glue_drawing import (
    all_curves,
    draw_all,
    draw_references,
    draw_rounds,
    figure_parser,
    finish,
    looks_of,
    metric_label,
    panel_axes,
    round_axis,
    seeds_text,
)
from plots.glue_runs import figures_of, headline
from plots.vit_drawing import seed_spread

GAIN = "global_minus_clients"
LACKING = "runs of fedavg_rounds.py with --eval-clients"


def build_parser():
    return figure_parser("Draws the clients' own metric beside the global model's.")


def main(args):
    draw_all(args, [("clients", select, draw_last), ("clients_rounds", select_rounds, draw_over_rounds)])


def select(runs, notes):
    return figures_of(compared(runs), notes), LACKING


def select_rounds(runs, notes):
    # a gain in several rounds
    several = [run for run in compared(runs) if run.central or sum(GAIN in row for row in run.rows) > 1]
    return glue_metric.select(several, notes)[0], f"{LACKING} and --eval-each-round"


def compared(runs):
    """Central runs, and those with the clients' metric beside the global one in a line or more.

    Such a line gets `global_minus_clients`: the global headline metric minus the mean of the clients', nan where a
    number is not finite.
    """
    chosen = []
    for run in runs:
        rows = [row | gain(run, row) for row in run.rows]
        if run.central or any(GAIN in row for row in rows):
            chosen.append(dataclasses.replace(run, rows=rows))
    return chosen


def gain(run, row):
    """{GAIN: global minus the clients' mean} of a line; {} where it lacks either."""
    field = f"val_{headline(run.task)}"
    clients = row.get(f"client_{field}")
    if field not in row or not isinstance(clients, list) or not clients:
        return {}
    return {GAIN: number(row[field]) - float(np.mean([number(value) for value in clients]))}


def last_line(run):
    """The run's last line with both the global metric and the clients'."""
    return [row for row in run.rows if GAIN in row][-1]


def draw_last(setting, panels):
    figure, axes = panel_axes(panels, height=3.0)
    looks = looks_of(panels)
    for axis, panel in zip(axes, panels, strict=True):
        draw_references(axis, panel)
        for i, curve in enumerate(panel.curves):
            draw_clients(axis, i, curve, panel.metric, looks[curve.label])
        axis.set_xticks(range(len(panel.curves)), [tick_name(curve) for curve in panel.curves], fontsize=8)
        axis.set_xlim(-0.6, len(panel.curves) - 0.4)
        axis.grid(False, axis="x")
        axis.set_ylabel(metric_label(panel.metric))
    title = f"Clients' own models and the global one, last round: {seeds_text(all_curves(panels), 'bars')}"
    finish(figure, axes, title, setting, panels)
    return figure


def draw_clients(axis, i, curve, field, look):
    """At place i: the clients of all seeds to the left, the global model to the right."""
    lines = [last_line(run) for run in curve.runs]
    clients = 100 * np.array([number(value) for line in lines for value in line[f"client_{field}"]])
    served = 100 * np.array([number(line[field]) for line in lines])
    # spread sideways, always in the same way
    x = i - 0.2 + 0.22 * (np.arange(len(clients)) * 0.618 % 1 - 0.5)
    axis.plot(x, clients, ".", color=GREY, markersize=4, zorder=2, label="a client's own model")
    axis.hlines(clients.mean(), i - 0.36, i - 0.04, color="black", linewidth=1.6, zorder=3, label="mean of the clients")
    spread = seed_spread(served)
    axis.errorbar(
        [i + 0.2],
        [served.mean()],
        [spread] if spread else None,
        label=f"{curve.label}, global",
        capsize=3,
        markersize=7,
        color=look["color"],
        marker=look["marker"],
        linestyle="",
        zorder=4,
    )


def tick_name(curve):
    """The rule without what its paper calls it; a star for a variant, whose marker the legend names."""
    short = curve.name.partition(" (")[0]
    return short + "*" * (curve.label != curve.name)


def draw_over_rounds(setting, panels):
    figure, axes = panel_axes(panels)
    looks = looks_of(panels)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(0, color=GREY, linewidth=1, zorder=1)
        draw_rounds(axis, panel.curves, looks, GAIN)
        round_axis(axis)
        axis.set_ylabel(f"Global - clients (points)\n{metric_label(panel.metric).partition(' (')[0]}")
    title = f"Global model minus the mean of its clients: {seeds_text(all_curves(panels))}"
    finish(figure, axes, title, setting, panels)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
