"""Each task's headline metric against what has been sent, a line per aggregation rule.

    python plots/glue_bytes.py --data-dir out_fedavg --out-dir results/plots

    bytes_up.png      sent by the clients to the server
    bytes_both.png    in both directions: stack and residual send their update of the base model down

All clients and rounds so far together, in MB (10^6 bytes). Panels, lines and bands as in glue_metric.py; the axis is
logarithmic where the rules' totals differ by more than a factor of five.
"""

import dataclasses

import numpy as np

from common.cli import run_main
from common.curves import number, round_ticks
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
    seeds_text,
)

LOG_FROM = 5  # factor between the totals of two rules from which the axis is logarithmic


def build_parser():
    return figure_parser("Draws each task's metric against the bytes sent.")


def main(args):
    def draw_field(name, label):
        return lambda setting, panels: draw(setting, panels, name, label)

    draw_all(
        args,
        [
            ("bytes_up", counted("bytes_up"), draw_field("bytes_up", "Sent by clients (MB)")),
            ("bytes_both", counted("bytes_both"), draw_field("bytes_both", "Sent up and down (MB)")),
        ],
    )


def counted(name):
    """`glue_metric.select`, restricted to runs that counted these bytes."""

    def chosen(runs, notes):
        runs = [with_both(run) for run in runs]
        found, lacking = glue_metric.select([r for r in runs if r.central or name in r.rows[-1]], notes)
        return found, f"{lacking}, with bytes_up and bytes_down in metrics.jsonl"

    return chosen


def with_both(run):
    """The run with `bytes_both` = bytes_up + bytes_down in every line that has both."""
    both = [{"bytes_both": number(row.get("bytes_up")) + number(row.get("bytes_down"))} for row in run.rows]
    rows = [row | (sums if np.isfinite(sums["bytes_both"]) else {}) for row, sums in zip(run.rows, both, strict=True)]
    return dataclasses.replace(run, rows=rows)


def plain_log_axis(axis):
    """A logarithmic x axis with plain numbers at round places."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_xscale("log")
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(FixedLocator(round_ticks(low, high, most=6)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.xaxis.set_minor_locator(NullLocator())


def draw(setting, panels, name, label):
    figure, axes = panel_axes(panels)
    looks = looks_of(panels)
    for axis, panel in zip(axes, panels, strict=True):
        draw_references(axis, panel)
        draw_rounds(axis, panel.curves, looks, panel.metric, x_name=name, x_factor=1e-6)
        totals = [run.rows[-1][name] for curve in panel.curves for run in curve.runs]
        if max(totals) > LOG_FROM * min(totals) > 0:
            plain_log_axis(axis)
        else:
            axis.set_xlim(left=0)
        axis.set_xlabel(label)
        axis.set_ylabel(metric_label(panel.metric))
    title = f"Validation metric against bytes sent, all clients: {seeds_text(all_curves(panels))}"
    finish(figure, axes, title, setting, panels)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
