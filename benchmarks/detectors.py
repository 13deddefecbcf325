"""How often each detector of llm_noniid is right: on synthetic curves, and on real runs.

    python benchmarks/detectors.py --eval-every 5 --curves 5000
    python benchmarks/detectors.py --log llm_noniid/results/regimes.jsonl

Without --log a row is a kind of curve, a column a detector: the share of curves with an alarm, and behind it the median
number of rounds from the onset to the alarm where the detector should fire ("+"). Where it should not, the share is its
rate of false alarms. Losses fall as 3.2 + exp(-t/12) nats, as a small language model's, unless the kind says otherwise.

With it the runs are healthy or broken by what they cost (`plots.noniid_costs`: each run's own difference to the IID
control of its seed, which is healthy, against the threshold). A row is a score, a column the area under the ROC curve
after a third, and two thirds, of the rounds, over pairs of a broken and a healthy run with one IID control: of one
algorithm and number of local steps. Behind it the 95 % interval over bootstrap draws of settings (all seeds of one
together, those of a control among themselves). The scores to beat are the last validation loss at that point, and the
last training loss in its better direction (under skew each client predicts its own labels: a broken run has the lower
one, as it happens): a detector beats one where the interval of the difference of the two areas, over the pairs that
both can judge, in the same draws, is above 0. `drift / chance` is the last drift of the gradients over its chance
level, which the detector `drifting` wants three times in a row. Pairs in which a run has no score count for none; `no
score`: no pair is left, or none in which two scores differ.
"""

import argparse
import math
import statistics
import time

import numpy as np

from common.seeding import stream
from llm_noniid.detectors import DETECTORS, curves_of, run_detectors, scores

ROUNDS = 50
BASES = ("val_loss", "train_loss")  # the scores to beat
DRIFT = "drift / chance"
JUDGED = (*DETECTORS, DRIFT)


def falling(draw, n, noise=0.01, over=12):
    """Losses [n, ROUNDS + 1] (round 0 is before training)."""
    return 3.2 + np.exp(-np.arange(ROUNDS + 1) / over) + noise * draw.standard_normal((n, ROUNDS + 1))


def steady(draw, n, noise=0.01, per_20=0.06):
    """Falls by the share `per_20` of itself in 20 rounds, throughout."""
    t = np.arange(ROUNDS + 1)
    return 3.5 * (1 - per_20) ** (t / 20) + noise * draw.standard_normal((n, ROUNDS + 1))


def plateau(draw, n, noise):
    return 3.2 + noise * draw.standard_normal((n, ROUNDS + 1))


def after(draw, n, shape):
    """A falling curve plus shape(rounds since an onset that differs from curve to curve)."""
    onset = draw.integers(10, 30, (n, 1))
    return falling(draw, n) + shape(np.maximum(np.arange(ROUNDS + 1) - onset, 0)), None, onset[:, 0]


def broken(draw, n):
    onset = draw.integers(10, 46, (n, 1))
    values = draw.choice([np.nan, np.inf], (n, 1))
    return np.where(np.arange(ROUNDS + 1) < onset, falling(draw, n), values), None, onset[:, 0]


def spike(draw, n):
    losses = steady(draw, n)
    losses[np.arange(n), draw.integers(5, 45, n)] += 0.5
    return losses


def bump(draw, n):
    """The first rounds make it worse: 0.6 nats, over after ten rounds."""
    t = np.arange(ROUNDS + 1)
    return falling(draw, n) + 0.6 * t / 3 * np.exp(1 - t / 3)


def swings(draw, n, size, period):
    t, phase = np.arange(ROUNDS + 1), draw.uniform(0, 2 * math.pi, (n, 1))
    wave = (-1.0) ** t if period == 2 else np.sin(2 * math.pi * t / period + phase)
    return steady(draw, n) + size * wave


def random_walk(draw, n):
    return steady(draw, n, per_20=0.1) + np.cumsum(0.02 * draw.standard_normal((n, ROUNDS + 1)), axis=1)


def drift(draw, n, ratio):
    """(drift ratios, their chance level), each [n, ROUNDS + 1] with a jitter of 5 %; ratio: of the two, by round."""
    ratio = np.broadcast_to(ratio, (n, ROUNDS + 1))
    jitter = np.exp(0.05 * draw.standard_normal((2, *ratio.shape)))
    return 2 * ratio * jitter[0], 2 * jitter[1]


def kinds(draw, n):
    """Yields (name, detectors that should fire, losses, `drift` or None, onsets or None)."""
    since = np.arange(ROUNDS + 1)
    yield "falling, noise 0.003", (), steady(draw, n, 0.003), drift(draw, n, 1.0), None
    for noise in (0.01, 0.02, 0.03):
        yield f"falling, noise {noise}", (), steady(draw, n, noise), drift(draw, n, 1.0), None
    yield "falling, one spike of 0.5", (), spike(draw, n), None, None
    yield "a bump of 0.6 at the start", (), bump(draw, n), None, None
    yield "random walk, falling", (), random_walk(draw, n), None, None
    yield "converged after 20 rounds", ("slow",), falling(draw, n, over=4), None, np.full(n, 20)
    for noise in (0.01, 0.03):
        yield f"pure noise {noise}", ("slow",), plateau(draw, n, noise), None, np.zeros(n)
    for share in (0.003, 0.009, 0.015, 0.02):
        slow = ("slow",) if share < 0.01 else ()
        yield f"falls {share:.1%} in 20 rounds", slow, steady(draw, n, 0.003, share), None, np.zeros(n)
    yield "not finite from one round on", ("diverged",), *broken(draw, n)
    for rate in (0.2, 0.1, 0.05):
        yield f"rises {rate} a round", ("diverged",), *after(draw, n, lambda t, r=rate: r * t)
    yield "doubles in 10 rounds", ("diverged",), *after(draw, n, lambda t: 3.2 * (2 ** (t / 10) - 1))
    yield "jumps by 0.8 and stays", ("diverged",), *after(draw, n, lambda t: 0.8 * (t > 0))
    yield "jumps by 1.2 and stays", ("diverged",), *after(draw, n, lambda t: 1.2 * (t > 0))
    for size in (0.02, 0.05, 0.2):
        fires = ("oscillating",) if size > 0.02 else ()  # above the floor
        yield f"+-{size} every round", fires, swings(draw, n, size, 2), None, np.zeros(n)
    for period in (3, 4, 6, 8):
        yield f"sine 0.2, period {period}", ("oscillating",), swings(draw, n, 0.2, period), None, np.zeros(n)
    for noise in (0.05, 0.1, 0.2):
        yield f"few clients: noise {noise}", ("oscillating",), steady(draw, n, noise), None, np.zeros(n)
    for ratio in (1.1, 2.0):
        fires = ("drifting",) if ratio > 1.25 else ()
        yield f"drift of {ratio} times chance", fires, steady(draw, n), drift(draw, n, ratio), np.zeros(n)
    late = drift(draw, n, 1 + 1.0 * (since > 25))
    yield "drift of 2 times chance, late", ("drifting",), steady(draw, n), late, np.full(n, 25)
    yield "two clients left out", ("left_out",), steady(draw, n), None, np.full(n, 25)


def rates(n, eval_every=1, seed=0):
    """{kind: ({detector: share of alarms}, {detector: median delay in rounds or None}, expected)}."""
    rounds, result = np.arange(0, ROUNDS + 1, eval_every), {}
    for name, expected, losses, drifts, onsets in kinds(stream(seed, "detectors"), n):
        found = {detector: [] for detector in DETECTORS}
        for i in range(n):
            first = {}
            for alarm in run_detectors(curves(i, rounds, losses, drifts, "left_out" in expected)):
                first.setdefault(alarm.detector, alarm.round)
            for detector, at in first.items():
                found[detector].append(at - (0 if onsets is None else onsets[i]))
        result[name] = (
            {detector: len(at) / n for detector, at in found.items()},
            {detector: statistics.median(at) if at and onsets is not None else None for detector, at in found.items()},
            expected,
        )
    return result


def curves(i, rounds, losses, drifts, left_out=False):
    """Curve `i` of a kind at these rounds, as `run_detectors` takes it."""
    made = {"round": rounds.tolist(), "val_loss": losses[i, rounds].tolist()}
    if drifts is not None:
        made |= {"drift_ratio": drifts[0][i, rounds].tolist(), "drift_ratio_chance": drifts[1][i, rounds].tolist()}
    if left_out:
        made["left_out"] = [[[26, 3], [27, 5]] if t == 30 else None for t in made["round"]]
    return made


def print_rates(n, eval_every):
    started = time.process_time()
    table = rates(n, eval_every)
    seconds = time.process_time() - started
    print(f"{n} curves of each kind, {ROUNDS} rounds, evaluated every {eval_every}; + should fire")
    print(f"{'':33}" + "".join(f"{detector:>16}" for detector in DETECTORS))
    for name, (shares, delays, expected) in table.items():
        cells = []
        for detector in DETECTORS:
            late = delays[detector] if detector in expected else None
            cells.append(f"{shares[detector]:7.1%}{'+' if detector in expected else ' '}")
            cells[-1] += f" {late:4.0f} r" if late is not None else ""
        print(f"{name:33}  " + "".join(f"{cell:>9}".ljust(16) for cell in cells).rstrip())
    print(f"{seconds:.1f} CPU seconds, {1e3 * seconds / (n * len(table)):.2f} ms a curve for all detectors")


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


def seen(run, share):
    """{one of JUDGED or BASES: score} of a run's evaluations in this share of its rounds; nan for none."""
    rows = [row for row in run.rows if row["round"] <= share * run.args["num_rounds"]]
    planned = 1 - -run.args["num_rounds"] // run.args["eval_every"]
    last = {name: [row[name] for row in rows if row["round"] and row.get(name) is not None] for name in BASES}
    losses = {name: np.nan_to_num(float(of[-1]), nan=math.inf) if of else math.nan for name, of in last.items()}
    drifts = [row["drift_ratio"] / row["drift_ratio_chance"] for row in rows if row.get("drift_ratio_chance")]
    return scores(curves_of(rows), planned) | losses | {DRIFT: drifts[-1] if drifts else math.nan}


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
