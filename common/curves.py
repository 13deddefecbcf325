"""Curves of a run, and the one style that every figure of the project has.

Nothing here imports matplotlib at import time and nothing uses `pyplot`: a figure is an object that is
drawn and saved, so a training process needs no display and keeps no state. Lines differ in colour, dash and
marker, so that a figure printed in grey says the same.
"""

import json
import math
import os
import textwrap
from pathlib import Path

# Okabe and Ito's colours without the yellow, ordered so that neighbours differ in lightness too.
COLORS = ["#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"]
DASHES = ["-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.2, 1, 1.2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
GREY = "#777777"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.framealpha": 0.9,
    "legend.handlelength": 3.2,
    "legend.edgecolor": "#cccccc",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def style():
    """A context in which figures are made *and saved* (matplotlib reads part of its settings only then)."""
    import matplotlib

    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": "agg"})


def new_figure(rows=1, columns=1, width=6.4, height=4.2, **kwargs):
    """A figure of `width` x `height` inches and its axes, an array [rows, columns]. Call it inside `style()`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def set_title(figure, text):
    """The title over a whole figure, its lines broken to the figure's width."""
    letters = int(figure.get_figwidth() * 14)
    figure.suptitle("\n".join(break_lines(line, letters) for line in text.split("\n")), fontsize=9.5)


def break_lines(text, letters):
    """`text` in lines of at most `letters`."""
    return textwrap.fill(text, letters, break_long_words=False)


def save_figure(figure, path):
    """Writes the figure (png or pdf by the file's suffix); a broken write leaves the old file in place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.new{path.suffix}")
    try:  # no date in the file: the same runs give the same bytes
        figure.savefig(part, metadata={"CreationDate": None} if path.suffix == ".pdf" else {})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def line_style(i, points):
    """Colour, dash and about eight markers of line i."""
    look = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
    return look | {"markevery": max(1, points // 8)}


def log_axis(axes, lowest, highest):
    """Makes a matplotlib y axis logarithmic over [lowest, highest], with plain numbers at round places.

    Perplexities of one figure often lie within a factor of two, where powers of ten would leave no label.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    pad = (highest / lowest) ** 0.06 if highest > lowest else 1.1
    axes.set_ylim(lowest / pad, highest * pad)
    near = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    axes.yaxis.set_major_locator(near if highest < 8 * lowest else LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def read_metrics(run_folder):
    """The lines of `metrics.jsonl` as dicts. A last line that was cut off (a killed run) is left out.

    Raises FileNotFoundError without that file and ValueError with the line's number for any other damage.
    """
    path = Path(run_folder) / "metrics.jsonl"
    lines, rows = path.read_bytes().splitlines(), []
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("round"), int):
            rows.append(row)
        elif n < len(lines):
            raise ValueError(f"{path}: line {n} is not a JSON object with a round")
    return rows


def number(value):
    """`value` as a float; nan for what is missing or not a finite number (None, "inf", a bool)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def draw_curve(run_folder):
    """Writes `curve.png` into a run folder: validation and train perplexity (log axis) against tokens seen.

    Returns the path, or None when no validation perplexity is finite.
    """
    from matplotlib.ticker import EngFormatter

    rows = [row for row in read_metrics(run_folder) if number(row.get("val_ppl")) > 0]
    if not rows:
        return None
    with style():
        figure, axes = new_figure(width=5.6, height=3.8)
        axis = axes[0, 0]
        seen = []
        for i, (field, label) in enumerate((("train_ppl", "train"), ("val_ppl", "validation")), start=1):
            values = [number(row.get(field)) for row in rows]
            axis.plot([row["tokens"] for row in rows], values, label=label, **line_style(i, len(rows)))
            seen += [value for value in values if value > 0]
        log_axis(axis, min(seen), max(seen))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.set(xlabel="Tokens seen", ylabel="Perplexity", title=Path(run_folder).name)
        axis.legend()
        return save_figure(figure, Path(run_folder) / "curve.png")


def draw_accuracy(run_folder, path):
    """Writes a run's curves: loss (training and validation) and validation accuracy in %, against the round.

    Returns the path, or None when metrics.jsonl has no accuracy.
    """
    rows = [row for row in read_metrics(run_folder) if not math.isnan(number(row.get("val_accuracy")))]
    if not rows:
        return None
    rounds = [row["round"] for row in rows]
    with style():
        figure, axes = new_figure(columns=2, width=8.2, height=3.4)
        left, right = axes[0]
        for i, (field, label) in enumerate((("train_loss", "training"), ("val_loss", "validation")), start=1):
            left.plot(rounds, [number(row.get(field)) for row in rows], label=label, **line_style(i, len(rows)))
        right.plot(rounds, [100 * row["val_accuracy"] for row in rows], label="validation", **line_style(2, len(rows)))
        for axis, label in ((left, "Cross-entropy (nats)"), (right, "Accuracy (%)")):
            axis.set(xlabel="Round" if "clients" in rows[-1] else "Epoch", ylabel=label)
            axis.legend()
        set_title(figure, Path(run_folder).name)
        return save_figure(figure, path)
