"""Detectors on hand-made curves, on prefixes of random ones, and their measured rates on synthetic ones."""

import importlib.util
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from llm_noniid.detectors import (
    amplitude,
    curves_of,
    diverged,
    drifting,
    left_out,
    oscillating,
    run_detectors,
    sign_change_rate,
    slow,
    stops,
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


# ---- diverged


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "inf"])
def test_not_finite(value):
    alarm = diverged([0, 5, 10, 15], [3.0, 2.9, value, 2.8])
    assert alarm.detector == "diverged" and alarm.round == 10 and alarm.value is alarm.threshold is None
    assert names_all(alarm, str(float(value)), "--learning-rate")
    assert diverged([0, 5, 10, 15], [3.0, 2.9, None, 2.8]) is None  # missing is not broken


def test_a_rise_of_more_than_one_nat_in_ten_rounds():
    losses = [10.0] * 20 + [10.0 + 0.1 * t for t in range(1, 32)]  # exactly 1 nat in 10 rounds
    assert diverged(ROUNDS, losses, jump=1.0001) is None
    alarm = diverged(ROUNDS, losses, jump=0.95)
    assert (alarm.round, alarm.threshold) == (29, 0.95) and alarm.value == pytest.approx(1.0)
    assert names_all(alarm, "1 nats", "0.95", "--learning-rate")
    assert diverged([0, 9], [3.0, 4.1]) is None  # less than ten rounds, less than three evaluations
    assert diverged([0, 10], [3.0, 4.1]).round == 10
    assert diverged([0, 14, 23], [3.0, 3.5, 4.1]).value == pytest.approx(1.1)
    assert diverged([0, 10], [3.0, 4.0]) is None


def test_staying_above_the_best():
    assert diverged(ROUNDS[:5], [3.0, 2.0, 2.7, 2.7, 2.5]) is None  # the third is not above 1.3 x 2
    alarm = diverged(ROUNDS[:6], [3.0, 2.0, 2.7, 2.9, 2.65, 9.0])
    assert (alarm.round, alarm.threshold) == (4, 1.3) and alarm.value == pytest.approx(2.65 / 2)
    assert names_all(alarm, "1.32 times", "1.3")
    assert diverged(ROUNDS[:3], [0.0, 0.1, 0.2]) is None  # a best of 0 has no multiples


# ---- oscillating


def test_sign_changes_and_amplitude_by_hand():
    swing = 3 + 0.1 * (-1.0) ** np.arange(10)
    assert sign_change_rate(swing) == 1.0 and sign_change_rate(swing - 0.5 * np.arange(10)) == 1.0
    t = np.arange(10)
    assert sign_change_rate(swing + t**2) == 1.0  # 0.4 up and down on differences that rise by 2 a step
    assert sign_change_rate(np.exp(-t / 4))[0] <= 0.25  # a fall that slows down
    assert amplitude(swing)[0] == pytest.approx(0.4 / 0.6745 / math.sqrt(6))
    assert amplitude(swing - 7 * np.arange(10))[0] == pytest.approx(amplitude(swing)[0])
    spike = np.full(10, 3.0)
    spike[5] = 9
    assert amplitude(spike) == 0 and amplitude(np.zeros((4, 10))).tolist() == [0] * 4
    noise = 0.3 * np.random.default_rng(1).standard_normal(20_000)
    assert amplitude(noise)[0] == pytest.approx(0.3, rel=0.03)


def test_oscillating():
    t = np.array(ROUNDS)
    calm, wild = 3.0 - 0.01 * t, 3.0 - 0.01 * t + 0.1 * (-1.0) ** t * (t >= 20)
    assert oscillating(ROUNDS, calm) is None and oscillating(ROUNDS[:9], wild[20:29]) is None
    alarm = oscillating(ROUNDS, wild)
    assert alarm.detector == "oscillating" and 24 <= alarm.round <= 29 and alarm.value > alarm.threshold > 0.05
    assert names_all(alarm, "limits", "50%", "--participation-rate", f"{alarm.value:.3g}", f"{alarm.threshold:.3g}")
    assert oscillating(ROUNDS, wild, floor=0.2) is None
    gaps = [None if i % 7 == 0 else math.nan if i % 11 == 0 else v for i, v in enumerate(wild)]
    assert oscillating(ROUNDS, gaps) is not None


# ---- drifting, slow, left out


def test_drifting():
    drifts, ten = [1.0, 2.5, 2.5, 1.9, 2.1, 2.2, None, 2.3, 9.0], [10.0] * 6 + [None] + [10.0] * 2
    alarm = drifting(ROUNDS[:9], drifts, ten)
    assert (alarm.detector, alarm.round, alarm.value, alarm.threshold) == ("drifting", 7, 2.3, 2.0)
    assert names_all(alarm, "2.3", "above 2 ", "--mu", "--cluster")
    assert drifting(ROUNDS[:9], drifts, ten, hold=1).round == 1
    assert drifting(ROUNDS[:9], drifts, ten, threshold=10) is None
    assert drifting(ROUNDS[:3], ["inf"] * 3, ten[:3]).value is None
    # of three clients whose updates share nothing: sqrt(2), under the fixed threshold
    alarm = drifting(ROUNDS[:3], [1.4] * 3, [3.0] * 3)
    assert alarm.threshold == pytest.approx(0.9 * math.sqrt(2)) and drifting(ROUNDS[:3], [1.4] * 3, ten[:3]) is None
    assert drifting(ROUNDS[:4], [1.4] * 4, [3, 3, 1, 3]).round == 3
    assert drifting(ROUNDS[:4], [0.0] * 4, [1] * 4) is None


def test_slow():
    losses = [4 * 0.99 ** (t / 20) for t in ROUNDS]  # exactly 1 % in 20 rounds
    assert slow(ROUNDS, losses, improvement=0.00999) is None
    alarm = slow(ROUNDS, losses, improvement=0.01001)
    assert (alarm.detector, alarm.round) == ("slow", 20) and alarm.value == pytest.approx(0.01)
    assert names_all(alarm, "1.00% in 20 rounds", "--learning-rate", "converged")
    stuck = [4.0, 3.0] + [3.5] * 49
    assert slow(ROUNDS, stuck).round == 21 and slow(ROUNDS, stuck).value == 0
    assert slow(ROUNDS[:20], stuck[:20]) is None and slow(ROUNDS, [0.0] * 51) is None
    seldom = [0, 12, 24, 36]  # in round 36 the last evaluation 20 rounds before is that of round 12
    assert slow(seldom, [4.0, 3.9, 3.8, 3.79]) is None
    assert (
        names_all(slow(seldom, [4.0, 3.9, 3.89, 3.87]), "in 24 rounds") and slow(seldom, [4.0, 3.9, 3.89, 3.86]) is None
    )


def test_left_out():
    events = [None, [[3, 7], [4, 7], [4, 2]], [], [[12, 7], [13, 1], [13, 2]]]
    alarms = left_out([0, 5, 10, 15], events)
    assert [(a.round, a.value, a.threshold) for a in alarms] == [(3, 1, 0), (4, 1, 0), (13, 1, 0)]
    assert names_all(alarms[0], "client 7", "1 update not finite") and names_all(alarms[2], "client 1:")
    assert names_all(left_out([5], [[[4, 9], [4, 2]]])[0], "2 updates", "client 2, 9", "limit 0")


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
    alarms = run_detectors({"round": ROUNDS, "val_loss": (3 + 0.04 * np.array(ROUNDS)).tolist()})
    assert [a.detector for a in alarms] == ["slow", "diverged"]
    assert stops(alarms, "never") is None
    assert stops(alarms, "divergence").detector == "diverged" and stops(alarms, "any").detector == "slow"
    assert stops(alarms[:1], "divergence") is None


@pytest.mark.parametrize("eval_every", [1, 5])
def test_live_is_offline_on_the_prefix(eval_every):
    bench, seen = benchmark(), set()
    for _, _, losses, drifts, _ in bench.kinds(np.random.default_rng(5), 1):
        for i in range(len(losses)):
            rounds = ROUNDS[::eval_every]
            curves = {"round": rounds, "val_loss": losses[i, ::eval_every].tolist()}
            curves["left_out"] = [[[t, t % 3]] if t % 10 == 0 and t else None for t in rounds]
            if drifts is not None:
                curves |= {"relative_drift": drifts[i, ::eval_every].tolist(), "effective_clients": [10] * len(rounds)}
            offline = run_detectors(curves)
            seen |= {a.detector for a in offline}
            for n, t in enumerate(rounds, start=1):
                live = run_detectors({name: values[:n] for name, values in curves.items()})
                assert live == [a for a in offline if a.round <= t]
    assert seen == {"diverged", "oscillating", "drifting", "slow", "left_out"}


def test_rates():
    """benchmarks/detectors.py on 60 curves of each kind: bounds on false alarms and detections."""
    table = benchmark().rates(60)
    known = {  # what the definitions let through, or take for an alarm
        ("falling, noise 0.03", "oscillating"): (0.1, 0.5),
        ("pure noise 0.03", "oscillating"): (0.1, 0.5),
        ("jumps by 0.8 and stays", "diverged"): (0, 0),
        ("rises 0.05 a round", "diverged"): (0.6, 1),
        ("sine 0.2, period 6", "oscillating"): (0, 0.05),
        ("+-0.02 every round", "oscillating"): (0.1, 0.6),
        ("few clients: noise 0.05", "oscillating"): (0.85, 1),
        ("alike clients, converging", "drifting"): (0.8, 1),
    }
    for name, (shares, _, expected, signs) in table.items():
        for column, share in shares.items():
            if (name, column) in known:
                low, high = known[name, column]
            elif column in expected:
                low, high = 0.95, 1
            elif column == "slow" and ("diverged" in expected or "oscillating" in expected):
                continue  # a loss that rises, or swings, does not improve either
            else:
                low, high = 0, 0.05
            assert low <= share <= high, (name, column, share)
        if name.startswith(("falling, noise", "pure noise")):
            assert signs[0] > 0.85 and 0.14 < signs[1] < 0.21  # curves, windows
    late = {name: delays for name, (_, delays, _, _) in table.items()}
    assert late["rises 0.2 a round"]["diverged"] <= 8 and late["not finite from one round on"]["diverged"] == 0
    assert late["+-0.2 every round"]["oscillating"] <= 10
    assert late["no shared part after round 25"]["drifting"] <= 4
