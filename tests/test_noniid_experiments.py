"""The search for the boundary of failure, the grids of run_experiments.py, and both scripts on tiny models."""

import itertools
import json
import math
import random
import subprocess

import pytest
from noniid_made import made_args, make_run
from running import ROOT

from common.checkpoint import read_json, write_json
from common.cli import UsageError, run_main
from llm_noniid import failure_map, launching, run_experiments
from llm_noniid.failure_map import bracket, next_point, search, violations

ALPHAS = (0.1, 100.0, 1.0, 0.01)


# ---------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("seed", range(30))
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


@pytest.mark.parametrize("seed", range(20))
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


@pytest.mark.parametrize("edge", [1, 2, 5, 37, 255, 256, 300])
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


# ------------------------------------------------------------------------------------------------ the grids


def planned(*words):
    return run_experiments.plan(*run_experiments.parse([str(word) for word in words]))


def flags_of(command):
    return launching.train_flags(command[1:])


def test_the_study_varies_one_factor_at_a_time_in_at_most_100_runs():
    runs = planned("--mode", "study", "--model", "models/small", "--results-dir", "out")
    maps = [run for run in runs if "failure_map.py" in run[2][0]]
    trains = [run for run in runs if run not in maps]
    assert len(trains) + len(maps) * run_experiments.MAP_BUDGET <= 100 and len(maps) == 2
    assert len({name for name, _, _ in runs}) == len(runs)
    parsed = [vars(flags_of(command)) for _, _, command in trains]
    base = next(p for p in parsed if p["algorithm"] == "fedavg" and p["partition"] == "topic_skew" and p["seed"] == 0)
    found = set()
    for args in parsed:
        away = {k for k, v in args.items() if v != base[k] and k not in ("seed", "run_name")}
        if args["num_rounds"] > 1:
            assert len(away - {"partition"}) <= 1, away
            found.add((args["algorithm"], *sorted(f"{k} {args[k]}" for k in away - {"algorithm"})))
    for wanted in itertools.product(("fedavg", "fedprox", "scaffold"), ("iid", "style_skew", "token_skew")):
        assert (wanted[0], f"partition {wanted[1]}") in found
    for more in ("alpha 100.0", "alpha 1.0", "alpha 0.01", "participation_rate 0.3", "participation_rate 0.1"):
        assert ("fedavg", more) in found
    for more in ("learning_rate 0.03", "learning_rate 0.3"):
        assert {("fedavg", more), ("fedavg", more, "partition iid")} <= found
    for more in ("local_steps 50", "cluster labels", "cluster updates"):
        assert ("fedavg", more) in found
    assert {("local",), ("central",), ("fedavg", "dataset wikitext")} <= found
    for partition in ("iid", "topic_skew"):
        for algorithm in ("fedavg", "fedprox", "scaffold"):
            seeds = [p["seed"] for p in parsed if p["algorithm"] == algorithm and p["partition"] == partition]
            assert {0, 1, 2} <= set(seeds)


def test_the_failure_maps_take_the_studys_flags():
    runs = planned("--mode", "study", "--dataset", "demo", "--model", "tiny", "--num-rounds", 3, "--batch-size", "4")
    assert not any("wikitext" in name for name, _, _ in runs)
    for name, folder, command in runs[-2:]:
        args, given = failure_map.parse(command[1:])
        made = failure_map.Map(args, given)
        assert made.folder == folder and name == folder.name and made.setting["num_rounds"] == 3
        assert made.setting["batch_size"] == 4 and made.setting["max_length"] == 64 and made.low < 3e-3 < made.high
        assert args.start_run == str(runs[0][1]) and "_start_" in args.start_run


def test_the_sources_grids():
    runs = planned("--mode", "main", "--seeds", 1, 2)
    assert len(runs) == 2 * (1 + 3 * 4 * 3)
    parsed = [flags_of(command) for name, _, command in runs if "_start_" not in name]
    assert {(a.algorithm, a.partition, a.participation_rate, a.seed) for a in parsed} == set(
        itertools.product(
            ("fedavg", "fedprox", "scaffold"),
            ("iid", "topic_skew", "style_skew", "token_skew"),
            (0.3, 0.5, 1.0),
            (1, 2),
        )
    )
    assert {(a.num_rounds, a.learning_rate, a.model, a.dataset) for a in parsed} == {
        (50, 5e-5, "distilgpt2", "ag_news")
    }
    runs = planned("--mode", "failure")
    parsed = [flags_of(command) for name, _, command in runs if "_start_" not in name]
    assert len(parsed) == 12 and {a.seed for a in parsed} == {42}
    found = {(a.alpha, a.participation_rate, a.learning_rate, a.local_epochs) for a in parsed}
    base = (0.1, 1.0, 5e-5, 1.0)
    assert found == {(0.01, *base[1:]), (0.1, 0.1, *base[2:]), (*base[:2], 1e-3, 1.0), (*base[:3], 5.0)}
    assert {a.mu for a in parsed} == {0.01}
    runs = planned("--mode", "failure", "--mu", 0.5)
    assert {(a.algorithm == "fedprox", a.mu) for a in (flags_of(c) for _, _, c in runs)} == {(True, 0.5), (False, 0.01)}


def test_flags_of_the_command_line_win_over_the_modes_but_not_over_the_grids(tmp_path, capsys):
    runs = planned("--mode", "quick", "--num_rounds", 7, "--batch-size", 3, "--model", "tiny", "--dataset", "demo")
    parsed = [flags_of(command) for name, _, command in runs if "_start_" not in name]
    assert {(a.num_rounds, a.batch_size, a.model) for a in parsed} == {(7, 3, "tiny")} and len(parsed) == 12
    for words in (["--algorithm", "fedavg"], ["--seed", "3"], ["--run_name=x"], ["--overwrite"]):
        with pytest.raises(UsageError, match="is set for each run by this script"):
            run_experiments.parse(["--mode", "quick", *words])
    with pytest.raises(UsageError, match="--participation-rate is set"):
        run_experiments.parse(["--mode", "main", "--participation-rate", "0.2"])
    for words in (["--no-such-flag", "3"], ["--alpha", "0"], ["--model"]):
        with pytest.raises(SystemExit) as stop:
            planned("--mode", "quick", *words)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(UsageError, match="runs nothing"):
        run_experiments.main(*run_experiments.parse(["--mode", "compare", "--batch-size", "3"]))


# ----------------------------------------------------------------------------------------------- launching


def test_finished_runs_are_not_started_and_those_with_other_flags_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("started"))
    folder = make_run(tmp_path, [4.0, 3.0])
    line = ["llm_noniid/train.py", "--num-rounds", "4", "--eval-every", "1", "--local-steps", "5", "--seed", "0"]
    assert launching.run_one("x", folder, line, tmp_path) == ("x", 0)
    assert "finished, took 6 s" in capsys.readouterr().out
    assert launching.run_one("x", folder, [*line, "--batch-size", "4"], tmp_path) == ("x", 2)
    assert "--batch-size 8 -> 4" in capsys.readouterr().out
    reason = "round 1: the updates of all 10 clients are not finite: lower it"
    blown = make_run(tmp_path, [], "failed", reason, learning_rate=9.0)
    assert launching.run_one("y", blown, [*line, "--learning-rate", "9"], tmp_path) == ("y", 0)
    assert "blew up" in capsys.readouterr().out


def test_broken_runs_are_started_again_and_failures_reported(tmp_path, capsys):
    folder = make_run(tmp_path, [4.0], "failed", "no space left")
    bad = ["llm_noniid/train.py", "--no-such-flag", "--resume"]
    assert launching.run_one("x", folder, bad, tmp_path) == ("x", 2)
    assert "exit code 2, see" in capsys.readouterr().out and "no-such-flag" in (tmp_path / "output/x.txt").read_text()
    assert launching.run_all([("x", folder, bad)], tmp_path, jobs=2) == ["x"]
    assert launching.took(folder) == "failed, goes on" and launching.took(tmp_path / "no") == "not run yet"


def test_collected_lines(tmp_path):
    make_run(tmp_path, [4.0, 3.0], model="/some/where/small")
    make_run(tmp_path, [4.0], "running", seed=1)
    launching.collect(tmp_path, tmp_path / "results.jsonl")
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["args"]["model"] == "small" and [row["val_loss"] for row in line["curve"]] == [4.0, 3.0]
    assert "output_dir" not in line["args"] and line["git_commit"] == "abc" and line["failed"] == ""


# ----------------------------------------------------------------------------------------- with real runs

TINY = "--model tiny --dataset demo --max-samples 200 --eval-samples 20 --num-rounds 2 --local-steps 2 --threads 1"


def call(module, words):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda argv: module.main(*module.parse(argv)), words.split())
    return stop.value.code


@pytest.mark.slow
def test_a_small_grid_from_the_runs_to_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_experiments, "PARTITIONS", ("iid",))
    monkeypatch.setattr(run_experiments, "ALGORITHMS", ("fedavg", "fedprox"))
    words = f"--mode quick {TINY} --mu 0.1 --jobs 2"
    assert call(run_experiments, words) == 0
    said = capsys.readouterr().out
    assert said.count("finished, took") == 3 and said.splitlines()[-1] == "results"
    assert "| fedprox, iid |" in said and "not measured" in said
    lines = [json.loads(line) for line in open("results/results.jsonl")]
    assert {line["args"]["algorithm"] for line in lines} == {"fedavg", "fedprox"}
    report = open("results/report.html", encoding="utf-8").read()
    assert "fedprox, iid" in report and "<script" not in report
    # a run that was broken off goes on; the others are not touched
    broken = tmp_path / "results/quick_fedavg_iid_demo_tiny_seed_42"
    manifest = read_json(broken / "run.json")
    write_json(broken / "run.json", manifest | {"status": "running", "results": None})
    other = tmp_path / "results/quick_fedprox_iid_demo_tiny_seed_42/run.json"
    before = other.stat().st_mtime_ns, (broken / "metrics.jsonl").read_text()
    assert call(run_experiments, f"{words} --plan") == 0
    plan = capsys.readouterr().out
    assert plan.count("# finished") == 2 and plan.count("# running, goes on") == 1
    monkeypatch.setattr(run_experiments.report, "draw", lambda folder: ([], []))
    assert call(run_experiments, words) == 0
    assert read_json(broken / "run.json")["status"] == "finished"
    assert (other.stat().st_mtime_ns, (broken / "metrics.jsonl").read_text()) == before
    # other flags in the same folder are an error, and are said
    assert call(run_experiments, f"{words} --batch-size 3") == 1
    assert "--batch-size 8 -> 3" in capsys.readouterr().out
    assert call(run_experiments, "--mode compare") == 0
    assert "| fedavg, iid |" in capsys.readouterr().out
    assert call(run_experiments, "--mode analyze --results-dir nowhere") == 2


@pytest.mark.slow
def test_a_failure_map_of_a_tiny_model(tmp_path, capsys):
    folder = tmp_path / "map"
    words = f"{TINY} --alphas 1 --low 1e-3 --high 1e3 --budget 2 --num-clients 3 --output-dir {folder}"
    assert call(failure_map, words) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == str(folder) and "works at" in said
    found = read_json(folder / "failure_map.json")
    assert found["finished"] and len(found["points"]) == 2 and found["points"][0]["value"] == 1.0
    assert found["boundary"][0] == bracket(found["points"], 1.0) and found["start_val_loss"] > 5
    for point in found["points"]:
        rows = (folder / point["run"] / "metrics.jsonl").read_text().splitlines()
        assert json.loads(rows[-1])["val_loss"] == point["val_loss"]
        assert point["failed"] == bool(point["reason"])
    runs = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/run.json"))]
    assert call(failure_map, words) == 0  # nothing is run again
    assert read_json(folder / "failure_map.json") == found
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*/run.json"))] == runs
    assert call(failure_map, words.replace("--budget 2", "--budget 3")) == 0
    assert read_json(folder / "failure_map.json")["points"][:2] == found["points"]
    capsys.readouterr()
    assert call(failure_map, words.replace("--local-steps 2", "--local-steps 3")) == 2
    assert "local_steps 2 -> 3" in capsys.readouterr().err


def test_the_made_run_folders_have_the_flags_that_runs_have():
    assert made_args()["learning_rate"] == 5e-5 and (ROOT / "llm_noniid/train.py").is_file()
