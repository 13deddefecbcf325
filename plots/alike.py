"""Runs that may be compared: groups with equal settings, the seeds of one method, labels that say what differs.

A study's `Run` says what its runs have (`setting`, `method`, `kind`) and how that is written (the names below).
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from common.curves import number


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder. A study's own class adds `kind`, `setting()` and `method()`, and names what they hold."""

    folder: Path
    command: str
    args: dict
    data: dict
    rows: list
    results: dict
    status: str

    kinds: ClassVar[dict] = {}  # kind of a run -> its name in figures and tables, in their order
    keys: ClassVar[tuple] = ()  # of `setting()`, in the order of captions
    short: ClassVar[dict] = {}  # name of a setting or argument -> its words, `{}` for the value
    yes_no: ClassVar[dict] = {}  # name of a flag -> (words for yes, for no)

    @property
    def seed(self):
        return self.args.get("seed")

    @property
    def written_at(self):
        """When its last evaluation was written; run.json, for one that ended before the first."""
        path = self.folder / "metrics.jsonl"
        return (path if path.exists() else self.folder / "run.json").stat().st_mtime

    @property
    def central(self):
        """Whether the run has no federation: its arguments are never compared with a federated run's."""
        return self.kind == "central"

    @staticmethod
    def order(key, value):
        """A sort key for the values of one setting or argument: numbers first."""
        return (0, value, 0, "") if isinstance(value, (int, float)) else (1, 0, 0, str(value))


def text(value):
    """`value` as something that can be compared and sorted: lists and dicts as JSON."""
    return value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value, sort_keys=True)


def base_name(path, inner=("final",)):
    """Last part of a path, without its seed: each seed may start from the run of its own seed; not one of `inner`."""
    path = Path(path)
    name = path.parent.name if path.name in inner else path.name
    return re.sub(r"_?seed_?\d+", "", name) or path.name


def like_with_like(runs, free=()):
    """Groups of runs that share every setting they have, keys in `free` apart.

    A run that has fewer keys than a group's (a central one: no federation) joins each group that it agrees with.
    Returns list[(setting dict, list[Run])], the group with most runs first.
    """

    def setting(run):
        return {key: value for key, value in run.setting().items() if key not in free}

    groups = []
    for mine, run in sorted(((setting(run), run) for run in runs), key=lambda pair: -len(pair[0])):
        joined = False
        for group, members in groups:
            if mine.items() <= group.items():
                members.append(run)
                joined = True
        if not joined:
            groups.append((mine, [run]))
    return sorted(groups, key=lambda group: (-len(group[1]), json.dumps(group[0], sort_keys=True)))


def suffixes(settings, keys):
    """File-name suffix of each setting: none for the first, for the others the values of `keys` that not all share."""
    keys = [key for key in keys if len({str(setting.get(key)) for setting in settings}) > 1]
    names = []
    for i, setting in enumerate(settings):
        words = "_".join(f"{key}_{setting[key]}" for key in keys if setting.get(key) is not None)
        name = "_" + (re.sub(r"[^A-Za-z0-9.]+", "_", words).strip("_") or f"group_{i + 1}") if i else ""
        names.append(name + f"_{i + 1}" if i and name in names else name)
    return names


def setting_of(setting, curves):
    """The group's setting with what else all federated curves agree on, for the caption of their figure."""
    several = [curve.runs[0].setting() for curve in curves if not curve.central]
    keys = {key for one in several for key in one}
    values = {key: [one[key] for one in several if key in one] for key in keys}
    return setting | {key: found[0] for key, found in values.items() if all(value == found[0] for value in found)}


@dataclass
class Panel:
    """Curves in one setting, central ones to refer to, what tells the panel from the figure's others."""

    setting: dict
    curves: list
    references: list = field(default_factory=list)
    title: str = ""


class Curve:
    """The seeds of one method in one setting: runs that differ in their seed only.

    args: its method's arguments and the settings that the figure varies, what lies on its axis apart.
    place: the values of what lies on the axis.
    """

    def __init__(self, runs, free=(), axis=()):
        self.runs = runs
        self.kind, args = runs[0].method()
        setting = runs[0].setting()
        varied = [key for key in runs[0].keys if key in free and key not in axis and key in setting]
        self.args = {key: setting[key] for key in varied} | dict(args)
        self.place = {key: setting.get(key) for key in axis}
        self.label, self.unlike = self.name, []

    @property
    def central(self):
        return self.runs[0].central

    @property
    def name(self):
        return self.runs[0].kinds.get(self.kind, self.kind.replace("_", " ").capitalize())

    @property
    def method(self):
        return self.kind, tuple(self.args.items())

    def words(self, name, value):
        """`words_for` an argument's value, as the curve's study writes it."""
        return words_for(name, value, self.runs[0].short, self.runs[0].yes_no)

    def series(self, field):
        """(rounds, mean, lowest, highest), each [evaluations]: over seeds, at the rounds that all of them evaluated.

        A value that is missing or not finite in any seed is nan in all three: the line has a gap there.
        """
        tables = [{row.get("round"): row for row in run.rows} for run in self.runs]
        rounds = [r for r in tables[0] if r is not None and all(r in table for table in tables)]
        values = np.array([[number(table[r].get(field)) for r in rounds] for table in tables])  # [S, E]
        return np.array(rounds, dtype=float), values.mean(axis=0), values.min(axis=0), values.max(axis=0)  # [E]

    def results(self, field):
        """[S] one number per seed of run.json's results, from the evaluations where those lack it."""
        return np.array([result(run, field) for run in self.runs])


def result(run, field):
    """A number of run.json's results, or from metrics.jsonl where that lacks it (nan where neither has it)."""
    value = number(run.results.get(field))
    if not math.isnan(value):
        return value
    if field == "val_accuracy_best" or field.startswith("best_val_"):
        field = field.removesuffix("_best").removeprefix("best_")
        return max((v for v in (number(row.get(field)) for row in run.rows) if v == v), default=math.nan)
    return number(run.rows[-1].get({"rounds": "round"}.get(field, field)))


def curves_of(runs, free=(), axis=(), notes=None):
    """The runs as labelled Curves in the order of their kinds, one for every method and value of the keys in `free`.

    Of two runs with the same setting, args and seed the later counts; a note names the other.
    """
    alike = {}
    for run in runs:
        setting = run.setting()
        key = (run.method(), tuple(str(setting.get(k)) for k in run.keys if k in free))
        alike.setdefault(key, {}).setdefault(run.seed, []).append(run)
    curves = []
    for seeds in alike.values():
        chosen = []
        for same in seeds.values():
            same.sort(key=lambda run: run.written_at)
            chosen.append(same[-1])
            for other in same[:-1]:
                note = f"left out {other.folder}: the same command and seed as {same[-1].folder}, which is later"
                if notes is not None and note not in notes:
                    notes.append(note)
        curves.append(Curve(sorted(chosen, key=lambda run: str(run.seed)), free, axis))
    curves.sort(key=lambda c: (kind_order(c), _order(c, c.args), _order(c, c.place)))
    label(curves)
    # of each method the usual variant first, then those that differ from it in one argument, in two, ...
    first = {kind: i for i, kind in reversed(list(enumerate(c.kind for c in curves)))}
    return sorted(curves, key=lambda c: (first[c.kind], len(c.unlike), [_word_order(c, name) for name in c.unlike]))


def kind_order(curve):
    """The place of the curve's kind among its study's; a kind that is not among them comes last."""
    kinds = list(curve.runs[0].kinds)
    return kinds.index(curve.kind) if curve.kind in kinds else len(kinds)


def _order(curve, values):
    order = curve.runs[0].order
    return [(_word_order(curve, key), order(key, value)) for key, value in sorted(values.items())]


def _word_order(curve, key):
    short = list(curve.runs[0].short)
    return short.index(key) if key in short else len(short)


def lines_of(curves):
    """The curves as lines along the axis: list of lists of curves with equal method, in the order of `curves`."""
    lines = {}
    for curve in curves:
        lines.setdefault(curve.method, []).append(curve)
    return list(lines.values())


def label(curves):
    """Sets each curve's label: its name, and the arguments in which it differs from most curves of the list.

    A value that more than half of the curves have is not written, unless two methods' labels came out the same.
    """
    for omit_usual in (True, False):
        for curve in curves:
            curve.unlike = _differences(curve, curves, omit_usual)
            words = [word for name in curve.unlike for word in curve.words(name, curve.args[name])]
            curve.label = ", ".join([curve.name, *words])
        if len({curve.label for curve in curves}) == len({curve.method for curve in curves}):
            return


def usual(curves):
    """What most of the federated curves have of the arguments that tell some apart, in words."""
    federated = [curve for curve in curves if not curve.central]
    words = []
    for name in _names(federated):
        values = [curve.args[name] for curve in federated if name in curve.args]
        most = max(values, key=values.count)
        if len(set(map(str, values))) > 1 and 2 * values.count(most) > len(values):
            words += federated[0].words(name, most)
    return ", ".join(words)


def _names(curves):
    names = {name for curve in curves for name in curve.args}
    return sorted(names, key=lambda name: (_word_order(curves[0], name), name))


def _differences(curve, curves, omit_usual):
    # the same flag means another thing to a central run: a batch, a learning rate, an epoch
    alike = [c for c in curves if c.central == curve.central]
    names = []
    for name in _names([curve]):
        values = [str(c.args[name]) for c in alike if name in c.args]
        most = 2 * values.count(str(curve.args[name])) > len(values)
        if len(set(values)) > 1 and not (omit_usual and most):
            names.append(name)
    return names


def words_for(name, value, short, yes_no):
    """[`J 4`], [`sparsity 0.9`], ... by a study's words; [] for a value that says nothing."""
    if value is None or value == "":
        return []
    if isinstance(value, bool):
        words = name.replace("_", " ")
        return [yes_no.get(name, (words, f"no {words}"))[not value]]
    text = short.get(name, name.replace("_", " ") + " {}").format(value)
    return [text[:-1] if value == 1 and text.endswith("s") and name != "shards" else text]


def usual_variants(curves, notes=None, where=""):
    """One curve per kind: of several, the one that shares most arguments with the others of the figure."""

    def shared(curve):
        return sum(other.args.get(key) == value for key, value in curve.args.items() for other in curves)

    chosen = {}
    for curve in sorted(curves, key=lambda curve: (-len(curve.runs), -shared(curve))):
        kept = chosen.setdefault(curve.kind, curve)
        if kept is not curve and notes is not None:
            notes.append(f"not drawn{where}: {curve.label} (of each method, only the usual variant is)")
    kept = [curve for curve in curves if chosen[curve.kind] is curve]
    label(kept)
    return kept
