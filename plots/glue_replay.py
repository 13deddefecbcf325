"""Figures and table of lora_glue_fl's --replay: does the error of the averaging cost loss?

    python plots/glue.py replay --data-dir out_fedavg --out-dir results/plots
    python plots/tables.py lora_glue_fl --data-dir out_fedavg --replay

    replay    replay_error.png: validation loss of what a rule serves minus that of the exact mean product, against the
              rule's aggregation error as a share of the exact mean's step; replay_error_train.png: on the clients'
              training examples; replay_dose.png: both against how often residual's correction is applied (0: naive,
              1: exact), a line per setting. A column per number of local epochs, each panel with its own scales.

Both losses are of the same clients, trained once, so that nothing but the averaging lies between them. A point or a
line is of a setting (a cell: clients, shards, local epochs, rank, rate, round): the mean over its seeds, with the 95 %
interval of a paired t test, which may leave the axes of replay_error. The grey band is the largest difference
between two ways to serve the exact mean (in the base's weights, and as an adapter beside a corrected base): what
rounding does.
"""

from collections import defaultdict
from functools import partial

import numpy as np

from common.cli import UsageError
from common.curves import GREY, new_figure, number, set_title
from plots.runs import describe, words_for
from plots.seeds import interval
from plots.style import Figure, each_group, legend_below, look
from plots.tables import layout, pairs_cell, spread

VARIED = ("clients", "shards", "local_epochs", "rank", "lora_alpha", "svd_rank", "served_scale", "learning_rate")
VARIED += ("rounds", "examples")
ROWS = {  # label and look, but for exact, which all are compared with, and residual's doses
    "naive": ("Naive", look(0)),
    "svd": ("SVD", look(1)),
    "rotate": ("Rotate", look(2)),
    "florana": ("FLoRA-NA", look(3)),
    "exact_as_far": ("Exact, as far as naive", look(6)),
    "noise": ("Noise as long as naive's miss", look(5, 1)),
}
PAIRS = {  # column of the table -> rows whose losses' difference it is
    "naive - start": ("naive", "start"),
    "naive - exact": ("naive", "exact"),
    "svd - exact": ("svd", "exact"),
    "noise - exact": ("noise", "exact"),
    "naive - exact as far": ("naive", "exact_as_far"),
    "naive - exact, half a step": ("naive_half", "exact_half"),
}
FOLLOWS = ("lora_alpha", "init_adapter")  # from the rank
DOSES = {"naive": 0.0, "residual_0.5": 0.5, "residual_1": 1.0, "residual_2": 2.0}
SPLITS = {"train_loss": "Clients' training examples", "val_loss": "Validation examples"}
REFIT = {"val_loss_refit": "validation examples, refit"}
LOSS = "Loss - exact mean's (nats)"


def cells(runs, notes=()):
    """(study, {cell: list of its seeds' `replay`}) of all evaluated rounds. cell: what sets it apart, (key, value)s."""
    found, study = defaultdict(dict), runs[0].study
    for run in sorted(runs, key=lambda run: run.written):
        place = {key: run.setting.get(key, "") for key in VARIED} | {"rule": run.kind, **dict(run.variant)}
        for row in run.rows:
            if row.get("replay"):
                found[tuple((place | {"round": row["round"]}).items())][run.seed] = row["replay"]

    def order(cell):
        return [study.order(key, value) for key, value in cell if key in VARIED], str(cell)

    return study, {cell: list(found[cell].values()) for cell in sorted(found, key=order)}


def losses(seeds, name, split, base="exact"):
    """[S] loss of the row `name` minus that of `base`, seed by seed; nan for what is not finite or not there."""
    every = [[number(one.get(row, {}).get(split)) for row in (name, base)] for one in seeds]
    return np.subtract(*np.array(every).T)


def errors(seeds, name):
    """[S] aggregation error of the row `name`, in percent of the exact mean's step: start's is 100 %."""
    every = [[number(one.get(row, {}).get("error")) for row in (name, "start")] for one in seeds]
    return 100 * np.divide(*np.array(every).T)


def rounding(every, split):
    """The largest finite |residual x 1 - exact| of cells' seeds."""
    return np.nanmax(np.abs(np.concatenate([losses(seeds, "residual_1", split) for seeds in every])), initial=0.0)


def half(values):
    """Half of the interval of values [S]; 0 for one seed."""
    return float(np.subtract(*interval(values)) / -2) if len(values) > 1 else 0.0


def labels(study, found):
    """{cell: what sets it apart from the others, but for local epochs}; FOLLOWS only where the rest does not say it."""
    every = [dict(cell) for cell in found]
    keys = dict.fromkeys(key for cell in every for key in cell if key != "local_epochs")
    keys = [key for key in keys if len({str(cell.get(key)) for cell in every}) > 1]
    for chosen in ([key for key in keys if key not in FOLLOWS], keys):
        words = {cell: [w for key in chosen for w in words_for(study, key, dict(cell).get(key))] for cell in found}
        names = {cell: ", ".join(words[cell]) or "mean over seeds" for cell in found}
        if len({(name, dict(cell)["local_epochs"]) for cell, name in names.items()}) == len(found):
            break
    return names


def panels(study, found, title, setting, x_label, splits=SPLITS):
    """(figure, [(axis, split, {cell: seeds} of its local epochs)]), to be finished by `legend_below`."""
    columns = defaultdict(dict)
    for cell, seeds in found.items():
        columns[dict(cell)["local_epochs"]][cell] = seeds
    epochs = sorted(columns, key=str) if "" in columns else sorted(columns)
    wide, tall = len(epochs), len(splits)
    figure, axes = new_figure(tall, wide, width=5.6 if wide == 1 else 2.8 * wide + 0.6, height=1.2 + 2.3 * tall)
    every = []
    for place, axis in np.ndenumerate(axes):
        here, split = columns[epochs[place[1]]], list(splits)[place[0]]
        axis.axhline(0, color=GREY, linewidth=1, zorder=1)
        noise = rounding(here.values(), split)
        axis.axhspan(-noise, noise, color=GREY, alpha=0.3, linewidth=0, zorder=0, label="rounding")
        every.append((axis, split, here))
    for axis, one in zip(axes[0], epochs, strict=True):
        axis.set_title("".join(words_for(study, "local_epochs", one)), fontsize=9.5)
    for axis in axes[-1]:
        axis.set_xlabel(x_label)
    for axis, where in zip(axes[:, 0], splits.values(), strict=True):
        axis.set_ylabel(f"{where}\n{LOSS}", fontsize=9)
    counts = sorted({len(seeds) for seeds in found.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    many = f"{len(found)} setting{'s' * (len(found) > 1)}, {seeds} seed{'s' * (seeds != '1')}"
    bars = ", mean and 95 % interval over them (paired t test)" * (counts[-1] > 1)
    set_title(figure, f"{title}: {many}{bars}\n{describe(study, setting)}")
    return figure, every


def draw_error(setting, what, args, split):
    (study, found), title, x_label = what, "What the averaging error costs", "Averaging error (% of the step)"
    figure, every = panels(study, found, title, setting, x_label, {split: SPLITS[split]})
    for axis, split, here in every:
        means = [0.0]
        for name, (label, style) in ROWS.items():
            points = [(errors(seeds, name), losses(seeds, name, split)) for seeds in here.values()]
            points = [(x.mean(), y) for x, y in points if np.isfinite([*x, *y]).all()]
            if points:
                x, y = [x for x, _ in points], [y.mean() for _, y in points]
                bars = {"linestyle": "", "markersize": 5.5, "elinewidth": 0.8}
                axis.errorbar(x, y, [half(y) for _, y in points], label=label, **style | bars)
                means += y
        room = 0.3 * np.ptp(means) or 1.0
        axis.set_ylim(min(means) - room, max(means) + room)  # intervals of few seeds would hide the means
        axis.set_xlim(left=0)
    legend_below(figure, [axis for axis, *_ in every])
    return figure


def draw_dose(setting, what, args):
    study, found = what
    figure, every = panels(study, found, "Dose and response", setting, "Residual's correction, times")
    names = labels(study, found)
    places, doses = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}, np.array(list(DOSES.values()))
    for axis, split, here in every:
        for cell, seeds in here.items():
            i, values = places[names[cell]], [losses(seeds, name, split) for name in DOSES]
            aside = 0.03 * (i - (len(places) - 1) / 2)  # so that no bar hides another
            style = look(i) | {"markersize": 4.5, "elinewidth": 0.8, "linewidth": 1.2}
            means, halves = [y.mean() for y in values], [half(y) for y in values]
            axis.errorbar(doses + aside, means, halves, label=names[cell], **style)
        axis.set_xticks(doses, ["0\nnaive", "0.5", "1\nexact", "2"])
    legend_below(figure, [axis for axis, *_ in every])
    return figure


GROUPS = each_group(cells, VARIED, lambda run: any(row.get("replay") for row in run.rows))
NEEDS = "runs of fedavg_rounds.py with --replay"
FIGURES = [
    Figure("replay_error", GROUPS, partial(draw_error, split="val_loss"), NEEDS),
    Figure("replay_error_train", GROUPS, partial(draw_error, split="train_loss"), NEEDS),
    Figure("replay_dose", GROUPS, draw_dose, NEEDS),
]


# ---- the table


def tables(runs, notes):
    """A table for each group of runs that may be compared: a row a setting and split, differences seed by seed.

    Raises UsageError where no run has a replay.
    """
    parts = []
    for setting, (study, found) in GROUPS(runs, notes):
        names, rows = labels(study, found), [["setting", "loss over", "exact", "error % (naive)", *PAIRS]]
        for cell, seeds in found.items():
            epochs = "".join(words_for(study, "local_epochs", dict(cell)["local_epochs"]))
            for split, words in (SPLITS | REFIT).items():
                if split in REFIT and not np.isfinite(losses(seeds, "exact", split, "start")).any():
                    continue  # regression
                exact = np.array([number(one.get("exact", {}).get(split)) for one in seeds])
                about = [f"{names[cell]}, {epochs}", words.lower(), spread(exact, 3), spread(errors(seeds, "naive"), 1)]
                rows.append([*about, *(pairs_cell(losses(seeds, a, split, b), 4) for a, b in PAIRS.values())])
        about = "losses in nats; differences: mean over seeds [95 % interval of a paired t test], seeds"
        parts += [f"### {describe(study, setting)}; {about}", layout(rows)]
    if not parts:
        raise UsageError(f"--replay: there are no {NEEDS}")
    return parts
