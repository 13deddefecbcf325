"""Figures of weights: updates stored in `deltas/step_*.npz` (singular values, heat maps), what masks keep of layers.

Arrays are named `layers.{i}.in_proj` [rows, d_model] and `layers.{i}.{A_log,D,dt_bias}` [heads].
"""

import math
import re
import zipfile
import zlib

import numpy as np

from common.cli import UsageError
from common.curves import COLORS, DASHES, GREY, MARKERS, break_lines, log_axis, new_figure, set_title
from plots import style

TOP = 80  # rows and columns of a heat map
STEPS = 10  # panels of a heat map
SINGULAR_VALUES = 8  # lines of an evolution
ENERGY = 0.95
VECTORS = ("A_log", "D", "dt_bias")
_WHOLE_RANGE = 99.5  # percentile at which the colour scale ends: one outlier must not blacken the rest


def stored_in(folder, notes):
    """The steps stored in a `deltas` folder, in order: list[(step, path)]; a note for each damaged file."""
    files = []
    for path in sorted(folder.glob("step_*.npz")):
        if not (step := re.fullmatch(r"step_(\d+)", path.stem)):
            continue
        try:
            with zipfile.ZipFile(path) as arrays:
                if odd := arrays.testzip():  # reads all: no figure may be half drawn when an array turns out damaged
                    raise zipfile.BadZipFile(odd)
            if layers_in(path):
                files.append((int(step[1]), path))
            else:
                notes.append(f"left out {path}: no array layers.<i>.in_proj")
        except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            notes.append(f"left out {path}: damaged ({type(error).__name__})")
    return sorted(files)


def layers_in(path):
    """The layer indices that a file has an in_proj of."""
    with np.load(path, allow_pickle=False) as arrays:
        matches = (re.fullmatch(r"layers\.(\d+)\.in_proj", name) for name in arrays.files)
        return sorted(int(match.group(1)) for match in matches if match)


def load(path, layer, name="in_proj"):
    """One array as fp64, or None if the file lacks it."""
    with np.load(path, allow_pickle=False) as arrays:
        key = f"layers.{layer}.{name}"
        return arrays[key].astype(np.float64) if key in arrays.files else None


def evenly(items, count):
    """At most `count` of the items, evenly spaced, with the first and the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


# ---- singular values


def singular_values(matrix):
    """All singular values, largest first, by the smaller Gram matrix (fp64): sigma^2 = eig(M M^T).

    Five times faster than an SVD at [2320, 512]. Values below 1e-8 of the largest are rounding and come out as such.
    """
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))


def energy_rank(sigma):
    """The smallest r with sum_{i<=r} sigma_i^2 >= ENERGY * sum_i sigma_i^2; 0 if all are 0."""
    total = np.cumsum(sigma**2)
    return int(np.searchsorted(total, ENERGY * total[-1] * (1 - 1e-12)) + 1) if total[-1] else 0


def spectra(files, layer):
    """dict step -> singular values of that step's in_proj update; a step with a non-finite entry is left out."""
    matrices = {step: load(path, layer) for step, path in files}
    return {step: singular_values(m) for step, m in matrices.items() if m is not None and np.isfinite(m).all()}


def mean_over(histories):
    """Steps that all histories (dict step -> sigma) have, and their values stacked: (list[int], [n, steps, r])."""
    histories = [h for h in histories if h]
    steps = sorted(set.intersection(*map(set, histories))) if histories else []
    return steps, np.array([[h[step] for step in steps] for h in histories])


def spectra_axes(panels, title, x_label, y_label):
    figure, axes = style.panel_axes(len(panels), 2, 6.2 if len(panels) == 1 else 9.6, 3.0, 0.9)
    for axis in axes:
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel(x_label)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel(y_label)
    set_title(figure, title)
    return figure, axes


def evolution(panels, title, step_name):
    """The largest singular values of each update over training: mean and minimum to maximum.

    panels: list[(name, steps, values [n, steps, r])].
    """
    figure, axes = spectra_axes(panels, title, step_name, "Singular value of the update")
    for axis, (name, steps, values) in zip(axes, panels, strict=True):
        top = values[:, :, :SINGULAR_VALUES]  # [n, steps, 8]
        for k in range(top.shape[2]):
            # From dark to light: the order of the values is the order of the greys.
            shade = COLORS[0] if k == 0 else str(round(0.1 + 0.07 * k, 2))
            look = {"color": shade, "marker": MARKERS[k], "linewidth": 1.2}
            every = style.markers_at(k, len(steps), SINGULAR_VALUES)
            axis.plot(steps, top[:, :, k].mean(axis=0), markevery=every, label=f"$\\sigma_{k + 1}$", **look)
            if len(top) > 1:
                low, high = top[:, :, k].min(axis=0), top[:, :, k].max(axis=0)
                axis.fill_between(steps, low, high, color=COLORS[2], alpha=0.15, linewidth=0)
        log_of_positive(axis, top)
        style.whole_numbers(axis.xaxis)
        if len(steps) == 1:
            axis.set_xlim(steps[0] - 1, steps[0] + 1)
        axis.set_title(name, fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def spectrum(panels, title):
    """The last update's singular values, and the rank that holds 95 % of the energy (sum of squares).

    panels: list[(name, values [n, r])]; the rank is each spectrum's own, then averaged.
    """
    figure, axes = spectra_axes(panels, title, "Index", "Singular value")
    for axis, (name, values) in zip(axes, panels, strict=True):
        ranks = [energy_rank(sigma) for sigma in values]
        style.band(axis, np.arange(1, values.shape[1] + 1), values, None, {"color": COLORS[2]}, None, "range", 0.2)
        axis.axvline(np.mean(ranks), color=COLORS[1], linestyle=DASHES[1])
        # What lies below a millionth of the largest is rounding: it would squeeze the rest.
        log_of_positive(axis, values[values > values.max() * 1e-6])
        axis.set_xlim(left=0)
        between = f" ({min(ranks)} to {max(ranks)})" if min(ranks) != max(ranks) else ""
        rank = f"dashed: 95 % of the energy, rank {np.mean(ranks):.3g}{between} of {values.shape[1]}"
        axis.set_title(", ".join(filter(None, [name, rank])), fontsize=9)
    return figure


def log_of_positive(axis, values):
    positive = values[values > 0]
    if positive.size:
        log_axis(axis, positive.min(), positive.max())


# ---- heat maps


def heatmaps(panels, title, blocks):
    """One panel per (name, matrix): |update| of the TOP rows and columns with the largest norm over all panels.

    The same rows and columns in every panel, in the order of the matrix, so that panels compare entry by entry;
    one colour scale, dark to light, that prints in grey.
    """
    matrices = [np.abs(matrix) for _, matrix in panels]
    rows, columns = strongest(matrices)
    zoomed = [m[np.ix_(rows, columns)] for m in matrices]
    top = np.nanpercentile(np.stack(zoomed), _WHOLE_RANGE) or 1.0
    ticks = block_ticks(rows, blocks)
    wide = min(5, len(panels))
    figure, axes = style.panel_axes(len(panels), wide, 1.2 + 1.95 * wide, 2.1, 0.9, sharex=True, sharey=True)
    for axis, (name, _), values in zip(axes, panels, zoomed, strict=True):
        image = style.heat_map(axis, values, 0, top)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([middle for _, middle, _ in ticks], [name for name, _, _ in ticks])
        for _, _, start in ticks[1:]:
            axis.axhline(start - 0.5, color="white", linewidth=0.7)
        axis.tick_params(length=0)
    figure.supxlabel(f"{len(columns)} of {matrices[0].shape[1]} columns (inputs)", fontsize=9)
    figure.supylabel(f"{len(rows)} of {matrices[0].shape[0]} rows (outputs)", fontsize=9)
    figure.colorbar(image, ax=axes, extend="max", pad=0.01, fraction=0.03).set_label("|update| of in_proj")
    set_title(figure, title)
    return figure


def strongest(matrices):
    """The TOP rows and the TOP columns with the largest norm over all matrices together, as ascending indices."""
    energy = sum(np.nan_to_num(m) ** 2 for m in matrices)  # [rows, columns]
    return [np.sort(np.argsort(-energy.sum(axis=other), kind="stable")[:TOP]) for other in (1, 0)]


def in_proj_blocks(run_args, rows, columns, heads):
    """[(name, first row)] of z, x, B, C, dt in in_proj's rows, or [] if the sizes do not fit together."""
    inner = (run_args.get("expand") or 2) * columns
    state = rows - 2 * inner - (heads or 0)
    if not heads or state <= 0 or state % 2:
        return []
    starts = np.cumsum([0, inner, inner, state // 2, state // 2])
    return list(zip(("z", "x", "B", "C", "dt"), starts.tolist(), strict=True))


def block_ticks(rows, blocks):
    """[(name, middle, first)] of the blocks that chosen rows fall into, in positions of the heat map.

    A block with too few rows for a label of its own height shares one with its neighbour: `B, C`.
    """
    ends = np.searchsorted(rows, [first for _, first in blocks] + [math.inf])
    joined = []
    for (name, _), first, last in zip(blocks, ends, ends[1:] - 1, strict=False):
        if joined and first <= last and min(last - first, joined[-1][2] - joined[-1][1]) < 6:
            joined[-1] = f"{joined[-1][0]}, {name}", joined[-1][1], last
        elif first <= last:
            joined.append((name, first, last))
    return [(name, (first + last) / 2, first) for name, first, last in joined]


def head_heatmaps(files, layers, title, step_name):
    """|update| of A_log, D and dt_bias: heads by steps, a row of panels per layer. None if the files lack them."""
    present = [name for name in VECTORS if load(files[0][1], layers[0], name) is not None]
    if not present:
        return None
    size = {"width": 8.4, "height": 0.9 + 1.7 * len(layers)}
    figure, axes = new_figure(len(layers), len(present), sharex=True, sharey="row", **size)
    for row, layer in zip(axes, layers, strict=True):
        for axis, name in zip(row, present, strict=True):
            values = np.abs([load(path, layer, name) for _, path in files]).T  # [heads, steps]
            image = style.heat_map(axis, values, 0, np.nanmax(values) or 1.0)
            axis.set_title(name if len(layers) == 1 else f"{name}, layer {layer}", fontsize=9)
            figure.colorbar(image, ax=axis, pad=0.02).ax.tick_params(labelsize=8)
        row[0].set_ylabel("Head")
        style.whole_numbers(row[0].yaxis)
    shown = evenly(range(len(files)), 4)
    for axis in axes[-1]:
        axis.set_xticks(shown, [str(files[i][0]) for i in shown])
        axis.set_xlabel(step_name)
    set_title(figure, title)
    return figure


# ---- masks

# The end of a layer's name (in transformers' newer, older form) -> its panel's title, in the order of the panels.
TITLES = {
    "layernorm_before": "Norm before attention",
    "attention.q_proj": "Query",
    "attention.k_proj": "Key",
    "attention.v_proj": "Value",
    "attention.o_proj": "Attention output",
    "layernorm_after": "Norm before MLP",
    "mlp.fc1": "MLP, first",
    "mlp.fc2": "MLP, second",
}
OTHER = "Outside the blocks"
OUTSIDE = {"layernorm": "last norm", "patch_embeddings.projection": "patches"}


def kept_shares(run):
    """{tensor: share kept, 0 to 1} of what a run says its mask keeps. Raises UsageError where that is damaged."""
    try:
        return {name: kept / size for name, (kept, size) in run.results["kept"].items()}
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        raise UsageError(f"{run.folder or run.name}: kept is damaged (no [kept, size] a tensor): run again") from None


def place_of(tensor):
    """(title of its panel, block number, or outside the blocks its name) of a tensor's name; biases are apart."""
    layer, _, kind = tensor.rpartition(".")
    more = ", bias" if kind == "bias" else ""
    block = re.search(r"(?:^|\.)(\d+)\.(.+)$", layer)
    if block:
        return TITLES.get(block[2], block[2]) + more, int(block[1])
    name = layer.removeprefix("vit.").removeprefix("embeddings.")
    return OTHER, OUTSIDE.get(name, name) + more


def draw_layers(setting, curves, args):
    """A panel per kind of tensor, the blocks along the axis; dotted: the fraction kept of all weights."""
    shares = [[kept_shares(run) for run in curve.runs] for curve in curves]
    kept = [[{place_of(name): 100 * share for name, share in one.items()} for one in seeds] for seeds in shares]
    every = dict.fromkeys(place for seeds in kept for one in seeds for place in one)
    order = [title + more for title in TITLES.values() for more in ("", ", bias")]
    order += [title for title, _ in every if title not in (*order, OTHER)] + [OTHER]
    titles = sorted({title for title, _ in every}, key=order.index)
    looks = style.looks_of(curves)
    figure, axes = style.panel_axes(len(titles), 4 if len(titles) > 9 else 3, 9.6, 2.1, 1.1, sharey=True)
    for axis, title in zip(axes, titles, strict=True):
        places = [place for panel, place in every if panel == title]
        places.sort(key=lambda place: place if isinstance(place, int) else 0)
        for i, (curve, seeds) in enumerate(zip(curves, kept, strict=True)):
            values = np.array([[one.get((title, place), math.nan) for place in places] for one in seeds])
            look, x, mean = looks[curve.label], np.arange(len(places)), values.mean(axis=0)
            if title == OTHER:  # not a sequence: side by side, bars for bands
                low, high = values.min(axis=0), values.max(axis=0)
                spread = np.maximum([mean - low, high - mean], 0)  # the mean of equal values may round past them
                look = look | {"linestyle": "", "elinewidth": 1, "label": curve.label}
                axis.errorbar(x + 0.1 * (i - (len(curves) - 1) / 2), mean, yerr=spread, **look)
            else:
                style.band(axis, x, values, curve.label, look, spread="range", alpha=0.15)
        if "sparsity" in setting:
            overall = 100 * (1 - setting["sparsity"])
            axis.axhline(overall, color=GREY, linestyle=":", linewidth=1.2, label=f"all weights: {overall:.3g} %")
        axis.set_title(title, fontsize=9)
        # nothing kept must be seen, and 1 % told from 10 %
        axis.set_yscale("symlog", linthresh=1, linscale=0.5)
        axis.set_ylim(-0.15, 130)
        axis.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
        axis.minorticks_off()
        if title == OTHER:
            names = [break_lines(str(place), 8) for place in places]
            axis.set_xticks(range(len(places)), names, size=7.5)
            axis.set_xlim(-0.5, len(places) - 0.5)
        else:
            shown = range(0, len(places), math.ceil(len(places) / 12))
            axis.set_xticks(shown, [str(places[i]) for i in shown])
            axis.set_xlabel("Block")
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("Kept (%)")
    style.legend_below(figure, axes[:1])
    style.caption(figure, f"Weights that the masks keep, by layer: {style.seeds_text(curves)}", setting, curves)
    return figure
