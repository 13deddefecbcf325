"""Figures of llm_noniid.

    python plots/noniid.py --data-dir results --out-dir results/plots           # all that the runs allow
    python plots/noniid.py curves clients --data-dir llm_noniid/results/study.jsonl
    python plots/tables.py llm_noniid

    curves        validation loss against rounds, a panel per partition (noniid_curves.png), of labels the accuracy
                  (_accuracy), and the worst client's loss on its own held-out texts (_worst); a panel per method, a
                  line per value (_alpha, _participation, _learning_rate, _local); after the last round against the
                  value (_last_alpha, ...). Dashed: what knowing the labels' shares alone has
    drift         how far the clients' updates and models pull apart, by partition and by value (_alpha, ...):

                      relative drift      sqrt(sum p_k ||d_k - d||^2) / ||d||
                      gradient diversity  sum ||d_k||^2 / ||sum d_k||^2
                      cosine              mean of a client's update with their mean d
                      CKA                 between hidden states of the clients' models and of the global one

                  d_k is what client k's round did to the layers' weights, s (B_k A_k - B A), never to the factors. A
                  dotted line is what orthogonal updates of equal length have: sqrt(m - 1), 1 and 1 / sqrt(m),
                  m = 1 / sum p_k^2 (drawn where that is the same for all runs of a panel)
    corrections   does SCAFFOLD correct the drift, under this client optimiser: how large c - c_k is, in mean gradients,
                  its cosine with the drift of the gradients, and that drift (dotted: its chance level, of texts dealt
                  at random), of SCAFFOLD and FedAvg, each at its own rate. As a table: plots/tables.py llm_noniid
                  --columns "gradient drift" "chance drift" correction "correction cosine"
    clients       after the last round: every client of every seed as a dot, mean and worst client beside
                  (noniid_clients.png); the same minus FedAvg's of the same client and seed (_against); each topic's
                  validation loss (_topics). A central run stands in the partition that its own flags name
    cost_map      plots/noniid_costs.py
    similarity, partition     plots/noniid_maps.py

Lines are means over seeds, bands and bars one standard deviation each way; losses are in nats per token, of labels per
text. Central training is a horizontal line at its last loss. A curve that leaves the axis ends in an arrow. Letters
stand where an alarm came first (`llm_noniid.detectors`; older logs have others): the first two of its name.
"""

import math
from functools import partial

import numpy as np

from common.cli import run_main
from common.curves import GREY, MARKERS, log_axis, new_figure, number
from plots import noniid_costs, noniid_maps
from plots.noniid_runs import (
    FACTORS,
    KEYS,
    STUDY,
    TABLE,
    central_of,
    corrected,
    factor_figures,
    figures_of,
    first_alarms,
    order,
    prior,
)
from plots.style import (
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
    look,
    looks_of,
    name_places,
    panel_axes,
    reference_lines,
    sideways,
    title_panels,
)

__all__ = ["FIGURES", "STUDY", "TABLE"]
WORST = "worst_client_val_loss"
CLIENTS, TOPICS = "client_val_loss", "val_topic_loss"


def having(*names, select=figures_of):
    """`select`, of the runs that logged one of these fields; a panel per partition."""

    def there(run):
        return any(row.get(name) is not None for row in run.rows for name in names)

    return lambda runs, notes: select([run for run in runs if there(run)], notes)


def looks_in(panels):
    """{label: look}: of methods that of `looks_of`; of a factor's values one in their order, whatever the method."""
    curves = all_curves(panels)
    if not curves[0].place:
        return looks_of(curves)
    return {name: look(i) for i, name in enumerate(dict.fromkeys(curve.label for curve in curves))}


# ---- losses over rounds, with the alarms

# a curve's marker as a letter, so that an alarm's mark says in grey, too, whose it is
SYMBOLS = dict(zip(MARKERS, "\u25cf\u25a0\u25b2\u25c6\u25bc\u271a\u2716\u25c0\u25b6", strict=True))
OFF_SCALE = 2.5  # a curve may take so many times the height of the usual one before it leaves the axis


def over_rounds(name, y_label, title):
    def draw(setting, panels, args):
        figure, axes = axes_of(panels, sharey=True)
        looks = looks_in(panels)
        for axis, panel in zip(axes, panels, strict=True):
            central = central_of(panel) if name == WORST else panel.references
            reference_lines(axis, central, name, words="{}, last round")
            draw_rounds(axis, panel.curves, looks, name)
            draw_prior(axis, panel.curves, name)
            axis.set_ylabel(y_label)
        leaving = keep_on_scale(axes, panels, name)
        size = 72 * figure.get_figwidth() / axes[0].get_gridspec().ncols - 60, 130
        spoke = {one for axis, p in zip(axes, panels, strict=True) for one in mark_alarms(axis, p, looks, name, size)}
        alarms = ", ".join(f"{letters(one)} {one.replace('_', ' ')}" for one in sorted(spoke))
        lines = [f"first alarms: {alarms} (n/m: in n of m seeds)" if spoke else ""]
        lines += ["arrows: the curve leaves the axis" if leaving else ""]
        return finish(figure, axes, title, setting, KEYS, panels, lines=lines)

    return draw


def draw_prior(axis, curves, name):
    """A dashed line at what knowing the labels' shares alone has, of runs that predict labels."""
    level = next((prior(curve.runs[0]).get(name) for curve in curves), None)
    if level is not None:
        axis.axhline(level, color="black", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="label prior")


def keep_on_scale(axes, panels, name):
    """Ends the y axes (all the same) where a curve that diverges would press the others together.

    At the lowest value + OFF_SCALE times the usual curve's height; an arrow shows where a curve leaves. Returns the
    number of curves that leave.
    """
    series = [(axis, *curve.series(name)[:2]) for axis, p in zip(axes, panels, strict=True) for curve in p.curves]
    means = [(axis, rounds, mean) for axis, rounds, mean in series if np.isfinite(mean).any()]
    if not means:
        return 0
    low = min(np.nanmin(mean) for _, _, mean in means)
    tops = [np.nanmax(mean) for _, _, mean in means]
    limit = low + OFF_SCALE * max(np.median(tops) - low, 1e-3 * abs(low))
    if max(tops) <= limit:
        return 0
    pad = 0.04 * (limit - low)
    axes[0].set_ylim(max(axes[0].get_ylim()[0], low - pad), limit + pad)
    arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for axis, rounds, mean in means:
        above = np.flatnonzero(mean > limit)
        if len(above):
            i = above[0]
            x = rounds[i]
            if i > 0 and np.isfinite(mean[i - 1]):
                # where the line to the first point above crosses the axis' end
                x = np.interp(limit + pad, mean[i - 1 : i + 1], rounds[i - 1 : i + 1])
            axis.annotate("", (x, limit + pad), (x, limit - 2 * pad), arrowprops=arrow, annotation_clip=False)
    return sum(top > limit for top in tops)


def letters(detector):
    return detector[:2].capitalize()


def mark_alarms(axis, panel, looks, name, size):
    """Each detector's first alarm as its letters on the mean curve, at the median round of the seeds that have it.

    `Di 2/3`: in two of three seeds. size: the axis in points (width, height), for marks that do not hide each other.
    Returns the detectors that spoke. Call it once the axis' limits stand.
    """
    (x0, x1), (y0, y1) = axis.get_xlim(), axis.get_ylim()
    placed, spoke = [], set()
    for curve in panel.curves:
        rounds, mean, *_ = curve.series(name)
        known, own, seeds = np.isfinite(mean), looks[curve.label], len(curve.runs)
        for detector, times in first_alarms(curve).items():
            spoke.add(detector)
            t = float(np.median(times))
            y = np.clip(np.interp(t, rounds[known], mean[known]) if known.any() else y1, y0, y1)
            words = f"{SYMBOLS[own['marker']]} {letters(detector)}"
            words += f" {len(times)}/{seeds}" if len(times) < seeds else ""
            at = np.array([(t - x0) / (x1 - x0) * size[0], (y - y0) / (y1 - y0) * size[1]])
            step = np.array([0, 10 if y < (y0 + y1) / 2 else -10])  # towards the middle
            spot = at + step
            while any(abs(spot[0] - p[0]) < 5 * len(words) and abs(spot[1] - p[1]) < 10 for p in placed):
                spot = spot + step
            placed.append(spot)
            where = {"xytext": tuple(spot - at), "textcoords": "offset points", "annotation_clip": False}
            line = {"arrowstyle": "-", "color": own["color"], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            axis.annotate("", (t, y), **where, arrowprops=line, zorder=4)
            box = {"boxstyle": "round,pad=0.18", "facecolor": "white", "edgecolor": own["color"], "linewidth": 0.9}
            axis.annotate(words, (t, y), **where, bbox=box, zorder=6, ha="center", va="center", fontsize=6.5)
    return spoke


def against(factor):
    """Draws the loss after the last round at evenly spaced values of a factor, a line per method."""

    def draw(setting, panels, args):
        figure, (axis,) = panel_axes(1)
        curves = all_curves(panels)
        ticks = {curve.place[factor]: curve.label for curve in curves}
        values = sorted(ticks, key=lambda value: order(factor, value))
        for panel in panels:
            for curve in panel.curves:
                curve.label = panel.title
        draw_along(
            axis,
            curves,
            lambda curve: curve.results("val_loss"),
            lambda curve: ticks[curve.place[factor]],
            lambda curve: order(factor, curve.place[factor]),
        )
        finite = [curve for curve in curves if np.isfinite(curve.results("val_loss")).all()]
        firsts = np.concatenate([curve.series("val_loss")[1][:1] for curve in curves])
        start = min(firsts[np.isfinite(firsts)], default=math.nan)
        if np.isfinite(start):
            before = all(curve.series("val_loss")[0][0] == 0 for curve in finite)
            name = f"{'before training' if before else 'first evaluation'}, lowest"
            axis.axhline(start, color="#999999", linestyle=(0, (1, 2)), zorder=1, label=name)
        draw_prior(axis, curves, "val_loss")
        for i, curve in enumerate(curve for curve in curves if curve not in finite):
            words = f"{curve.label}:\nnot finite" if len(panels) > 1 else "not\nfinite"
            at = values.index(curve.place[factor]), 0.98 - 0.1 * (i % 3)
            axis.annotate(words, at, xycoords=("data", "axes fraction"), ha="center", va="top")
        means = [curve.results("val_loss").mean() for curve in finite]
        if means and max(means) > 1.5 * min(means):
            log_axis(axis, min([*means, start]), max([*means, start]))
        axis.set_ylabel("Validation loss (nats)")
        return finish(figure, [axis], "Validation loss after the last round", setting, KEYS, panels, BARS)

    return draw


# ---- drift

# field, y label, logarithmic, of m orthogonal updates of equal length (or the field of its chance level)
MEASURES = (
    ("relative_drift", "Relative drift", True, lambda m: math.sqrt(m - 1)),
    ("gradient_diversity", "Gradient diversity", True, lambda m: 1.0),
    ("mean_cosine", "Cosine with the mean", False, lambda m: 1 / math.sqrt(m)),
    ("mean_cka", "CKA with the global model", False, None),
)
CORRECTIONS = (
    ("correction_ratio", "||c - c_k|| / ||g_k||", True, None),
    ("correction_cosine", "Cosine of c - c_k\nwith the drift", False, None),
    ("drift_ratio", "Drift of the gradients", True, "drift_ratio_chance"),
)


def clients_of(panel):
    """1 / sum p_k^2 of the panel's rounds: m clients of equal weight; None where that differs, or is not known."""
    rows = [row for c in panel.curves for run in c.runs for row in run.rows if row.get("relative_drift") is not None]
    counts = {round(row.get("effective_clients") or 0, 1) for row in rows}
    return counts.pop() or None if len(counts) == 1 else None


def draw_drift(title, declared=MEASURES):
    def draw(setting, panels, args):
        curves = all_curves(panels)
        measures = [m for m in declared if any(np.isfinite(curve.series(m[0])[1]).any() for curve in curves)]
        if len(panels) == 1:
            figure, axes = panel_axes(len(measures), 2, width=8.4, height=5.6 / 2, extra=0)
            axes = np.array(axes).reshape(-1, 1)
        else:
            size = {"width": (4.2 if len(panels) == 2 else 3.0) * len(panels) + 0.8, "height": 2 * len(measures) + 1.4}
            figure, axes = new_figure(len(measures), len(panels), sharey="row", sharex=True, **size)
            title_panels(axes[0], panels)
        looks = looks_in(panels)
        for row, (name, y_label, logarithmic, chance) in zip(axes, measures, strict=True):
            for axis, panel in zip(row, panels, strict=True):
                draw_rounds(axis, panel.curves, looks, name)
                axis.set_xlabel("")
                m, line = clients_of(panel), {"linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}
                if isinstance(chance, str):
                    for curve in panel.curves:
                        color = looks[curve.label]["color"]
                        axis.plot(*curve.series(chance), color=color, label="chance level", **line)
                elif chance and m and m > 1:
                    axis.axhline(chance(m), color="black", label="orthogonal updates", **line)
            means = np.concatenate([curve.series(name)[1] for curve in curves])
            means = means[np.isfinite(means)]
            if logarithmic and (means > 0).all() and means.max() > 3 * means.min():
                log_axis(row[0], means.min(), means.max())
            row[0].set_ylabel(y_label)
        for axis in axes.flat if len(panels) == 1 else axes[-1]:
            axis.set_xlabel("Round")
        where = f"{panels[0].title}, " if len(panels) == 1 else ""
        return finish(figure, axes.flat, title, setting, KEYS, panels, where=where)

    return draw


# ---- losses of clients and topics


def last_losses(run, name):
    """[K] or [C] of the run's last line, nan for a topic without texts; None where it has none or one diverged."""
    values = run.rows[-1].get(name)
    given = [number(value) for value in values if value is not None] if isinstance(values, list) else []
    return np.array([number(value) for value in values]) if given and np.isfinite(given).all() else None


def with_last(name):
    """A select of the runs that end with finite losses of that name; central ones in their partition."""

    def select(runs, notes):
        figures = figures_of([run for run in runs if last_losses(run, name) is not None], notes)
        for panel in (panel for _, panels in figures for panel in panels):
            panel.curves += central_of(panel)
        return figures

    return select


def with_single(runs, notes):
    """Panels with FedAvg and another method."""
    figures = [(s, [p for p in panels if beside_single(p)]) for s, panels in with_last(CLIENTS)(runs, notes)]
    return [(setting, panels) for setting, panels in figures if panels]


def beside_single(panel):
    """[(curve, differences to FedAvg's loss of the same client and seed)] of the other curves that share a seed."""
    base = next((curve for curve in panel.curves if curve.kind == "fedavg"), None)
    theirs = {run.seed: last_losses(run, CLIENTS) for run in base.runs} if base else {}
    chosen = []
    for curve in panel.curves:
        mine = [(last_losses(run, CLIENTS), theirs[run.seed]) for run in curve.runs if run.seed in theirs]
        pairs = [a - b for a, b in mine if len(a) == len(b)]
        if curve is not base and pairs:
            chosen.append((curve, pairs))
    return chosen


def draw_dots(axis, i, values):
    x = i - 0.17 + 0.26 * sideways(len(values))
    axis.plot(x, values, ".", color=GREY, markersize=4, zorder=2, label="a client")


BAR = {"always": False, "capsize": 3, "markersize": 6, "linestyle": "", "color": "black", "zorder": 4}
TURNED = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}


def draw_clients(setting, panels, args):
    figure, axes = axes_of(panels, height=3.3, sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        for i, curve in enumerate(panel.curves):
            values = [last_losses(run, CLIENTS) for run in curve.runs]
            draw_dots(axis, i, np.concatenate(values))
            bars(axis, [i + 0.12], [[v.mean() for v in values]], marker="o", label="mean of the clients", **BAR)
            worst = {"marker": "^", "label": "worst client", "mfc": "white"}
            bars(axis, [i + 0.27], [[v.max() for v in values]], **worst, **BAR)
        name_places(axis, [curve.label for curve in panel.curves], **TURNED)
        axis.set_ylabel("Client's own loss (nats)")
    title = "Loss of the clients on their own texts, last round"
    return finish(figure, axes, title, setting, KEYS, panels, BARS)


def draw_against(setting, panels, args):
    figure, axes = axes_of(panels, height=3.3, sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(0, color="black", linewidth=1, zorder=1)
        beside = beside_single(panel)
        for i, (_, pairs) in enumerate(beside):
            draw_dots(axis, i, np.concatenate(pairs))
            bars(axis, [i + 0.2], [[v.mean() for v in pairs]], marker="o", label="mean of the clients", **BAR)
            share = f"{100 * np.mean(np.concatenate(pairs) < 0):.0f} %"
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom", "fontsize": 7.5}
            axis.annotate(share, (i, 1.0), **place)
        axis.set_title(axis.get_title(), fontsize=9.5, pad=16)
        name_places(axis, [curve.label for curve, _ in beside], **TURNED)
        axis.set_ylabel("Loss - FedAvg's (nats)")
    title = "Each client's loss against the single global model's, same client and seed"
    lines = ["above: share of clients that are better off than with FedAvg"]
    return finish(figure, axes, title, setting, KEYS, panels, BARS, lines)


def draw_topics(setting, panels, args):
    figure, axes = axes_of(panels, height=3.1, sharey=True)
    looks = looks_of(all_curves(panels))
    for axis, panel in zip(axes, panels, strict=True):
        step = min(0.12, 0.7 / max(1, len(panel.curves)))
        for i, curve in enumerate(panel.curves):
            values = np.array([last_losses(run, TOPICS) for run in curve.runs]).T  # [C, S]
            x = np.arange(len(values)) + (i - (len(panel.curves) - 1) / 2) * step
            own = looks[curve.label] | {"linestyle": ""}
            hollow = {"mfc": "white"} if own["marker"] in MARKERS[1::2] else {}
            bars(axis, x, values, label=curve.label, capsize=2, markersize=5, **own | hollow)
        name_places(axis, topic_names(panel.curves[0].runs[0], len(values)))
        axis.set_xlim(-0.5, len(values) - 0.5)
        axis.set_ylabel("Validation loss (nats)")
    return finish(figure, axes, "Loss of each topic's validation texts, last round", setting, KEYS, panels, BARS)


def topic_names(run, count):
    """The topics' names, from run.json or partition.json, else their numbers."""
    names = run.facts.get("label_names") or (noniid_maps.read_partition(run.folder) or {}).get("label_names") or []
    return [str(name) for name in names] if len(names) == count else [str(c) for c in range(count)]


# ---- all of them

TRAIN = "runs of train.py with"
DRIFT = "runs with one global model, whose metrics.jsonl has relative_drift"
LAST = f"{TRAIN} {CLIENTS} in the last line of metrics.jsonl"
BESIDE = f"{LAST}, of FedAvg and another with the same seed"
LOSSES = partial(over_rounds, "val_loss", "Validation loss (nats)")
ACCURACY = over_rounds("val_accuracy", "Validation accuracy", "Validation accuracy")
WORST_LOSSES = over_rounds(WORST, "Worst client's loss (nats)", "Worst client's loss")
UPDATES, CORRECTED = "Drift of the clients' updates", "SCAFFOLD's corrections and the drift that they are for"
DRIFTED = f"{TRAIN} --algorithm scaffold --drift-samples"
drifting = partial(having, *(name for name, *_ in MEASURES))
FIGURES = {
    "curves": [
        Figure("noniid_curves", having("val_loss"), LOSSES("Validation loss"), f"{TRAIN} val_loss"),
        Figure("noniid_curves_accuracy", having("val_accuracy"), ACCURACY, f"{TRAIN} val_accuracy"),
        Figure("noniid_curves_worst", having(WORST), WORST_LOSSES, f"{TRAIN} {WORST}"),
    ],
    "drift": [Figure("noniid_drift", drifting(), draw_drift(UPDATES), DRIFT)],
    "corrections": [Figure("noniid_corrections", corrected, draw_drift(CORRECTED, CORRECTIONS), DRIFTED)],
    "clients": [
        Figure("noniid_clients", with_last(CLIENTS), draw_clients, LAST),
        Figure("noniid_clients_against", with_single, draw_against, BESIDE),
        Figure("noniid_clients_topics", with_last(TOPICS), draw_topics, LAST.replace(CLIENTS, TOPICS)),
    ],
    "cost_map": noniid_costs.COST_MAP,
    "similarity": noniid_maps.SIMILARITY,
    "partition": noniid_maps.PARTITION,
}
for factor, name in FACTORS.items():
    select, needs = partial(factor_figures, factor=factor), f"runs of one method with two values of {name}"
    FIGURES["curves"] += [
        Figure(f"noniid_curves_{factor}", select, LOSSES(f"Validation loss by {name}"), needs),
        Figure(f"noniid_curves_last_{factor}", select, against(factor), needs),
    ]
    title, needs = f"{UPDATES} by {name}", f"{DRIFT}, with two values of {name}"
    FIGURES["drift"].append(Figure(f"noniid_drift_{factor}", drifting(select=select), draw_drift(title), needs))


def build_parser():
    return figure_parser(STUDY, FIGURES)


def main(args):
    draw_figures(STUDY, FIGURES, args)


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
