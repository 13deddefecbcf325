"""What the clients' texts are: topics, lengths, words, and how far each client is from the whole.

    python plots/noniid_partition.py --data-dir results --out-dir results/plots

    noniid_partition_topics.png       texts of each topic at each client, a panel per partition
    noniid_partition_divergence.png   Jensen-Shannon divergence of each client's topics and tokens from the whole, and
                                      of a random partition into parts of the same sizes: what small samples have
    noniid_partition_lengths.png      lengths of the clients' texts: median, quartiles, 5 % and 95 %; the whole's behind
    noniid_partition_vocabulary.png   share of words that two clients have in common (Jaccard index)

From partition.json in the folders of train.py's runs; of each partition the lowest seed is shown. Rounds, rates and
algorithms do not matter here.
"""

import json
import math

import numpy as np

from common.cli import UsageError, run_main
from common.curves import GREY, new_figure, set_title
from plots.alike import like_with_like
from plots.noniid_drawing import draw_all, figure_parser
from plots.noniid_runs import PLACE, SETTING, Run, describe, place_name

LACKING = "partition.json in the folders of train.py's runs"
NEEDED = ("label_names", "label_histograms", "vocabulary_overlap", "quantiles", "length_tokens", "length_tokens_all")
NEEDED += ("label_divergence", "label_divergence_chance", "token_divergence", "token_divergence_chance", "counts")
# what a partition does not depend on
FREE = tuple(key for key in SETTING if key not in ("dataset", "texts", "clients"))
NUMBERS = 20  # clients up to which the cells hold their numbers


def build_parser():
    return figure_parser("Draws how the texts were dealt to the clients.")


def main(args):
    draw_all(
        args,
        [
            ("noniid_partition_topics", select, draw_topics),
            ("noniid_partition_divergence", select, draw_divergence),
            ("noniid_partition_lengths", select, draw_lengths),
            ("noniid_partition_vocabulary", select, draw_vocabulary),
        ],
    )


def read_partition(folder):
    """partition.json of a run folder; None without one. Raises UsageError for a damaged one."""
    path = folder / "partition.json"
    if not path.is_file():
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


def select(runs, notes):
    """list[(setting, {partition's name: (seed, facts)})], the least skewed first."""
    chosen = []
    for setting, members in like_with_like([run for run in runs if not run.central], FREE):
        found = {}
        for run in sorted(members, key=lambda run: (str(run.seed).zfill(20), str(run.folder))):
            own = run.setting()
            key = tuple(Run.order(name, own[name]) for name in PLACE if name in own)
            if key not in found and (facts := read_partition(run.folder)) is not None:
                found[key] = place_name(own), run.seed, facts
        if found:
            chosen.append((setting, {name: (seed, facts) for _, (name, seed, facts) in sorted(found.items())}))
    return chosen, LACKING


def panels_of(found, width=3.0, height=3.2):
    """A figure with an axis for each partition: (figure, axes, (name, seed, facts) of each)."""
    wide = math.ceil(len(found) / math.ceil(len(found) / 4))
    rows = math.ceil(len(found) / wide)
    figure, axes = new_figure(rows, wide, width=max(5.0, width * wide + 0.9), height=height * rows + 0.9)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    items = [(name, seed, facts) for name, (seed, facts) in found.items()]
    for axis, (name, seed, _) in zip(axes.flat, items, strict=False):
        axis.set_title(f"{name}\n(seed {seed})", fontsize=9)
    return figure, list(axes.flat[: len(found)]), items


def draw_topics(setting, found):
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    figure, axes, items = panels_of(found)
    colors = ListedColormap(colormaps["cividis_r"](np.linspace(0.08, 1, 256))).with_extremes(bad="white")
    for axis, (_, _, facts) in zip(axes, items, strict=True):
        counts = np.array(facts["label_histograms"])
        share = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        shown = np.ma.masked_where(counts == 0, share)
        image = axis.imshow(shown, cmap=colors, vmin=0, vmax=100, aspect="auto", interpolation="nearest")
        axis.grid(False)
        if len(counts) <= NUMBERS:
            for i, j in np.argwhere(counts > 0):
                color = "white" if share[i, j] > 55 else "black"
                axis.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=7, color=color)
        name_topics(axis, facts["label_names"])
        number_clients(axis.yaxis, len(counts))
        axis.set_ylabel("Client")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("Share of the client's texts (%), white: none")
    set_title(figure, f"Texts of each topic at each client\n{describe(setting)}")
    return figure


def name_topics(axis, names):
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 6 else {}
    axis.set_xticks(range(len(names)), names, fontsize=8, **turned)
    axis.tick_params(length=0)


def number_clients(axis, k):
    step = max(1, math.ceil(k / 12))
    axis.set_ticks(range(0, k, step))
    axis.set_tick_params(labelsize=8)


def draw_divergence(setting, found):
    figure, axes = new_figure(2, 1, width=max(5.4, 1.5 * len(found) + 1.6), height=5.6, sharex=True)
    parts = ((axes[0, 0], "label", "of topics"), (axes[1, 0], "token", "of tokens"))
    for axis, name, what in parts:
        for i, (_, facts) in enumerate(found.values()):
            own, chance = np.array(facts[f"{name}_divergence"]), np.array(facts[f"{name}_divergence_chance"])
            x = 0.2 * (np.arange(len(own)) * 0.618 % 1 - 0.5)
            look = {"linestyle": "", "marker": "o", "markersize": 3.5}
            axis.plot(i - 0.17 + x, own, color="black", label="a client", **look)
            axis.plot(i + 0.17 + x, chance, color=GREY, mfc="white", label="a random part of its size", **look)
            for left, values, color in ((i - 0.3, own, "black"), (i + 0.04, chance, GREY)):
                axis.hlines(values.mean(), left, left + 0.26, color=color, linewidth=1.8, zorder=3, label="their mean")
        axis.set_ylabel(f"Divergence {what}\n(bits)")
        axis.set_ylim(bottom=0)
        axis.grid(False, axis="x")
    names = [f"{name}\n(seed {seed})".replace(", ", "\n", 1) for name, (seed, _) in found.items()]
    axes[1, 0].set_xticks(range(len(found)), names, fontsize=8)
    axes[1, 0].set_xlim(-0.55, len(found) - 0.45)
    entries = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=3)
    set_title(figure, f"Jensen-Shannon divergence of each client from the whole\n{describe(setting)}")
    return figure


def draw_lengths(setting, found):
    figure, axes, items = panels_of(found, height=2.8)
    top = max(np.max(facts["length_tokens"]) for _, _, facts in items)
    for axis, (_, _, facts) in zip(axes, items, strict=True):
        at = [facts["quantiles"].index(q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
        names = ("whislo", "q1", "med", "q3", "whishi")
        boxes = [dict(zip(names, np.array(row)[at], strict=True)) for row in facts["length_tokens"]]
        whole = np.array(facts["length_tokens_all"])[at]
        axis.axhspan(whole[1], whole[3], color="#d9d9d9", linewidth=0, zorder=0, label="all texts, quartiles")
        axis.axhline(whole[2], color=GREY, linestyle=(0, (5, 2)), zorder=1, label="all texts, median")
        axis.bxp(
            boxes,
            positions=range(len(boxes)),
            showfliers=False,
            widths=0.6,
            boxprops={"linewidth": 1},
            medianprops={"color": "black", "linewidth": 2},
        )
        axis.set_ylim(0, 1.04 * top)
        axis.set_xlim(-0.8, len(boxes) - 0.2)
        axis.grid(False, axis="x")
        step = max(1, math.ceil(len(boxes) / 12))
        axis.set_xticks(range(0, len(boxes), step), range(0, len(boxes), step))
        axis.set_xlabel("Client")
    for axis in axes:
        axis.set_ylabel("Tokens of a text")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    title = "Lengths of the clients' texts: median, quartiles, 5 % and 95 %"
    set_title(figure, f"{title}\n{describe(setting)}")
    return figure


def draw_vocabulary(setting, found):
    from matplotlib import colormaps

    figure, axes, items = panels_of(found)
    overlaps = [np.array(facts["vocabulary_overlap"]) for _, _, facts in items]
    apart = [m[~np.eye(len(m), dtype=bool)] for m in overlaps]
    values = 100 * np.concatenate(apart)
    low, high = (values.min(), values.max()) if values.size else (0, 100)
    colors = colormaps["cividis"].with_extremes(bad="white")
    for axis, overlap, pairs in zip(axes, overlaps, apart, strict=True):
        shown = np.ma.masked_array(100 * overlap, np.eye(len(overlap), dtype=bool))
        image = axis.imshow(shown, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
        axis.grid(False)
        for side in (axis.xaxis, axis.yaxis):
            number_clients(side, len(overlap))
        axis.tick_params(length=0)
        mean = f"\nmean {100 * pairs.mean():.0f} %" if pairs.size else ""
        axis.set_title(axis.get_title() + mean, fontsize=9)
        axis.set_xlabel("Client")
        axis.set_ylabel("Client")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04)
    bar.set_label("Words in common (% of both clients' words)")
    set_title(figure, f"Vocabulary that two clients share\n{describe(setting)}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
