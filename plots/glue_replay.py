"""Figures of lora_glue_fl's --replay: does the error of the averaging cost loss?

    python plots/glue.py replay --data-dir out_fedavg --out-dir results/plots

    replay    replay_error.png: loss of what a rule serves minus the loss of the exact mean product, against the rule's
              aggregation error; replay_dose.png: the same against how often residual's correction is applied (0: naive,
              1: exact). Left on the clients' training examples, right on the validation examples.

Both losses are of the same clients, trained once, so that nothing but the averaging lies between them. A point or thin
line is a cell (clients, shards, local epochs, rank, rate, round): the mean over its seeds, with the 95 % interval of a
paired t test. The grey band is the largest difference between two ways to serve the exact mean (in the base's weights,
and as an adapter beside a corrected base): what rounding does.
"""

from collections import defaultdict

import numpy as np

from common.curves import GREY, new_figure, number, set_title
from plots.runs import describe
from plots.seeds import interval
from plots.style import Figure, each_group, legend_below, look

VARIED = ("clients", "shards", "local_epochs", "rank", "lora_alpha", "svd_rank", "served_scale", "learning_rate")
VARIED += ("rounds", "examples")
ROWS = {  # but for exact, which all are compared with
    "naive": "Naive (residual x 0)",
    "svd": "SVD",
    "rotate": "Rotate",
    "florana": "FLoRA-NA",
    "residual_0.5": "Residual x 0.5",
    "residual_2": "Residual x 2",
}
DOSES = {"naive": 0.0, "residual_0.5": 0.5, "residual_1": 1.0, "residual_2": 2.0}
SPLITS = {"train_loss": "Clients' training examples", "val_loss": "Validation examples"}
LOSS = "Loss - loss of the exact mean (nats)"


def cells(runs, notes=()):
    """(study, {cell: list of its seeds' `replay`}) of all evaluated rounds."""
    found = defaultdict(dict)
    for run in sorted(runs, key=lambda run: run.written):
        place = tuple(str(run.setting.get(key)) for key in VARIED)
        for row in run.rows:
            if row.get("replay"):
                found[*place, run.kind, run.variant, row["round"]][run.seed] = row["replay"]
    return runs[0].study, {cell: list(seeds.values()) for cell, seeds in found.items()}


def losses(seeds, name, split):
    """[S] loss of the row `name` minus that of exact, seed by seed; nan for what is not finite or not there."""
    every = [[number(one.get(row, {}).get(split)) for row in (name, "exact")] for one in seeds]
    return np.subtract(*np.array(every).T)


def errors(seeds, name):
    """[S] aggregation error of the row `name`, in percent."""
    return np.array([100 * number(one.get(name, {}).get("error")) for one in seeds])


def rounding(found, split):
    """The largest finite |residual x 1 - exact|."""
    every = np.concatenate([np.abs(losses(seeds, "residual_1", split)) for seeds in found.values()])
    return np.nanmax(every, initial=0.0)


def panels(found):
    figure, axes = new_figure(columns=2, width=7.6, height=4.1)
    for axis, (split, title) in zip(axes[0], SPLITS.items(), strict=True):
        axis.axhline(0, color=GREY, linewidth=1, zorder=1)
        noise = rounding(found, split)
        axis.axhspan(-noise, noise, color=GREY, alpha=0.3, linewidth=0, zorder=0, label="rounding")
        axis.set_title(title, fontsize=9.5)
    axes[0, 0].set_ylabel(LOSS)
    return figure, axes[0]


def draw_error(setting, what, args):
    study, found = what
    figure, axes = panels(found)
    for axis, split in zip(axes, SPLITS, strict=True):
        for i, (name, label) in enumerate(ROWS.items()):
            points = [(errors(seeds, name), losses(seeds, name, split)) for seeds in found.values()]
            points = [(x.mean(), y) for x, y in points if np.isfinite([*x, *y]).all()]
            if points:
                half = [np.subtract(*interval(y)) / -2 if len(y) > 1 else 0.0 for _, y in points]
                style = look(i) | {"linestyle": "", "capsize": 2, "markersize": 5}
                axis.errorbar([x for x, _ in points], [y.mean() for _, y in points], half, label=label, **style)
        axis.set_xlim(left=0)
        axis.set_xlabel("Aggregation error (%)")
    return titled(figure, axes, "What the averaging error costs", describe(study, setting), found)


def draw_dose(setting, what, args):
    study, found = what
    figure, axes = panels(found)
    for axis, split in zip(axes, SPLITS, strict=True):
        every = []
        for seeds in found.values():
            line = np.array([losses(seeds, name, split).mean() for name in DOSES])  # [doses]
            axis.plot(list(DOSES.values()), line, color=GREY, linewidth=0.8, label="a cell, mean over seeds")
            every.append(line)
        every = [line for line in every if np.isfinite(line).all()]
        if every:
            axis.plot(list(DOSES.values()), np.mean(every, axis=0), **look(0), label="mean of the cells")
        axis.set_xticks(list(DOSES.values()))
        axis.set_xlabel("Residual's correction, times")
    return titled(figure, axes, "Dose and response", describe(study, setting), found)


def titled(figure, axes, title, about, found):
    legend_below(figure, axes)
    counts = sorted({len(seeds) for seeds in found.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    many = f"{len(found)} cell{'s' * (len(found) > 1)}, {seeds} seed{'s' * (seeds != '1')}"
    set_title(figure, f"{title}: {many}, bars: 95 % of a paired t test\n{about}")
    return figure


GROUPS = each_group(cells, VARIED, lambda run: any(row.get("replay") for row in run.rows))
NEEDS = "runs of fedavg_rounds.py with --replay"
FIGURES = [Figure("replay_error", GROUPS, draw_error, NEEDS), Figure("replay_dose", GROUPS, draw_dose, NEEDS)]
