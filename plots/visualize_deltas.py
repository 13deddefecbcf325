"""What central training changes: heat maps and singular values of the updates of Mamba-2's in_proj.

    python plots/visualize_deltas.py --data_dir results --output_dir results/plots

Needs runs of mamba_fl/central.py with --save-deltas: `server/deltas/step_*.npz`, arrays `layers.{i}.in_proj` [rows,
d_model]. For each run (a heat map cannot be averaged):

    heatmap_structure_{run}_layer_{i}.png   |update| of the 80 rows and columns with the largest norm, at 10 steps

and for each configuration, the mean over layers, then over seeds:

    averaged_svd_evolution_{config}.png     the 8 largest singular values over training
    averaged_final_spectrum_{config}.png    the last update's, and the rank that holds 95 % of the energy

visualize_federated_deltas.py draws those of federated runs, with the functions here.
"""

import re
from pathlib import Path

import numpy as np

from common.cli import Parser, UsageError, run_main
from common.curves import COLORS, DASHES, MARKERS, save_figure, set_title
from common.curves import style as figure_style
from plots import style
from plots.mamba import STUDY, setting_of
from plots.read import read
from plots.rows import comparable, describe

TOP = 80  # rows and columns of a heat map
STEPS = 10  # panels of a heat map
SINGULAR_VALUES = 8  # lines of an evolution
ENERGY = 0.95
FILES = ("svd_evolution", "svd_spectrum"), ("averaged_svd_evolution", "averaged_final_spectrum")  # central ones last
WHOSE = {"central": "Updates", "server": "Server's updates", "client": "Clients' updates"}


def build_parser(description, federated):
    parser = Parser(description)
    parser.add_argument("--data-dir", default="results", help="folder that holds the run folders")
    parser.add_argument("--output-dir", "--out-dir", default="results/plots", help="folder for the figures")
    if federated:
        parser.add_argument("--entity", choices=["server", "client"], default="server", help="whose updates")
    return parser


def draw_updates(args, entity):
    """Draws the updates of `entity`: central, server or client. Raises UsageError where no run has stored any."""
    notes, wrote, names = [], [], set()
    runs = read(args.data_dir, STUDY, notes=notes)
    runs = runs[[(kind == "central") == (entity == "central") for kind in runs["kind"]]]
    files = {folder: stored(folder, entity) for folder in runs["folder"] if folder}
    runs = runs[[bool(files.get(folder)) for folder in runs["folder"]]]
    with figure_style():
        for setting, rows in comparable(runs, STUDY, notes) if len(runs) else ():
            for row in rows:
                names.add(name := file_name(row, entity, names))
                every = {folder: files[folder] for folder in row.runs["folder"]}
                figures = [one for folder in every for one in heat_maps(folder, every[folder], name, entity)]
                for stem, figure in [*figures, *of_seeds(setting, row, every.values(), name, entity)]:
                    wrote.append(save_figure(figure, Path(args.output_dir) / f"{stem}.png"))
    if not wrote:
        kind = "central.py" if entity == "central" else "a federated script"
        raise UsageError(f"{args.data_dir} has no run of {kind} with {entity} updates: train with --save-deltas")
    print("\n".join(dict.fromkeys([f"wrote {path}" for path in wrote] + notes)))


def file_name(row, entity, taken):
    """`fed_fisher_pure_ssm_1_layer_lu_1`, as in the source; of central runs the configuration."""
    name = setting_of(row.first)["config"]
    if entity != "central":
        name = f"{'federated' if row.kind == 'fed_avg' else row.kind}_{name}_lu_{row['local_updates']}"
    return next(one for one in (name, *(f"{name}_{i}" for i in range(2, 100))) if one not in taken)


# ---- files


def stored(folder, entity):
    """{server, or each client: [(step, path)]} of what a run has stored; a central run is its own server."""
    place, found = "client_*" if entity == "client" else "server", {}
    for path in sorted(folder.glob(f"{place}/deltas/step_??????.npz")):
        found.setdefault(path.parts[-3].replace("_", " "), []).append((int(path.stem[5:]), path))
    return dict(sorted(found.items(), key=lambda one: (len(one[0]), one[0])))  # client 2 before client 10


def load(path):
    """{layer: its in_proj's update, fp64 [rows, d_model]}."""
    with np.load(path, allow_pickle=False) as arrays:
        found = {re.fullmatch(r"layers\.(\d+)\.in_proj", name): name for name in arrays.files}
        return {int(match[1]): arrays[name].astype(np.float64) for match, name in found.items() if match}


# ---- heat maps


def heat_maps(folder, files, name, entity):
    """Yields (file, figure) of a run, per layer: |update| at 10 steps, or of 10 clients' last updates."""
    word, end = ("step", "") if entity == "central" else ("round", f"_{entity}")
    shown = [(f"{whose}, {word} {some[-1][0]:,}", some[-1][1]) for whose, some in files.items()]
    if entity != "client":
        shown = [(f"{word} {step:,}", path) for step, path in files["server"]]
    places = np.linspace(0, len(shown) - 1, min(STEPS, len(shown))).round().astype(int)  # the first and the last too
    seed = "_".join(re.findall(r"seed_\d+", folder.name) or [folder.name])
    run = f"structure_{folder.name}" if entity == "central" else f"{name}_{seed}"
    updates = [(shown[i][0], load(shown[i][1])) for i in places]
    for layer in sorted(updates[-1][1]):
        panels = [(words, np.abs(update[layer])) for words, update in updates]
        title = f"{WHOSE[entity]} of in_proj, layer {layer}: {folder.name}"
        yield f"heatmap_{run}_layer_{layer}{end}", heat_map(panels, title)


def heat_map(panels, title):
    """One panel per (name, |update|): the TOP rows and columns with the largest norm over all panels, on one scale."""
    energy = sum(np.nan_to_num(matrix) ** 2 for _, matrix in panels)  # [rows, columns]
    rows, columns = (np.sort(np.argsort(-energy.sum(axis=axis), kind="stable")[:TOP]) for axis in (1, 0))
    zoomed = [matrix[np.ix_(rows, columns)] for _, matrix in panels]
    top = np.nanpercentile(np.stack(zoomed), 99.5) or 1.0  # one outlier must not blacken the rest
    wide = min(5, len(panels))
    figure, axes = style.panel_axes(len(panels), wide, 1.2 + 1.95 * wide, 2.1, 0.9, sharex=True, sharey=True)
    for axis, (name, _), values in zip(axes, panels, zoomed, strict=True):
        image = axis.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axis.grid(False)
        axis.set_title(name, fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.supxlabel(f"{len(columns)} of {energy.shape[1]} columns (inputs)", fontsize=9)
    figure.supylabel(f"{len(rows)} of {energy.shape[0]} rows (outputs)", fontsize=9)
    figure.colorbar(image, ax=axes, extend="max", pad=0.01, fraction=0.03).set_label("|update| of in_proj")
    set_title(figure, title)
    return figure


# ---- singular values


def energy_rank(sigma):
    """The smallest r with sum_{i<=r} sigma_i^2 >= ENERGY * sum_i sigma_i^2; 0 if all are 0."""
    total = np.cumsum(sigma**2)
    return int(np.searchsorted(total, ENERGY * total[-1] * (1 - 1e-12)) + 1) if total[-1] else 0


def spectra(files, layers):
    """{step: singular values of its update, largest first, the mean over layers}."""
    return {
        step: np.mean([np.linalg.svd(load(path)[layer], compute_uv=False) for layer in layers], axis=0)
        for step, path in files
    }


def of_seeds(setting, row, files, name, entity):
    """Yields (file, figure): singular values over seeds (and clients), of each layer, of central runs of all.

    files: for each seed {name: stored updates}.
    """
    central, several = entity == "central", [one for seed in files for one in seed.values()]
    layers, panels = sorted(load(several[0][-1][1])), []
    for words, some in [("", layers)] if central else [(f"layer {layer}", [layer]) for layer in layers]:
        histories = [spectra(one, some) for one in several]
        steps = sorted(set.intersection(*map(set, histories)))
        panels.append((words, steps, np.array([[history[step] for step in steps] for history in histories])))
    title = f"{WHOSE[entity]} of in_proj, {row.label}: mean of {len(several)} stored, band: standard deviation\n"
    title += describe(STUDY, setting)
    first, second = FILES[central]
    end = name + "_client" * (entity == "client")
    yield f"{first}_{end}", evolution(panels, title, "Optimiser step" if central else "Round")
    yield f"{second}_{end}", spectrum(panels, title)


def evolution(panels, title, step_name):
    """The largest singular values of each update over training. panels: [(name, steps, values [n, steps, r])]."""
    figure, axes = style.panel_axes(len(panels), 2)
    for axis, (name, steps, values) in zip(axes, panels, strict=True):
        for k in range(min(SINGULAR_VALUES, values.shape[2])):
            look = {"color": str(round(0.1 * k, 1)), "marker": MARKERS[k]}  # the largest is the darkest
            style.band(axis, steps, values[:, :, k], f"$\\sigma_{k + 1}$", look)
        style.whole_numbers(axis.xaxis)
        axis.set(xlabel=step_name, ylabel="Singular value of the update", yscale="log", title=name)
    style.legend_below(figure, axes)
    set_title(figure, title)
    return figure


def spectrum(panels, title):
    """The last update's singular values, and the rank that holds 95 % of the energy (sum of squares), averaged."""
    figure, axes = style.panel_axes(len(panels), 2)
    for axis, (name, steps, history) in zip(axes, panels, strict=True):
        values = history[:, -1]  # [n, r]
        rank = np.mean([energy_rank(sigma) for sigma in values])
        style.band(axis, np.arange(1, values.shape[1] + 1), values, None, {"color": COLORS[2]})
        axis.axvline(rank, color=COLORS[1], linestyle=DASHES[1])
        words = f"at {steps[-1]:,}, dashed: 95 % of the energy, rank {rank:.3g} of {values.shape[1]}"
        axis.set_title(", ".join(filter(None, [name, words])), fontsize=9)
        axis.set(xlabel="Index", ylabel="Singular value", yscale="log")
        axis.set_ylim(bottom=values.max() * 1e-6)  # what lies below is rounding
    set_title(figure, title)
    return figure


if __name__ == "__main__":
    parser = build_parser("Draws the parameter updates of central runs.", federated=False)
    run_main(lambda args: draw_updates(args, "central"), parser.parse_args())
