"""Where training fails: the phase diagram of alpha against the learning rate or the number of local steps.

    python plots/noniid_failure_map.py --data-dir results --out-dir results/plots

Reads every failure_map*.json in a folder and those below it (`llm_noniid/failure_map.py` writes them) and draws

    noniid_failure_map_learning_rate.png, noniid_failure_map_local_steps.png    a panel per algorithm

Points are runs: a filled dot worked, a cross failed. The line joins the middles (on a log scale) of the brackets
between the largest value that worked and the smallest that failed; a bracket with one end only is an arrow to where the
boundary must be. Above the line, hatched, training fails.
"""

import json
from pathlib import Path

import numpy as np

from common.cli import UsageError, run_main
from common.curves import COLORS, new_figure, number, save_figure, set_title, style
from plots.noniid_drawing import figure_parser
from plots.noniid_runs import KINDS, map_files

AXES = {"learning_rate": "Learning rate", "local_steps": "Local steps a round"}


def build_parser():
    return figure_parser("Draws the boundary between training that works and training that fails.")


def main(args):
    maps, notes = read_maps(args.data_dir)
    for axis in dict.fromkeys(found["axis"] for found in maps):
        with style():
            path = Path(args.out_dir) / f"noniid_failure_map_{axis}.{args.format}"
            save_figure(draw(axis, [found for found in maps if found["axis"] == axis]), path)
        print(f"wrote {path}")
    for line in notes:
        print(line)


def read_maps(data_dir):
    """(the failure maps in a folder, notes); of two with one algorithm, axis and setting the later counts.

    Raises UsageError without any, and for a damaged one.
    """
    if not Path(data_dir).is_dir():
        raise UsageError(f"--data-dir {data_dir} is not a folder: give the --output-dir that the maps were written to")
    found, notes = {}, []
    for path in sorted(map_files(data_dir), key=lambda path: (path.stat().st_mtime, path)):
        try:
            one = json.loads(path.read_text(encoding="utf-8"))
            for point in one["points"]:
                if not (
                    number(point["alpha"]) > 0 and number(point["value"]) > 0 and isinstance(point["failed"], bool)
                ):
                    raise ValueError(f"the point {point}")
            for line in one["boundary"]:
                if not (number(line["alpha"]) > 0 and {"works", "fails"} <= line.keys()):
                    raise ValueError(f"the boundary {line}")
            key = one["algorithm"], one["axis"], json.dumps(one.get("setting"), sort_keys=True), one.get("seed")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error}): run failure_map.py again") from error
        if not one["points"]:
            notes.append(f"left out {path}: no run yet")
            continue
        if key in found:
            notes.append(f"left out {found[key]['path']}: the same flags as {path}, which is later")
        found[key] = one | {"path": path}
    if not found:
        raise UsageError(f"no figure could be drawn from {data_dir}: failure_map.py's failure_map.json is not there")
    order = list(KINDS)
    maps = sorted(found.values(), key=lambda m: order.index(m["algorithm"]) if m["algorithm"] in order else 99)
    return maps, notes


def draw(axis_name, maps):
    wide = min(3, len(maps))
    rows = -(-len(maps) // wide)
    width = 5.8 if wide == 1 else 4.0 * wide + 0.4
    figure, axes = new_figure(rows, wide, width=width, height=3.4 * rows + 1.2, sharex=True, sharey=True)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    alphas = sorted({point["alpha"] for found in maps for point in found["points"]})
    values = [point["value"] for found in maps for point in found["points"]]
    low, high = min(values) / 1.5, max(values) * 1.5
    titles = titles_of(maps)
    for axis, found, title in zip(axes.flat, maps, titles, strict=False):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(low, high)
        axis.set_xlim(alphas[0] / 2, alphas[-1] * 2)
        draw_boundary(axis, found["boundary"], high)
        draw_points(axis, found["points"])
        axis.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
        axis.minorticks_off()
        axis.set_title(title, fontsize=9.5)
        axis.tick_params(labelbottom=True, labelleft=True)
        axis.set_xlabel("Dirichlet's alpha (left: one topic a client, right: alike)", fontsize=9)
        axis.set_ylabel(AXES.get(axis_name, axis_name))
    plain_ticks(axes.flat[0].yaxis, low, high)
    entries = {}
    for axis in axes.flat[: len(maps)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=4 if wide > 1 else 2)
    set_title(figure, f"Where training fails: alpha against {AXES.get(axis_name, axis_name).lower()}\n{about(maps)}")
    return figure


def titles_of(maps):
    """The algorithm of each map, with its seed and file where two would be called the same."""
    titles = [KINDS.get(found["algorithm"], str(found["algorithm"])) for found in maps]
    if len(set(titles)) < len(titles):
        titles = [f"{title}, {found['path'].parent.name}" for title, found in zip(titles, maps, strict=True)]
    return [f"{title} ({len(found['points'])} runs)" for title, found in zip(titles, maps, strict=True)]


def about(maps):
    """What the maps' settings agree on, in words."""
    words = {"dataset": "{}", "model": "{}", "num_clients": "{} clients", "local_steps": "{} local steps"}
    words |= {"learning_rate": "lr {:g}", "num_rounds": "{} rounds", "participation_rate": "participation {:g}"}
    settings = [(found.get("setting") or {}) | {"seed": found.get("seed")} for found in maps]
    said = []
    for name, text in (words | {"seed": "seed {}"}).items():
        values = {str(setting.get(name)) for setting in settings}
        value = settings[0].get(name)
        if len(values) == 1 and value is not None and name not in {found["axis"] for found in maps}:
            said.append(text.format(Path(value).name if name == "model" else value))
    return ", ".join(said)


def draw_points(axis, points):
    for failed, marker, label in ((False, "o", "works"), (True, "X", "fails")):
        chosen = [(point["alpha"], point["value"]) for point in points if point["failed"] == failed]
        if chosen:
            look = {"color": COLORS[1] if failed else "black", "markersize": 7 if failed else 5.5}
            axis.plot(*zip(*chosen, strict=True), marker, label=label, markeredgecolor="white", zorder=4, **look)


def draw_boundary(axis, boundary, high):
    """The brackets, the line through their middles and the hatched region above it."""
    known, ends = [], sorted(boundary, key=lambda line: line["alpha"])
    for line in ends:
        works, fails = number(line["works"]), number(line["fails"])
        if works > 0 and fails > 0:
            middle = float(np.sqrt(works * fails))
            known.append((line["alpha"], middle))
            axis.plot([line["alpha"]] * 2, [works, fails], "-", color="#555555", linewidth=5, alpha=0.35, zorder=2)
        elif works > 0 or fails > 0:
            start, end = (works, works * 1.8) if works > 0 else (fails, fails / 1.8)
            arrow = {"arrowstyle": "-|>", "linewidth": 1.6, "color": "#555555", "shrinkA": 6, "shrinkB": 0}
            axis.annotate("", (line["alpha"], end), (line["alpha"], start), arrowprops=arrow, annotation_clip=False)
    if known:
        x, y = (np.array(column) for column in zip(*known, strict=True))
        axis.plot(x, y, "--", color="black", linewidth=1.6, marker="_", markersize=14, label="boundary", zorder=3)
        axis.fill_between(
            x,
            y,
            high,
            facecolor="none",
            edgecolor="#bbbbbb",
            hatch="///",
            linewidth=0,
            zorder=1,
            label="training fails",
        )


def plain_ticks(axis, low, high):
    """Plain numbers at round places of a logarithmic axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from common.curves import round_ticks

    axis.set_major_locator(FixedLocator(round_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    run_main(main, build_parser().parse_args())
