"""How far what the server serves is from the mean of the clients' updates, by aggregation rule.

    python plots/glue_error.py --data-dir out_fedavg --out-dir results/plots

    error_rounds.png    against rounds, a panel per task and federation
    error_clients.png   against the number of clients, a panel per task and way to deal the examples
    error_rank.png      against the rank of the adapters, a panel per task and federation

    error = ||served - mean(BA)|| / ||mean(BA)||, mean(BA) = sum_k p_k s_k B_k A_k, in percent, over all layers

The latter two show the mean over all rounds of a run. Lines are means over seeds; bands and bars one standard
deviation each way. Rules whose error stays below 0.1 % everywhere (what rounding leaves) share one line.
"""

import numpy as np

from common.cli import run_main
from common.curves import GREY
from plots.alike import label, lines_of
from plots.glue_drawing import (
    all_curves,
    draw_all,
    draw_rounds,
    figure_parser,
    finish,
    looks_of,
    panel_axes,
    round_axis,
    seeds_text,
)
from plots.glue_runs import evaluated, figures_of, mean_over_rounds
from plots.vit_drawing import seed_spread

FIELD = "aggregation_error"
EXACT = 1e-3
Y_LABEL = "Aggregation error (%)"


def build_parser():
    return figure_parser("Draws the error of the aggregation against rounds, clients and rank.")


def main(args):
    def along(axis, lacking):
        return lambda runs, notes: (select(runs, notes, axis), lacking)

    draw_all(
        args,
        [
            ("error_rounds", select_rounds, draw_over_rounds),
            ("error_clients", along(("clients",), "runs with two numbers of clients"), by_clients),
            ("error_rank", along(("rank", "lora_alpha"), "runs with two values of --lora-r"), by_rank),
        ],
    )


def measured(runs):
    """The runs whose metrics.jsonl holds the error."""
    return [run for run in runs if any(FIELD in row for row in run.rows)]


def select_rounds(runs, notes):
    return figures_of(measured(runs), notes), f"runs of fedavg_rounds.py with {FIELD} in metrics.jsonl"


def select(runs, notes, axis):
    """Figures of the panels that have a rule at two places of the axis or more: list[(setting, panels)]."""
    chosen = []
    for setting, panels in figures_of(measured(runs), notes, axis, axis):
        for panel in panels:
            lines = [line for line in lines_of(panel.curves) if len(line) > 1]
            panel.curves = [curve for line in lines for curve in line]
            label(panel.curves)
        panels = [panel for panel in panels if panel.curves]
        if panels:
            chosen.append((setting, panels))
    return chosen


def exact_rules(panels):
    """({labels of rules whose error is below EXACT in every panel, round and seed}, the largest of those errors)."""
    largest = {}
    for panel in panels:
        for curve in panel.curves:
            # a value that is not finite is not exact
            errors = np.nan_to_num(evaluated(curve, FIELD)[1], nan=np.inf)
            largest[curve.label] = max(largest.get(curve.label, 0.0), errors.max(initial=0.0))
    exact = {name: error for name, error in largest.items() if error < EXACT}
    return set(exact), max(exact.values(), default=0.0)


def exact_note(panels):
    names, largest = exact_rules(panels)
    # in the panels' order
    names = list(dict.fromkeys(c.label for panel in panels for c in panel.curves if c.label in names))
    return f"exact (error at most {100 * largest:.1g} %): {', '.join(names)}" if names else ""


def draw_over_rounds(setting, panels):
    figure, axes = panel_axes(panels)
    looks, (exact, _) = looks_of(panels), exact_rules(panels)
    for axis, panel in zip(axes, panels, strict=True):
        draw_rounds(axis, [curve for curve in panel.curves if curve.label not in exact], looks, FIELD)
        zero_line(axis, exact & {curve.label for curve in panel.curves})
        round_axis(axis)
        axis.set_ylabel(Y_LABEL)
    title = f"Error of what is served: {seeds_text(all_curves(panels))}"
    finish(figure, axes, title, setting, panels, exact_note(panels))
    return figure


def zero_line(axis, exact):
    """A line at 0 that stands for the exact rules; the axis begins a little below it."""
    if exact:
        axis.axhline(0, color=GREY, linewidth=2.2, label="Exact rules, see above", zorder=1)
    axis.autoscale_view()
    top = max(axis.get_ylim()[1], 100 * EXACT)
    axis.set_ylim(-0.04 * top, top)


def by_clients(setting, panels):
    return draw_points(setting, panels, "Clients", lambda place: str(place["clients"]))


def by_rank(setting, panels):
    alphas = {curve.place["lora_alpha"] for panel in panels for curve in panel.curves}

    def name(place):
        alpha = place["lora_alpha"]
        return str(place["rank"]) + (f"\n(alpha {alpha:g})" if len(alphas) > 1 and alpha is not None else "")

    return draw_points(setting, panels, "Rank r of the adapters", name)


def draw_points(setting, panels, x_label, name):
    """Panels with the mean error of a run's rounds at evenly spaced places, a line per rule.

    name(place) -> the text of a tick. The lines stand side by side, so that no bar hides another.
    """
    figure, axes = panel_axes(panels)
    looks, (exact, _) = looks_of(panels), exact_rules(panels)
    for axis, panel in zip(axes, panels, strict=True):
        order = panel.curves[0].runs[0].order
        places = {name(curve.place): [order(*item) for item in curve.place.items()] for curve in panel.curves}
        ticks = sorted(places, key=places.get)
        lines = [line for line in lines_of(panel.curves) if line[0].label not in exact]
        step = min(0.1, 0.5 / max(1, len(lines)))
        for i, line in enumerate(lines):
            line = sorted(line, key=lambda curve: ticks.index(name(curve.place)))
            x = [ticks.index(name(curve.place)) + (i - (len(lines) - 1) / 2) * step for curve in line]
            values = [100 * mean_over_rounds(curve, FIELD) for curve in line]
            spreads = [seed_spread(seeds) for seeds in values]
            look = looks[line[0].label]
            axis.errorbar(x, [v.mean() for v in values], spreads, label=line[0].label, capsize=3, markersize=6, **look)
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlim(-0.5, len(ticks) - 0.5)
        zero_line(axis, exact & {curve.label for curve in panel.curves})
        axis.set_xlabel(x_label)
        axis.set_ylabel(Y_LABEL + ", mean of rounds")
    title = f"Error of what is served: {seeds_text(all_curves(panels), 'bars')}"
    finish(figure, axes, title, setting, panels, exact_note(panels))
    return figure


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
