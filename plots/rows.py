"""Rows of a table, which are the lines of a figure: the seeds of one method, groups that may be compared, labels.

Runs are seeds of one row where all flags but the seed and the machine's agree. A label is the method's name and the
flags in which the row differs from most of its table, in the study's words.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from common.curves import number
from plots.read import result

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

    args: what sets it apart, {flag or varied key of the setting: value}; label: set by `label`.
    """

    def __init__(self, study, runs, free=()):
        self.study, self.runs = study, runs.set_index("seed", drop=False).sort_index(key=lambda seeds: seeds.map(str))
        self.counted = self.runs[~self.runs["diverged"].astype(bool)]
        self.first = self.runs.iloc[0]
        self.kind, self.central = self.first["kind"], self.first["kind"] in study.central
        setting = self.first["setting"]
        self.args = {key: setting[key] for key in study.keys if key in free and key in setting} | self.first["variant"]
        self.label = self.name = study.kinds.get(self.kind, self.kind)
        self.unlike = []

    def __getitem__(self, flag):
        """The value of a flag, None where the runs have none."""
        return self.first.get(f"--{flag}")

    def results(self, name):
        """A number a seed of run.json's results: a Series."""
        return pd.Series({seed: result(run, name) for seed, run in self.counted.iterrows()}, dtype=float)

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


def with_settings(runs, study):
    """The table with two columns more: `setting`, and `variant`, the flags that set a run apart from its kind."""
    settings, variants, hidden = [], [], study.said | WHERE
    for _, run in runs.iterrows():
        settings.append({key: value for key, value in study.setting(run).items() if value is not None})
        flags = {key[2:]: value for key, value in run.items() if key.startswith("--") and value is not None}
        variants.append({flag: plain(value) for flag, value in sorted(flags.items()) if flag not in hidden})
    return runs.assign(setting=settings, variant=variants)


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


def rows_of(runs, study, free=(), notes=None):
    """The runs of a group as labelled `Row`s, in the order of their kinds, the usual variant of each first.

    Of two runs with the same setting, flags and seed the one that was written later counts; a note says so.
    """
    alike, rows = {}, []
    for i, (_, run) in enumerate(runs.iterrows()):
        varied = [str(run["setting"].get(key)) for key in study.keys if key in free]
        alike.setdefault(json.dumps([run["kind"], run["variant"], varied], sort_keys=True), []).append(i)
    for members in alike.values():
        same = runs.iloc[members].sort_values("written", kind="stable")
        for _, other in same[same["seed"].duplicated(keep="last")].iterrows():
            note = f"left out {other['folder'] or other['name']}: a later run has the same flags and seed"
            notes is not None and note not in notes and notes.append(note)
        rows.append(Row(study, same.drop_duplicates("seed", keep="last"), free))

    def by_values(row):
        values = [(word_order(row, key), study.order(key, value)) for key, value in sorted(row.args.items())]
        return kind_order(row), values

    def by_words(row):
        return kind_order(row), len(row.unlike), [word_order(row, name) for name in row.unlike]

    rows.sort(key=by_values)
    label(rows)
    return sorted(rows, key=by_words)


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
    values = [value for row in rows for value in row.results(row.study.budget) if value > 0]
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


def nearest(row, others):
    """The one of `others` that differs from the row in fewest flags; None of none."""
    return min(others, key=lambda other: distance(row, other), default=None)


def distance(row, other):
    return sum(row.args.get(name) != other.args.get(name) for name in {*row.args, *other.args})
