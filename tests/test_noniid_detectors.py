"""Detectors on hand-made curves, on prefixes of random ones, and their measured rates on synthetic ones."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from llm_noniid.detectors import curves_of, diverged, run_detectors, stops

ROUNDS = list(range(51))


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


def test_staying_above_the_best():
    assert alarm("diverged", [3.0, 2.0, 2.7, 2.7, 2.5], 31) is None  # the third is not above 1.3 x 2
    found = alarm("diverged", [3.0, 2.0, 2.7, 2.9, 2.65, 9.0], 31)
    assert found.round == 4 and found.value == pytest.approx(0.325) and found.threshold == pytest.approx(0.3)
    assert names_all(found, "32.5% or more above", "30%")
    assert alarm("diverged", [0.0, 0.1, 0.2], 31) is None  # a best of 0 has no multiples


# ---- left out


def test_left_out():
    events = [None, [[3, 7], [4, 7], [4, 2]], [], [[12, 7], [13, 1], [13, 2]]]
    curves = {"round": [0, 5, 10, 15], "left_out": events}
    alarms = run_detectors(curves)
    assert [(a.round, a.value, a.threshold) for a in alarms] == [(3, 1, 0), (4, 1, 0), (13, 1, 0)]
    assert names_all(alarms[0], "client 7", "1 update not finite") and names_all(alarms[2], "client 1:")
    assert run_detectors(curves | {"left_out": [None] * 4}) == []
    (found,) = run_detectors({"round": [5], "left_out": [[[4, 9], [4, 2]]]})
    assert names_all(found, "2 updates", "client 2, 9", "limit 0")


# ---- both of them


def test_curves_of_logged_rows():
    rows = [{"round": 0, "val_loss": 3.0}, {"round": 5, "val_loss": "nan", "left_out": [[2, 1]]}]
    curves = curves_of(rows)
    assert curves == {"round": [0, 5], "val_loss": [3.0, "nan"], "left_out": [None, [[2, 1]]]}
    alarms = run_detectors(curves)
    assert [(a.detector, a.round) for a in alarms] == [("left_out", 2), ("diverged", 5)]
    json.dumps([asdict(alarm) for alarm in alarms], allow_nan=False)
    assert run_detectors(curves_of([])) == []


def test_what_stops_a_run():
    events = [None] * 5 + [[[5, 0]]] + [None] * 45
    alarms = run_detectors({"round": ROUNDS, "val_loss": (3 + 0.2 * np.array(ROUNDS)).tolist(), "left_out": events})
    assert [a.detector for a in alarms] == ["left_out", "diverged"]
    assert stops(alarms, "never") is None
    assert stops(alarms, "divergence").detector == "diverged" and stops(alarms, "any").detector == "left_out"
    assert stops(alarms[:1], "divergence") is None
