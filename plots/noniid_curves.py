"""Validation loss against rounds, a line per algorithm, with the detectors' alarms on the lines.

    python plots/noniid_curves.py --data-dir results --out-dir results/plots

    noniid_curves.png             of the validation texts, a panel per partition
    noniid_curves_worst.png       of the worst client, on that client's own held-out texts
    noniid_curves_alpha.png, ..._participation.png, ..._learning_rate.png, ..._local.png
                                  of the validation texts, a panel per method, a line per value
    noniid_curves_last_alpha.png, ...
                                  the same runs' loss after the last round against the value

A line is the mean over seeds, its band one standard deviation each way; central training is a horizontal line at its
last loss. Losses are in nats per token. A curve that leaves the axis ends in an arrow. Letters stand where a detector
spoke first (`llm_noniid.detectors`): Dv diverged, Os oscillating, Dr drifting, Sl slow, Lo updates left out.
"""

from copy import copy

import numpy as np

from common.cli import run_main
from common.curves import log_axis
from plots.alike import Panel
from plots.glue_drawing import all_curves, seeds_text
from plots.glue_runs import evaluated
from plots.noniid_drawing import (
    alarm_words,
    draw_all,
    draw_references,
    draw_rounds,
    figure_parser,
    finish,
    keep_on_scale,
    looks_of,
    mark_alarms,
    panel_axes,
)
from plots.noniid_runs import FACTOR_NAMES, FACTORS, Run, central_of, factor_figures, figures_of
from plots.vit_drawing import seed_spread

LOSS = "Validation loss (nats)"
LOG_FROM = 1.5  # largest by smallest loss from which the axis is logarithmic
WORST = "Worst client's loss (nats)"


def build_parser():
    return figure_parser("Draws the validation loss against rounds, and what changes it.")


def main(args):
    def of_factor(factor):
        lacking = f"runs of one method with two values of {FACTOR_NAMES[factor]}"
        return lambda runs, notes: (factor_figures(runs, notes, factor), lacking)

    figures = [
        ("noniid_curves", select("val_loss"), over_rounds("val_loss", LOSS, "Validation loss")),
        (
            "noniid_curves_worst",
            select("worst_client_val_loss"),
            over_rounds("worst_client_val_loss", WORST, WORST[:-7]),
        ),
    ]
    for factor in FACTORS:
        title = f"Validation loss by {FACTOR_NAMES[factor]}"
        figures += [
            (f"noniid_curves_{factor}", of_factor(factor), over_rounds("val_loss", LOSS, title)),
            (f"noniid_curves_last_{factor}", of_factor(factor), against(factor)),
        ]
    draw_all(args, figures)


def select(name):
    def chosen(runs, notes):
        having = [run for run in runs if any(name in row for row in run.rows)]
        return figures_of(having, notes, single=False), f"runs of train.py with {name} in metrics.jsonl"

    return chosen


def over_rounds(name, y_label, title):
    def draw(setting, panels):
        figure, axes = panel_axes(panels)
        looks = looks_of(panels)
        for axis, panel in zip(axes, panels, strict=True):
            draw_references(axis, central_of(panel) if name == "worst_client_val_loss" else panel.references, name)
            draw_rounds(axis, panel.curves, looks, name)
            axis.set_ylabel(y_label)
        leaving = keep_on_scale(axes, panels, name)
        wide = 72 * figure.get_figwidth() / axes[0].get_gridspec().ncols - 60
        spoke = []
        for axis, panel in zip(axes, panels, strict=True):
            spoke += mark_alarms(axis, panel.curves, looks, name, (wide, 130))
        arrows = "arrows: the curve leaves the axis" if leaving else ""
        seeds = seeds_text(all_curves(panels))
        finish(figure, axes, f"{title}: {seeds}", setting, [alarm_words(spoke), arrows])
        return figure

    return draw


def against(factor):
    """Draws the loss after the last round at evenly spaced values of a factor, a line per method."""

    def draw(setting, panels):
        figure, (axis,) = panel_axes([panels[0]])
        axis.set_title("")
        places = {curve.place[factor]: curve.label for curve in all_curves(panels)}
        order = sorted(places, key=lambda value: Run.order(factor, value))
        named, broken = [as_method(panel) for panel in panels], []
        looks = looks_of(named)
        step = min(0.1, 0.5 / len(panels))
        for i, panel in enumerate(panels):
            shift = (i - (len(panels) - 1) / 2) * step
            values = [(order.index(curve.place[factor]) + shift, curve.results("val_loss")) for curve in panel.curves]
            good = [(x, v) for x, v in values if np.isfinite(v).all()]
            broken += [(x, panel.title) for x, v in values if not np.isfinite(v).all()]
            axis.errorbar(
                [x for x, _ in good],
                [v.mean() for _, v in good],
                [seed_spread(v) for _, v in good],
                label=panel.title,
                capsize=3,
                markersize=6,
                **looks[panel.title],
            )
        start = first_losses(panels)
        if np.isfinite(start):
            axis.axhline(start, color="#999999", linestyle=(0, (1, 2)), zorder=1, label="first evaluation, lowest")
        for i, (x, title) in enumerate(broken):
            text = f"{title}:\nnot finite" if len(panels) > 1 else "not\nfinite"
            axis.annotate(text, (x, 0.98 - 0.1 * (i % 3)), xycoords=("data", "axes fraction"), ha="center", va="top")
        axis.set_xticks(range(len(order)), [places[value] for value in order])
        axis.set_xlim(-0.5, len(order) - 0.5)
        means = [v.mean() for curve in all_curves(panels) if np.isfinite(v := curve.results("val_loss")).all()]
        if means and max(means) > LOG_FROM * min(means):
            low, high = min([*means, start]), max([*means, start])
            log_axis(axis, low, high)
        axis.set_ylabel(LOSS)
        seeds = seeds_text(all_curves(panels), "bars")
        finish(figure, [axis], f"Validation loss after the last round: {seeds}", setting)
        return figure

    return draw


def as_method(panel):
    """A panel of the first curve alone, labelled as the method, for `looks_of`."""
    curve = copy(panel.curves[0])
    curve.label = panel.title
    return Panel(panel.setting, [curve])


def first_losses(panels):
    """The lowest loss of any curve's first evaluation."""
    found = [evaluated(curve, "val_loss")[1][:, :1] for curve in all_curves(panels)]
    found = [values.mean() for values in found if values.size and np.isfinite(values).all()]
    return min(found, default=np.nan)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
