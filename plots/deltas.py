"""Figures of weight updates, stored by mamba_fl's scripts with --save-deltas: heat maps and singular values of in_proj.

The fronts, with the sources' names, are visualize_deltas.py and visualize_federated_deltas.py. Arrays in
`deltas/step_*.npz` are named `layers.{i}.in_proj` [rows, d_model].
"""

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError
from common.curves import COLORS, DASHES, MARKERS, log_axis, save_figure, set_title
from common.curves import style as figure_style
from plots import style
from plots.mamba import STUDY, setting_of
from plots.read import read
from plots.rows import describe, groups, rows_of

TOP = 80  # rows and columns of a heat map
STEPS = 10  # panels of a heat map
SINGULAR_VALUES = 8  # lines of an evolution
ENERGY = 0.95
WHOSE = {"central": "Updates", "server": "Server's updates", "client": "Clients' updates"}


def build_parser(description="Draws updates.", federated=True):
    parser = Parser(description)
    parser.add_argument("--data-dir", default="results", help="folder that holds the run folders")
    parser.add_argument("--output-dir", "--out-dir", default="results/plots", help="folder for the figures")
    if federated:
        parser.add_argument("--entity", choices=["server", "client"], default="server", help="whose updates")
    parser.add_argument("--format", choices=["png", "pdf"], default="png")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    return parser


def draw_updates(args, entity):
    """Draws the updates of `entity`: central, server or client. Raises UsageError where no run has stored any."""
    notes, wrote, names = [], [], set()
    runs = read(args.data_dir, STUDY, unfinished=args.unfinished, notes=notes)
    runs = runs[(runs["kind"] == "central") == (entity == "central")]
    files = {folder: stored(folder, entity, notes) for folder in runs["folder"] if folder}
    runs = runs[[bool(files.get(folder)) for folder in runs["folder"]]]
    with figure_style():
        for setting, members in groups(runs, STUDY) if len(runs) else ():
            for row in rows_of(members, STUDY, notes=notes):
                name = unique(file_name(row, entity), names)
                figures = [
                    *(one for folder in row.runs["folder"] for one in heat_maps(folder, files[folder], name, entity)),
                    *of_seeds(setting, row, [files[folder] for folder in row.runs["folder"]], name, entity),
                ]
                for stem, figure in figures:
                    wrote.append(save_figure(figure, Path(args.output_dir) / f"{stem}.{args.format}"))
    for line in dict.fromkeys([f"wrote {path}" for path in wrote] + (notes if wrote else [])):
        print(line)
    if not wrote:
        kind = "central.py" if entity == "central" else "a federated script"
        raise UsageError(f"{args.data_dir} has no run of {kind} with {entity} updates: train with --save-deltas")


def unique(name, names):
    """The name, with a number where another method has it."""
    chosen = next(one for one in (name, *(f"{name}_{i}" for i in range(2, 100))) if one not in names)
    names.add(chosen)
    return chosen


def file_name(row, entity):
    """`fed_fisher_pure_ssm_1_layer_lu_1`, as in the source; of central runs the configuration."""
    config = setting_of(row.first)["config"]
    method = "federated" if row.kind == "fed_avg" else row.kind
    return config if entity == "central" else f"{method}_{config}_lu_{row['local_updates']}"


# ---- files


def stored(folder, entity, notes):
    """{name: [(step, path)]} of the run, of the server, or of each client that has any."""
    places = {entity: folder / "server" / "deltas"}
    if entity == "central" and (folder / "deltas").is_dir():
        places = {entity: folder / "deltas"}
    elif entity == "client":
        clients = sorted(folder.glob("client_*"), key=lambda path: int(path.name[7:]))
        places = {path.name.replace("_", " "): path / "deltas" for path in clients}
    found = {name: files_in(place, notes) for name, place in places.items()}
    return {name: files for name, files in found.items() if files}


def files_in(folder, notes):
    """The steps stored in a `deltas` folder, in order; a note for each damaged file."""
    files = []
    for path in sorted(folder.glob("step_*.npz")):
        try:
            with zipfile.ZipFile(path) as arrays:
                if odd := arrays.testzip():  # reads all: no figure may be half drawn when an array turns out damaged
                    raise zipfile.BadZipFile(odd)
            if layers_in(path):
                files.append((int(path.stem[5:]), path))
        except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            notes.append(f"left out {path}: damaged ({type(error).__name__})")
    return sorted(files)


def layers_in(path):
    """The layer indices that a file has an in_proj of."""
    with np.load(path, allow_pickle=False) as arrays:
        return sorted(int(m[1]) for m in (re.fullmatch(r"layers\.(\d+)\.in_proj", n) for n in arrays.files) if m)


def load(path, layer):
    """An in_proj's update, fp64 [rows, d_model]."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[f"layers.{layer}.in_proj"].astype(np.float64)


def evenly(items, count):
    """At most `count` of the items, evenly spaced, with the first and the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


# ---- heat maps


def heat_maps(folder, files, name, entity):
    """Yields (file, figure) of a run, per layer: |update| at 10 steps, or of 10 clients' last updates."""
    central, seed = entity == "central", re.search(r"seed_(\d+)", folder.name)
    word = "step" if central else "round"
    if entity == "client":
        shown = [(f"{client}, round {files[client][-1][0]:,}", files[client][-1][1]) for client in files]
    else:
        shown = [(f"{word} {step:,}", path) for step, path in next(iter(files.values()))]
    run = f"structure_{folder.name}" if central else f"{name}_seed_{seed[1]}" if seed else f"{name}_{folder.name}"
    for layer in layers_in(shown[-1][1]):
        panels = [(words, np.abs(load(path, layer))) for words, path in evenly(shown, STEPS)]
        title = f"{WHOSE[entity]} of in_proj, layer {layer}: {folder.name}"
        yield f"heatmap_{run}_layer_{layer}" + ("" if central else f"_{entity}"), heat_map(panels, title)


def heat_map(panels, title):
    """One panel per (name, |update|): the TOP rows and columns with the largest norm over all panels, the same in each.

    One colour scale, dark to light, that prints in grey.
    """
    energy = sum(np.nan_to_num(matrix) ** 2 for _, matrix in panels)  # [rows, columns]
    rows, columns = (np.sort(np.argsort(-energy.sum(axis=axis), kind="stable")[:TOP]) for axis in (1, 0))
    zoomed = [matrix[np.ix_(rows, columns)] for _, matrix in panels]
    top = np.nanpercentile(np.stack(zoomed), 99.5) or 1.0  # one outlier must not blacken the rest
    wide = min(5, len(panels))
    figure, axes = style.panel_axes(len(panels), wide, 1.2 + 1.95 * wide, 2.1, 0.9, sharex=True, sharey=True)
    for axis, (name, _), values in zip(axes, panels, zoomed, strict=True):
        image = style.heat_map(axis, values, 0, top)
        axis.set_title(name, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel(f"{len(columns)} of {energy.shape[1]} columns (inputs)", fontsize=9)
    figure.supylabel(f"{len(rows)} of {energy.shape[0]} rows (outputs)", fontsize=9)
    figure.colorbar(image, ax=axes, extend="max", pad=0.01, fraction=0.03).set_label("|update| of in_proj")
    set_title(figure, title)
    return figure


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


def spectra(files, layers):
    """{step: singular values, the mean over layers} of finite updates."""
    matrices = {step: [load(path, layer) for layer in layers] for step, path in files}
    finite = {step: some for step, some in matrices.items() if all(np.isfinite(m).all() for m in some)}
    return {step: np.mean([singular_values(m) for m in some], axis=0) for step, some in finite.items()}


def of_seeds(setting, row, files, name, entity):
    """Yields (file, figure): singular values over seeds (and clients), of each layer, of central runs of all.

    files: for each seed {name: stored updates}.
    """
    central, several = entity == "central", [one for seed in files for one in seed.values()]
    layers = layers_in(several[0][-1][1])
    panels = []
    for words, some in [("", layers)] if central else [(f"layer {layer}", [layer]) for layer in layers]:
        histories = [spectra(one, some) for one in several]
        steps = sorted(set.intersection(*map(set, histories)))
        if not steps:
            return
        panels.append((words, steps, np.array([[history[step] for step in steps] for history in histories])))
    over = "mean over layers; " if central else ""
    about = f"{row.label}: {describe(STUDY, setting)}\n{over}{len(several)} stored, band: minimum to maximum"
    stems = ("averaged_svd_evolution", "averaged_final_spectrum") if central else ("svd_evolution", "svd_spectrum")
    end, step = "_client" * (entity == "client"), "Optimiser step" if central else "Round"
    yield f"{stems[0]}_{name}{end}", evolution(panels, f"{WHOSE[entity]} of in_proj, {about}", step)
    title = f"{WHOSE[entity]} of in_proj, the last ({step.lower()} {panels[0][1][-1]:,}), {about}"
    yield f"{stems[1]}_{name}{end}", spectrum(panels, title)


def evolution(panels, title, step_name):
    """The largest singular values of each update over training. panels: [(name, steps, values [n, steps, r])]."""
    figure, axes = style.panel_axes(len(panels), 2, 6.2 if len(panels) == 1 else 9.6, 3.0, 0.9)
    for axis, (name, steps, values) in zip(axes, panels, strict=True):
        top = values[:, :, :SINGULAR_VALUES]  # [n, steps, 8]
        for k in range(top.shape[2]):
            # from dark to light: the order of the values is the order of the greys
            look = {"color": COLORS[0] if k == 0 else str(round(0.1 + 0.07 * k, 2)), "marker": MARKERS[k]}
            every = style.markers_at(k, len(steps), SINGULAR_VALUES)
            style.band(axis, steps, top[:, :, k], f"$\\sigma_{k + 1}$", look, every, "range", 0.15)
        log_of_positive(axis, top)
        style.whole_numbers(axis.xaxis)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(step_name)
        axis.set_ylabel("Singular value of the update")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    set_title(figure, title)
    return figure


def spectrum(panels, title):
    """The last update's singular values, and the rank that holds 95 % of the energy (sum of squares), averaged."""
    figure, axes = style.panel_axes(len(panels), 2, 6.2 if len(panels) == 1 else 9.6, 3.0, 0.9)
    for axis, (name, _, history) in zip(axes, panels, strict=True):
        values = history[:, -1]  # [n, r]
        ranks = [energy_rank(sigma) for sigma in values]
        style.band(axis, np.arange(1, values.shape[1] + 1), values, None, {"color": COLORS[2]}, None, "range", 0.2)
        axis.axvline(np.mean(ranks), color=COLORS[1], linestyle=DASHES[1])
        # what lies below a millionth of the largest is rounding: it would squeeze the rest
        log_of_positive(axis, values[values > values.max() * 1e-6])
        axis.set_xlim(left=0)
        rank = f"dashed: 95 % of the energy, rank {np.mean(ranks):.3g} of {values.shape[1]}"
        axis.set_title(", ".join(filter(None, [name, rank])), fontsize=9)
        axis.set_xlabel("Index")
        axis.set_ylabel("Singular value")
    set_title(figure, title)
    return figure


def log_of_positive(axis, values):
    positive = values[values > 0]
    if positive.size:
        log_axis(axis, positive.min(), positive.max())
