"""Curves of a run, and the one style that every figure of the project has.

Nothing here imports matplotlib at import time and nothing uses `pyplot`: a figure is an object that is
drawn and saved, so a training process needs no display and keeps no state. Lines differ in colour, dash and
marker, so that a figure printed in grey says the same.
"""

import json
import math
import os
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
    """The title over a whole figure; lines too long for the figure's width are broken at their commas."""
    letters = int(figure.get_figwidth() * 14)
    figure.suptitle("\n".join(break_lines(line, letters) for line in text.split("\n")), fontsize=9.5)


def break_lines(text, letters):
    """`text` broken at its commas into lines of at most `letters` (a longer part stays whole)."""
    lines = [""]
    for part in text.split(", "):
        if lines[-1] and len(lines[-1]) + 2 + len(part) > letters:
            lines[-1] += ","
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + part
    return "\n".join(lines)


def save_figure(figure, path):
    """Writes the figure (png or pdf by the file's suffix); a broken write leaves the old file in place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.new{path.suffix}")  # one name: the next writes over that of a killed process
    # No date in the file: the same runs give the same bytes.
    metadata = {"CreationDate": None} if path.suffix == ".pdf" else {}
    try:
        figure.savefig(part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def line_style(i, points, lines=1):
    """Colour, dash and marker of line `i` of `lines`; about eight markers, shifted against the others'."""
    every = max(1, points // 8)
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markevery": ((i * every) // max(1, lines) % every, every),
    }


def token_unit(most):
    """(divisor, word) for an axis that ends at `most` tokens."""
    if most >= 1e9:
        return 1e9, "billions"
    if most >= 1e6:
        return 1e6, "millions"
    if most >= 1e4:
        return 1e3, "thousands"
    return 1.0, ""


def tokens_label(word, what="Tokens seen, all clients together"):
    return what + (f" ({word})" if word else "")


def log_axis(axis, lowest, highest):
    """Makes a matplotlib y axis logarithmic over [lowest, highest] with plain numbers at round places.

    Perplexities of one figure often lie within a factor of two, where powers of ten would leave no label.
    """
    axis.set_yscale("log")
    pad = (highest / lowest) ** 0.06 if highest > lowest else 1.1
    low, high = lowest / pad, highest * pad
    axis.set_ylim(low, high)
    plain_ticks(axis.yaxis, low, high)


def plain_ticks(axis, low, high, most=8):
    """Plain numbers at round places of a logarithmic matplotlib axis (`axes.xaxis`)."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(round_ticks(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def round_ticks(low, high, most=8):
    """At most `most` and, if it can be, at least three round numbers inside [low, high] (both above 0)."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [round(m * 10.0**e, 12) for e in range(first, last + 1) for m in multiples]
        ticks = [t for t in ticks if low <= t <= high]
        if 3 <= len(ticks) <= most:
            return ticks
    if len(ticks) > most:
        return ticks[:: math.ceil(len(ticks) / most)]
    # Less than about a third of a decade: evenly spaced numbers.
    for digits in range(math.floor(math.log10(high - low)) - 2, last + 1):
        for step in (1, 2, 2.5, 5):
            size = step * 10.0**digits
            start, stop = math.ceil(low / size), math.floor(high / size)
            if stop - start + 1 <= most:
                return [round(n * size, 12) for n in range(start, stop + 1)]
    return [low]


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
    """Writes `curve.png` into a run folder: validation perplexity (log axis) against tokens seen.

    Beside it, where metrics.jsonl has them: the train perplexity, the range of the clients' own models (on the
    validation sequences that they are evaluated on), and the best round. Returns the path, or None when no
    validation perplexity is finite.
    """
    run_folder = Path(run_folder)
    rows = [r for r in read_metrics(run_folder) if number(r.get("val_ppl")) > 0 and number(r.get("tokens")) >= 0]
    if not rows:
        return None
    divisor, word = token_unit(max(row["tokens"] for row in rows))
    tokens = [row["tokens"] / divisor for row in rows]
    validation, train = ([number(row.get(field)) for row in rows] for field in ("val_ppl", "train_ppl"))
    clients = [[v for v in map(number, row.get("client_val_ppl") or []) if v > 0] for row in rows]
    seen = [v for v in (*validation, *train, *(v for values in clients for v in values)) if v > 0]

    with style():
        figure, axes = new_figure(width=5.6, height=3.8)
        axis = axes[0, 0]
        if any(clients):
            low, high = ([end(values, default=math.nan) for values in clients] for end in (min, max))
            axis.fill_between(tokens, low, high, color="#dddddd", linewidth=0, label="clients' own models, min to max")
        if any(v > 0 for v in train):
            axis.plot(tokens, train, color=COLORS[1], linestyle=DASHES[1], marker="s", ms=3, label="train")
        every = max(1, len(tokens) // 12)
        axis.plot(tokens, validation, color=COLORS[2], marker="o", markevery=every, label="validation")
        _mark_best(axis, tokens, validation, min, "{:.4g}")
        log_axis(axis, min(seen), max(seen))
        axis.set_xlim(left=0)
        axis.set_xlabel(tokens_label(word) if "clients" in rows[-1] else tokens_label(word, "Tokens seen"))
        axis.set_ylabel("Perplexity")
        axis.set_title(run_folder.name)
        axis.legend()
        return save_figure(figure, run_folder / "curve.png")


def draw_accuracy(run_folder, path):
    """Writes a run's curves: loss (training and validation) and validation accuracy in %, against the round.

    Returns the path, or None when metrics.jsonl has no accuracy.
    """
    rows = [row for row in read_metrics(run_folder) if not math.isnan(number(row.get("val_accuracy")))]
    if not rows:
        return None
    rounds = [row["round"] for row in rows]
    accuracy = [100 * row["val_accuracy"] for row in rows]
    with style():
        figure, axes = new_figure(columns=2, width=8.2, height=3.4)
        left, right = axes[0]
        for i, (field, label) in enumerate((("train_loss", "training"), ("val_loss", "validation")), start=1):
            left.plot(rounds, [number(row.get(field)) for row in rows], label=label, **line_style(i, len(rounds), 2))
        right.plot(rounds, accuracy, label="validation", **line_style(2, len(rounds)))
        _mark_best(right, rounds, accuracy, max, "{:.1f} %")
        for axis, label in ((left, "Cross-entropy (nats)"), (right, "Accuracy (%)")):
            axis.set_xlabel("Round" if "clients" in rows[-1] else "Epoch")
            axis.set_ylabel(label)
            axis.legend()
        set_title(figure, Path(run_folder).name)
        return save_figure(figure, path)


def _mark_best(axis, x, y, best, words):
    i = y.index(best(y))
    axis.plot(x[i], y[i], "*", ms=11, color="black", ls="", label="best: " + words.format(y[i]))
