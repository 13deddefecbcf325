"""What heterogeneity costs in llm_noniid: the map over local steps and alpha, and which runs are broken.

    python plots/noniid.py cost_map --data-dir llm_noniid/results/regimes.jsonl

cost_map     noniid_cost_map.png, of validation loss (nats a token), and noniid_cost_map_accuracy.png (points): a panel
             per algorithm and budget, a row per number of local steps H, a column per alpha. A cell is the mean of

                 cost = outcome(alpha, H) - outcome(IID, H)     of one seed, algorithm and number of rounds,
                                                                each at its own learning rate; of accuracy the opposite

             It is broken where that is above the margin, two standard deviations of the outcome under IID over seeds,
             or where a run diverged: hatched, with their number; they are no part of the mean. The column IID has that
             outcome and, behind ±, the margin (of one seed there is none). A line lies between broken cells and others
"""

from dataclasses import dataclass, field

import numpy as np

from common.curves import GREY, number, set_title
from plots.noniid_runs import STUDY, TUNED, WIDE, baseline, not_finite, order, tuned_rank
from plots.runs import LeftOut, describe, like_with_like, shared_setting, words_for
from plots.seeds import curves_of
from plots.style import Figure, heat_map, panel_axes, seeds_range

MARGIN = 2.0  # standard deviations of the IID runs
IN_MAP = {"alpha", "local", "rounds", "min_samples"} | TUNED  # what may differ within a panel
OUTCOMES = {  # field: (which way is worse, factor, name with unit, digits)
    "val_loss": (1, 1, "validation loss (nats a token)", 3),
    "val_accuracy": (-1, 100, "validation accuracy (points)", 1),
}


@dataclass(frozen=True, eq=False)
class Cell:
    """A setting and its IID control: {seed: cost} of the runs that did not diverge, the mean outcome under IID, the
    margin, the runs that diverged."""

    curve: object
    control: object
    costs: dict
    level: float
    margin: float
    diverged: list = field(default_factory=list)

    @property
    def mean(self):
        return float(np.mean(list(self.costs.values()))) if self.costs else np.nan

    @property
    def broken(self):
        """Whether a run diverged or the mean cost is above the margin; None where that is not known."""
        if self.diverged:
            return True
        return None if np.isnan(self.margin) or not self.costs else self.mean > self.margin

    def broken_runs(self):
        """[(run, whether it is broken)] of the runs of which that is known."""
        known = not np.isnan(self.margin)
        of = [(run, self.costs[run.seed] > self.margin) for run in self.curve.runs if run.seed in self.costs and known]
        return of + [(run, True) for run in self.diverged]


def has_diverged(run):
    """Whether it ended by its updates, loss or the alarm of divergence, or with a loss above that before training.

    No detector is asked of a run that went on to its end: by this they are judged.
    """
    if not_finite(run) or run.ended["by"] == "diverged":
        return True
    last, start = run.result("val_loss"), next((row.get("val_loss") for row in run.rows if row["round"] == 0), None)
    return bool(np.isnan(last) or last > number(start))


def budget(curve):
    """Local steps, or epochs, of all rounds."""
    args = curve.runs[0].args
    return (args.get("local_steps") or args.get("local_epochs")) * args["num_rounds"]


def cells_of(runs, notes, name="val_loss"):
    """list[(setting, curves, list[Cell])] of the groups of like runs in which a setting has its control.

    Of several learning rates of a cell that with most seeds counts, of those the one with the lowest loss.
    """
    sign, found = OUTCOMES[name][0], []
    for setting, members in like_with_like([run for run in runs if not run.central], WIDE):
        curves, alike, cells = curves_of(members, WIDE, notes=notes), {}, []
        for curve in curves:
            place = {key: value for key, value in curve.args.items() if key not in TUNED}
            alike.setdefault((curve.kind, str(sorted(place.items()))), []).append(curve)
        for same in alike.values():
            curve = max(same, key=tuned_rank)
            notes += [LeftOut(c.label, "another learning rate of its cell counts") for c in same if c is not curve]
            control = baseline(curve, curves, "iid")
            if curve.args["partition"] == "IID":
                continue
            if control is None:
                notes.append(LeftOut(curve.label, "no run under IID with as many rounds and local steps"))
                continue
            cells.append(cell_of(curve, control, name, sign))
        if cells:
            found.append((setting, curves, cells))
    return found


def cell_of(curve, control, name, sign=1):
    """The `Cell` of a curve and its control."""
    base = {run.seed: run.result(name) for run in control.runs if not has_diverged(run)}
    diverged = [run for run in curve.runs if has_diverged(run)]
    pairs = {run.seed: sign * (run.result(name) - base.get(run.seed, np.nan)) for run in curve.runs}
    costs = {s: cost for s, cost in pairs.items() if np.isfinite(cost) and s not in {run.seed for run in diverged}}
    outcomes = np.array(list(base.values()) or [np.nan])
    margin = MARGIN * outcomes.std(ddof=1) if len(base) > 1 else np.nan
    return Cell(curve, control, costs, float(outcomes.mean()), float(margin), diverged)


# ---- the map


def maps_of(name):
    """A select: [(setting, [(panel's title, its cells)])] of an outcome."""

    def select(runs, notes):
        figures = []
        for setting, curves, cells in cells_of([run for run in runs if having(run, name)], notes, name):
            panels = {}
            for cell in cells:
                if "alpha" in cell.curve.args and (cell.costs or cell.diverged):
                    same = {key: value for key, value in cell.curve.args.items() if key not in IN_MAP}
                    panels.setdefault((cell.curve.name, budget(cell.curve), tuple(same.items())), []).append(cell)
            if panels:
                figures.append((shared_setting(setting, curves), named(panels)))
        return sorted(figures, key=lambda figure: -sum(len(cells) for _, cells in figure[1]))

    return select


def having(run, name):
    return has_diverged(run) or np.isfinite(run.result(name))


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


def draw_map(name):
    def draw(setting, panels, args):
        _, factor, words, digits = OUTCOMES[name]
        means = np.array([factor * cell.mean for _, cells in panels for cell in cells])
        scale = np.nanmin([0, *means]), np.nanmax([1e-9, *means])
        alphas, steps = ({cell.curve.args[k] for _, cells in panels for cell in cells} for k in ("alpha", "local"))
        wide = min(3, len(panels))
        size = {"width": max(5.4, wide * (0.75 * len(alphas) + 1.9) + 1), "height": 0.5 * len(steps) + 1.3}
        figure, axes = panel_axes(len(panels), wide, extra=1.1, **size)
        for axis, (title, cells) in zip(axes, panels, strict=True):
            draw_cells(axis, cells, scale, factor, digits)
            axis.set_title(title, fontsize=9.5)
        figure.colorbar(axes[0].images[0], ax=axes, pad=0.02, fraction=0.04).set_label(
            f"Cost in\n{words}", fontsize=8.5
        )
        seeds = seeds_range([cell.curve for _, cells in panels for cell in cells])
        lines = [
            f"What skew costs against IID, mean of {seeds} seed{'s' * (seeds != '1')}",
            describe(STUDY, setting),
            f"line: beyond it broken, a cost above {MARGIN:g} standard deviations over IID's seeds (±), or diverged",
        ]
        set_title(figure, "\n".join(lines))
        return figure

    return draw


def draw_cells(axis, cells, scale, factor, digits):
    """A panel: rows of local work, most on top; columns IID and alpha, least skew on the left."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    alphas = sorted({cell.curve.args["alpha"] for cell in cells}, reverse=True)
    steps = sorted({cell.curve.args["local"] for cell in cells}, key=lambda value: order("local", value), reverse=True)
    at = {(steps.index(c.curve.args["local"]), 1 + alphas.index(c.curve.args["alpha"])): c for c in cells}
    values = np.full((len(steps), len(alphas) + 1), np.nan)
    broken = np.full(values.shape, np.nan)  # 1, 0, nan: not known
    texts = {}
    for (i, j), cell in at.items():
        values[i, j], n = round(factor * cell.mean, digits) + 0.0, len(cell.diverged)
        broken[i, j] = np.nan if cell.broken is None else cell.broken
        said = [f"{values[i, j]:+.{digits}f}"] * bool(cell.costs) + [f"{n}/{len(cell.curve.runs)} div."] * bool(n)
        texts[i, j] = "\n".join(said)
        known = not np.isnan(cell.margin)
        broken[i, 0] = 0 if known else np.nan
        margin = f"± {factor * cell.margin:.{digits}f}" if known else "one seed"
        texts[i, 0] = f"{factor * cell.level:.{digits}f}\n{margin}"
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
    axis.set_xlabel("Dirichlet's alpha (right: one topic a client)", fontsize=9)
    axis.set_ylabel(f"Local {steps[0].split()[2].rstrip('s')}s a round, H")


COST_MAP = [
    Figure(f"noniid_cost_map{end}", maps_of(name), draw_map(name), f"runs with {name} under topic skew and under IID")
    for name, end in (("val_loss", ""), ("val_accuracy", "_accuracy"))
]
