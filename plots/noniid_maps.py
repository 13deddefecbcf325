"""Maps of llm_noniid: what the clients' texts are, how alike their updates, where training fails.

python plots/noniid.py partition similarity failure_map --data-dir results --out-dir results/plots

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
failure_map  noniid_failure_map_AXIS.png of failure_map*.json (`llm_noniid/failure_map.py`): the boundary between
             training that works and training that fails over alpha and AXIS, learning_rate or local_steps, a panel
             per algorithm. Points are runs: a filled dot worked, a cross failed. The line joins the middles (on a
             log scale) of the brackets between the largest value that worked and the smallest that failed; a
             bracket with one end only is an arrow to where the boundary must be. Above, hatched, training fails
"""

import json
import math
from pathlib import Path

import numpy as np

from common.cli import UsageError
from common.curves import COLORS, GREY, new_figure, number, set_title
from plots.noniid_runs import KEYS, PLACE, STUDY, factor_figures, figures_of, place_order
from plots.runs import LeftOut, describe, files_named, like_with_like
from plots.style import Figure, heat_map, legend_below, panel_axes, plain_ticks, sideways

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
        k, topics = np.array(facts["label_histograms"]).shape
        missing = [name for name in NEEDED if name not in facts]
        if missing or len(facts["counts"]) != k or len(facts["label_names"]) != topics:
            raise ValueError(f"lacks {', '.join(missing)}" if missing else "its lists differ in length")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}): delete it or run again") from error
    return facts


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
    """A figure with a titled axis for each partition, and its axes."""
    wide = math.ceil(len(there) / math.ceil(len(there) / 4))
    figure, axes = panel_axes(len(there), wide, max(5.0, 3.0 * wide + 0.9), height, 0.9)
    for axis, (name, seed, _) in zip(axes, there, strict=True):
        axis.set_title(f"{name}\n(seed {seed})", fontsize=9)
    return figure, axes


def number_clients(axis, k):
    step = max(1, math.ceil(k / 12))
    axis.set_ticks(range(0, k, step))
    axis.set_tick_params(labelsize=8)


def draw_topics(setting, there, args):
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    figure, axes = partition_axes(there)
    colors = ListedColormap(colormaps["cividis_r"](np.linspace(0.08, 1, 256)))
    for axis, (_, _, facts) in zip(axes, there, strict=True):
        counts = np.array(facts["label_histograms"])
        share = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        form = (lambda i, j, counts=counts: f"{counts[i, j]:,}") if len(counts) <= MANY[0] else None
        shown = np.ma.masked_where(counts == 0, share)
        image = heat_map(axis, shown, 0, 100, form, colors, fontsize=7, dark_high=True)
        names = facts["label_names"]
        turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 6 else {}
        axis.set_xticks(range(len(names)), names, fontsize=8, **turned)
        axis.tick_params(length=0)
        number_clients(axis.yaxis, len(counts))
        axis.set_ylabel("Client")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("Share of the client's texts (%), white: none")
    set_title(figure, f"Texts of each topic at each client\n{describe(STUDY, setting)}")
    return figure


def draw_divergence(setting, there, args):
    figure, axes = new_figure(2, 1, width=max(5.4, 1.5 * len(there) + 1.6), height=5.6, sharex=True)
    for axis, name, what in ((axes[0, 0], "label", "of topics"), (axes[1, 0], "token", "of tokens")):
        for i, (_, _, facts) in enumerate(there):
            clients, chance = np.array(facts[f"{name}_divergence"]), np.array(facts[f"{name}_divergence_chance"])
            x, look = i + 0.2 * sideways(len(clients)), {"linestyle": "", "marker": "o", "markersize": 3.5}
            axis.plot(x - 0.17, clients, color="black", label="a client", **look)
            axis.plot(x + 0.17, chance, color=GREY, mfc="white", label="a random part of its size", **look)
            for left, values, color in ((i - 0.3, clients, "black"), (i + 0.04, chance, GREY)):
                axis.hlines(values.mean(), left, left + 0.26, color=color, linewidth=1.8, zorder=3, label="their mean")
        axis.set_ylabel(f"Divergence {what}\n(bits)")
        axis.set_ylim(bottom=0)
        axis.grid(False, axis="x")
    names = [f"{name}\n(seed {seed})".replace(", ", "\n", 1) for name, seed, _ in there]
    axes[1, 0].set_xticks(range(len(there)), names, fontsize=8)
    axes[1, 0].set_xlim(-0.55, len(there) - 0.45)
    legend_below(figure, axes[0], 3)
    set_title(figure, f"Jensen-Shannon divergence of each client from the whole\n{describe(STUDY, setting)}")
    return figure


def draw_lengths(setting, there, args):
    figure, axes = partition_axes(there, height=2.8)
    top = max(np.max(facts["length_tokens"]) for _, _, facts in there)
    for axis, (_, _, facts) in zip(axes, there, strict=True):
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
        step = max(1, math.ceil(len(boxes) / 12))
        axis.set_xticks(range(0, len(boxes), step), range(0, len(boxes), step))
        axis.set_xlabel("Client")
        axis.set_ylabel("Tokens of a text")
    legend_below(figure, axes[:1], 2)
    title = "Lengths of the clients' texts: median, quartiles, 5 % and 95 %"
    set_title(figure, f"{title}\n{describe(STUDY, setting)}")
    return figure


def draw_vocabulary(setting, there, args):
    figure, axes = partition_axes(there)
    overlaps = [masked_diagonal(100 * np.array(facts["vocabulary_overlap"])) for _, _, facts in there]
    values = np.concatenate([overlap.compressed() for overlap in overlaps])
    low, high = (values.min(), values.max()) if values.size else (0, 100)
    for axis, overlap in zip(axes, overlaps, strict=True):
        image = heat_map(axis, overlap, low, high)
        axis.set_aspect("equal")
        for side in (axis.xaxis, axis.yaxis):
            number_clients(side, len(overlap))
        axis.tick_params(length=0)
        mean = f"\nmean {overlap.mean():.0f} %" if overlap.count() else ""
        axis.set_title(axis.get_title() + mean, fontsize=9)
        axis.set_xlabel("Client")
        axis.set_ylabel("Client")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("Words in common (% of both clients' words)")
    set_title(figure, f"Vocabulary that two clients share\n{describe(STUDY, setting)}")
    return figure


def masked_diagonal(square):
    return np.ma.masked_array(square, np.eye(len(square), dtype=bool))


# ---- cosines of updates


def compared(select, least=1):
    """`select` of the federated runs that compared clients in so many rounds."""

    def chosen(runs, notes):
        figures = select([run for run in runs if not run.central and lines_of(run)], notes)
        return [(s, ps) for s, ps in figures if any(len(lines_of(c.runs[0])) >= least for p in ps for c in p.curves)]

    return chosen


def lines_of(run):
    """The lines of metrics.jsonl with the cosines of two clients or more."""
    return [row for row in run.rows if isinstance(row.get("update_cosines"), list) and len(row["update_cosines"]) > 1]


def draw_similarity(at, turned=False):
    """A draw of line `at` of each curve's first run. turned: a row per panel, a column per curve."""

    def draw(setting, panels, args):
        cells = {(c.label, p.title)[:: -1 if turned else 1]: c.runs[0] for p in panels for c in p.curves}
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
                image = draw_cosines(axes[i, j], *pictures[row, column], low, high, len(cells) < 3)
                t = lines_of(run)[at]["round"]
                axes[i, j].set_title(f"{row}, {column}\nround {t}, seed {run.seed}", fontsize=8.5)
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
        bar.set_label("Cosine of two clients' updates")
        set_title(figure, f"How alike the clients' updates are\n{describe(STUDY, setting)}")
        return figure

    return draw


def picture(run, at):
    """(cosines [m, m] in the order of main topics, the diagonal masked; ids [m]; topics' (name, first, last))."""
    row = lines_of(run)[at]
    cosines = np.array(row["update_cosines"], dtype=np.float64)
    ids = row.get("compared") or sorted(row["clients"])  # of many clients some are drawn
    facts = read_partition(run.folder)
    if facts is None or run.args.get("partition") != "topic_skew":
        return masked_diagonal(cosines), ids, []
    counts = np.array(facts["label_histograms"])[ids]
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    main = share.argmax(axis=1)
    order = np.lexsort([-share.max(axis=1), main])
    places = {topic: np.flatnonzero(main[order] == topic) for topic in range(counts.shape[1])}
    blocks = [(facts["label_names"][topic], at[0], at[-1]) for topic, at in places.items() if len(at)]
    return masked_diagonal(cosines[np.ix_(order, order)]), [ids[i] for i in order], blocks


def draw_cosines(axis, cosines, ids, blocks, low, high, numbers):
    form = (lambda i, j: f"{cosines[i, j]:.2f}") if numbers and len(ids) <= MANY[1] else None
    image = heat_map(axis, cosines, low, high, form)
    axis.set_aspect("equal")
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
    return image


# ---- failure maps

AXES = {"learning_rate": "Learning rate", "local_steps": "Local steps a round"}


def read_maps(paths, notes, strict=True):
    """The failure maps as dicts, with their `path`; of two with one algorithm, axis and setting the later counts.

    strict: a damaged one raises UsageError; else `notes` gets a line.
    """
    maps = {}
    files = {file for path in paths for file in files_named(path, STUDY.beside)}
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path)):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
            for point in one["points"]:
                if not (number(point["alpha"]) > 0 < number(point["value"]) and isinstance(point["failed"], bool)):
                    raise ValueError(f"the point {point}")
            for line in one["boundary"]:
                if not (number(line["alpha"]) > 0 and {"works", "fails"} <= line.keys()):
                    raise ValueError(f"the boundary {line}")
            key = one["algorithm"], one["axis"], json.dumps(one.get("setting"), sort_keys=True), one.get("seed")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damage = f"{path} is damaged ({error}): run failure_map.py again"
            if strict:
                raise UsageError(damage) from error
            notes.append(damage)
            continue
        if not one["points"]:
            notes.append(LeftOut(path.parent.name, "no run yet", str(path)))
            continue
        if key in maps:
            old = maps[key]["path"]
            notes.append(LeftOut(old.parent.name, f"the same flags as {path}, which is later", str(old)))
        maps[key] = one | {"path": path}
    kinds = list(STUDY.kinds)
    return sorted(maps.values(), key=lambda m: kinds.index(m["algorithm"]) if m["algorithm"] in kinds else 99)


def maps_along(axis):
    def select(paths, notes):
        maps = [one for one in read_maps(paths, notes) if one["axis"] == axis]
        return [({}, maps)] if maps else []

    return select


def draw_maps(_, maps, args):
    name = maps[0]["axis"]
    size = {"width": 5.8, "height": 3.4, "extra": 1.2} if len(maps) == 1 else {"height": 3.4, "extra": 1.2}
    figure, axes = panel_axes(len(maps), 3, **size, sharex=True, sharey=True)
    alphas = sorted({point["alpha"] for one in maps for point in one["points"]})
    values = [point["value"] for one in maps for point in one["points"]]
    low, high = min(values) / 1.5, max(values) * 1.5
    titles = [STUDY.kinds.get(one["algorithm"], str(one["algorithm"])) for one in maps]
    if len(set(titles)) < len(titles):
        titles = [f"{title}, {one['path'].parent.name}" for title, one in zip(titles, maps, strict=True)]
    for axis, one, title in zip(axes, maps, titles, strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        axis.set_xlim(alphas[0] / 2, alphas[-1] * 2)
        draw_boundary(axis, sorted(one["boundary"], key=lambda line: line["alpha"]), high)
        for failed, marker, words in ((False, "o", "works"), (True, "X", "fails")):
            at = [(point["alpha"], point["value"]) for point in one["points"] if point["failed"] == failed]
            own = {"color": COLORS[1] if failed else "black", "markersize": 7 if failed else 5.5, "zorder": 4}
            if at:
                axis.plot(*zip(*at, strict=True), marker, label=words, markeredgecolor="white", **own)
        axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axis.minorticks_off()
        axis.set_title(f"{title} ({len(one['points'])} runs)", fontsize=9.5)
        axis.tick_params(labelbottom=True, labelleft=True)
        axis.set_xlabel("Dirichlet's alpha (left: one topic a client, right: alike)", fontsize=9)
        axis.set_ylabel(AXES[name])
    plain_ticks(axes[0].yaxis, low, high)
    legend_below(figure, axes)
    set_title(figure, f"Where training fails: alpha against {AXES[name].lower()}\n{about_maps(maps)}")
    return figure


def draw_boundary(axis, boundary, high):
    middles = []
    for line in boundary:
        alpha, works, fails = line["alpha"], number(line["works"]), number(line["fails"])
        if works > 0 and fails > 0:
            middles.append((alpha, math.sqrt(works * fails)))
            axis.plot([alpha] * 2, [works, fails], "-", color="#555555", linewidth=5, alpha=0.35, zorder=2)
        elif works > 0 or fails > 0:
            start, end = (works, works * 1.8) if works > 0 else (fails, fails / 1.8)
            arrow = {"arrowstyle": "-|>", "linewidth": 1.6, "color": "#555555", "shrinkA": 6, "shrinkB": 0}
            axis.annotate("", (alpha, end), (alpha, start), arrowprops=arrow, annotation_clip=False)
    if middles:
        x, y = zip(*middles, strict=True)
        axis.plot(x, y, "--", color="black", linewidth=1.6, marker="_", markersize=14, label="boundary", zorder=3)
        hatch = {"facecolor": "none", "edgecolor": "#bbbbbb", "hatch": "///", "linewidth": 0, "zorder": 1}
        axis.fill_between(x, y, high, label="training fails", **hatch)


def about_maps(maps):
    """What the maps' settings agree on, in words."""
    words = {"dataset": "{}", "model": "{}", "num_clients": "{} clients", "local_steps": "{} local steps"}
    words |= {"learning_rate": "lr {:g}", "num_rounds": "{} rounds", "participation_rate": "participation {:g}"}
    settings = [(one.get("setting") or {}) | {"seed": one.get("seed")} for one in maps]
    said = []
    for name, form in (words | {"seed": "seed {}"}).items():
        value = settings[0].get(name)
        same = len({str(setting.get(name)) for setting in settings}) == 1
        if same and value is not None and name not in {one["axis"] for one in maps}:
            said.append(form.format(Path(value).name if name == "model" else value))
    return ", ".join(said)


COSINES = "runs with one global model, whose metrics.jsonl has update_cosines"
DEALT = "partition.json in the folders of train.py's runs"
PARTITION = [
    Figure("noniid_partition_topics", partitions, draw_topics, DEALT),
    Figure("noniid_partition_divergence", partitions, draw_divergence, DEALT),
    Figure("noniid_partition_lengths", partitions, draw_lengths, DEALT),
    Figure("noniid_partition_vocabulary", partitions, draw_vocabulary, DEALT),
]
SIMILARITY = [
    Figure("noniid_similarity", compared(figures_of), draw_similarity(0), COSINES),
    Figure("noniid_similarity_last", compared(figures_of, least=2), draw_similarity(-1), COSINES),
    Figure(
        "noniid_similarity_alpha",
        compared(lambda runs, notes: factor_figures(runs, notes, "alpha")),
        draw_similarity(0, turned=True),
        f"{COSINES}, with two values of --alpha",
    ),
]
FAILURES = [
    Figure(f"noniid_failure_map_{axis}", maps_along(axis), draw_maps, "failure_map.py's failure_map.json", paths=True)
    for axis in AXES
]
