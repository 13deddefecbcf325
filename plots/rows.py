"""Rows of a table, which are the lines of a figure: the seeds of one method, groups that may be compared, labels.

Runs are seeds of one row where all flags but the seed and the machine's agree. A label is the method's name and the
flags in which the row differs from most of its table, in the study's words.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd

from common.curves import number
from plots.read import flags_of, result

# flags that say where and how a run was computed, not what
WHERE = frozenset(
    "output_dir output_root adapter_output_dir results_dir data_dir data_root cache_dir hf_home shard_dir seed"
    " checkpoint_dir log_dir run_name name experiment_name config resume overwrite track use_wandb wandb_project"
    " threads processes device num_workers pin_memory compile kernel chunk keep keep_best save_clients final"
    " save_deltas save_every save_freq save_interval log_interval val_freq eval_every eval_batch_size prompt"
    " num_runs keep_checkpoints patience held_out_sequences".split()
)


class Row:
    """The seeds of one method in one setting: `runs`, a DataFrame indexed by seed; `counted`, without diverged ones.

    args: what sets it apart, {flag or varied key of the setting: value}; place: the values of what lies on a figure's
    axis; label: set by `label`.
    """

    def __init__(self, study, runs, free=(), axis=()):
        self.study, self.runs = study, runs.set_index("seed", drop=False).sort_index(key=lambda seeds: seeds.map(str))
        self.counted = self.runs[~self.runs["diverged"].astype(bool)]
        self.first = self.runs.iloc[0]
        self.kind, self.central = self.first["kind"], self.first["kind"] in study.central
        setting = self.first["setting"]
        varied = [key for key in study.keys if key in free and key not in axis and key in setting]
        self.args = {key: setting[key] for key in varied} | self.first["variant"]
        self.place = {key: setting.get(key) for key in axis}
        self.label = self.name = study.kinds.get(self.kind, str(self.kind).replace("_", " ").capitalize())
        self.unlike = []

    def __getitem__(self, flag):
        """The value of a flag, None where the runs have none."""
        return self.first.get(f"--{flag}")

    @property
    def method(self):
        return self.kind, tuple(self.args.items())

    def results(self, name):
        """A number a seed of run.json's results: a Series."""
        return pd.Series({seed: result(run, name) for seed, run in self.counted.iterrows()}, dtype=float)

    def mean_over_rounds(self, name):
        """The mean of a field over the rounds that have it, a number a seed: nan without any or with one not finite."""
        given = {s: [number(row[name]) for row in rows if row.get(name) is not None] for s, rows in self.curves.items()}
        return pd.Series({s: np.mean(values) if values else math.nan for s, values in given.items()}, dtype=float)

    @property
    def curves(self):
        return self.counted["curve"]

    def rounds(self, name, x="round"):
        """(x [E], values [S, E]) of a field at the rounds where every seed has it; x: the mean over the seeds."""
        tables = [pd.DataFrame([r for r in rows if r.get(name) is not None]) for rows in self.curves]
        tables = [table.set_index("round")[list({name, x} - {"round"})] for table in tables if len(table)]
        if not tables or len(tables) < len(self.curves):
            return np.empty(0), np.empty((len(self.curves), 0))
        shared = sorted(set.intersection(*(set(table.index) for table in tables)))
        values = np.array([[number(v) for v in table.loc[shared, name]] for table in tables])
        at = shared if x == "round" else np.mean([table.loc[shared, x].astype(float) for table in tables], axis=0)
        return np.array(at, dtype=float), values


def with_settings(runs, study):
    """The table with two columns more: `setting`, and `variant`, the flags that set a run apart from its kind."""
    runs, hidden = runs.copy(), study.said | WHERE
    runs["setting"] = [{k: v for k, v in study.setting(run).items() if v is not None} for _, run in runs.iterrows()]
    flags = [{k: plain(v) for k, v in sorted(flags_of(run).items()) if k not in hidden} for _, run in runs.iterrows()]
    runs["variant"] = flags
    return runs


def plain(value):
    """A flag's value as it is compared: of a path the last part, without a seed, as each seed may start elsewhere."""
    if isinstance(value, str) and ("/" in value or "seed_" in value):
        return base_name(value)
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value, sort_keys=True)


def base_name(path, inner=("final", "adapter", "model")):
    """The last part of a path, without its seed; not one of `inner`."""
    path = Path(path)
    name = path.parent.name if path.name in inner and path.parent.name else path.name
    return re.sub(r"_?seed_?\d+", "", name) or path.name


def groups(runs, study, free=()):
    """[(setting, runs)] that share every setting they have, keys in `free` apart; those with most runs first.

    A run that has fewer keys than a group's (a central one: no federation) joins each group that it agrees with.
    """
    runs = runs if "setting" in runs else with_settings(runs, study)
    settings = [{key: v for key, v in setting.items() if key not in free} for setting in runs["setting"]]
    found = []
    for i in sorted(range(len(runs)), key=lambda i: -len(settings[i])):
        agree = [members for setting, members in found if settings[i].items() <= setting.items()]
        for members in agree:
            members.append(i)
        if not agree:
            found.append((settings[i], [i]))
    found.sort(key=lambda group: (-len(group[1]), json.dumps(group[0], sort_keys=True)))
    return [(setting, runs.iloc[sorted(members)]) for setting, members in found]


def rows_of(runs, study, free=(), axis=(), notes=None):
    """The runs of a group as labelled `Row`s, in the order of their kinds, the usual variant of each first.

    Of two runs with the same setting, flags and seed the one that was written later counts; a note says so.
    """
    alike = {}
    for i, (_, run) in enumerate(runs.iterrows()):
        varied = [str(run["setting"].get(key)) for key in study.keys if key in free]
        alike.setdefault(json.dumps([run["kind"], run["variant"], varied], sort_keys=True), []).append(i)
    rows = []
    for members in alike.values():
        same = runs.iloc[members].sort_values("written", kind="stable")
        for _, other in same[same["seed"].duplicated(keep="last")].iterrows():
            note = f"left out {other['folder'] or other['name']}: a later run has the same flags and seed"
            notes is not None and note not in notes and notes.append(note)
        rows.append(Row(study, same.drop_duplicates("seed", keep="last"), free, axis))
    rows.sort(key=lambda row: (kind_order(row), _order(row, row.args), _order(row, row.place)))
    label(rows)
    return sorted(rows, key=lambda row: (kind_order(row), len(row.unlike), [word_order(row, n) for n in row.unlike]))


def kind_order(row):
    return place_in(row.kind, row.study.kinds)


def word_order(row, name):
    return place_in(name, row.study.words)


def place_in(name, names):
    return list(names).index(name) if name in names else len(names)


def _order(row, values):
    return [(word_order(row, key), row.study.order(key, value)) for key, value in sorted(values.items())]


def lines_of(rows):
    """The rows as lines along a figure's axis: lists of rows with equal method."""
    lines = {}
    for row in rows:
        lines.setdefault(json.dumps(row.method, default=str), []).append(row)
    return list(lines.values())


# ---- labels


def label(rows):
    """Sets each row's label: its name and the flags in which it differs from most rows, if that tells all apart."""
    for omit_usual in (True, False):
        for row in rows:
            row.unlike = [name for name in names_of([row]) if _differs(row, name, rows, omit_usual)]
            words = [word for name in row.unlike for word in words_for(row.study, name, row.args[name])]
            row.label = ", ".join([row.name, *words])
        if len({row.label for row in rows}) == len(lines_of(rows)):
            return


def names_of(rows):
    return sorted({name for row in rows for name in row.args}, key=lambda name: (word_order(rows[0], name), name))


def _differs(row, name, rows, omit_usual):
    """Whether a label says a flag. The same flag means another thing to a central run: a batch, a rate, an epoch."""
    values = [str(one.args[name]) for one in rows if one.central == row.central and name in one.args]
    if len(set(values)) < 2 or (name in row.study.lengths and not differing(rows, row.study.budget)):
        return False
    most = 2 * values.count(str(row.args[name])) > len(values)
    return not (omit_usual and most and name not in row.study.spoken)


def usual(rows):
    """What most of the federated rows have of the flags that tell some apart, in words."""
    federated, words = [row for row in rows if not row.central], []
    for name in names_of(federated) if federated else ():
        values = [str(row.args[name]) for row in federated if name in row.args]
        most = max(values, key=values.count)
        several = len(set(values)) > 1 and name not in rows[0].study.spoken
        if several and 2 * values.count(most) > len(values):
            value = next(row.args[name] for row in federated if str(row.args.get(name)) == most)
            words += words_for(rows[0].study, name, value)
    return ", ".join(words)


def differing(rows, name):
    """The lowest and highest value of a result over the rows' runs where they differ by over 2 %, else None."""
    values = [value for row in rows for value in row.results(name) if value > 0]
    return (min(values), max(values)) if values and max(values) > 1.02 * min(values) else None


def shared_setting(setting, rows):
    """The group's setting with what else all its federated rows agree on."""
    several = [row.first["setting"] for row in rows if not row.central]
    values = {key: [one[key] for one in several if key in one] for one in several for key in one}
    return setting | {key: given[0] for key, given in values.items() if all(value == given[0] for value in given)}


def describe(study, setting, keys=None):
    """A setting in words, in the order of `keys`: `cifar100, classes 50 to 99, tiny, 100 clients, IID, J 4`."""
    return ", ".join(word for key in keys or study.keys for word in words_for(study, key, setting.get(key)))


def words_for(study, name, value):
    """[`J 4`], [`sparsity 0.9`], ... in the study's words; [] for a value that says nothing."""
    if value is None or value == "":
        return []
    form = study.words.get(name, name.replace("_", " ") + " {}")
    if not isinstance(form, str):
        return [word for word in [form and form(value)] if word]
    words = form.format(value)
    return [words[:-1] if value == 1 and words.endswith("s") and form != "{}" else words]


def nearest(row, others):
    """The one of `others` that differs from the row in fewest flags; None of none."""
    return min(others, key=lambda other: distance(row, other), default=None)


def distance(row, other):
    return sum(row.args.get(name) != other.args.get(name) for name in {*row.args, *other.args})
