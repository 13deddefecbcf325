"""What a figure shows, in numbers and words, and how two such descriptions differ.

A figure's axes have their titles, labels, scales, named ticks, legends and texts, and of every line, bar, band, cloud
of points and heat map the data, without colours, looks and the place of a legend. Long arrays are kept as their count,
ends and two sums, so that a difference in the last bits of a sum does not matter.
"""

import math

import numpy as np

WHOLE = 8  # so many numbers are kept one by one
TOLERANCE = 2e-5  # relative: numbers are kept to six digits
# what the numbers of a kind of artist are
DATA = {"line": "xy", "bar": "x y width height", "spread": "xy", "points": "xy", "map": "values", "band": "xy"}


def numbers(flat):
    """A flat array for JSON: its numbers, or of a long one {count, ends, sums, gaps}; None for a gap."""
    if flat.size <= WHOLE:
        return [_number(v) for v in flat]
    finite = np.where(np.isfinite(flat), flat, 0.0)
    weights = 1 + np.arange(flat.size) % 11 / 10
    # the second sum is the first one's scale
    sums = [_number(finite @ weights), _number(np.abs(finite).sum())]
    kept = {"count": flat.size, "ends": [_number(v) for v in (*flat[:2], *flat[-2:])], "sums": sums}
    gaps = int((~np.isfinite(flat)).sum())
    return kept | ({"gaps": gaps} if gaps else {})


def _number(value):
    if math.isnan(value):
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))


def words(text):
    """A text on one line."""
    return " ".join(text.split())


def describe(figure, coarse=False):
    """dict of what a matplotlib figure shows; coarse: with all artists of a kind in one array, whatever their names."""
    title = words(figure.get_suptitle())
    legends = [words(t.get_text()) for legend in figure.legends for t in legend.get_texts()]
    axes = [describe_axes(axes, coarse) for axes in figure.axes if axes.axison]
    return _full({"caption": title, "legend": legends, "axes": axes})


def describe_axes(axes, coarse=False):
    from matplotlib.ticker import FixedLocator

    about = {"title": words(axes.get_title()), "x": words(axes.get_xlabel()), "y": words(axes.get_ylabel())}
    scales = f"{axes.get_xscale()}, {axes.get_yscale()}"
    about["scales"] = "" if scales == "linear, linear" else scales
    for name, axis in (("x ticks", axes.xaxis), ("y ticks", axes.yaxis)):
        if isinstance(axis.get_major_locator(), FixedLocator):
            about[name] = [words(label.get_text()) for label in axis.get_ticklabels()]
    legend = axes.get_legend()
    about["legend"] = [words(t.get_text()) for t in legend.get_texts()] if legend else []
    about["texts"] = sorted(words(t.get_text()) for t in axes.texts if t.get_text().strip())
    about["shows"] = sorted(_shown(axes, coarse), key=repr)
    return _full(about)


def _shown(axes, coarse):
    """One dict for all artists of a kind and name: how many they are if several, and their numbers in one array."""
    groups = {}
    for kind, label, values in _artists(axes):
        groups.setdefault((kind, "" if coarse else label), []).append(values)
    for (kind, label), arrays in groups.items():
        arrays.sort(key=lambda values: [float(f"{v:.5g}") for v in np.nan_to_num(values[:50])])
        many = {"how many": len(arrays)} if len(arrays) > 1 else {}
        yield {kind: label, **many, DATA[kind]: numbers(np.concatenate(arrays))}


def _artists(axes):
    """(kind, name, flat values) of everything drawn but the caps of bars of spread."""
    from matplotlib.collections import LineCollection, PathCollection, QuadMesh

    named, caps = {}, set()
    for container in axes.containers:  # a point with its bar: the container has the name
        for artist in container.get_children():
            named[artist] = container.get_label()
        if hasattr(container, "lines"):
            caps |= set(container.lines[1])
    for line in axes.lines:
        if line not in caps:
            x, y = line.get_data(orig=False)
            yield "line", _label(line, named), _flat(np.ma.stack([_floats(x), _floats(y)], axis=-1))
    for patch in axes.patches:
        corners = patch.get_patch_transform().transform(patch.get_path().vertices)
        box = [*corners.min(axis=0), *(corners.max(axis=0) - corners.min(axis=0))]
        yield "bar", _label(patch, named), _flat(box)
    for item in axes.collections:
        name = _label(item, named)
        if not len(item.get_paths()) and not isinstance(item, PathCollection):
            continue  # a colour bar's lines between no colours
        if isinstance(item, LineCollection):
            yield "spread", name, np.concatenate([_flat(segment) for segment in item.get_segments()])
        elif isinstance(item, PathCollection):
            yield "points", name, _flat(item.get_offsets())
        elif isinstance(item, QuadMesh):
            yield "map", name, _flat(item.get_array())
        else:
            yield "band", name, np.concatenate([_flat(path.vertices) for path in item.get_paths()])
    for image in axes.images:
        yield "map", "", _flat(image.get_array())


def _floats(values):
    return np.ma.asarray(values, dtype=float)


def _flat(values):
    return np.ma.filled(_floats(values), np.nan).ravel()


def _label(artist, named):
    label = str(named.get(artist) or artist.get_label())
    return "" if label.startswith("_") else words(label)


def _full(about):
    return {key: value for key, value in about.items() if value}


def differences(golden, now):
    """Where two descriptions differ: a list of lines `place: golden ..., now ...`."""
    golden, now = dict(_leaves(golden)), dict(_leaves(now))
    pairs = {where: (golden.get(where, "nothing"), now.get(where, "nothing")) for where in golden | now}
    return [
        f"{where.removeprefix(', ')}: golden {a!r:.300}, now {b!r:.300}"
        for where, (a, b) in pairs.items()
        if not alike(a, b)
    ]


def _leaves(value, where=""):
    """(place, value) of every number, word and long array, and how long every list is."""
    if isinstance(value, list):
        yield f"{where}, count", len(value)
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{where}[{i}]")
    elif isinstance(value, dict) and "sums" not in value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{where}, {key}")
    else:
        yield where, value


def alike(a, b):
    if isinstance(a, dict) and isinstance(b, dict):  # long arrays
        scale = TOLERANCE * a["sums"][1]
        close = [math.isclose(x, y, rel_tol=0, abs_tol=scale) for x, y in zip(a["sums"], b["sums"], strict=True)]
        ends = [alike(x, y) for x, y in zip(a["ends"], b["ends"], strict=True)]
        return all(close + ends) and a["count"] == b["count"] and a.get("gaps") == b.get("gaps")
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-9)
    return a == b
