"""Rows of a table, which are the lines of a figure: the seeds of one method, groups that may be compared, labels.

Runs are seeds of one row where all flags but the seed and the machine's agree. A label is the method's name and the
flags in which the row differs from most of its table, in the study's words.
"""

import json
import math
from collections import Counter

import numpy as np
import pandas as pd

from common.curves import number
from plots.read import result


class Row:
    """The seeds of one method in one setting: `runs`, a DataFrame indexed by seed; `counted`, without diverged ones.

    args: what sets it apart, {flag or varied key of the setting: value}; label: set by `label`.
    """

    def __init__(self, study, runs):
        self.study, self.runs = study, runs.set_index("seed", drop=False).sort_index(key=lambda seeds: seeds.map(str))
        self.counted = self.runs[~self.runs["diverged"].astype(bool)]
        self.first = self.runs.iloc[0]
        self.kind, self.central = self.first["kind"], self.first["kind"] in study.central
        setting = self.first["setting"]
        self.args = {key: setting[key] for key in study.free if key in setting} | self.first["variant"]
        self.label = self.name = study.kinds.get(self.kind, self.kind)
        self.unlike, self.known = [], {}

    def __getitem__(self, flag):
        """The value of a flag, None where the runs have none."""
        return self.first.get(f"--{flag}")

    def results(self, name):
        """A number a seed of run.json's results: a Series."""
        if name not in self.known:  # cells of a table compare every row with every other
            every = {seed: result(run, name) for seed, run in self.counted.iterrows()}
            self.known[name] = pd.Series(every, dtype=float)
        return self.known[name]

    def mean_over_rounds(self, name):
        """The mean of a field over the rounds that have it, a number a seed: nan without any or with one not finite."""
        curves = self.counted["curve"].items()
        given = {seed: [number(line[name]) for line in curve if line.get(name) is not None] for seed, curve in curves}
        return pd.Series({seed: np.mean(values) if values else math.nan for seed, values in given.items()}, dtype=float)

    def rounds(self, name, x="round"):
        """(x [E], values [S, E]) of a field at the rounds where every seed has it; x: the mean over the seeds."""
        curves = [[line for line in curve if line.get(name) is not None] for curve in self.counted["curve"]]
        each = [{line["round"]: (number(line[x]), number(line[name])) for line in curve} for curve in curves]
        shared = sorted(set.intersection(*map(set, each))) if each else []
        both = np.array([[seed[t] for t in shared] for seed in each]).reshape(len(each), len(shared), 2)
        return both[..., 0].mean(axis=0), both[..., 1]


def comparable(runs, study, notes=None):
    """[(setting, rows)] of the runs that may be compared: what a table has, and what figures draw.

    Groups of central runs alone only where there are no others.
    """
    found = [(setting, rows_of(members, study, notes)) for setting, members in groups(runs, study)]
    return [one for one in found if not all(row.central for row in one[1])] or found


def groups(runs, study):
    """[(setting, runs)] that share every setting they have but the study's `free`; those with most runs first.

    A run that has fewer keys than a group's (a central one: no federation) joins each group that it agrees with.
    """
    settings = [{key: v for key, v in setting.items() if key not in study.free} for setting in runs["setting"]]
    found = []
    for i in sorted(range(len(runs)), key=lambda i: -len(settings[i])):
        agree = [members for setting, members in found if settings[i].items() <= setting.items()]
        for members in agree:
            members.append(i)
        if not agree:
            found.append((settings[i], [i]))
    found.sort(key=lambda group: (-len(group[1]), json.dumps(group[0], sort_keys=True)))
    return [(setting, runs.iloc[sorted(members)]) for setting, members in found]


def rows_of(runs, study, notes=None):
    """The runs of a group as labelled `Row`s, in the order of their kinds, the usual variant of each first.

    Of two runs with the same setting, flags and seed the one that was written later counts; a note says so.
    """
    alike, rows = {}, []
    for i, (_, run) in enumerate(runs.iterrows()):
        varied = [str(run["setting"].get(key)) for key in study.free]
        alike.setdefault(json.dumps([run["kind"], run["variant"], varied], sort_keys=True), []).append(i)
    for members in alike.values():
        same = runs.iloc[members].sort_values("written", kind="stable")
        for _, other in same[same["seed"].duplicated(keep="last")].iterrows():
            note = f"left out {other['folder'] or other['name']}: a later run has the same flags and seed"
            notes is not None and note not in notes and notes.append(note)
        rows.append(Row(study, same.drop_duplicates("seed", keep="last")))

    def by_values(row):
        values = [(word_order(row, key), study.order(key, value)) for key, value in sorted(row.args.items())]
        return kind_order(row), values

    def by_words(row):
        return kind_order(row), len(row.unlike), [word_order(row, name) for name in row.unlike]

    rows.sort(key=by_values)
    label(rows)
    return sorted(rows, key=by_words)


def at_best_rate(rows, tuned, rank):
    """Of federated rows that differ in the flags `tuned` alone the one with the highest rank(row)."""
    alike = {}
    for row in (row for row in rows if not row.central):
        rest = {name: value for name, value in row.args.items() if name not in tuned}
        alike.setdefault((row.kind, str(rest)), []).append(row)
    return [max(some, key=rank) for some in alike.values()]


def kind_order(row):
    return place_in(row.kind, row.study.kinds)


def word_order(row, name):
    return place_in(name, row.study.words)


def place_in(name, names):
    return list(names).index(name) if name in names else len(names)


# ---- labels


def label(rows):
    """Sets each row's label: its name and the flags in which it differs from most rows, if that tells all apart."""
    for omit_usual in (True, False):
        for row in rows:
            row.unlike = [name for name in names_of([row]) if _differs(row, name, rows, omit_usual)]
            words = [word for name in row.unlike for word in words_for(row.study, name, row.args[name])]
            row.label = ", ".join([row.name, *words])
        if len({row.label for row in rows}) == len(rows):
            return


def names_of(rows):
    return sorted({name for row in rows for name in row.args}, key=lambda name: (word_order(rows[0], name), name))


def _differs(row, name, rows, omit_usual):
    """Whether a label says a flag. The same flag means another thing to a central run."""
    values = [str(one.args[name]) for one in rows if one.central == row.central and name in one.args]
    if len(set(values)) < 2 or (name in row.study.lengths and _as_long(rows)):
        return False
    most = 2 * values.count(str(row.args[name])) > len(values)
    return not (omit_usual and most and name not in row.study.spoken)


def _as_long(rows):
    """Whether all runs had the same budget, up to 2 %."""
    values = [value for row in rows for value in row.results("tokens") if value > 0]
    return not values or max(values) <= 1.02 * min(values)


def usual(rows):
    """What most of the federated rows have of the flags that tell some apart, in words."""
    federated, words = [row for row in rows if not row.central], []
    for name in names_of(federated) if federated else ():
        values = [row.args[name] for row in federated if name in row.args]
        most = Counter(map(str, values)).most_common()
        if len(most) > 1 and name not in rows[0].study.spoken and 2 * most[0][1] > len(values):
            words += words_for(rows[0].study, name, next(value for value in values if str(value) == most[0][0]))
    return ", ".join(words)


def describe(study, setting, keys=None):
    """A setting in words, in the order of `keys`: `cifar100, classes 50 to 99, tiny, 100 clients, IID, J 4`."""
    return ", ".join(word for key in keys or study.keys for word in words_for(study, key, setting.get(key)))


def words_for(study, name, value):
    """[`J 4`], [`sparsity 0.9`], ... in the study's words; [] for a value that says nothing."""
    form = study.words.get(name, name.replace("_", " ") + " {}")
    if value in (None, "") or form is None:
        return []
    words = form.format(value) if isinstance(form, str) else form(value)
    if value == 1 and isinstance(form, str) and form.endswith("s"):
        words = words[:-1]
    return [words] if words else []
