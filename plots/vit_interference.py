"""Figure of vit_sparse_fl's question: what a client's update does to its own and the others' losses.

    python plots/vit.py cross --data-dir results

    cross       cross_losses.png: a row per method, means over the rounds of --interference-every, a dot a seed:
                M_ii, the client's own loss after its update; M_ij, the others', and with random signs (chance); the
                gap between the merged model and the client's own, and what it were, to first order, if the others'
                updates did nothing to it: the own gain but for the client's share, -(1 - 1/m) M_ii of m clients;
                cosines of updates between clients minus within one, and in grey how far they lie apart where clients
                are dealt at random (95 % of draws)

    gains       gains.png: what the other clients lose, M_ij, against what a client gains, -M_ii, a panel for each round
                of --interference-every in which clients gain 0.2 nats or more; dense training's rates are one line:
                how far a client moves decides both, so that a mask reduces interference where it lies below the line

Losses are in nats, on held images (vit_sparse_fl/cross_losses.py); below 0 in the first two panels helps. The table
has them too, and `others / own`, -M_ij / M_ii: what the others lose for what a client gains, however long its step.
"""

import numpy as np

from common.curves import GREY, break_lines, new_figure
from common.participation import per_round
from plots.seeds import curves_of
from plots.style import Figure, caption, each_group, legend_below, looks_of, panel_axes, seed_spread
from plots.vit_runs import LEAST, OTHERS, OWN, broken, crossed, gains, is_dense, say_diverged, seeds_said

POINTS = "bars: standard deviation, dots: seeds"
# field -> (label, its chance level: name, function of the curve to [S])
PANELS = {
    OWN: ("Own loss, $M_{ii}$", None),
    OTHERS: (
        "Others' loss, $M_{ij}$",
        ("random signs", lambda c: c.mean_over_rounds("interference_chance")),
    ),
    "merge_gap": ("Merge gap", ("own gain diluted", lambda c: -(1 - share(c)) * c.mean_over_rounds(OWN))),
    "cosine_excess": ("Cosines, between - within", None),
}


def share(curve):
    """1 / m: what a client counts in a round of m of equal size."""
    args = curve.runs[0].args
    return 1 / per_round(args.get("participation_rate", 1), args.get("num_clients", 1))


def draw_cross(setting, curves, args):
    figure, axes = new_figure(columns=len(PANELS), width=11.0, height=1.7 + 0.36 * len(curves), sharey=True)
    looks = looks_of(curves)
    for axis, (field, (label, chance)) in zip(axes[0], PANELS.items(), strict=True):
        axis.axvline(0, color="black", linewidth=0.9)
        for i, curve in enumerate(curves):
            factors = curve.kind == "lora"  # which are not unique, so that their cosines and signs say nothing
            if factors and field == "cosine_excess":
                continue
            draw_row(axis, i, curve.mean_over_rounds(field), looks[curve.label])
            if chance and curve.counted and not (factors and field == "interference_others"):
                name, level = chance
                mark = {"color": GREY, "marker": "|", "markersize": 13, "markeredgewidth": 2, "linestyle": ""}
                axis.plot([level(curve).mean()], [i], label=f"{name} ({label})" if i == 0 else None, zorder=1, **mark)
            if field == "cosine_excess" and curve.counted:
                half = curve.mean_over_rounds("cosine_chance").mean()
                axis.barh(i, 2 * half, 0.7, -half, color=GREY, alpha=0.25, label="pairs at random" if i == 0 else None)
        axis.set_xlabel(label + ("" if field == "cosine_excess" else " (nats)"))
        axis.grid(False, axis="y")
    names = ["\n".join(filter(None, (break_lines(curve.label, 34), broken(curve)))) for curve in curves]
    axes[0, 0].set_yticks(range(len(curves)), names)
    axes[0, 0].set_ylim(len(curves) - 0.4, -0.6)
    legend_below(figure, axes[0])
    caption(figure, f"Interference between clients: {seeds_said(curves, POINTS)}", setting, curves)
    return figure


def draw_row(axis, i, values, look):
    """Mean, spread and dots of one number a seed; a row without a point where one is not finite, or there is none."""
    if not len(values):
        return
    if np.isfinite(values).all():
        bar = seed_spread(values)
        axis.errorbar([values.mean()], [i], xerr=[bar] if bar else None, capsize=3, **look | {"linestyle": "-"})
        if len(values) > 1:
            axis.plot(values, np.full(len(values), i + 0.25), ".", color=look["color"], markersize=4)
    else:
        axis.text(0.5, i, "not finite", transform=axis.get_yaxis_transform(), ha="center", va="center", fontsize=7.5)


CROSS = Figure(
    "cross_losses",
    each_group(lambda runs, notes: curves_of(runs, notes=notes), keep=crossed),
    draw_cross,
    "federated runs with --interference-every",
)


# ---- what the others lose against what a client gains


def gains_of(runs, notes):
    """(curves, {round: {label: (gains [S], the others' losses [S])}}), None where clients gain too little.

    Without the rounds where dense training, whose rates are the line, gains too little at all of them.
    """
    curves, rounds = [curve for curve in curves_of(runs, notes=notes) if curve.counted], {}
    say_diverged(curves)
    for curve in curves:
        for t, pairs in points(curve).items():
            rounds.setdefault(t, {})[curve.label] = pairs
    lines = {curve.label for curve in curves if is_dense(curve)} or {curve.label for curve in curves}

    def moves(at):
        return any(own.mean() >= LEAST for name, (own, _) in at.items() if name in lines)

    rounds = {t: at for t, at in sorted(rounds.items()) if moves(at)}
    return (curves, rounds) if rounds else None


def points(curve):
    """{round: (gains [S], the others' losses [S])}, of the seeds that have the round."""
    every = {}
    for run in curve.counted:
        for t, pair in gains(run).items():
            every.setdefault(t, []).append(pair)
    return {t: np.array(pairs).T for t, pairs in every.items()}


def draw_gains(setting, what, args):
    curves, rounds = what
    looks = looks_of(curves)
    figure, axes = panel_axes(len(rounds), width=5.2 * len(rounds), height=4.0, sharex=True, sharey=True)
    names = {curve.label: f"{i}  {curve.label}" for i, curve in enumerate(curves, 1)}
    for axis, (t, there) in zip(axes, rounds.items(), strict=True):
        line = sorted(tuple(there[c.label].mean(axis=1)) for c in curves if is_dense(c) and c.label in there)
        axis.plot(*np.array(line).reshape(-1, 2).T, color="black", linewidth=1.1, zorder=1)
        for name, pair in there.items():
            (x, y), bars = pair.mean(axis=1), [seed_spread(values) for values in pair]
            spreads = {key: [bar] for key, bar in zip(("xerr", "yerr"), bars, strict=True) if bar}
            shown = looks[name] | {"linestyle": "", "label": names[name], "markersize": 4}
            axis.errorbar([x], [y], capsize=2, elinewidth=0.8, **spreads, **shown)
            axis.annotate(names[name].split()[0], (x, y), (3, 3), textcoords="offset points", fontsize=7.5)
        axis.set_title(f"round {t}")
        axis.set_xlabel("A client's gain, $-M_{ii}$ (nats)")
    axes[0].set_ylabel("The others' loss, $M_{ij}$ (nats)")
    legend_below(figure, axes)
    caption(figure, f"Interference at equal gain: {seeds_said(curves, 'bars: standard deviation')}", setting, curves)
    return figure


GAINS = Figure("gains", each_group(gains_of, keep=crossed), draw_gains, "federated runs with --interference-every")
