"""How often the alarm `diverged` of llm_noniid is right, on synthetic curves, and what warns in real runs.

    python benchmarks/detectors.py --eval-every 5 --curves 5000
    python benchmarks/detectors.py --log llm_noniid/results/regimes.jsonl

Without --log a row is a kind of curve: the share of curves with an alarm, and behind it the median number of rounds
from the onset to the alarm where it should fire ("+"). Where it should not, the share is its rate of false alarms.
Losses fall as a small language model's: as 3.2 + exp(-t/12) nats, or from 3.5 by 6 % in 20 rounds.

With it the runs are healthy or broken by what they cost (`plots.noniid_costs`: each run's own difference to the IID
control of its seed, which is healthy, against the threshold). A row is a score, a column the area under the ROC curve
after a third, and two thirds, of the rounds, over pairs of a broken and a healthy run with one IID control: of one
algorithm and number of local steps. Behind it the 95 % interval over bootstrap draws of settings (all seeds of one
together, those of a control among themselves). The scores to beat are the last validation loss at that point, and the
last training loss in its better direction (under skew each client predicts its own labels: a broken run has the lower
one, as it happens): a score beats one where the interval of the difference of the two areas, over the pairs that both
can judge, in the same draws, is above 0. Judged are `diverged`, its largest value / limit so far (an alarm's is above
1), and `drift / chance`, the last drift of the gradients over its chance level. Pairs in which a run has no score count
for none; `no score`: no pair is left, or none in which two scores differ.
"""

import argparse
import math
import statistics
import time

import numpy as np

from common.seeding import stream
from llm_noniid.detectors import curves_of, diverged, run_detectors

ROUNDS = 50
BASES = ("val_loss", "train_loss")  # the scores to beat
DRIFT = "drift / chance"
JUDGED = ("diverged", DRIFT)


def noisy(draw, n, noise=0.01):
    return noise * draw.standard_normal((n, ROUNDS + 1))


def falling(draw, n):
    """Losses [n, ROUNDS + 1] (round 0 is before training)."""
    return 3.2 + np.exp(-np.arange(ROUNDS + 1) / 12) + noisy(draw, n)


def steady(draw, n, noise=0.01, per_20=0.06):
    """Falls by the share `per_20` of itself in 20 rounds, throughout."""
    return 3.5 * (1 - per_20) ** (np.arange(ROUNDS + 1) / 20) + noisy(draw, n, noise)


def after(draw, n, shape):
    """A falling curve plus shape(rounds since an onset that differs from curve to curve)."""
    onset = draw.integers(10, 30, (n, 1))
    return falling(draw, n) + shape(np.maximum(np.arange(ROUNDS + 1) - onset, 0)), onset[:, 0]


def broken(draw, n):
    onset = draw.integers(10, 46, (n, 1))
    values = draw.choice([np.nan, np.inf], (n, 1))
    return np.where(np.arange(ROUNDS + 1) < onset, falling(draw, n), values), onset[:, 0]


def spike(draw, n):
    losses = steady(draw, n)
    losses[np.arange(n), draw.integers(5, 45, n)] += 0.5
    return losses


def kinds(draw, n):
    """Yields (name, losses, onsets of what should be seen or None)."""
    t = np.arange(ROUNDS + 1)
    for noise in (0.003, 0.03, 0.2):
        yield f"falling, noise {noise}", steady(draw, n, noise), None
    yield "falling, one spike of 0.5", spike(draw, n), None
    yield "a bump of 0.6 at the start", falling(draw, n) + 0.6 * t / 3 * np.exp(1 - t / 3), None
    yield "random walk, falling", steady(draw, n, per_20=0.1) + np.cumsum(noisy(draw, n, 0.02), axis=1), None
    yield "pure noise 0.03", 3.2 + noisy(draw, n, 0.03), None
    yield "+-0.2 every round", steady(draw, n) + 0.2 * (-1.0) ** t, None
    yield "not finite from one round on", *broken(draw, n)
    for rate in (0.2, 0.1, 0.05):
        yield f"rises {rate} a round", *after(draw, n, lambda t, r=rate: r * t)
    yield "doubles in 10 rounds", *after(draw, n, lambda t: 3.2 * (2 ** (t / 10) - 1))
    for jump in (0.8, 1.2):
        yield f"jumps by {jump} and stays", *after(draw, n, lambda t, j=jump: j * (t > 0))


def rates(n, eval_every=1, seed=0):
    """{kind: (share of curves with an alarm, median delay in rounds or None, whether it should fire)}."""
    rounds, result = np.arange(0, ROUNDS + 1, eval_every), {}
    for name, losses, onsets in kinds(stream(seed, "detectors"), n):
        first = [run_detectors({"round": rounds.tolist(), "val_loss": one[rounds].tolist()})[:1] for one in losses]
        late = [alarms[0].round - onsets[i] for i, alarms in enumerate(first) if alarms and onsets is not None]
        result[name] = sum(map(len, first)) / n, statistics.median(late) if late else None, onsets is not None
    return result


def print_rates(n, eval_every):
    started = time.process_time()
    table = rates(n, eval_every)
    seconds = time.process_time() - started
    print(f"{n} curves of each kind, {ROUNDS} rounds, evaluated every {eval_every}: `diverged`; + should fire")
    for name, (share, late, expected) in table.items():
        print(f"{name:33}{share:7.1%}{'+' if expected else ''}" + (f" {late:4.0f} r" if late is not None else ""))
    print(f"{seconds:.1f} CPU seconds, {1e3 * seconds / (n * len(table)):.2f} ms a curve")


# ---- real runs


def judged(path):
    """[(IID control, setting, run, whether it is broken)] of a log's runs with a control, and of those controls."""
    from plots.noniid_costs import cells_of, has_diverged
    from plots.noniid_runs import STUDY
    from plots.runs import read_runs

    cells = [cell for *_, some in cells_of(*read_runs([path], STUDY)) for cell in some]
    known = [(cell.control, cell.curve, *of) for cell in cells for of in cell.broken_runs()]
    controls = dict.fromkeys(cell.control for cell in cells)
    return known + [(one, one, run, has_diverged(run)) for one in controls for run in one.runs]


def divergence(curves, planned):
    """The largest value / limit that `diverged` saw, inf of a loss that is not finite, nan of too few evaluations."""
    looks = diverged(curves["round"], curves["val_loss"], planned)
    return max((value / (limit or 1) for _, value, limit, _ in looks), default=math.nan)


def seen(run, share):
    """{one of JUDGED or BASES: score} of a run's evaluations in this share of its rounds; nan for none."""
    rows = [row for row in run.rows if row["round"] <= share * run.args["num_rounds"]]
    planned = 1 - -run.args["num_rounds"] // run.args["eval_every"]
    last = {name: [row[name] for row in rows if row["round"] and row.get(name) is not None] for name in BASES}
    losses = {name: np.nan_to_num(float(of[-1]), nan=math.inf) if of else math.nan for name, of in last.items()}
    drifts = [row["drift_ratio"] / row["drift_ratio_chance"] for row in rows if row.get("drift_ratio_chance")]
    return losses | {"diverged": divergence(curves_of(rows), planned), DRIFT: drifts[-1] if drifts else math.nan}


def areas(broken, strata, settings, values, draws=1000, seed=0):
    """{score: None, or (pairs, area, (low, high), {base: (low, high) of the difference to that base's area})}.

    The area is the share of pairs, broken and healthy, of one stratum in order; ties count a half. `train_loss` is
    `-train_loss` where it is lower in broken runs.

    Args: broken: bool [n]; strata, settings: of each run, [n]; values: {score: [n]}, nan for none, with BASES.
    """
    broken, draw = np.array(broken), stream(seed, "areas")
    strata, settings = (np.unique(of, return_inverse=True)[1] for of in (strata, settings))
    weights = np.ones((1 + draws, len(broken)))  # how often each run is drawn; first as it is
    for stratum in range(strata.max() + 1):
        members = np.unique(settings[strata == stratum])
        times = draw.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
        for member, count in zip(members, times.T, strict=True):
            weights[1:, settings == member] = count[:, None]
    pairs = broken[:, None] & ~broken & (strata[:, None] == strata)

    def known(v):
        return ~np.isnan(v)[:, None] & ~np.isnan(v)

    def drawn(v, there):
        """[1 + draws] areas over the pairs that are there; nan of none."""
        order = there * ((v[:, None] > v) + 0.5 * (v[:, None] == v))
        with np.errstate(invalid="ignore"):
            return (weights @ order * weights).sum(axis=1) / (weights @ there * weights).sum(axis=1)

    def ends(of):
        return tuple(float(end) for end in np.nanquantile(of[1:], (0.025, 0.975)))

    found, values = {}, dict(values)
    if drawn(values["train_loss"], pairs & known(values["train_loss"]))[0] < 0.5:
        values["train_loss"] = -values["train_loss"]
        values = {"-train_loss" if name == "train_loss" else name: v for name, v in values.items()}
    bases = {name: v for name, v in values.items() if name.lstrip("-") in BASES}
    for name, v in values.items():
        there = pairs & known(v)
        if not (there & (v[:, None] != v)).any():
            found[name] = None
            continue
        of, beside = drawn(v, there), {}
        for base, other in bases.items():
            both = there & known(other)
            if base != name and both.any():
                beside[base] = ends(drawn(v, both) - drawn(other, both))
        found[name] = int(there.sum()), float(of[0]), ends(of), beside
    return found


def numbered(things):
    """Each thing's number, alike for the same thing: in the order of the log, so that draws come again."""
    numbers = {}
    return [numbers.setdefault(id(thing), len(numbers)) for thing in things]


def print_areas(path, draws):
    known = judged(path)
    controls, settings, runs, broken = zip(*known, strict=True) if known else ((), (), (), ())
    if not any(broken[i] and not broken[j] and controls[i] is controls[j] for i, j in np.ndindex(len(runs), len(runs))):
        words = f"{sum(broken)} of {len(known)} runs with an IID control are broken"
        raise SystemExit(f"{path}: {words}: no broken and healthy run of one algorithm and number of local steps")
    print(f"{len(runs)} runs of {len(set(settings))} settings, {sum(broken)} broken; areas under the ROC curve")
    for share, words in ((1 / 3, "a third"), (2 / 3, "two thirds")):
        figures = [seen(run, share) for run in runs]
        values = {name: np.array([one[name] for one in figures]) for name in (*BASES, *JUDGED)}
        table = areas(broken, numbered(controls), numbered(settings), values, draws)
        heads = [f"less {name}'s" for name in table if name.lstrip("-") in BASES]
        print(f"\n{f'after {words}':16}{'pairs':>6}{'area':>20}" + "".join(f"{head:>28}" for head in heads))
        for name, of in table.items():
            if of is None:
                print(f"{name:16}{'no score':>26}")
                continue
            pairs, value, (low, high), beside = of
            cells = [""] * len(heads)
            for base, (less, more) in beside.items() if name in JUDGED else ():
                at = heads.index(f"less {base}'s")
                cells[at] = f"{less:+.2f} {more:+.2f} {'beats it' if less > 0 else 'does not'}"
            area = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            print(f"{name:16}{pairs:6}{area:>20}{''.join(f'{cell:>28}' for cell in cells)}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--curves", type=int, default=1000, help="synthetic curves of each kind")
    parser.add_argument("--eval-every", type=int, default=1, help="rounds between two evaluations of those")
    parser.add_argument("--log", help="runs of llm_noniid instead: their folder or committed log")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    options = parser.parse_args()
    if options.log:
        print_areas(options.log, options.draws)
    else:
        print_rates(options.curves, options.eval_every)


if __name__ == "__main__":
    main()
