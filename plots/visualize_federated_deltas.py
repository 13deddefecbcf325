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
from pathlib import Path

from common.cli import Parser, UsageError, run_main
from plots import deltas
from plots.mamba import FILES, STUDY
from plots.runs import describe, read_runs

WHOSE = {"central": "Updates", "server": "Server's updates", "client": "Clients' updates"}
STEP = {True: "Optimiser step", False: "Round"}  # of central runs or not


def build_parser(description="Draws the parameter updates of federated runs.", federated=True):
    parser = Parser(description)
    parser.add_argument("--data-dir", default="results", help="folder that holds the run folders")
    parser.add_argument("--output-dir", "--out-dir", default="results/plots", help="folder for the figures")
    if federated:
        parser.add_argument("--entity", choices=["server", "client"], default="server", help="whose updates")
    parser.add_argument("--format", choices=["png", "pdf"], default="png")
    parser.add_argument("--unfinished", action="store_true", help="take runs that have not finished too")
    return parser


def main(args):
    draw_updates(args, args.entity)


def draw_updates(args, entity):
    """Draws the updates of `entity`: central, server or client. Raises UsageError where no run has stored any."""
    runs, notes = read_runs(args.data_dir, STUDY, unfinished=args.unfinished)
    runs = [run for run in runs if run.central == (entity == "central") and run.folder]
    files = {run: stored(run.folder, entity, notes) for run in runs}
    files = {run: whole for run, whole in files.items() if whole}
    wrote = []
    for setting, curve, name in deltas.named_curves(list(files), lambda curve: base_name(curve, entity), notes):
        for run in curve.runs:
            wrote += draw_run(run, files[run], name, entity, args)
        wrote += draw_method(setting, curve, [files[run] for run in curve.runs], name, entity, args, notes)
    for line in dict.fromkeys([f"wrote {path}" for path in wrote] + [str(note) for note in notes]):
        print(line)
    if not wrote:
        kind = "run(s) of central.py" if entity == "central" else "federated run(s)"
        there = f"{len(runs)} {kind} there, none with stored {entity} updates" if runs else f"no {kind}"
        raise UsageError(f"nothing to draw in {args.data_dir}: {there}; train with --save-deltas")


def stored(folder, entity, notes):
    """{name: stored updates} of the run, of the server, or of each client that has any."""
    if entity == "central":
        places = {"run": folder / "deltas"} if (folder / "deltas").is_dir() else {"run": folder / "server" / "deltas"}
    elif entity == "server":
        places = {"server": folder / "server" / "deltas"}
    else:
        numbers = [int(p.name[7:]) for p in folder.glob("client_*") if re.fullmatch(r"client_\d+", p.name)]
        places = {f"client {i}": folder / f"client_{i}" / "deltas" for i in sorted(numbers)}
    files = {name: deltas.readable(deltas.delta_files(place), notes) for name, place in places.items()}
    return {name: whole for name, whole in files.items() if whole}


def base_name(curve, entity):
    """`fed_fisher_pure_ssm_1_layer_lu_1`, as in the source; of central runs the configuration."""
    config = curve.runs[0].setting["config"]
    return config if entity == "central" else f"{FILES[curve.kind]}_{config}_lu_{curve.args.get('local_updates')}"


def draw_run(run, files, name, entity, args):
    """One heat map per layer: the update at 10 steps, or the last update of each of 10 clients; one of the vectors."""
    central, out, paths = entity == "central", Path(args.output_dir), []
    step_name, heat, end = ("step", "heatmap_structure", "") if central else ("round", "heatmap", f"_{entity}")
    run_name = run.folder.name if central else f"{name}_seed_{run.seed}"
    first = next(iter(files.values()))
    layers = deltas.layers_in(first[-1][1])
    for layer in layers:
        if entity == "client":
            last = [(client, *files[client][-1]) for client in deltas.evenly(list(files), deltas.STEPS)]
            panels = [(f"{client}, {step_name} {step:,}", path) for client, step, path in last]
        else:
            panels = [(f"{step_name} {step:,}", path) for step, path in deltas.evenly(first, deltas.STEPS)]
        heads = deltas.load(panels[0][1], layer, "A_log")
        panels = [(text, deltas.load(path, layer)) for text, path in panels]
        blocks = deltas.in_proj_blocks(run.args, *panels[0][1].shape, None if heads is None else len(heads))
        whose = "Clients' last updates" if entity == "client" else WHOSE[entity]
        title = f"{whose} of in_proj, layer {layer}: {run.folder.name}"
        path = out / f"{heat}_{run_name}_layer_{layer}{end}.{args.format}"
        paths.append(deltas.heatmaps(path, panels, title, blocks))
    if entity != "client":
        title = f"|update| of each head{'' if central else ', server'}: {run.folder.name}"
        path = out / f"heatmap_heads_{run_name}{end}.{args.format}"
        paths.append(deltas.head_heatmaps(path, first, layers, title, STEP[central]))
    return [path for path in paths if path]


def draw_method(setting, curve, files, name, entity, args, notes):
    """The singular values of one method, averaged over seeds (and clients): of each layer, of central runs of all.

    files: for each seed {name: stored updates}.
    """
    central, several = entity == "central", [stored for seed in files for stored in seed.values()]
    layers = deltas.layers_in(several[0][-1][1])
    panels, last = [], []
    for words, group in [("", layers)] if central else [(f"layer {layer}", [layer]) for layer in layers]:
        steps, values = deltas.mean_over([mean_history(stored, group) for stored in several])
        if not steps:
            notes.append(f"not drawn: svd_*_{name} needs a round that every run and client has stored")
            return []
        panels.append((words, steps, values))
        last.append((words, values[:, -1]))
    about = f"{curve.label}: {describe(STUDY, setting)}\n{average_text(len(files), len(several), entity)}"
    names = ("averaged_svd_evolution", "averaged_final_spectrum") if central else ("svd_evolution", "svd_spectrum")
    end = "_client" if entity == "client" else ""
    paths = [Path(args.output_dir) / f"{stem}_{name}{end}.{args.format}" for stem in names]
    deltas.evolution(paths[0], panels, f"{WHOSE[entity]} of in_proj, {about}", STEP[central])
    whose = WHOSE[entity].removesuffix("updates").removesuffix("Updates") + ("Last" if central else "last")
    when = f"{'step' if central else 'round'} {panels[0][1][-1]:,}"
    deltas.spectrum(paths[1], last, f"{whose} update of in_proj ({when}), {about}")
    return paths


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
    run_main(main, build_parser().parse_args())
