"""The search for the boundary of failure, and a map of a tiny model."""

import json
import math
import random

import pytest

from common.checkpoint import read_json
from common.cli import UsageError, run_main
from llm_noniid import failure_map
from llm_noniid.failure_map import ALPHAS, bracket, next_point, violations


def search(fails, *limits, points=(), **options):
    """All points of a search on a made-up surface: fails(alpha, value)."""
    points = list(points)
    while point := next_point(points, *limits, **options):
        points.append({"alpha": point[0], "value": point[1], "failed": fails(*point)})
    return points


# ---------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("seed", range(5))
def test_the_search_brackets_synthetic_boundaries(seed):
    """The boundary of every alpha lies in its bracket; no point is asked twice; the budget holds."""
    draw = random.Random(seed)
    edges = {alpha: 10 ** draw.uniform(-3.9, -0.1) for alpha in ALPHAS}
    asked = []

    def fails(alpha, value):
        asked.append((alpha, value))
        return value > edges[alpha]

    points = search(fails, ALPHAS, 1e-4, 1.0, budget=60)
    assert len(asked) == len(set(asked)) == len(points) <= 60
    assert all(1e-4 <= value <= 1 for _, value in asked) and violations(points) == []
    for alpha in ALPHAS:
        b = bracket(points, alpha)
        assert b["works"] <= edges[alpha] < b["fails"] and b["fails"] / b["works"] <= 1.6, b  # 1.5, and two digits


@pytest.mark.parametrize("seed", range(4))
def test_a_small_budget_is_kept_and_every_alpha_has_its_share(seed):
    draw = random.Random(seed)
    middle = draw.uniform(-3, -0.5)
    edges = {alpha: 10 ** (middle + draw.uniform(-0.2, 0.2)) for alpha in ALPHAS}
    points = search(lambda alpha, value: value > edges[alpha], ALPHAS, 1e-3, 1.0, budget=10)
    assert len(points) == 10
    for alpha in ALPHAS:
        b = bracket(points, alpha)
        assert b["works"] or b["fails"]
        assert (b["works"] or 0) <= edges[alpha] < (b["fails"] or math.inf)
        assert sum(p["alpha"] == alpha for p in points) >= 2


def test_equal_boundaries_cost_two_runs_for_each_further_alpha():
    points = search(lambda alpha, value: value > 0.03, ALPHAS, 1e-3, 1.0, budget=100, tolerance=1.5)
    per_alpha = {alpha: sum(p["alpha"] == alpha for p in points) for alpha in ALPHAS}
    assert per_alpha[0.1] == 5 and [per_alpha[alpha] for alpha in ALPHAS[1:]] == [2, 2, 2]  # a grid: 18 values each


def test_what_never_or_always_fails_has_one_end():
    never = search(lambda alpha, value: False, (0.1, 1.0), 1e-3, 1.0, budget=40)
    assert [bracket(never, alpha) for alpha in (0.1, 1.0)] == [
        {"alpha": alpha, "works": 1.0, "fails": None} for alpha in (0.1, 1.0)
    ]
    always = search(lambda alpha, value: True, (0.1, 1.0), 1e-3, 1.0, budget=40)
    assert [bracket(always, alpha)["fails"] for alpha in (0.1, 1.0)] == [1e-3, 1e-3]
    assert bracket(always, 0.1)["works"] is None and len(never) < 20 and len(always) < 20
    # one that never fails beside one that always does
    mixed = search(lambda alpha, value: alpha == 0.1, (0.1, 1.0), 1e-3, 1.0, budget=40)
    assert bracket(mixed, 0.1)["fails"] == 1e-3 and bracket(mixed, 1.0)["works"] == 1.0


@pytest.mark.parametrize("edge", [1, 37, 255, 300])
def test_local_steps_are_whole(edge):
    points = search(lambda alpha, value: value > edge, (0.1, 1.0), 1, 256, budget=50, tolerance=1.001, whole=True)
    assert all(isinstance(p["value"], int) for p in points)
    for alpha in (0.1, 1.0):
        b = bracket(points, alpha)
        assert b["works"] == min(edge, 256) and b["fails"] == (edge + 1 if edge < 256 else None)


def test_a_search_that_was_broken_off_goes_on_as_it_would_have():
    whole = search(lambda alpha, value: value > 0.02 * alpha**0.1, ALPHAS, 1e-3, 1.0, budget=14)
    for n in (0, 1, 5, 9):
        known = whole[:n]
        random.Random(n).shuffle(known)
        again = search(lambda alpha, value: value > 0.02 * alpha**0.1, ALPHAS, 1e-3, 1.0, budget=14, points=known)
        assert again[n:] == whole[n:]
    assert next_point(whole, ALPHAS, 1e-3, 1.0, budget=14) is None
    assert next_point(whole[:10], ALPHAS, 1e-3, 1.0, budget=10) is None


def test_what_is_not_monotone_is_noted():
    points = [
        {"alpha": 0.1, "value": v, "failed": f} for v, f in ((0.1, False), (0.2, True), (0.4, False), (0.8, True))
    ]
    assert bracket(points, 0.1) == {"alpha": 0.1, "works": 0.1, "fails": 0.2}
    assert violations(points) == [{"alpha": 0.1, "failed": 0.2, "worked": 0.4}]
    assert bracket(points, 1.0) == {"alpha": 1.0, "works": None, "fails": None}


# -------------------------------------------------------------------------------------------------- the map


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--alphas", "1", "1"], "one is there twice"),
        (["--tolerance", "1"], "not above 1"),
        (["--low", "1", "--high", "0.1"], "--low 1 is not below --high 0.1"),
        (["--learning-rate", "0.1"], "--learning-rate is set for each run"),
        (["--axis", "local_steps", "--seed", "1", "--local_steps", "3"], "--local-steps is set for each run"),
    ],
)
def test_bad_usage_of_the_failure_map(words, error, tmp_path):
    with pytest.raises(UsageError, match=error):
        args, given = failure_map.parse([*words, "--output-dir", str(tmp_path / "x")])
        failure_map.main(args, given)
    assert not (tmp_path / "x").exists()


TINY = "--model tiny --dataset demo --max-samples 200 --eval-samples 20 --num-rounds 2 --local-steps 2 --threads 1"


def call(words):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda argv: failure_map.main(*failure_map.parse(argv)), words.split())
    return stop.value.code


@pytest.mark.slow
def test_a_failure_map_of_a_tiny_model(tmp_path, capsys):
    folder = tmp_path / "map"
    words = f"{TINY} --alphas 1 --low 1e-3 --high 1e3 --budget 2 --num-clients 3 --output-dir {folder}"
    assert call(words) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(folder) and "works at" in said
    found = read_json(folder / "failure_map.json")
    assert found["finished"] and len(found["points"]) == 2 and found["points"][0]["value"] == 1.0
    assert found["boundary"][0] == bracket(found["points"], 1.0)
    assert found["start_val_loss"] is None or found["start_val_loss"] > 5  # None: runs that do not log round 0
    for point in found["points"]:
        rows = (folder / point["run"] / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["val_loss"] == point["val_loss"]
        assert point["failed"] == bool(point["reason"])
    runs = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/run.json"))]
    assert call(words) == 0  # nothing is run again
    assert read_json(folder / "failure_map.json") == found
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/run.json"))] == runs
    assert call(words.replace("--budget 2", "--budget 3")) == 0
    assert read_json(folder / "failure_map.json")["points"][:2] == found["points"]
    capsys.readouterr()
    assert call(words.replace("--local-steps 2", "--local-steps 3")) == 2
    assert "local_steps 2 -> 3" in capsys.readouterr().err
