"""The search for the boundary of failure, and a map of a tiny model."""

import json
import math
import random

import pytest

from common.checkpoint import read_json, write_json
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
        assert (b["works"] or 0) <= edges[alpha] < (b["fails"] or math.inf)
        assert sum(p["alpha"] == alpha for p in points) >= 2


def test_equal_boundaries_cost_two_runs_for_each_further_alpha():
    points = search(lambda alpha, value: value > 0.03, ALPHAS, 1e-3, 1.0, budget=100, tolerance=1.5)
    per_alpha = {alpha: sum(p["alpha"] == alpha for p in points) for alpha in ALPHAS}
    assert per_alpha[0.1] == 5 and [per_alpha[alpha] for alpha in ALPHAS[1:]] == [2, 2, 2]  # a grid: 18 values each


@pytest.mark.parametrize(
    ("fails_at", "ends"),
    [
        ((), [(1.0, None), (1.0, None)]),
        ((0.1, 1.0), [(None, 1e-3), (None, 1e-3)]),
        ((1.0,), [(1.0, None), (None, 1e-3)]),
    ],
)
def test_what_never_or_always_fails_has_one_end(fails_at, ends):
    points = search(lambda alpha, value: alpha in fails_at, (0.1, 1.0), 1e-3, 1.0, budget=40)
    found = [bracket(points, alpha) for alpha in (0.1, 1.0)]
    assert [(b["works"], b["fails"]) for b in found] == ends and len(points) < 20


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


def call(words):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda argv: failure_map.main(*failure_map.parse(argv)), words.split())
    return stop.value.code


@pytest.fixture
def values(monkeypatch):
    """The learning rates of the runs, which are made up: from 1 without a finite update, from 0.1 rising."""
    values = []

    def run_all(runs, output, **_):
        (run,) = runs
        values.append(float(run.command[run.command.index("--learning-rate") + 1]))
        losses, how = [5.0, 4.5, 4.75 if values[-1] >= 0.1 else 4.0], {"status": "finished"}
        if values[-1] >= 1:
            losses, how = [5.0], {"status": "failed", "reason": "round 1: the updates of all clients are not finite"}
        rows = [{"round": t, "val_loss": loss} for t, loss in enumerate(losses)]
        (output / run.name).mkdir()
        (output / run.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (output / run.name / "run.json").write_text(json.dumps(how))
        return []

    monkeypatch.setattr(failure_map.grid, "run_all", run_all)
    monkeypatch.setattr(failure_map.grid, "collect", lambda output: None)
    monkeypatch.setattr(failure_map.grid, "read_study", lambda command: (0, ""))
    return values


def test_a_map_of_made_up_runs_goes_on_and_counts_its_points(values, tmp_path, capsys):
    words = f"--alphas 1 --low 1e-3 --high 1e3 --output-dir {tmp_path / 'map'} --num-rounds 2"
    assert call(f"{words} --budget 3") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["alpha 1: works at 0.032, fails at 0.18", str(tmp_path / "map")]
    map_ = read_json(tmp_path / "map" / "failure_map.json")
    assert map_["finished"] and values == [1.0, 0.032, 0.18] and map_["start_val_loss"] == 5.0
    assert map_["boundary"] == [bracket(map_["points"], 1.0)] and map_["violations"] == []
    reasons = ["no update was finite", "", "ends above its first evaluation"]
    assert [p["reason"] for p in map_["points"]] == reasons and map_["points"][0]["val_loss"] is None
    second = {"alpha": 1.0, "value": 0.032, "failed": False, "reason": "", "val_loss": 4.0}
    assert map_["points"][1] == second | {"run": "alpha_1_learning_rate_0.032"}

    assert call(f"{words} --budget 3") == 0 and len(values) == 3  # nothing is run again
    assert read_json(tmp_path / "map" / "failure_map.json")["points"] == map_["points"]
    del map_["setting"]["final"]  # of before there was that flag
    write_json(tmp_path / "map" / "failure_map.json", map_)
    assert call(f"{words} --budget 5") == 0 and len(values) == 5
    assert read_json(tmp_path / "map" / "failure_map.json")["points"][:3] == map_["points"]
    capsys.readouterr()
    assert call(f"{words} --budget 9 --plan") == 0 and len(values) == 5
    assert "at most 4 more runs" in capsys.readouterr().out
    assert call(f"{words.replace('rounds 2', 'rounds 3')} --budget 9") == 2
    assert "num_rounds 2 -> 3" in capsys.readouterr().err


DAMAGED = ["", "null", "[]", "{}", '{"setting": {}, "points": [null], "start_val_loss": 5}', b"\xff"]
DAMAGED += ['{"setting": {}, "points": "x", "start_val_loss": 5}', '{"setting": {}, "points": [], "start": 5}']
DAMAGED += ['{"setting": {}, "points": [{"run": "r", "alpha": "1", "value": 1, "failed": true}], "start_val_loss": 5}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_map_is_one_line(content, tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{}")
    (tmp_path / "failure_map.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert call(f"--output-dir {tmp_path}") == 2
    error = capsys.readouterr().err
    assert "failure_map.json is damaged: delete it" in error and error.count("\n") == 1


def test_a_place_that_is_a_file_and_steps_of_seven_digits(values, tmp_path, capsys):
    assert call("--output-dir /dev/null") == 2 and "/dev/null is a file" in capsys.readouterr().err
    args, given = failure_map.parse(f"--axis local_steps --high 5000000 --output-dir {tmp_path}".split())
    assert "5000000" in failure_map.Map(args, given).run(0.1, 5000000).command


TINY = "--model tiny --dataset demo --max-samples 60 --eval-samples 5 --num-rounds 1 --local-steps 1 --threads 1"


@pytest.mark.slow
def test_a_point_of_a_real_run(tmp_path, monkeypatch):
    monkeypatch.setattr(failure_map.grid, "read_study", lambda command: (0, ""))
    words = f"{TINY} --alphas 1 --low 1e-3 --high 1e3 --budget 1 --num-clients 2 --output-dir {tmp_path / 'map'}"
    assert call(words) == 0
    map_ = read_json(tmp_path / "map" / "failure_map.json")
    (point,) = map_["points"]
    rows = (tmp_path / "map" / point["run"] / "metrics.jsonl").read_text().splitlines()
    before, after = (json.loads(row)["val_loss"] for row in rows)
    assert (map_["start_val_loss"], point["val_loss"]) == (before, after) and point["value"] == 1.0
    assert point["failed"] == bool(point["reason"]) == (after > before)
