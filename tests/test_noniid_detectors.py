"""Detectors on hand-made curves, on prefixes of random ones, and their measured rates on synthetic ones."""

import importlib.util
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from noniid_made import write_regimes
from sklearn.metrics import roc_auc_score

from llm_noniid.detectors import (
    DETECTORS,
    curves_of,
    diverged,
    drifting,
    oscillating,
    run_detectors,
    scores,
    slow,
    stops,
    swing,
)

ROUNDS = list(range(51))


def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "detectors.py"
    spec = importlib.util.spec_from_file_location("detectors_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_all(alarm, *words):
    """The message is one line with the round, the value, the threshold and what helps."""
    assert "\n" not in alarm.message and alarm.message.startswith(f"round {alarm.round}: ")
    return all(word in alarm.message for word in words)


def alarm(name, values, evaluations=None, **more):
    """The first alarm of a detector on a validation loss in rounds 0, 1, ...; None without one."""
    curves = {"round": ROUNDS[: len(values)], "val_loss": list(values)} | more
    return next((a for a in run_detectors(curves, evaluations) if a.detector == name), None)


# ---- diverged


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "inf"])
def test_not_finite(value):
    found = alarm("diverged", [3.0, 2.9, value, 2.8])
    assert found.round == 2 and found.value is found.threshold is None
    assert names_all(found, str(float(value)), "--learning-rate")
    assert alarm("diverged", [3.0, 2.9, None, 2.8]) is None  # missing is not broken
    assert scores({"round": [0, 1], "val_loss": [3.0, value]})["diverged"] == math.inf


def test_a_rise_of_more_than_one_nat_in_ten_evaluations():
    losses = [10.0] * 20 + [10.0 + 0.1 * t for t in range(1, 32)]  # exactly 1 nat in 10 evaluations
    looks = list(diverged(ROUNDS, losses, jump=0.95))
    (t, value, limit, words), *_ = (look for look in looks if look[1] > look[2])
    assert (t, limit) == (29, 0.95) and value == pytest.approx(1.0) and "1 nats in 10 rounds (limit 0.95)" in words
    assert not [look for look in diverged(ROUNDS, losses, jump=1.0001) if look[1] > look[2]]
    assert alarm("diverged", [3.0, 3.0, 4.1], 31) is None and alarm("diverged", [3.0] * 10 + [4.1], 31).round == 10


def test_windows_are_a_third_of_the_run_and_never_longer():
    """A rise of 0.3 nats a round from round 0 on is above 1 nat after 4 rounds: seen as soon as the window allows."""
    rising = [30 + 0.3 * t for t in range(51)]
    seen = {planned: alarm("diverged", rising[:planned], planned) for planned in (3, 4, 9, 12, 15, 31, 51)}
    assert {planned: a and a.round for planned, a in seen.items()} == {3: None, 4: None, 9: None} | {
        12: 4,
        15: 5,
        31: 10,
        51: 10,
    }
    flat = [3.0] * 51
    ends = {planned: alarm("slow", flat[:planned], planned).round for planned in (4, 9, 12, 30, 51)}
    assert ends == {4: 3, 9: 3, 12: 4, 30: 10, 51: 17}  # round 0 is in the window
    assert alarm("slow", flat[:3], 3) is None


def test_staying_above_the_best():
    assert alarm("diverged", [3.0, 2.0, 2.7, 2.7, 2.5], 31) is None  # the third is not above 1.3 x 2
    found = alarm("diverged", [3.0, 2.0, 2.7, 2.9, 2.65, 9.0], 31)
    assert found.round == 4 and found.value == pytest.approx(0.325) and found.threshold == pytest.approx(0.3)
    assert names_all(found, "32.5% or more above", "30%")
    assert alarm("diverged", [0.0, 0.1, 0.2], 31) is None  # a best of 0 has no multiples


# ---- oscillating


def test_swing_by_hand_and_by_every_four_points():
    t = np.arange(12)
    assert swing([0.0, 1, 0, 1]) == 1 and swing([0.0, 3, 1, 5]) == 2 and swing([5.0, 0, 2, 1, 4, 3]) == 1
    spike, bump = np.full(12, 3.0) - 0.1 * t, 3 - 0.01 * (t - 5.0) ** 2
    spike[5] = 9
    for calm in (3 - 0.1 * t, 3 + 0.1 * t, spike, bump, np.where(t > 5, 4.0, 3.0)):
        assert swing(calm) == 0
    assert swing(3 + 0.1 * (-1.0) ** t)[0] == pytest.approx(0.2)
    draw = np.random.default_rng(0).standard_normal((20, 9))
    places = list(itertools.combinations(range(9), 4))
    every = [max(min(f[j] - f[i], f[j] - f[k], f[m] - f[k]) for i, j, k, m in places) for f in draw]
    assert swing(draw) == pytest.approx(np.maximum(every, 0)) and swing(draw).min() > 0


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize("period", range(2, 9))
def test_swings_of_a_period_of_two_to_eight_evaluations_are_seen(period, noise):
    draw, t = np.random.default_rng(period), np.arange(31)
    for phase in draw.uniform(0, 2 * math.pi, 20):
        wave = (-1.0) ** t if period == 2 else np.sin(2 * math.pi * t / period + phase)
        calm = 3.2 - 0.005 * t + noise * draw.standard_normal(31)
        found = alarm("oscillating", calm + 0.1 * wave)
        assert found.round <= 17 and names_all(found, "limit", "--participation-rate", f"{found.value:.3g}")
        assert alarm("oscillating", calm) is None
        high, low = (scores({"round": ROUNDS[:31], "val_loss": f})["oscillating"] for f in (calm + 0.1 * wave, calm))
        assert low < 1 < high == pytest.approx(max(v / limit for _, v, limit, _ in oscillating(t, calm + 0.1 * wave)))


def test_what_is_missing_or_too_short_does_not_swing():
    wild = 3.0 + 0.1 * (-1.0) ** np.arange(51)
    assert alarm("oscillating", wild[1:4]) is None and alarm("oscillating", wild[1:5]).round == 3
    gaps = [None if i % 7 == 0 else math.nan if i % 11 == 0 else v for i, v in enumerate(wild)]
    assert any(value > limit for _, value, limit, _ in oscillating(ROUNDS, gaps))
    far = np.full(51, 3.0)
    far[[10, 30]] = 4  # two spikes more than 16 evaluations apart
    assert alarm("oscillating", far) is None


# ---- drifting, slow, left out


def test_drifting_is_measured_against_chance():
    ratios = [9.0, 1.0, 3.0, 2.6, None, 4.0, 9.0, "inf"]
    chance = [None, 1.0, 2.0, 2.0, 2.0, 2.0, 8.0, 1.0]
    assert [(t, value) for t, value, *_ in drifting(ROUNDS[:8], ratios, chance)] == [
        (3, 1.0),
        (5, 1.3),
        (6, 1.125),
        (7, 1.125),
    ]
    curves = {"round": ROUNDS[:8], "drift_ratio": ratios, "drift_ratio_chance": chance}
    (found,) = run_detectors(curves)
    assert (found.detector, found.round, found.value, found.threshold) == ("drifting", 5, 1.3, 1.25)
    assert names_all(found, "1.3 times", "limit 1.25", "--mu", "--cluster")
    assert scores(curves)["drifting"] == 1.3 / 1.25
    for silent in ({"drift_ratio": ratios}, {"drift_ratio": ratios, "drift_ratio_chance": [None] * 8}):
        assert run_detectors({"round": ROUNDS[:8]} | silent) == []
        assert math.isnan(scores({"round": ROUNDS[:8]} | silent)["drifting"])
    (found,) = run_detectors({"round": [1, 2, 3], "drift_ratio": ["inf"] * 3, "drift_ratio_chance": [1.0] * 3})
    assert found.value is None


def test_slow():
    losses = [4 * 0.9915 ** (t / 17) for t in ROUNDS]  # 0.85 % in 17 rounds, a third of the run: 1 % in 20
    assert not [look for look in slow(ROUNDS, losses, improvement=0.00999) if look[1] > look[2]]
    t, value, limit, words = next(slow(ROUNDS, losses, improvement=0.01001))
    assert t == 17 and value == pytest.approx(0.9915) and value > limit and "0.85% in 17 rounds (limit 0.85%)" in words
    stuck = [4.0, 3.0] + [3.5] * 49
    assert alarm("slow", stuck).round == 18 and alarm("slow", stuck).value == 1
    assert names_all(alarm("slow", stuck), "0.00%", "--learning-rate", "converged")
    assert alarm("slow", [0.0] * 51) is None


def test_left_out():
    events = [None, [[3, 7], [4, 7], [4, 2]], [], [[12, 7], [13, 1], [13, 2]]]
    curves = {"round": [0, 5, 10, 15], "left_out": events}
    alarms = run_detectors(curves)
    assert [(a.round, a.value, a.threshold) for a in alarms] == [(3, 1, 0), (4, 1, 0), (13, 1, 0)]
    assert names_all(alarms[0], "client 7", "1 update not finite") and names_all(alarms[2], "client 1:")
    assert scores(curves)["left_out"] == 3 and scores(curves | {"left_out": [None] * 4})["left_out"] == 0
    (found,) = run_detectors({"round": [5], "left_out": [[[4, 9], [4, 2]]]})
    assert names_all(found, "2 updates", "client 2, 9", "limit 0")


# ---- all of them


def test_curves_of_logged_rows():
    rows = [{"round": 0, "val_loss": 3.0}, {"round": 5, "val_loss": "nan", "left_out": [[2, 1]]}]
    curves = curves_of(rows)
    assert curves == {"round": [0, 5], "val_loss": [3.0, "nan"], "left_out": [None, [[2, 1]]]}
    alarms = run_detectors(curves)
    assert [(a.detector, a.round) for a in alarms] == [("left_out", 2), ("diverged", 5)]
    json.dumps([asdict(alarm) for alarm in alarms], allow_nan=False)
    assert run_detectors(curves_of([])) == []


def test_what_stops_a_run():
    alarms = run_detectors({"round": ROUNDS, "val_loss": (3 + 0.025 * np.array(ROUNDS)).tolist()})
    assert [a.detector for a in alarms] == ["slow", "diverged"]
    assert stops(alarms, "never") is None
    assert stops(alarms, "divergence").detector == "diverged" and stops(alarms, "any").detector == "slow"
    assert stops(alarms[:1], "divergence") is None


@pytest.mark.parametrize("eval_every", [1, 5])
def test_live_is_offline_on_the_prefix(eval_every):
    bench, seen = benchmark(), set()
    rounds = np.array(ROUNDS[::eval_every])
    for _, _, losses, drifts, _ in bench.kinds(np.random.default_rng(5), 1):
        curves = bench.curves(0, rounds, losses, drifts)
        curves["left_out"] = [[[t, t % 3]] if t % 10 == 0 and t else None for t in curves["round"]]
        offline = run_detectors(curves)
        seen |= {a.detector for a in offline}
        top = dict.fromkeys(DETECTORS, -math.inf)
        for n, t in list(enumerate(rounds, start=1))[:: 5 // eval_every]:
            part = {name: values[:n] for name, values in curves.items()}
            alarms, figures = run_detectors(part, len(rounds)), scores(part, len(rounds))
            assert alarms == [a for a in offline if a.round <= t]
            over = {name for name in DETECTORS if figures[name] > (0 if name == "left_out" else 1)}
            assert over == {a.detector for a in alarms}  # an alarm is a score above 1
            assert all(figures[name] >= top[name] for name in DETECTORS if not math.isnan(figures[name]))
            top |= {name: value for name, value in figures.items() if not math.isnan(value)}
    assert seen == set(DETECTORS)


def test_rates():
    """benchmarks/detectors.py on 60 curves of each kind: bounds on false alarms and detections."""
    table = benchmark().rates(60)
    known = {  # what the definitions let through, or take for an alarm
        ("falling, noise 0.03", "oscillating"): (0, 0.2),
        ("pure noise 0.03", "oscillating"): (0.3, 0.7),
        ("falls 1.5% in 20 rounds", "slow"): (0, 0.3),
        ("jumps by 0.8 and stays", "diverged"): (0, 0),
        ("rises 0.05 a round", "diverged"): (0.6, 1),
        ("few clients: noise 0.05", "oscillating"): (0.8, 1),
    }
    for name, (shares, _, expected) in table.items():
        for detector, share in shares.items():
            if (name, detector) in known:
                low, high = known[name, detector]
            elif detector in expected:
                low, high = 0.95, 1
            elif detector == "slow" and ("diverged" in expected or "oscillating" in expected):
                continue  # a loss that rises, or swings, does not improve either
            else:
                low, high = 0, 0.05
            assert low <= share <= high, (name, detector, share)
    late = {name: delays for name, (_, delays, _) in table.items()}
    assert late["rises 0.2 a round"]["diverged"] <= 8 and late["not finite from one round on"]["diverged"] == 0
    assert late["+-0.2 every round"]["oscillating"] <= 10
    assert late["drift of 2 times chance, late"]["drifting"] <= 4


# ---- on real runs


def test_areas_are_those_of_scikit_learn_over_the_pairs_of_a_stratum_with_settings_drawn_together():
    """One score orders by chance, one is the label, one the stratum, two are silent, one in a stratum; train_loss is
    the label the wrong way round."""
    draw, settings = np.random.default_rng(0), np.arange(60) // 5
    strata, broken = settings % 2, settings % 3 == 0
    values = {"val_loss": draw.standard_normal(60) + strata, "train_loss": 1.0 - broken, "diverged": broken * 1.0}
    values |= {"oscillating": strata * 1.0, "slow": np.full(60, math.nan), "left_out": np.zeros(60)}
    values |= {"drifting": np.where(strata, math.nan, broken + values["val_loss"])}
    found = benchmark().areas(broken, strata, settings, values, draws=200)
    each = [(broken[strata == one], values["val_loss"][strata == one]) for one in (0, 1)]
    pairs = [of.sum() * (~of).sum() for of, _ in each]
    n, area, (low, high), beside = found["val_loss"]
    assert n == sum(pairs) and area == pytest.approx(np.average([roc_auc_score(*one) for one in each], weights=pairs))
    assert low < area < high and beside.keys() == {"-train_loss"} and beside["-train_loss"][1] < 0
    assert found["diverged"][1:3] == found["-train_loss"][1:3] == (1, (1, 1)) and "train_loss" not in found
    assert found["diverged"][3]["val_loss"][0] > 0 and found["diverged"][3]["-train_loss"] == (0, 0)
    assert found["slow"] is found["left_out"] is found["oscillating"] is None  # what only orders strata is no score
    n, area, _, beside = found["drifting"]
    assert n == pairs[0] and area == pytest.approx(roc_auc_score(broken[strata == 0], values["drifting"][strata == 0]))
    assert beside["val_loss"][0] > 0, "beside the base's area over the same pairs"


def test_settings_are_drawn_as_wholes():
    draw, settings = np.random.default_rng(1), np.arange(60) // 5
    broken = settings % 3 == 0
    values = {"val_loss": draw.standard_normal(12)[settings], "train_loss": draw.standard_normal(60)}
    ends = [
        benchmark().areas(broken, np.zeros(60), of, values, draws=200)["val_loss"][2] for of in (settings, range(60))
    ]
    assert np.ptp(ends[0]) > 1.5 * np.ptp(ends[1])


def cost(algorithm, steps, alpha, seed):
    return 0.1 if (steps, alpha) in ((32, 0.1), (4, 0.1)) else 0.001 * seed


def test_the_table_of_a_log_says_which_detectors_beat_the_validation_loss_at_that_point(tmp_path, capsys):
    """Skew costs at alpha 0.1, where the drift ratio says so from the start and, among seeds that learn at another
    pace, the validation loss does not; that of training, lower in broken runs, orders the runs as well."""
    log = write_regimes(tmp_path / "llm_noniid" / "log.jsonl", cost, algorithms=("fedavg", "fedprox"), eval_every=1)
    known = benchmark().judged(log)
    assert len(known) == 2 * 2 * 4 * 3 and sum(broken for *_, broken in known) == 2 * 2 * 3
    benchmark().print_areas(log, 200)
    parts = capsys.readouterr().out.split("after")[1:]
    third, later = ({line.split()[0]: line for line in part.splitlines() if line} for part in parts)
    for part in (third, later):
        assert "-train_loss" in part and "1.00 [1.00, 1.00]" in part["-train_loss"]
        assert "1.00 [1.00, 1.00]" in part["drifting"] and part["drifting"].endswith("+0.00 +0.00 does not")
        assert "no score" in part["left_out"] and "no score" in part["oscillating"] and "beats" not in part["val_loss"]
    assert "beats it" in third["drifting"] and "beats it" not in later["drifting"]
    assert later["val_loss"].split()[1] == "108"
    assert third["drifting"].split()[1] == "54" and later["drifting"].split()[1] == "108"  # two evaluations are too few


def test_a_log_without_a_broken_and_a_healthy_run_of_one_algorithm_and_h_has_no_areas(tmp_path):
    log = write_regimes(tmp_path / "llm_noniid" / "log.jsonl", lambda *place: 0.0)
    with pytest.raises(SystemExit, match="0 of 24 runs"):
        benchmark().print_areas(log, 10)
