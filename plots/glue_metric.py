"""Each task's headline metric on its validation examples against rounds, a line per aggregation rule.

    python plots/glue_metric.py --data-dir out_fedavg --out-dir results/plots

Writes metric.png: a panel per task and federation (clients and how the examples were dealt to them). A line is the
mean over seeds, its band one standard deviation each way; central training is a horizontal line at its last metric,
with such a band. A figure holds only runs of one model and adapter size; a further such group gets a figure with what
sets it apart in its name. Matthews' and Pearson's correlations are shown times 100.
"""

import numpy as np

from common.cli import run_main
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
from plots.glue_runs import evaluated, figures_of


def build_parser():
    return figure_parser("Draws each task's metric against rounds.")


def main(args):
    draw_all(args, [("metric", select, draw)])


def select(runs, notes):
    """Figures of the panels with two evaluated rounds or more: (list[(setting, panels)], what is lacking)."""
    chosen = []
    for setting, panels in figures_of(runs, notes):
        panels = [panel for panel in panels if evaluated_rounds(panel) > 1]
        if panels:
            chosen.append((setting, panels))
    return chosen, "runs of fedavg_rounds.py with --eval-each-round"


def evaluated_rounds(panel):
    """The most rounds at which one of the panel's curves has the metric."""
    return max(np.isfinite(evaluated(curve, panel.metric)[1].mean(axis=0)).sum() for curve in panel.curves)


def draw(setting, panels):
    figure, axes = panel_axes(panels)
    looks = looks_of(panels)
    for axis, panel in zip(axes, panels, strict=True):
        draw_references(axis, panel)
        draw_rounds(axis, panel.curves, looks, panel.metric)
        round_axis(axis)
        axis.set_ylabel(metric_label(panel.metric))
    finish(figure, axes, f"Validation metric: {seeds_text(all_curves(panels))}", setting, panels)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
