"""Alarms on hand-made lines of metrics.jsonl."""

import json
import math

import pytest

from llm_noniid.detectors import alarms_of


def first(losses, planned=31):
    """The first alarm of `diverged` on a validation loss in rounds 0, 1, ...; None without one."""
    lines = [{"round": t, "val_loss": loss} for t, loss in enumerate(losses)]
    return next(iter(alarms_of(lines, planned)), None)


@pytest.mark.parametrize("value", [math.nan, "nan", "inf"])
def test_not_finite(value):
    found = first([3.0, 2.9, value, 2.8])
    assert (found["detector"], found["round"]) == ("diverged", 2)
    assert str(float(value)) in found["message"] and "--learning-rate" in found["message"]
    json.dumps(found, allow_nan=False)


def test_a_rise_of_more_than_one_nat_in_ten_evaluations():
    assert first([3.0, 3.0, 4.1]) is None and first([3.0] * 10 + [4.1])["round"] == 10
    assert first([30 + 0.099 * t for t in range(31)]) is None
    assert "1.1 nats in 10 rounds (limit 1)" in first([30 + 0.11 * t for t in range(31)])["message"]


def test_windows_are_a_third_of_the_run_and_never_longer():
    """A rise of 0.3 nats a round from round 0 on is above 1 nat after 4 rounds: seen as soon as the window allows."""
    seen = {n: first([30 + 0.3 * t for t in range(n)], n) for n in (3, 9, 12, 15, 31, 51)}
    assert {n: a and a["round"] for n, a in seen.items()} == {3: None, 9: None, 12: 4, 15: 5, 31: 10, 51: 10}


def test_staying_above_the_best():
    assert first([3.0, 2.0, 2.7, 2.7, 2.5]) is None  # the third is not above 1.3 x 2
    found = first([3.0, 2.0, 2.7, 2.9, 2.65, 9.0])
    assert found["round"] == 4 and "above 1.3 times the best (2)" in found["message"]
