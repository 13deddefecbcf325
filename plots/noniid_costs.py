"""What heterogeneity costs in llm_noniid: the map over local steps and alpha, and which runs are broken.

    python plots/noniid.py cost_map --data-dir llm_noniid/results/regimes.jsonl

cost_map     noniid_cost_map.png: a panel per algorithm and budget, a row per number of local steps H, a column per
             alpha. A cell is the mean over seeds of

                 cost = outcome(alpha, H) - outcome(IID, H)     of one seed, algorithm and number of rounds,
                                                                each at its own learning rate and mu

             in validation accuracy (--target label: the opposite, in points; noniid_cost_map_loss.png has the loss, in
             nats a text, beside) or validation loss (of texts, nats a token). A cell is broken if its mean cost is
             above 5 points of accuracy, of texts 0.05 nats, and the paired 95 % interval excludes 0, or if a run
             diverged: hatched, with their number, no part of the mean. Of fewer than 3 pairs, or above that with
             0 in the interval, nothing is decided. Panels of one H are left out where others have several (they
             are rows of plots/tables.py llm_noniid --against iid). `chance`: an accuracy at most a standard error,
             of the texts evaluated, above 1 / topics; `prior`: a loss of at least ln(topics). The column IID has
             its outcome. A line lies between broken cells and others
"""

import math
from dataclasses import dataclass

import numpy as np

from common.curves import GREY, number, set_title
from plots.noniid_runs import STUDY, TUNED, WIDE, baseline, order, prior, tuned_rank
from plots.runs import LeftOut, describe, like_with_like, not_finite, shared_setting, words_for
from plots.seeds import curves_of, interval
from plots.style import Figure, heat_map, panel_axes, seeds_range

THRESHOLD = 0.05  # of accuracy (--target label), nats a token (text): a mean cost above it is broken
PAIRS = 3  # that decide
DECIDES = {"label": "val_accuracy", "text": "val_loss"}  # --target: the outcome that a verdict is of
IN_MAP = {"alpha", "local", "rounds", "min_samples"} | TUNED  # what may differ within a panel
OUTCOMES = {  # field: (which way is worse, factor, name, unit of each target, digits)
    "val_loss": (1, 1, "validation loss", {"text": "nats a token", "label": "nats a text"}, 3),
    "val_accuracy": (-1, 100, "validation accuracy", {"label": "points"}, 1),
}


@dataclass(frozen=True, eq=False)
class Cell:
    """A setting and its IID control, both a `Curve`."""

    curve: object
    control: object

    @property
    def target(self):
        return self.curve.runs[0].setting["target"]

    @property
    def diverged(self):
        return [run for run in self.curve.runs if has_diverged(run)]

    def costs(self, name=None):
        """{seed: cost} in an outcome, by default the one that decides, of the pairs without a run that diverged."""
        name = name or DECIDES[self.target]
        there = [[run for run in c.runs if not has_diverged(run)] for c in (self.control, self.curve)]
        base, mine = ({run.seed: run.result(name) for run in runs} for runs in there)
        pairs = {seed: OUTCOMES[name][0] * (mine[seed] - base[seed]) for seed in mine if seed in base}
        return {seed: cost for seed, cost in pairs.items() if np.isfinite(cost)}

    @property
    def broken(self):
        """See this module's docstring; None where it is not decided."""
        costs = np.array(list(self.costs().values()))
        if self.diverged:
            return True
        if len(costs) < PAIRS or costs.mean() > THRESHOLD and interval(costs)[0] <= 0:
            return None
        return bool(costs.mean() > THRESHOLD)

    def broken_runs(self):
        """[(run, whether its own cost is above the threshold, or it diverged)] of the runs of which that is known."""
        costs, diverged = self.costs(), self.diverged
        known = [(run, costs[run.seed] > THRESHOLD) for run in self.curve.runs if run.seed in costs]
        return [one for one in known if one[0] not in diverged] + [(run, True) for run in diverged]


def has_diverged(run):
    """Whether its updates or last loss were not finite or, of --target text, that loss is above that before training.

    Of labels a model knows less than nothing before training: that loss says nothing, and accuracy decides. No detector
    is asked, as by this they are judged.
    """
    last, start = run.result("val_loss"), next((row.get("val_loss") for row in run.rows if row["round"] == 0), None)
    above = run.setting["target"] == "text" and last > number(start)
    return bool(not_finite(run) or np.isnan(last) or above)


def no_better(curve, name):
    """Whether the mean outcome is what knowing nothing but the labels has: see `chance` and `prior` above."""
    run = curve.runs[0]
    level, n = prior(run).get(name, math.nan), (run.facts.get("counts") or {}).get("validation") or math.inf
    n = min(run.args.get("eval_samples") or math.inf, n)
    mean = np.mean([one.result(name) for one in curve.runs if not has_diverged(one)] or [math.nan])
    return bool(mean >= level if name == "val_loss" else mean <= level + math.sqrt(level * (1 - level) / n))


def noise(cells, name):
    """The pooled standard deviation of a cell's paired costs over seeds; nan of one seed."""
    every = [np.array(list(cell.costs(name).values())) for cell in cells]
    freedom = sum(max(0, len(costs) - 1) for costs in every)
    return math.sqrt(sum(len(c) * c.var() for c in every if len(c)) / freedom) if freedom else math.nan


def budget(curve):
    """Local steps, or epochs, of all rounds."""
    args = curve.runs[0].args
    return (args.get("local_steps") or args.get("local_epochs")) * args["num_rounds"]


def cells_of(runs, notes):
    """list[(setting, curves, list[Cell])] of the groups of like runs in which a setting has its control.

    Of several learning rates (or mu) of a cell that with most seeds counts, of those the one with the lowest loss. Runs
    that an alarm may have ended are left out.
    """
    whole = [run for run in runs if run.args.get("stop_on", "never") == "never"]
    notes += [LeftOut(run.name, "an alarm may end it (--stop-on)") for run in runs if run not in whole]
    found = []
    for setting, members in like_with_like([run for run in whole if not run.central], WIDE):
        curves, alike, cells = curves_of(members, WIDE, notes=notes), {}, []
        for curve in curves:
            place = {key: value for key, value in curve.args.items() if key not in TUNED}
            alike.setdefault((curve.kind, str(sorted(place.items()))), []).append(curve)
        for same in alike.values():
            curve = max(same, key=tuned_rank)
            why = "another learning rate or mu of its cell counts"
            notes += [LeftOut(c.label, why) for c in same if c is not curve]
            control = baseline(curve, curves, "iid")
            if curve.args["partition"] == "IID":
                continue
            if control is None:
                notes.append(LeftOut(curve.label, "no run under IID with as many rounds and local steps"))
                continue
            cells.append(Cell(curve, control))
        if cells:
            found.append((setting, curves, cells))
    return found


# ---- the map


def maps_of(names):
    """A select: [(setting, [(panel's title, its cells)])] of the outcome that `names` has for a run's target."""

    def select(runs, notes):
        figures = []
        for setting, curves, cells in cells_of([run for run in runs if having(run, names)], notes):
            panels = {}
            for cell in cells:
                if "alpha" in cell.curve.args and (cell.costs(names[cell.target]) or cell.diverged):
                    same = {key: value for key, value in cell.curve.args.items() if key not in IN_MAP}
                    panels.setdefault((cell.curve.name, budget(cell.curve), tuple(same.items())), []).append(cell)
            several = {key: cells for key, cells in panels.items() if len({c.curve.args["local"] for c in cells}) > 1}
            for cell in (cell for key, cells in panels.items() if several and key not in several for cell in cells):
                notes.append(LeftOut(cell.curve.label, "of one number of local steps, beside maps of several"))
            panels = several or panels
            if panels:
                figures.append((shared_setting(setting, curves), named(panels)))
        return sorted(figures, key=lambda figure: -sum(len(cells) for _, cells in figure[1]))

    return select


def having(run, names):
    name = names.get(run.setting["target"])
    return bool(name and (has_diverged(run) or np.isfinite(run.result(name))))


def named(panels):
    """[(title, cells)]: the algorithm, the flags in which its panels differ, the budget."""
    titles = []
    for (algorithm, steps, same), cells in panels.items():
        others = [dict(theirs) for name, _, theirs in panels if name == algorithm]
        differ = [(key, value) for key, value in same if any(other.get(key) != value for other in others)]
        words = [word for key, value in differ for word in words_for(STUDY, key, value)]
        unit = cells[0].curve.args["local"].rstrip("s").split()[-1]
        titles.append((", ".join([algorithm, *words, f"{steps:g} {unit}s a client"]), cells))
    return titles


def draw_map(names):
    def draw(setting, panels, args):
        target, every = setting["target"], [cell for _, cells in panels for cell in cells]
        name = names[target]
        _, factor, words, units, digits = OUTCOMES[name]
        means = np.array([factor * mean_of(cell, name) for cell in every])
        scale = np.nanmin([0, *means]), np.nanmax([factor * THRESHOLD, *means])
        alphas, steps = ({cell.curve.args[k] for cell in every} for k in ("alpha", "local"))
        wide = min(3, len(panels))
        size = {"width": max(5.4, wide * (0.75 * len(alphas) + 1.9) + 1), "height": 0.5 * len(steps) + 1.3}
        figure, axes = panel_axes(len(panels), wide, extra=2.0, **size)
        for axis, (title, cells) in zip(axes, panels, strict=True):
            draw_cells(axis, cells, scale, name)
            axis.set_title(title, fontsize=9.5)
        bar = figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, fraction=0.04)
        bar.set_label(f"Cost in\n{words} ({units[target]})", fontsize=8.5)
        decides = OUTCOMES[DECIDES[target]]
        least, spread = (
            f"{decides[1] * THRESHOLD:g} {decides[3][target]}",
            f"{factor * noise(every, name):.{digits + 1}f}",
        )
        seeds = seeds_range([cell.curve for cell in every])
        level = prior(every[0].curve.runs[0])
        lines = [
            f"What skew costs against IID, mean of {seeds} seed{'s' * (seeds != '1')}",
            describe(STUDY, setting),
            f"line: beyond it broken, {decides[2].split()[1]} worse by over {least}, paired 95 % interval without 0,"
            f" or diverged ({len(every)} cells)",
            f"standard deviation of a seed's cost, pooled over cells: {spread} {units[target]}" * (spread != "nan"),
            f"label prior: {level['val_loss']:.2f} nats a text, {100 * level['val_accuracy']:.0f} %" if level else "",
        ]
        set_title(figure, "\n".join(filter(None, lines)))
        return figure

    return draw


def mean_of(cell, name):
    costs = list(cell.costs(name).values())
    return np.mean(costs) if costs else math.nan


def draw_cells(axis, cells, scale, name):
    """A panel: rows of local work, most on top; columns IID and alpha, least skew on the left."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    _, factor, *_, digits = OUTCOMES[name]
    mark = "prior" if name == "val_loss" else "chance"
    alphas = sorted({cell.curve.args["alpha"] for cell in cells}, reverse=True)
    steps = sorted({cell.curve.args["local"] for cell in cells}, key=lambda value: order("local", value), reverse=True)
    at = {(steps.index(c.curve.args["local"]), 1 + alphas.index(c.curve.args["alpha"])): c for c in cells}
    values = np.full((len(steps), len(alphas) + 1), np.nan)
    broken = np.full(values.shape, np.nan)  # 1, 0, nan: not decided
    texts = {}
    for (i, j), cell in at.items():
        values[i, j], n = round(factor * mean_of(cell, name), digits) + 0.0, len(cell.diverged)
        broken[i, 0], broken[i, j] = 0, np.nan if cell.broken is None else cell.broken
        said = [f"{values[i, j]:+.{digits}f}"] * bool(cell.costs(name)) + [f"{n}/{len(cell.curve.runs)} div."] * bool(n)
        said += [mark] * no_better(cell.curve, name) + ["not decided"] * (cell.broken is None)
        texts[i, j] = "\n".join(said)
        level = f"{factor * np.nanmean(cell.control.results(name)):.{digits}f}"
        texts[i, 0] = "\n".join([level, *[mark] * no_better(cell.control, name)])
    colors = ListedColormap(colormaps["cividis_r"](np.linspace(0.08, 1, 256)))
    heat_map(axis, np.ma.masked_invalid(values), *scale, None, colors)
    for (i, j), words in texts.items():
        dark = values[i, j] > sum(scale) / 2
        look = {"color": "white" if dark else "black"}
        if j and at[i, j].diverged:
            box = {"facecolor": "none", "edgecolor": GREY, "hatch": "////", "linewidth": 0}
            axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **box))
            look = {"color": "black", "bbox": {"facecolor": "white", "linewidth": 0, "pad": 1.5}}
        axis.text(j, i, words, ha="center", va="center", fontsize=7, **look)
    line = {"color": "black", "linewidth": 3, "solid_capstyle": "round"}
    for i, j in np.ndindex(*values.shape):  # between a broken cell and one that is not
        if j + 1 < values.shape[1] and {broken[i, j], broken[i, j + 1]} == {0, 1}:
            axis.plot([j + 0.5] * 2, [i - 0.5, i + 0.5], **line)
        if i + 1 < values.shape[0] and {broken[i, j], broken[i + 1, j]} == {0, 1}:
            axis.plot([j - 0.5, j + 0.5], [i + 0.5] * 2, **line)
    axis.set_xticks(range(len(alphas) + 1), ["IID", *(f"{alpha:g}" for alpha in alphas)])
    axis.set_yticks(range(len(steps)), [value.split()[0] for value in steps])
    axis.tick_params(length=0)
    axis.set_xlabel("Dirichlet's alpha (right: more skew)", fontsize=9)
    axis.set_ylabel(f"Local {steps[0].split()[2].rstrip('s')}s a round, H")


LABELS_LOSS = {"label": "val_loss"}
COST_MAP = [
    Figure(f"noniid_cost_map{end}", maps_of(names), draw_map(names), f"runs{which} under topic skew and under IID")
    for names, end, which in ((DECIDES, "", ""), (LABELS_LOSS, "_loss", " of --target label"))
]
