"""Detectors on hand-made curves, on prefixes of random ones, and their measured rates on synthetic ones."""

import importlib.util
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from noniid_made import write_regimes
from sklearn.metrics import roc_auc_score

from llm_noniid.detectors import DETECTORS, curves_of, diverged, run_detectors, stops

ROOT = Path(__file__).parents[1]
ROUNDS = list(range(51))


def benchmark():
    path = ROOT / "benchmarks" / "detectors.py"
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
    assert benchmark().divergence({"round": [0, 1], "val_loss": [3.0, value]}, 2) == math.inf


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


@pytest.mark.parametrize("eval_every", [1, 5])
def test_live_is_offline_on_the_prefix(eval_every):
    bench, seen = benchmark(), set()
    rounds = np.array(ROUNDS[::eval_every])
    for _, losses, _ in bench.kinds(np.random.default_rng(5), 1):
        curves = {"round": rounds.tolist(), "val_loss": losses[0, rounds].tolist()}
        curves["left_out"] = [[[t, t % 3]] if t % 10 == 0 and t else None for t in curves["round"]]
        offline, top = run_detectors(curves), -math.inf
        seen |= {a.detector for a in offline}
        for n, t in list(enumerate(rounds, start=1))[:: 5 // eval_every]:
            part = {name: values[:n] for name, values in curves.items()}
            alarms, score = run_detectors(part, len(rounds)), bench.divergence(part, len(rounds))
            assert alarms == [a for a in offline if a.round <= t]
            assert (score > 1) == ("diverged" in {a.detector for a in alarms})  # an alarm is a score above 1
            assert math.isnan(score) or score >= top
            top = top if math.isnan(score) else score
    assert seen == set(DETECTORS)


def test_rates():
    """benchmarks/detectors.py on 60 curves of each kind: bounds on false alarms and detections."""
    table = benchmark().rates(60)
    known = {"jumps by 0.8 and stays": (0, 0), "rises 0.05 a round": (0.6, 1)}  # what the definition lets through
    for name, (share, _, expected) in table.items():
        low, high = known.get(name, (0.95, 1) if expected else (0, 0.05))
        assert low <= share <= high, (name, share)
    assert table["rises 0.2 a round"][1] <= 8 and table["not finite from one round on"][1] == 0


# ---- on real runs


def test_areas_are_those_of_scikit_learn_over_the_pairs_of_a_stratum_with_settings_drawn_together():
    """One score orders by chance, one is the label, one the stratum, two are silent, one in a stratum; train_loss is
    the label the wrong way round."""
    draw, settings = np.random.default_rng(0), np.arange(60) // 5
    strata, broken = settings % 2, settings % 3 == 0
    values = {"val_loss": draw.standard_normal(60) + strata, "train_loss": 1.0 - broken, "diverged": broken * 1.0}
    values |= {"stratum": strata * 1.0, "none": np.full(60, math.nan), "constant": np.zeros(60)}
    values |= {"in one": np.where(strata, math.nan, broken + values["val_loss"])}
    found = benchmark().areas(broken, strata, settings, values, draws=200)
    each = [(broken[strata == one], values["val_loss"][strata == one]) for one in (0, 1)]
    pairs = [of.sum() * (~of).sum() for of, _ in each]
    n, area, (low, high), beside = found["val_loss"]
    assert n == sum(pairs) and area == pytest.approx(np.average([roc_auc_score(*one) for one in each], weights=pairs))
    assert low < area < high and beside.keys() == {"-train_loss"} and beside["-train_loss"][1] < 0
    assert found["diverged"][1:3] == found["-train_loss"][1:3] == (1, (1, 1)) and "train_loss" not in found
    assert found["diverged"][3]["val_loss"][0] > 0 and found["diverged"][3]["-train_loss"] == (0, 0)
    assert found["none"] is found["constant"] is found["stratum"] is None  # what only orders strata is no score
    n, area, _, beside = found["in one"]
    assert n == pairs[0] and area == pytest.approx(roc_auc_score(broken[strata == 0], values["in one"][strata == 0]))
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


def test_the_table_of_a_log_says_which_scores_beat_the_validation_loss_at_that_point(tmp_path, capsys):
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
        assert "1.00 [1.00, 1.00]" in part["drift"] and part["drift"].endswith("+0.00 +0.00 does not")
        assert "no score" in part["diverged"] and "beats" not in part["val_loss"]  # all fall alike
    assert "beats it" in third["drift"] and "beats it" not in later["drift"]
    assert later["val_loss"].split()[1] == later["drift"].split()[3] == "108"


def test_a_log_without_a_broken_and_a_healthy_run_of_one_algorithm_and_h_has_no_areas(tmp_path):
    log = write_regimes(tmp_path / "llm_noniid" / "log.jsonl", lambda *place: 0.0)
    with pytest.raises(SystemExit, match="0 of 24 runs"):
        benchmark().print_areas(log, 10)


def test_the_runs_that_were_evaluated_each_round_say_what_the_readme_says():
    """Their alarms are of detectors that are gone because of them."""
    bench = benchmark()
    known = bench.judged(ROOT / "llm_noniid" / "results" / "watched" / "regimes.jsonl")
    spoke = Counter(
        (broken, alarm["detector"]) for *_, run, broken in known for row in run.rows for alarm in row.get("alarms", ())
    )
    assert Counter(broken for *_, broken in known) == {True: 6, False: 3}
    assert spoke == {(True, "drifting"): 6, (True, "oscillating"): 5, (True, "slow"): 1, (False, "oscillating"): 2}
    for _, _, run, _ in known:
        row = run.rows[10]
        assert row["round"] == 10
        assert bench.seen(run, 0.5)[bench.DRIFT] == row["drift_ratio"] / row["drift_ratio_chance"]
