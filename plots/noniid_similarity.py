"""How alike the clients' updates are: a heat map of the cosine of every pair, clients ordered by main topic.

    python plots/noniid_similarity.py --data-dir results --out-dir results/plots

    noniid_similarity.png         after the first evaluated round, a column per partition, a row per algorithm
    noniid_similarity_last.png    after the last evaluated round
    noniid_similarity_alpha.png   after the first evaluated round, a column per alpha, a row per method

cos(d_i, d_j) with d_k = s (B_k A_k - B A), over all layers, of the lowest seed. Under topic skew clients stand in the
order of their most frequent topic, white lines between topics; else by id, under style and token skew the order of the
slices that they got. The diagonal, always 1, is left out of the colours.
"""

import numpy as np

from common.cli import run_main
from common.curves import new_figure, set_title
from plots.noniid_drawing import draw_all, figure_parser
from plots.noniid_partition import read_partition
from plots.noniid_runs import describe, factor_figures, figures_of

FIELD = "update_cosines"
LACKING = "runs with one global model, whose metrics.jsonl has update_cosines"
NUMBERS = 12  # clients up to which a cell of a small figure holds its number


def build_parser():
    return figure_parser("Draws the cosines of the clients' updates.")


def main(args):
    def main_figures(runs, notes):
        return figures_of(measured(runs), notes, single=False), LACKING

    def alphas(runs, notes):
        return factor_figures(measured(runs), notes, "alpha"), f"{LACKING}, with two values of --alpha"

    draw_all(
        args,
        [
            ("noniid_similarity", main_figures, draw(0)),
            ("noniid_similarity_last", lambda runs, notes: (several(main_figures(runs, notes)[0]), LACKING), draw(-1)),
            ("noniid_similarity_alpha", alphas, draw(0, turned=True)),
        ],
    )


def measured(runs):
    """The federated runs with the cosines of two clients' updates or more."""
    return [run for run in runs if not run.central and rounds_of(run)]


def rounds_of(run):
    """The lines of metrics.jsonl with the cosines of two clients or more."""
    return [row for row in run.rows if isinstance(row.get(FIELD), list) and len(row[FIELD]) > 1]


def several(figures):
    """The figures in which a run has two such rounds."""
    return [(s, ps) for s, ps in figures if any(len(rounds_of(c.runs[0])) > 1 for p in ps for c in p.curves)]


def draw(at, turned=False):
    """A function that draws line `at` of each curve's first run. turned: a row per panel, a column per curve."""

    def figure_for(setting, panels):
        cells = {}
        for panel in panels:
            for curve in panel.curves:
                place = (panel.title, curve.label) if turned else (curve.label, panel.title)
                cells[place] = curve.runs[0]
        rows, columns = (list(dict.fromkeys(place[i] for place in cells)) for i in (0, 1))
        wide, tall = max(5.4, 2.6 * len(columns) + 1.4), 2.4 * len(rows) + 1.2
        figure, axes = new_figure(len(rows), len(columns), width=wide, height=tall)
        pictures = {place: picture(run, at) for place, run in cells.items()}
        apart = np.concatenate([m[~np.eye(len(m), dtype=bool)] for m, *_ in pictures.values()])
        low, high = np.floor(10 * apart.min()) / 10, np.ceil(10 * apart.max()) / 10
        image = None
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                axis = axes[i, j]
                if (row, column) not in cells:
                    axis.set_axis_off()
                    continue
                image = heat_map(axis, *pictures[row, column], low, high, len(cells) < 3)
                t = rounds_of(cells[row, column])[at]["round"]
                axis.set_title(f"{row}, {column}\nround {t}, seed {cells[row, column].seed}", fontsize=8.5)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
        bar.set_label("Cosine of two clients' updates")
        set_title(figure, f"How alike the clients' updates are\n{describe(setting)}")
        return figure

    return figure_for


def picture(run, at):
    """(cosines [m, m] in the order of main topics, client ids [m], topics' blocks [(name, first, last)])."""
    row = rounds_of(run)[at]
    cosines = np.array(row[FIELD], dtype=np.float64)
    ids = row.get("compared") or sorted(row["clients"])  # of many clients some are drawn
    facts = read_partition(run.folder)
    if facts is None or run.args.get("partition") != "topic_skew":
        return cosines, ids, []
    counts = np.array(facts["label_histograms"])[ids]
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    main = share.argmax(axis=1)
    order = np.lexsort([-share.max(axis=1), main])
    blocks = []
    for topic in range(counts.shape[1]):
        places = np.flatnonzero(main[order] == topic)
        if len(places):
            blocks.append((facts["label_names"][topic], places[0], places[-1]))
    return cosines[np.ix_(order, order)], [ids[i] for i in order], blocks


def heat_map(axis, cosines, ids, blocks, low, high, numbers):
    from matplotlib import colormaps

    shown = np.ma.masked_array(cosines, np.eye(len(cosines), dtype=bool))
    colors = colormaps["cividis"].with_extremes(bad="#ffffff")
    image = axis.imshow(shown, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    axis.grid(False)
    step = max(1, len(ids) // 12)
    axis.set_xticks(range(0, len(ids), step), ids[::step], fontsize=7)
    axis.tick_params(length=0)
    if blocks:
        axis.set_yticks([(first + last) / 2 for _, first, last in blocks], [name for name, *_ in blocks], fontsize=7)
        for _, first, _ in blocks[1:]:
            axis.axhline(first - 0.5, color="white", linewidth=1.6)
            axis.axvline(first - 0.5, color="white", linewidth=1.6)
    else:
        axis.set_yticks(range(0, len(ids), step), ids[::step], fontsize=7)
        axis.set_ylabel("Client", fontsize=8)
    axis.set_xlabel("Client", fontsize=8)
    if numbers and len(ids) <= NUMBERS:
        for i, j in np.argwhere(~np.eye(len(ids), dtype=bool)):
            dark = cosines[i, j] < (low + high) / 2
            color = "white" if dark else "black"
            axis.text(j, i, f"{cosines[i, j]:.2f}", ha="center", va="center", fontsize=5.5, color=color)
    return image


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
