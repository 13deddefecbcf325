"""The seeds of one method as a `Curve`: labels that say what differs, means over rounds, differences seed by seed."""

import math

import numpy as np

from common.curves import number
from plots.runs import LeftOut, words_for


class Curve:
    """The seeds of one method in one setting: runs that differ in their seed only.

    counted: the runs that all means are over, which are those that did not diverge.
    args: flags and values that set the method apart and the settings that the figure varies, what lies on its axis
    apart. place: the values of what lies on the axis. label: set by `label`.
    """

    def __init__(self, runs, free=(), axis=()):
        self.runs, self.study = runs, runs[0].study
        self.counted = [run for run in runs if not run.diverged]
        self.kind, self.central = runs[0].kind, runs[0].central
        setting = runs[0].setting
        varied = [key for key in self.study.keys if key in free and key not in axis and key in setting]
        self.args = {key: setting[key] for key in varied} | dict(runs[0].variant)
        self.place = {key: setting.get(key) for key in axis}
        self.label, self.unlike = self.name, []

    @property
    def name(self):
        return self.study.kinds.get(self.kind, self.kind.replace("_", " ").capitalize())

    @property
    def method(self):
        return self.kind, tuple(self.args.items())

    def evaluated(self, name, x="round"):
        """(x [E], values [S, E]) of a field at the rounds where every seed has it; nan where it is not finite.

        x: the round, or another field (`tokens`): its mean over the seeds.
        """
        if not self.counted:
            return np.empty(0), np.empty((0, 0))
        tables = [{row["round"]: row for row in run.rows if "round" in row and name in row} for run in self.counted]
        rounds = [t for t in tables[0] if all(t in table for table in tables)]

        def numbers(field):
            return np.array([[number(table[t].get(field)) for t in rounds] for table in tables])

        at, values = numbers(x).mean(axis=0), numbers(name)
        return at[np.isfinite(at)], values[:, np.isfinite(at)]

    def series(self, name, x="round"):
        """(x [E], mean [E] over the seeds); nan, a gap, where a seed's value is not finite."""
        at, values = self.evaluated(name, x)
        return at, values.mean(axis=0) if len(values) else at

    def results(self, name):
        """[S] one number per seed of run.json's results, from the evaluations where those lack it."""
        return np.array([run.result(name) for run in self.counted])

    def mean_over_rounds(self, name):
        """[S] the mean of a field over the rounds that have it; nan without any or with one not finite."""
        given = [[number(row[name]) for row in run.rows if row.get(name) is not None] for run in self.counted]
        return np.array([np.mean(values) if values else math.nan for values in given])


def curves_of(runs, free=(), axis=(), notes=None):
    """The runs as labelled Curves in the order of their kinds, one for every method and value of the keys in `free`.

    Of two runs with the same setting, method and seed the later counts; a note names the other.
    """
    alike = {}
    for run in runs:
        key = run.kind, run.variant, tuple(str(run.setting.get(k)) for k in run.study.keys if k in free)
        alike.setdefault(key, {}).setdefault(run.seed, []).append(run)
    curves = []
    for seeds in alike.values():
        chosen = []
        for same in seeds.values():
            same.sort(key=lambda run: run.written)
            chosen.append(same[-1])
            for other in same[:-1]:
                why = f"the same command and seed as {same[-1].folder or same[-1].name}, which is later"
                note = LeftOut(other.name, why, str(other.folder or ""))
                if notes is not None and note not in notes:
                    notes.append(note)
        curves.append(Curve(sorted(chosen, key=lambda run: str(run.seed)), free, axis))
    curves.sort(key=lambda c: (kind_order(c), _order(c, c.args), _order(c, c.place)))
    label(curves)
    # of each kind the usual variant first, then those that differ from it in one argument, in two, ...
    first = {kind: i for i, kind in reversed(list(enumerate(c.kind for c in curves)))}
    return sorted(curves, key=lambda c: (first[c.kind], len(c.unlike), [_word_order(c, name) for name in c.unlike]))


def kind_order(curve):
    """The place of the curve's kind among its study's; a kind that is not among them comes last."""
    return _place(curve.kind, curve.study.kinds)


def _place(name, names):
    return list(names).index(name) if name in names else len(names)


def _word_order(curve, key):
    return _place(key, curve.study.words)


def _order(curve, values):
    return [(_word_order(curve, key), curve.study.order(key, value)) for key, value in sorted(values.items())]


def lines_of(curves):
    """The curves as lines along the axis: list of lists of curves with equal method, in the order of `curves`."""
    lines = {}
    for curve in curves:
        lines.setdefault(curve.method, []).append(curve)
    return list(lines.values())


def label(curves):
    """Sets each curve's label: its name, and the arguments in which it differs from most curves of the list.

    Not written, unless two methods' labels came out the same: a value that more than half of the curves have; an
    argument that others lack, as another flag switches it off for them. The off-value of a newer flag has no word.
    """
    for lacking, omit_usual in ((False, True), (False, False), (True, True), (True, False)):
        for curve in curves:
            curve.unlike = _differences(curve, curves, omit_usual, lacking)
            words = [word for name in curve.unlike for word in words_for(curve.study, name, curve.args[name])]
            curve.label = ", ".join([curve.name, *words])
        if len({curve.label for curve in curves}) == len({curve.method for curve in curves}):
            return


def usual(curves):
    """What most of the federated curves have of the arguments that tell some apart, in words."""
    words = []
    for name in _names([curve for curve in curves if not curve.central]):
        having, off = _having(name, curves, central=False)
        values = [curve.args[name] for curve in having]
        most, study = max(values, key=values.count), curves[0].study
        if name not in study.spoken and not _other(name, most, off) and len(set(map(str, values))) > 1:
            words += words_for(study, name, most) if 2 * values.count(most) > len(values) else []
    return ", ".join(words)


def _names(curves):
    names = {name for curve in curves for name in curve.args}
    return sorted(names, key=lambda name: (_word_order(curves[0], name), name))


def _having(name, curves, central, lacking=False):
    """The central or the federated curves that have an argument, and those that have it at its off-value: two lists.

    lacking: take every argument that a curve lacks for one at its off-value, also one that another flag switches off.
    """
    always = curves[0].study.off.get(name)
    # the same flag means another thing to a central run: a batch, a learning rate, an epoch; but off is off
    alike = [curve for curve in curves if curve.central == central or always is not None]
    having = [curve for curve in alike if name in curve.args]
    newer = always is not None and any(curve.kind not in always for curve in having)
    return having, [curve for curve in alike if name not in curve.args and (lacking or newer)]


def _other(name, value, off):
    """Whether one of the curves `off` has another off-value: 1, of an optimiser with the server's rate 1, is none."""
    return any(str(curve.runs[0].args.get(name)) != str(value) for curve in off)


def _differences(curve, curves, omit_usual, lacking):
    study = curve.study

    def differs(name):
        having, off = _having(name, curves, curve.central, lacking)
        values, mine = [str(c.args[name]) for c in having], str(curve.args[name])
        most = 2 * values.count(mine) > len(values) and name not in study.spoken
        if name in study.lengths and not differing(curves, study.budgets[0]):
            return False
        return _other(name, mine, off) or (len(set(values)) > 1 and not (omit_usual and most))

    return [name for name in _names([curve]) if differs(name) or (name, curve.args[name]) in study.marked]


def differing(curves, name):
    """The lowest and highest value of a result over the curves' runs where they differ by over 2 %, else None."""
    values = [value for curve in curves for value in curve.results(name) if value > 0]
    return (min(values), max(values)) if values and max(values) > 1.02 * min(values) else None


def distance(curve, other):
    """In how many arguments two curves differ; one that only one of them has is such an argument."""
    return sum(curve.args.get(name) != other.args.get(name) for name in {*curve.args, *other.args})


def nearest(curve, others):
    """The one of `others` that differs from the curve in fewest arguments; None of none."""
    return min(others, key=lambda other: distance(curve, other), default=None)


def usual_variants(curves, notes):
    """One curve per kind: of several, the one that differs least from the others of the figure."""
    chosen = {}
    for curve in sorted(curves, key=lambda c: (-len(c.runs), sum(distance(c, other) for other in curves))):
        kept = chosen.setdefault(curve.kind, curve)
        if kept is not curve:
            notes.append(LeftOut(curve.label, "of each method, only the usual variant is drawn"))
    kept = [curve for curve in curves if chosen[curve.kind] is curve]
    label(kept)
    return kept


def paired(curve, base, name, how=np.subtract):
    """[S] how(curve's result, base's), seed by seed, over the seeds that both have: their differences, or ratios."""
    mine, other = (dict(zip([run.seed for run in c.counted], c.results(name), strict=True)) for c in (curve, base))
    return np.array([how(mine[seed], other[seed]) for seed in mine if seed in other])


def ratio(curve, base, name, log=False):
    """(mean, low, high) of a result's ratio to the base's: the geometric mean over the seeds that both have and the
    95 % interval of a paired t test of its logarithm. nan: without seeds or not finite, the interval also of one.
    log: whether the result is the logarithm already, such as a loss of which the perplexities are compared."""
    logs = paired(curve, base, name) if log else np.log(paired(curve, base, name, np.divide))
    if not len(logs) or not np.isfinite(logs).all():
        return (math.nan,) * 3
    return tuple(np.exp([logs.mean(), *interval(logs)]))


def interval(differences, level=0.95):
    """(low, high) of the paired t test's interval of the mean of differences [S]: nan of fewer than two.

    mean +- t_{S-1, (1 + level) / 2} s / sqrt(S),   s: the sample standard deviation
    """
    from scipy.stats import t as student  # only here: it takes a while to import

    n = len(differences)
    if n < 2:
        return math.nan, math.nan
    half = student.ppf((1 + level) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)
