"""Maps of llm_noniid: what the clients' texts are, how alike their updates.

python plots/noniid.py partition similarity --data-dir results --out-dir results/plots

partition    from partition.json, of each partition the lowest seed (rounds, rates and algorithms do not matter):
             noniid_partition_topics.png, texts of each topic at each client; _divergence, Jensen-Shannon divergence
             of each client's topics and tokens from the whole, and of a random partition into parts of the same
             sizes: what small samples have; _lengths, median, quartiles, 5 % and 95 %, the whole's behind;
             _vocabulary, share of words that two clients have in common (Jaccard index)
similarity   cos(d_i, d_j) of every pair of clients, d_k = s (B_k A_k - B A) over all layers, of the lowest seed:
             after the first evaluated round (noniid_similarity.png), a column per partition, a row per algorithm;
             after the last (_last); after the first, a column per alpha, a row per method (_alpha). Under topic
             skew clients stand in the order of their most frequent topic, white lines between topics; else by id.
             The diagonal, always 1, is left out of the colours
"""

import json
import math
from functools import partial

import numpy as np

from common.cli import UsageError
from common.curves import GREY, new_figure, set_title
from plots.noniid_runs import KEYS, PLACE, STUDY, factor_figures, figures_of, place_order
from plots.runs import describe, like_with_like
from plots.style import Figure, all_curves, heat_map, legend_below, panel_axes, sideways

NEEDED = ("label_names", "label_histograms", "vocabulary_overlap", "quantiles", "length_tokens", "length_tokens_all")
NEEDED += ("label_divergence", "label_divergence_chance", "token_divergence", "token_divergence_chance", "counts")
MANY = 20, 12  # clients up to which the cells of partitions, and of cosines, hold their numbers


def read_partition(folder):
    """partition.json of a run folder; None without one. Raises UsageError for a damaged one."""
    path = folder and folder / "partition.json"
    if not path or not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if missing := [name for name in NEEDED if name not in facts]:
            raise ValueError(f"lacks {', '.join(missing)}")
        if np.array(facts["label_histograms"]).shape != (len(facts["counts"]), len(facts["label_names"])):
            raise ValueError("its lists differ in length")
        for name in NEEDED:
            if "divergence" in name and np.array(facts[name], np.float64).shape != (len(facts["counts"]),):
                raise ValueError(f"{name} has not a number for each client")
        length_tokens, quantiles = np.array(facts["length_tokens"], np.float64), len(facts["quantiles"])
        if length_tokens.shape != (len(facts["counts"]), quantiles) or len(facts["length_tokens_all"]) != quantiles:
            raise ValueError("length_tokens has not a number for each client and quantile")
        if np.array(facts["vocabulary_overlap"], np.float64).shape != (len(facts["counts"]),) * 2:
            raise ValueError("vocabulary_overlap has not a number for each two clients")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}): delete it or run again") from error
    return facts


def finished(figure, title, setting, bar=""):
    """With its title and, where it has heat maps, their scale: what a colour is."""
    if bar:
        image = next(axis.images[0] for axis in figure.axes if axis.images)
        figure.colorbar(image, ax=figure.axes, pad=0.02, fraction=0.04).set_label(bar)
    set_title(figure, f"{title}\n{describe(STUDY, setting)}")
    return figure


def number_clients(axis, ids):
    """Ticks of a matplotlib axis (`axes.xaxis`) with clients at 0, 1, ...: twelve of them at most."""
    step = math.ceil(len(ids) / 12)
    axis.set_ticks(range(0, len(ids), step), ids[::step], fontsize=8)


def without_diagonal(square):
    return np.ma.masked_array(square, np.eye(len(square), dtype=bool))


# ---- partitions


def partitions(runs, notes):
    """list[(setting, [(partition's name, seed, facts)])], the least skewed first; runs may differ in all else."""
    free = tuple(key for key in KEYS if key not in ("dataset", "texts", "clients"))
    chosen = []
    for setting, members in like_with_like([run for run in runs if not run.central], free):
        there = {}
        for run in sorted(members, key=lambda run: (str(run.seed).zfill(20), str(run.folder))):
            key = tuple(place_order(run.setting))
            if key not in there and (facts := read_partition(run.folder)) is not None:
                there[key] = describe(STUDY, run.setting, PLACE), run.seed, facts
        if there:
            chosen.append((setting, [there[key] for key in sorted(there)]))
    return chosen


def partition_axes(there, height=3.2):
    """A figure with a titled axis for each partition, and [(axis, facts)]."""
    wide = math.ceil(len(there) / math.ceil(len(there) / 4))
    figure, axes = panel_axes(len(there), wide, max(5.0, 3.0 * wide + 0.9), height, 0.9)
    for axis, (name, seed, _) in zip(axes, there, strict=True):
        axis.set_title(f"{name}\n(seed {seed})", fontsize=9)
    return figure, [(axis, facts) for axis, (_, _, facts) in zip(axes, there, strict=True)]


def draw_topics(setting, there, args):
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    figure, panels = partition_axes(there)
    colors = ListedColormap(colormaps["cividis_r"](np.linspace(0.08, 1, 256)))
    for axis, facts in panels:
        counts, names = np.array(facts["label_histograms"]), facts["label_names"]
        share = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        form = (lambda i, j, counts=counts: f"{counts[i, j]:,}") if len(counts) <= MANY[0] else None
        heat_map(axis, np.ma.masked_where(counts == 0, share), 0, 100, form, colors, fontsize=7, dark_high=True)
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 6 else {}
        axis.set_xticks(range(len(names)), names, fontsize=8, **turned)
        axis.tick_params(length=0)
        number_clients(axis.yaxis, range(len(counts)))
        axis.set_ylabel("Client")
    bar = "Share of the client's texts (%), white: none"
    return finished(figure, "Texts of each topic at each client", setting, bar)


def draw_divergence(setting, there, args):
    figure, axes = new_figure(2, 1, width=max(5.4, 1.5 * len(there) + 1.6), height=5.6, sharex=True)
    for axis, name in zip(axes.flat, ("label", "token"), strict=True):
        for i, (_, _, facts) in enumerate(there):
            clients, chance = np.array(facts[f"{name}_divergence"]), np.array(facts[f"{name}_divergence_chance"])
            x, look = i + 0.2 * sideways(len(clients)), {"linestyle": "", "marker": "o", "markersize": 3.5}
            axis.plot(x - 0.17, clients, color="black", label="a client", **look)
            axis.plot(x + 0.17, chance, color=GREY, mfc="white", label="a random part of its size", **look)
            for left, values, color in ((i - 0.3, clients, "black"), (i + 0.04, chance, GREY)):
                axis.hlines(values.mean(), left, left + 0.26, color=color, linewidth=1.8, zorder=3, label="their mean")
        axis.set_ylabel(f"Divergence of {'topics' if name == 'label' else 'tokens'}\n(bits)")
        axis.set_ylim(bottom=0)
        axis.grid(False, axis="x")
    names = [f"{name}\n(seed {seed})".replace(", ", "\n", 1) for name, seed, _ in there]
    axes[1, 0].set_xticks(range(len(there)), names, fontsize=8)
    axes[1, 0].set_xlim(-0.55, len(there) - 0.45)
    legend_below(figure, axes[0], 3)
    return finished(figure, "Jensen-Shannon divergence of each client from the whole", setting)


def draw_lengths(setting, there, args):
    figure, panels = partition_axes(there, height=2.8)
    top = max(np.max(facts["length_tokens"]) for _, facts in panels)
    for axis, facts in panels:
        at = [facts["quantiles"].index(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        names = ("whislo", "q1", "med", "q3", "whishi")
        boxes = [dict(zip(names, np.array(row)[at], strict=True)) for row in facts["length_tokens"]]
        whole = np.array(facts["length_tokens_all"])[at]
        axis.axhspan(whole[1], whole[3], color="#d9d9d9", linewidth=0, zorder=0, label="all texts, quartiles")
        axis.axhline(whole[2], color=GREY, linestyle=(0, (5, 2)), zorder=1, label="all texts, median")
        looks = {"boxprops": {"linewidth": 1}, "medianprops": {"color": "black", "linewidth": 2}}
        axis.bxp(boxes, positions=range(len(boxes)), showfliers=False, widths=0.6, **looks)
        axis.set_ylim(0, 1.04 * top)
        axis.set_xlim(-0.8, len(boxes) - 0.2)
        axis.grid(False, axis="x")
        number_clients(axis.xaxis, range(len(boxes)))
        axis.set_xlabel("Client")
        axis.set_ylabel("Tokens of a text")
    legend_below(figure, figure.axes[:1], 2)
    return finished(figure, "Lengths of the clients' texts: median, quartiles, 5 % and 95 %", setting)


def draw_vocabulary(setting, there, args):
    figure, panels = partition_axes(there)
    overlaps = [without_diagonal(100 * np.array(facts["vocabulary_overlap"])) for _, facts in panels]
    values = np.concatenate([overlap.compressed() for overlap in overlaps])
    low, high = (values.min(), values.max()) if values.size else (0, 100)
    for (axis, _), overlap in zip(panels, overlaps, strict=True):
        heat_map(axis, overlap, low, high)
        axis.set_aspect("equal")
        for side in (axis.xaxis, axis.yaxis):
            number_clients(side, range(len(overlap)))
        axis.tick_params(length=0)
        mean = f"\nmean {overlap.mean():.0f} %" if overlap.count() else ""
        axis.set_title(axis.get_title() + mean, fontsize=9)
        axis.set_xlabel("Client")
        axis.set_ylabel("Client")
    bar = "Words in common (% of both clients' words)"
    return finished(figure, "Vocabulary that two clients share", setting, bar)


# ---- cosines of updates


def compared(rounds=1, select=figures_of):
    """`select`, of the federated runs that compared clients; of figures in which a run did so in so many rounds."""

    def chosen(runs, notes):
        figures = select([run for run in runs if not run.central and compared_in(run)], notes)
        return [(s, ps) for s, ps in figures if any(len(compared_in(c.runs[0])) >= rounds for c in all_curves(ps))]

    return chosen


def compared_in(run):
    """The lines of metrics.jsonl with the cosines of two clients or more."""
    return [row for row in run.rows if len(row.get("update_cosines") or []) > 1]


def draw_similarity(at):
    """A draw of line `at` of each curve's first run, a column per partition, or per value of a factor."""

    def draw(setting, panels, args):
        cells = {(c.label, p.title)[:: -1 if c.place else 1]: c.runs[0] for p in panels for c in p.curves}
        rows, columns = (list(dict.fromkeys(place[i] for place in cells)) for i in (0, 1))
        wide, tall = max(5.4, 2.6 * len(columns) + 1.4), 2.4 * len(rows) + 1.2
        figure, axes = new_figure(len(rows), len(columns), width=wide, height=tall)
        pictures = {place: picture(run, at) for place, run in cells.items()}
        apart = np.concatenate([cosines.compressed() for cosines, *_ in pictures.values()])
        low, high = np.floor(10 * apart.min()) / 10, np.ceil(10 * apart.max()) / 10
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if (row, column) not in cells:
                    axes[i, j].set_axis_off()
                    continue
                run = cells[row, column]
                draw_cosines(axes[i, j], *pictures[row, column], low, high, len(cells) < 3)
                t = compared_in(run)[at]["round"]
                axes[i, j].set_title(f"{row}, {column}\nround {t}, seed {run.seed}", fontsize=8.5)
        return finished(figure, "How alike the clients' updates are", setting, "Cosine of two clients' updates")

    return draw


def picture(run, at):
    """(cosines [m, m] in the order of main topics, the diagonal masked; ids [m]; topics' (name, first, last))."""
    row = compared_in(run)[at]
    cosines = np.array(row["update_cosines"], dtype=np.float64)
    ids = row.get("compared") or sorted(row["clients"])  # of many clients some are drawn
    facts = read_partition(run.folder)
    if facts is None or run.args.get("partition") != "topic_skew":
        return without_diagonal(cosines), ids, []
    counts = np.array(facts["label_histograms"])[ids]
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    main = share.argmax(axis=1)
    order = np.lexsort([-share.max(axis=1), main])
    places = {topic: np.flatnonzero(main[order] == topic) for topic in range(counts.shape[1])}
    blocks = [(facts["label_names"][topic], at[0], at[-1]) for topic, at in places.items() if len(at)]
    return without_diagonal(cosines[np.ix_(order, order)]), [ids[i] for i in order], blocks


def draw_cosines(axis, cosines, ids, blocks, low, high, numbers):
    form = (lambda i, j: f"{cosines[i, j]:.2f}") if numbers and len(ids) <= MANY[1] else None
    heat_map(axis, cosines, low, high, form)
    axis.set_aspect("equal")
    axis.tick_params(length=0)
    number_clients(axis.xaxis, ids)
    axis.set_xlabel("Client", fontsize=8)
    if not blocks:
        number_clients(axis.yaxis, ids)
        axis.set_ylabel("Client", fontsize=8)
        return
    axis.set_yticks([(first + last) / 2 for _, first, last in blocks], [name for name, *_ in blocks], fontsize=8)
    for _, first, _ in blocks[1:]:
        axis.axhline(first - 0.5, color="white", linewidth=1.6)
        axis.axvline(first - 0.5, color="white", linewidth=1.6)


# ---- all of them

COSINES = "runs with one global model, whose metrics.jsonl has update_cosines"
BY_ALPHA = compared(select=partial(factor_figures, factor="alpha"))
SIMILARITY = [
    Figure("noniid_similarity", compared(), draw_similarity(0), COSINES),
    Figure("noniid_similarity_last", compared(rounds=2), draw_similarity(-1), COSINES),
    Figure("noniid_similarity_alpha", BY_ALPHA, draw_similarity(0), f"{COSINES}, with two values of --alpha"),
]
PARTITION = [
    Figure(f"noniid_partition_{name}", partitions, draw, "partition.json in the folders of train.py's runs")
    for name, draw in (
        ("topics", draw_topics),
        ("divergence", draw_divergence),
        ("lengths", draw_lengths),
        ("vocabulary", draw_vocabulary),
    )
]
