"""How far the clients' updates and models pull apart, against rounds.

    python plots/noniid_drift.py --data-dir results --out-dir results/plots

    noniid_drift.png          a column per partition, a line per algorithm
    noniid_drift_alpha.png, ..._participation.png, ..._learning_rate.png, ..._local.png
                              a column per method, a line per value

Rows: relative drift sqrt(sum p_k ||d_k - d||^2) / ||d||, gradient diversity sum ||d_k||^2 / ||sum d_k||^2, the mean
cosine of a client's update with their mean d, and linear CKA between hidden states of the clients' models and of the
global one. d_k is what client k's round did to the layers' weights, s (B_k A_k - B A), never to the factors. Lines are
means over seeds, bands one standard deviation each way; a dotted line is what orthogonal updates of equal length
have: sqrt(m - 1), 1 and 1 / sqrt(m), m = 1 / sum p_k^2 (drawn where that is the same for all runs of a panel).
"""

import math

import numpy as np

from common.cli import run_main
from common.curves import log_axis, new_figure
from plots.glue_drawing import all_curves, seeds_text
from plots.glue_runs import evaluated
from plots.noniid_drawing import draw_all, draw_rounds, figure_parser, finish, looks_of, title_panel
from plots.noniid_runs import FACTOR_NAMES, FACTORS, factor_figures, figures_of

# field, y label, logarithmic, of m orthogonal updates of equal length
MEASURES = (
    ("relative_drift", "Relative drift", True, lambda m: math.sqrt(m - 1)),
    ("gradient_diversity", "Gradient diversity", True, lambda m: 1.0),
    ("mean_cosine", "Cosine with the mean", False, lambda m: 1 / math.sqrt(m)),
    ("mean_cka", "CKA with the global model", False, None),
)
LACKING = "runs with one global model, whose metrics.jsonl has relative_drift"


def build_parser():
    return figure_parser("Draws drift, diversity and cosine of the clients' updates, and CKA of their models.")


def main(args):
    def of_factor(factor):
        more = f", with two values of {FACTOR_NAMES[factor]}"
        return lambda runs, notes: (factor_figures(measured(runs), notes, factor), LACKING + more)

    draw_all(
        args,
        [("noniid_drift", lambda runs, notes: (figures_of(measured(runs), notes, single=False), LACKING), draw(""))]
        + [(f"noniid_drift_{f}", of_factor(f), draw(f" by {FACTOR_NAMES[f]}")) for f in FACTORS],
    )


def measured(runs):
    """The federated runs that logged how far their clients' updates are apart."""
    fields = [name for name, *_ in MEASURES]
    return [run for run in runs if not run.central and any(row.get(f) is not None for row in run.rows for f in fields)]


def clients_of(panel):
    """1 / sum p_k^2 of the panel's rounds: m clients of equal weight; None where that differs, or is not known."""
    rows = [row for c in panel.curves for run in c.runs for row in run.rows if row.get("relative_drift") is not None]
    counts = {round(row.get("effective_clients") or 0, 1) for row in rows}
    return counts.pop() or None if len(counts) == 1 else None


def draw(title):
    def figure_for(setting, panels):
        rows = [measure for measure in MEASURES if any(finite(curve, measure[0]) for curve in all_curves(panels))]
        if len(panels) == 1:
            figure, axes = new_figure(2, 2, width=8.4, height=5.6)
            for axis in axes.flat[len(rows) :]:
                axis.set_axis_off()
            axes = axes.reshape(4, 1)[: len(rows)]
        else:
            size = {"width": (4.2 if len(panels) == 2 else 3.0) * len(panels) + 0.8, "height": 2 * len(rows) + 1.4}
            figure, axes = new_figure(len(rows), len(panels), sharey="row", sharex=True, **size)
        looks = looks_of(panels)
        for row, (name, y_label, logarithmic, orthogonal) in zip(axes, rows, strict=True):
            for axis, panel in zip(row, panels, strict=True):
                draw_rounds(axis, panel.curves, looks, name)
                axis.set_xlabel("")
                m = clients_of(panel)
                if orthogonal and m and m > 1:
                    line = {"color": "black", "linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}
                    axis.axhline(orthogonal(m), label="orthogonal updates", **line)
            means = [evaluated(curve, name)[1].mean(axis=0) for curve in all_curves(panels)]
            means = np.concatenate([mean[np.isfinite(mean)] for mean in means])
            if logarithmic and (means > 0).all() and means.max() > 3 * means.min():
                log_axis(row[0], means.min(), means.max())
            row[0].set_ylabel(y_label)
        for axis, panel in zip(axes[0], panels, strict=True):
            if len(panels) > 1:
                title_panel(axis, panel, panels)
        for axis in axes.flat if len(panels) == 1 else axes[-1]:
            axis.set_xlabel("Round")
        seeds = (f"{panels[0].title}, " if len(panels) == 1 else "") + seeds_text(all_curves(panels))
        finish(figure, axes.flat, f"Drift of the clients' updates{title}: {seeds}", setting)
        return figure

    return figure_for


def finite(curve, name):
    return np.isfinite(evaluated(curve, name)[1]).any()


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
