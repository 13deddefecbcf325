"""What training changes: heat maps and singular values of the updates of in_proj, of the server or of the clients.

    python plots/visualize_federated_deltas.py --data_dir results --output_dir results/plots --entity server
    python plots/visualize_federated_deltas.py --data_dir results --output_dir results/plots --entity client

Needs federated runs with --save-deltas (of central runs: visualize_deltas.py). {method} is the source's: federated,
fed_momentum, fed_entropy, fed_fisher. For each run (a heat map cannot be averaged):

    heatmap_{method}_{config}_lu_{LU}_seed_{s}_layer_{i}_server.png   |update|, 80 rows and columns, 10 rounds
    heatmap_{method}_{config}_lu_{LU}_seed_{s}_layer_{i}_client.png   the same of every client's last update
    heatmap_heads_{method}_{config}_lu_{LU}_seed_{s}_server.png       |update| of A_log, D and dt_bias, heads by rounds

and for each method, a panel per layer, the mean over seeds (--entity client: over clients and seeds):

    svd_evolution_{method}_{config}_lu_{LU}.png      the 8 largest singular values over training
    svd_spectrum_{method}_{config}_lu_{LU}.png       the last update's, and the rank that holds 95 % of the energy

The last two end in `_client` with --entity client.
"""

import re
from functools import partial
from itertools import chain, count
from pathlib import Path

from common.cli import Parser, UsageError, run_main
from common.curves import save_figure, style
from plots import deltas
from plots.mamba import FILES, STUDY
from plots.runs import describe, like_with_like, read_runs, suffixes
from plots.seeds import curves_of

WHOSE = {"central": "Updates", "server": "Server's updates", "client": "Clients' updates"}
LAST = {"central": "Last update", "server": "Server's last update", "client": "Clients' last update"}


def build_parser(description="Draws the parameter updates of federated runs.", federated=True):
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
    runs, notes = read_runs(args.data_dir, STUDY, unfinished=args.unfinished)
    runs = [run for run in runs if run.central == (entity == "central") and run.folder]
    files = {run: stored(run.folder, entity, notes) for run in runs}
    files = {run: whole for run, whole in files.items() if whole}
    wrote = []
    with style():
        for setting, curve, name in named_curves(list(files), partial(file_name, entity), notes):
            of_runs = (of_run(run, files[run], name, entity) for run in curve.runs)
            of_all = of_method(setting, curve, [files[run] for run in curve.runs], name, entity, notes)
            for stem, figure in chain(*of_runs, of_all):
                wrote.append(save_figure(figure, Path(args.output_dir) / f"{stem}.{args.format}"))
    for line in dict.fromkeys([f"wrote {path}" for path in wrote] + [str(note) for note in notes]):
        print(line)
    if not wrote:
        kind = "run(s) of central.py" if entity == "central" else "federated run(s)"
        there = f"{len(runs)} {kind} there, none with stored {entity} updates" if runs else f"no {kind}"
        raise UsageError(f"nothing to draw in {args.data_dir}: {there}; train with --save-deltas")


def stored(folder, entity, notes):
    """{name: stored updates} of the run, of the server, or of each client that has any."""
    places = {entity: folder / "server" / "deltas"}
    if entity == "central" and (folder / "deltas").is_dir():
        places = {entity: folder / "deltas"}
    elif entity == "client":
        numbers = [int(p.name[7:]) for p in folder.glob("client_*") if re.fullmatch(r"client_\d+", p.name)]
        places = {f"client {i}": folder / f"client_{i}" / "deltas" for i in sorted(numbers)}
    files = {name: deltas.stored_in(place, notes) for name, place in places.items()}
    return {name: whole for name, whole in files.items() if whole}


def file_name(entity, curve):
    """`fed_fisher_pure_ssm_1_layer_lu_1`, as in the source; of central runs the configuration."""
    config = curve.runs[0].setting["config"]
    return config if entity == "central" else f"{FILES[curve.kind]}_{config}_lu_{curve.args.get('local_updates')}"


def named_curves(runs, base, notes):
    """list[(setting, curve, name)]: every curve of every group, with a name for files that no other has.

    The name is `base(curve)`; for a further curve of that name, what sets its group or its arguments apart follows.
    """
    groups, named = like_with_like(runs), {}
    names = suffixes([setting for setting, _ in groups], runs[0].study.keys) if runs else []
    for (setting, members), suffix in zip(groups, names, strict=True):
        for curve in curves_of(members, notes=notes):
            words = re.sub(r"[^A-Za-z0-9.]+", "_", curve.label.partition(", ")[2]).strip("_")
            whole = base(curve) + suffix + (f"_{words}" if words else "")
            numbered = (f"{whole}_{i}" for i in count(2))
            names_ = chain([base(curve), base(curve) + suffix, whole], numbered)
            named[next(name for name in names_ if name not in named)] = setting, curve
    return [(setting, curve, name) for name, (setting, curve) in named.items()]


def of_run(run, files, name, entity):
    """Yields (file, figure): a heat map per layer, at 10 steps or of 10 clients' last updates; one of the vectors."""
    central, first = entity == "central", next(iter(files.values()))
    heat, run_name, end = "heatmap", f"{name}_seed_{run.seed}", f"_{entity}"
    if central:
        heat, run_name, end = "heatmap_structure", run.folder.name, ""
    if entity == "client":
        last = [(client, *files[client][-1]) for client in deltas.evenly(list(files), deltas.STEPS)]
        shown = [(f"{client}, round {t:,}", path) for client, t, path in last]
    else:
        word = "step" if central else "round"
        shown = [(f"{word} {step:,}", path) for step, path in deltas.evenly(first, deltas.STEPS)]
    layers = deltas.layers_in(first[-1][1])
    for layer in layers:
        panels = [(words, deltas.load(path, layer)) for words, path in shown]
        heads = deltas.load(shown[0][1], layer, "A_log")
        blocks = deltas.in_proj_blocks(run.args, *panels[0][1].shape, None if heads is None else len(heads))
        whose = "Clients' last updates" if entity == "client" else WHOSE[entity]
        title = f"{whose} of in_proj, layer {layer}: {run.folder.name}"
        yield f"{heat}_{run_name}_layer_{layer}{end}", deltas.heatmaps(panels, title, blocks)
    if entity != "client":
        title = f"|update| of each head{'' if central else ', server'}: {run.folder.name}"
        figure = deltas.head_heatmaps(first, layers, title, "Optimiser step" if central else "Round")
        if figure is not None:
            yield f"heatmap_heads_{run_name}{end}", figure


def of_method(setting, curve, files, name, entity, notes):
    """Yields (file, figure): singular values averaged over seeds (and clients), of each layer, of central runs of all.

    files: for each seed {name: stored updates}.
    """
    central, several = entity == "central", [stored for seed in files for stored in seed.values()]
    layers = deltas.layers_in(several[0][-1][1])
    panels = []
    for words, group in [("", layers)] if central else [(f"layer {layer}", [layer]) for layer in layers]:
        steps, values = deltas.mean_over([mean_history(stored, group) for stored in several])
        if not steps:
            notes.append(f"not drawn: svd_*_{name} needs a round that every run and client has stored")
            return
        panels.append((words, steps, values))
    about = f"{curve.label}: {describe(STUDY, setting)}\n{average_text(len(files), len(several), entity)}"
    stems = ("averaged_svd_evolution", "averaged_final_spectrum") if central else ("svd_evolution", "svd_spectrum")
    stems = [f"{stem}_{name}" + "_client" * (entity == "client") for stem in stems]
    step = "Optimiser step" if central else "Round"
    yield stems[0], deltas.evolution(panels, f"{WHOSE[entity]} of in_proj, {about}", step)
    last = [(words, values[:, -1]) for words, _, values in panels]
    when = f"{'step' if central else 'round'} {panels[0][1][-1]:,}"
    yield stems[1], deltas.spectrum(last, f"{LAST[entity]} of in_proj ({when}), {about}")


def mean_history(stored, layers):
    """{step: singular values}, the mean over layers."""
    steps, values = deltas.mean_over([deltas.spectra(stored, layer) for layer in layers])
    return dict(zip(steps, values.mean(axis=0), strict=True)) if steps else {}


def average_text(seeds, count, entity):
    """`mean of 2 clients x 3 seeds, band: minimum to maximum`"""
    over = "mean over layers; " if entity == "central" else ""
    if count == 1:
        return f"{over}one seed"
    of = f"{count // seeds} clients" + f" x {seeds} seeds" * (seeds > 1) if entity == "client" else f"{seeds} seeds"
    return f"{over}mean of {of}, band: minimum to maximum"


if __name__ == "__main__":
    run_main(lambda args: draw_updates(args, args.entity), build_parser().parse_args())
