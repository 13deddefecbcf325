"""The loss of each client and of each topic: who is served badly by the model that serves all.

    python plots/noniid_clients.py --data-dir results --out-dir results/plots

    noniid_clients.png           after the last round, a panel per partition: every client of every seed as a dot, on
                                 its own held-out texts, mean and worst client (means over seeds) beside
    noniid_clients_against.png   the same losses minus FedAvg's of the same client and seed: below 0 the client is
                                 better off than with the single global model. Clusters, local, central, the others
    noniid_clients_topics.png    validation loss of each topic's texts, a panel per partition, a marker per algorithm

Losses are in nats per token; bars are one standard deviation over seeds. A central run is compared in the partition
that its own --partition and --alpha name: that partition's clients are those whose texts it was tested on.
"""

import numpy as np

from common.cli import run_main
from common.curves import GREY, MARKERS, number
from plots.glue_drawing import all_curves, seeds_text
from plots.noniid_drawing import draw_all, figure_parser, finish, looks_of, panel_axes
from plots.noniid_partition import read_partition
from plots.noniid_runs import central_of, figures_of
from plots.vit_drawing import seed_spread

FIELD, TOPICS = "client_val_loss", "val_topic_loss"
SINGLE = "fedavg"
LACKING = "runs whose last line of metrics.jsonl has {}"


def build_parser():
    return figure_parser("Draws the loss of each client and topic.")


def main(args):
    draw_all(
        args,
        [
            ("noniid_clients", with_last(FIELD), draw_clients),
            ("noniid_clients_against", select_against, draw_against),
            ("noniid_clients_topics", with_last(TOPICS), draw_topics),
        ],
    )


def with_last(name):
    """A `select` of the figures whose runs end with finite losses of that name; central ones in their partition."""

    def select(runs, notes):
        figures = figures_of([run for run in runs if losses(run, name) is not None], notes, single=False)
        for _, panels in figures:
            for panel in panels:
                panel.curves = panel.curves + central_of(panel)
        return figures, LACKING.format(name)

    return select


def select_against(runs, notes):
    """Panels with FedAvg and another method: list[(setting, panels)]."""
    figures, lacking = with_last(FIELD)(runs, notes)
    chosen = []
    for setting, panels in figures:
        panels = [panel for panel in panels if others(panel)]
        if panels:
            chosen.append((setting, panels))
    return chosen, f"{lacking}, of FedAvg and another method with the same seed"


def losses(run, name):
    """[K] or [C] of the run's last line, nan for a topic without texts; None where it has none or one diverged."""
    values = run.rows[-1].get(name)
    if not isinstance(values, list) or not any(value is not None for value in values):
        return None
    found = np.array([number(value) for value in values])
    whole = all(np.isfinite(x) for x, value in zip(found, values, strict=True) if value is not None)
    return found if whole else None


def single(panel):
    """The panel's FedAvg curve, the usual variant, or None."""
    return next((curve for curve in panel.curves if curve.kind == SINGLE), None)


def others(panel):
    """[(curve, differences to FedAvg's loss of the same client and seed)] of the other curves that share a seed."""
    base = single(panel)
    if base is None:
        return []
    by_seed = {run.seed: losses(run, FIELD) for run in base.runs}
    found = []
    for curve in panel.curves:
        pairs = [(losses(run, FIELD), by_seed[run.seed]) for run in curve.runs if run.seed in by_seed]
        pairs = [mine - theirs for mine, theirs in pairs if len(mine) == len(theirs)]
        if curve is not base and pairs:
            found.append((curve, pairs))
    return found


def spread_dots(axis, i, values):
    """All values as grey dots about place i, spread sideways, always in the same way."""
    x = i - 0.17 + 0.26 * (np.arange(len(values)) * 0.618 % 1 - 0.5)
    axis.plot(x, values, ".", color=GREY, markersize=4, zorder=2, label="a client")


def name_places(axis, labels):
    axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.grid(False, axis="x")


def seed_bar(axis, x, values, marker, label, **look):
    """Mean of the seeds' values with a bar of one standard deviation."""
    spread = seed_spread(values)
    bar = {"capsize": 3, "markersize": 6, "linestyle": "", "color": "black", "zorder": 4} | look
    axis.errorbar([x], [np.mean(values)], [spread] if spread else None, marker=marker, label=label, **bar)


def draw_clients(setting, panels):
    figure, axes = panel_axes(panels, height=3.3)
    for axis, panel in zip(axes, panels, strict=True):
        for i, curve in enumerate(panel.curves):
            found = [losses(run, FIELD) for run in curve.runs]
            spread_dots(axis, i, np.concatenate(found))
            seed_bar(axis, i + 0.12, [x.mean() for x in found], "o", "mean of the clients")
            seed_bar(axis, i + 0.27, [x.max() for x in found], "^", "worst client", mfc="white")
        name_places(axis, [curve.label for curve in panel.curves])
        axis.set_ylabel("Client's own loss (nats)")
    title = f"Loss of the clients on their own texts, last round: {seeds_text(all_curves(panels), 'bars')}"
    finish(figure, axes, title, setting)
    return figure


def draw_against(setting, panels):
    figure, axes = panel_axes(panels, height=3.3)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(0, color="black", linewidth=1, zorder=1)
        found = others(panel)
        for i, (_, pairs) in enumerate(found):
            spread_dots(axis, i, np.concatenate(pairs))
            seed_bar(axis, i + 0.2, [x.mean() for x in pairs], "o", "mean of the clients")
            better = np.mean(np.concatenate(pairs) < 0)
            axis.annotate(
                f"{100 * better:.0f} %",
                (i, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
        axis.set_title(axis.get_title(), fontsize=9.5, pad=16)
        name_places(axis, [curve.label for curve, _ in found])
        axis.set_ylabel("Loss - FedAvg's (nats)")
    seeds = seeds_text(all_curves(panels), "bars")
    title = f"Each client's loss against the single global model's, same client and seed: {seeds}"
    finish(figure, axes, title, setting, ["above: share of clients that are better off than with FedAvg"])
    return figure


def draw_topics(setting, panels):
    figure, axes = panel_axes(panels, height=3.1)
    looks = looks_of(panels)
    for axis, panel in zip(axes, panels, strict=True):
        names = topic_names(panel)
        step = min(0.12, 0.7 / max(1, len(panel.curves)))
        for i, curve in enumerate(panel.curves):
            values = np.array([losses(run, TOPICS) for run in curve.runs])  # [S, C]
            x = np.arange(values.shape[1]) + (i - (len(panel.curves) - 1) / 2) * step
            spreads = [seed_spread(values[:, c]) for c in range(values.shape[1])]
            look = {k: v for k, v in looks[curve.label].items() if k != "linestyle"} | {"linestyle": ""}
            hollow = {"mfc": "white"} if look["marker"] in MARKERS[1::2] else {}
            axis.errorbar(x, values.mean(axis=0), spreads, label=curve.label, capsize=2, markersize=5, **look, **hollow)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_xlim(-0.5, len(names) - 0.5)
        axis.grid(False, axis="x")
        axis.set_ylabel("Validation loss (nats)")
    title = f"Loss of each topic's validation texts, last round: {seeds_text(all_curves(panels), 'bars')}"
    finish(figure, axes, title, setting)
    return figure


def topic_names(panel):
    """The topics' names, from run.json or partition.json, else their numbers."""
    run = panel.curves[0].runs[0]
    count = len(losses(run, TOPICS))
    names = run.data.get("label_names") or (read_partition(run.folder) or {}).get("label_names") or []
    return [str(name) for name in names] if len(names) == count else [str(c) for c in range(count)]


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
