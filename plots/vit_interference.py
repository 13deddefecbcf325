"""Figure of vit_sparse_fl's question: what a client's update does to its own and the others' losses.

    python plots/vit.py cross --data-dir results

    cross       cross_losses.png: a row per method, means over the rounds of --interference-every, a dot a seed:
                M_ii, the client's own loss after its update; M_ij, the others', and with random signs (chance); the
                gap between the merged model and the client's own; cosines of updates between clients minus within one,
                and in grey how far they lie apart where clients are dealt at random (95 % of draws)

Losses are in nats, on held images (vit_sparse_fl/cross_losses.py); below 0 in the first two panels helps. The table
has them too, and `others / own`, -M_ij / M_ii: what the others lose for what a client gains, however long its step.
"""

import numpy as np

from common.curves import GREY, break_lines, new_figure
from plots.seeds import curves_of
from plots.style import Figure, caption, each_group, legend_below, looks_of, seed_spread, seeds_text
from plots.tables import Column, over_rounds, sent, spread

FIELD = "interference_own"
POINTS = "bars: standard deviation, dots: seeds"
# field -> (label, its chance level: name, function of the curve to [S])
PANELS = {
    "interference_own": ("Own loss, $M_{ii}$", None),
    "interference_others": (
        "Others' loss, $M_{ij}$",
        ("random signs", lambda c: c.mean_over_rounds("interference_chance")),
    ),
    "merge_gap": ("Merge gap", ("the round undone", lambda c: -c.mean_over_rounds(FIELD))),
    "cosine_excess": ("Cosines, between - within", None),
}


def measured(run):
    """Whether a run's rows hold cross losses."""
    return not run.central and any(row.get(FIELD) is not None for row in run.rows)


def draw_cross(setting, curves, args):
    figure, axes = new_figure(columns=len(PANELS), width=11.0, height=1.7 + 0.36 * len(curves), sharey=True)
    looks = looks_of(curves)
    for axis, (field, (label, chance)) in zip(axes[0], PANELS.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        for i, curve in enumerate(curves):
            draw_row(axis, i, curve.mean_over_rounds(field), looks[curve.label])
            if chance:
                name, level = chance
                mark = {"color": GREY, "marker": "|", "markersize": 13, "markeredgewidth": 2, "linestyle": ""}
                axis.plot([level(curve).mean()], [i], label=f"{name} ({label})" if i == 0 else None, zorder=1, **mark)
            if field == "cosine_excess":
                half = curve.mean_over_rounds("cosine_chance").mean()
                axis.barh(i, 2 * half, 0.7, -half, color=GREY, alpha=0.25, label="pairs at random" if i == 0 else None)
        axis.set_xlabel(label + ("" if field == "cosine_excess" else " (nats)"))
        axis.grid(False, axis="y")
    axes[0, 0].set_yticks(range(len(curves)), [break_lines(curve.label, 34) for curve in curves])
    axes[0, 0].set_ylim(len(curves) - 0.4, -0.6)
    legend_below(figure, axes[0])
    caption(figure, f"Interference between clients: {seeds_text(curves, POINTS)}", setting, curves)
    return figure


def draw_row(axis, i, values, look):
    """Mean, spread and dots of one number a seed; a row without a point where one is not finite."""
    if np.isfinite(values).all():
        bar = seed_spread(values)
        axis.errorbar([values.mean()], [i], xerr=[bar] if bar else None, capsize=3, **look | {"linestyle": "-"})
        if len(values) > 1:
            axis.plot(values, np.full(len(values), i + 0.25), ".", color=look["color"], markersize=4)
    else:
        axis.text(0.5, i, "not finite", transform=axis.get_yaxis_transform(), ha="center", va="center", fontsize=7.5)


COLUMNS = (
    over_rounds("own loss", FIELD, 1, 4),
    over_rounds("others' loss", "interference_others", 1, 4),
    over_rounds("random signs", "interference_chance", 1, 4),
    Column(
        "others / own", lambda c, _: spread(-c.mean_over_rounds("interference_others") / c.mean_over_rounds(FIELD), 3)
    ),
    over_rounds("merge gap", "merge_gap", 1, 4),
    over_rounds("between - within", "cosine_excess", 1, 3),
    over_rounds("at random", "cosine_chance", 1, 3),
)


def more_columns(curves):
    """Columns of the study's table that only newer runs have: of cross losses, and of what is sent down."""
    runs = [run for curve in curves for run in curve.runs]
    if any("download" in run.method for run in runs):
        yield Column("MB down", lambda curve, _: sent(curve, "bytes_down"))
    if any(map(measured, runs)):
        yield from COLUMNS


CROSS = Figure(
    "cross_losses",
    each_group(lambda runs, notes: curves_of(runs, notes=notes), keep=measured),
    draw_cross,
    "federated runs with --interference-every",
)
