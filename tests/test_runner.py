"""The runner of all four studies, on a script of a few lines; the plans of their presets against their logs."""

import importlib
import json
import math
import signal
import subprocess
from dataclasses import replace

import harness
import pytest
from made_runs import call

from common.cli import RunFailed, UsageError
from plots import runner
from plots.runner import Run, best_value, extension, preset, row

STUDIES = {
    "mamba_fl": "mamba_fl.run_study",
    "lora_glue_fl": "lora_glue_fl.run_study",
    "llm_noniid": "llm_noniid.run_experiments",
    "vit_sparse_fl": "vit_sparse_fl.run_all_experiments",
}
GRIDS = {name: importlib.import_module(place).STUDY for name, place in STUDIES.items()}

# ---- the runner, on a made-up script

SCRIPT = """
import json, os, pathlib, sys
from common.cli import Parser

def build_parser():
    parser = Parser("x")
    for name in "kind lr mu name output-dir run-name seed data-root resume".split():
        parser.add_argument("--" + name, nargs="?")
    return parser

if __name__ == "__main__":
    flags = build_parser().parse_args()
    folder, lr, ended = pathlib.Path(flags.output_dir) / flags.run_name, float(flags.lr or 1), {}
    print("started with", os.environ.get("WORLD_SIZE", "any"), flush=True)
    if flags.kind == "refuses":
        sys.exit("error: no memory") if os.environ.get("SOFT") else build_parser().error("--kind: no")
    folder.mkdir(parents=True, exist_ok=True)
    line = {"round": 1, "val_loss": (lr - 0.3) ** 2 + float(flags.mu or 0), "tokens_per_second": 9}
    (folder / "metrics.jsonl").write_text(json.dumps(line))
    if flags.kind == "diverges":
        ended = {"how": "failed", "by": "left_out", "reason": "round 2: lower --lr"}
    about = {"command": "fed_avg", "argv": sys.argv, "status": "failed" if ended else "finished", "ended": ended}
    about |= {"args": {"lr": lr, "model": "/some/where/small/model", "output_dir": "/x"}, "data": {"source": "/x"}}
    (folder / "run.json").write_text(json.dumps(about))
    sys.exit(ended.get("reason"))
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A maker of studies of `fake.py`: rows -> function of a command line, which runs it."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "fake.py").write_text(SCRIPT)

    def make(rows, **more):
        study = {"presets": {"p": preset(rows, **{"seeds": (0, 1)} | more)}, "default": "p", "output": "x"}
        parser = runner.build_parser(study, "x")
        out = str(tmp_path / "out")
        return lambda line="": runner.run_study(study, *parser.parse_known_args([*line.split(), "--output-dir", out]))

    return make


def lines_of(out):
    return {line["name"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def starts(out, name):
    return (out / "output" / f"{name}.txt").read_text().count("started with 1")  # and one process


def test_a_grid_runs_goes_on_and_names_what_failed(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOFT", "1")
    kinds, out = ("works", "diverges", "refuses"), tmp_path / "out"
    run = made({kind: row(f"fake.py --kind {kind}") for kind in kinds})
    with pytest.raises(RunFailed, match="2 of 6 runs did not finish: refuses_seed_0, refuses_seed_1"):
        run("--jobs 2")
    said, lines = capsys.readouterr().out, lines_of(out)
    assert "exit code 1: error: no memory (see" in said and "round 2: lower --lr" in said
    assert set(lines) == {f"{kind}_seed_{seed}" for kind in ("works", "diverges") for seed in (0, 1)}
    line = lines["works_seed_1"]
    assert line["args"] == {"lr": 1.0, "model": "small"} and line["data"] == {}
    assert line["curve"] == [{"round": 1, "val_loss": 0.48999999999999994}]
    with pytest.raises(RunFailed):  # what has a result is not started again, what has none is
        run("--jobs 2")
    assert [starts(out, f"{kind}_seed_0") for kind in kinds] == [1, 1, 2]
    assert run("--only works --lr 2 --jobs 2") == 0 and starts(out, "works_seed_0") == 2  # another command


def test_the_plan_needs_nothing_and_runs_nothing(made, tmp_path, capsys):
    run = made({"a": row("fake.py --kind works --name {seed}"), "b": row("fake.py", "other", seeds=1)}, shared="--lr 3")
    assert run("--plan --data-root /nowhere") == 0 and not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "# a_seed_1: not run yet\npython fake.py --lr 3 --data-root /nowhere --kind works --name 1 --seed 1" in said
    assert "b_seed_0" in said and "b_seed_1" not in said
    assert run("--plan --only other --seeds 7") == 0 and "a_seed" not in capsys.readouterr().out


def test_what_a_run_needs_is_run_first_and_without_it_nothing_starts(made, tmp_path, monkeypatch):
    rows = {"first": row("fake.py --kind works", "first", tag=""), "b": row("fake.py --kind works", needs=("first",))}
    assert made(rows)("--jobs 2") == 0
    assert list(lines_of(tmp_path / "out")) == ["b_seed_0", "b_seed_1", "first"]
    monkeypatch.setenv("SOFT", "1")
    rows = {"c": row("fake.py --kind refuses"), "d": row("fake.py --kind works", needs=("c",))}
    with pytest.raises(RunFailed, match="2 of 2 runs did not finish"):
        made(rows)("--seeds 0")
    assert not (tmp_path / "out" / "output" / "d_seed_0.txt").exists()


def test_what_a_script_refuses_ends_the_grid_in_its_line(made, tmp_path):
    run = made({"a": row("fake.py --kind refuses"), "b": row("fake.py --kind works")})
    with pytest.raises(UsageError, match="a_seed_0: --kind: no"):
        run("--jobs 1")
    assert not (tmp_path / "out" / "output" / "b_seed_0.txt").exists()


def test_what_a_grid_has_started_ends_with_it(tmp_path, monkeypatch):
    started = iter([(sleeping := subprocess.Popen(["sleep", "60"]), tmp_path / "log")])
    monkeypatch.setattr(runner, "start", lambda run, alone: next(started))
    with pytest.raises(StopIteration):
        runner.run_all([Run(tmp_path, name, name, ("a.py",)) for name in "ab"], jobs=2)
    assert sleeping.poll() == -signal.SIGTERM


# ---- tuning


def test_a_best_at_the_edge_extends_it():
    for lowest, more, best in (
        (0.45, [], 0.5),
        (4.0, [2, 4, 8], 4),
        (1e6, [2, 4, 8], 8),
        (0, [0.125, 0.0625, 0.03125], 0.03125),
    ):
        values, tried = [0.25, 0.5, 1.0], {}
        while todo := extension(tried, values) if tried else values:
            tried |= {x: abs(x - lowest) for x in todo}
        assert list(tried) == [0.25, 0.5, 1, *more] and best_value(tried) == best
    assert best_value({1: 5.0, 2: 5.0, 4: math.inf}) == 1  # inf: it diverged


def test_tuned_rates_are_what_the_same_command_then_runs_at(made, tmp_path, capsys):
    both = {"lr": (0.1, 0.3, 0.9), "mu": (0.1, 0.2)}
    rows = {
        "b": row("fake.py --kind works", tune={"mu": (0.1, 0.2)}, rate_of="a"),
        "a": row("fake.py --kind works", tune={"lr": (0.1, 0.3, 0.9)}),
        "c": row("fake.py --kind works", tune=both),
    }
    run, out = made(rows), tmp_path / "out"
    with pytest.raises(UsageError, match="b has no tuned values: give --tune first"):
        run("--plan")
    assert run("--tune --jobs 2") == 0
    found = json.loads((out / "tuned.json").read_text())
    assert found["a"]["lr"]["best"] == 0.3 and found["a"]["lr"]["seed"] == 100 and not found["a"]["lr"]["edge"]
    assert found["b"]["mu"]["best"] == 0.0125 and found["b"]["mu"]["edge"]  # 0.1, three times halved
    assert (found["c"]["lr"]["best"], found["c"]["mu"]["best"]) == (0.3, 0.0125)
    assert found["c"]["mu"]["tried"]["0.1"] == pytest.approx(0.1)  # at the first's best
    assert set(lines_of(out / "tuning")) > {"a_seed_100_lr_0.3", "b_seed_100_lr_0.3_mu_0.05"}
    assert starts(out, "tuning/a_seed_100_lr_0.3") == 1
    capsys.readouterr()
    assert run("--plan") == 0
    said = capsys.readouterr().out
    assert "--kind works --seed 0 --lr 0.3 --out" in said and "--kind works --seed 1 --lr 0.3 --mu 0.0125" in said
    with pytest.raises(UsageError, match="was tuned on it"):
        run("--seeds 100")
    assert made({"d": row("fake.py --kind works", tune={"mu": (0.1, 0.2)})}, higher=True)("--tune") == 0
    about = json.loads((out / "tuned.json").read_text())["d"]["mu"]  # more is better: 0.2, three times doubled
    assert about["best"] == 1.6 and about["tried"]["0.1"] == pytest.approx(0.59)


def test_what_is_refused(made, tmp_path):
    for words, said in (
        ("--tune lr 1 1", "give a flag and two different numbers"),
        ("--tune", "none of these rows has values of its own"),
        ("--only c", "--only c: not in this preset; choose from a"),
    ):
        with pytest.raises(UsageError, match=said):
            made({"a": row("fake.py --kind works")})(words)
    assert not (tmp_path / "out").exists()


# ---- the studies' grids


@pytest.mark.parametrize("study", GRIDS)
def test_every_row_of_a_grid_is_accepted_by_its_script(study):
    """Its flags are flags of the script."""
    for name in GRIDS[study]["presets"]:
        args = runner.build_parser(GRIDS[study], "x").parse_args(["--preset", name, "--output-dir", "out"])
        for run in runner.runs_of(GRIDS[study], args, [0]):
            module = importlib.import_module(run.words[0].removesuffix(".py").replace("/", "."))
            parsed = vars(module.build_parser().parse_args(run.command[1:]))
            assert not run.row or (parsed["seed"], parsed["run_name"]) == (0, run.folder.name)


@pytest.mark.parametrize(
    "study, name, log, words",
    [
        ("mamba_fl", "gap", "gap.jsonl", []),
        ("mamba_fl", "gap-demo", "gap_demo.jsonl", []),
        ("lora_glue_fl", "trajectories", "trajectories.jsonl", ["--model", "model"]),
        ("llm_noniid", "regimes", "regimes.jsonl", ["--model", "small"]),
        ("vit_sparse_fl", "rates", "rates.jsonl", []),
    ],
)
def test_the_plan_has_the_rates_of_the_log(study, name, log, words):
    grid, flag = GRIDS[study], "--lr" if study in ("mamba_fl", "vit_sparse_fl") else "--learning-rate"
    lines = map(json.loads, (harness.ROOT / study / "results" / log).read_text().splitlines())
    rates = {line["name"]: line["args"][flag[2:].replace("-", "_")] for line in lines}
    args = runner.build_parser(grid, "x").parse_args(["--preset", name, "--output-dir", "nowhere"])
    one, seeds = grid["presets"][name], list(grid["presets"][name]["seeds"])
    args.only = [row for row in one["rows"] if any(f"{row}_" in run for run in rates)]  # those that were measured
    runs = [run for run in runner.runs_of(grid, args, seeds, words) if run.row]
    runs = [replace(run, point=runner.point_of(one, run, seeds=seeds)) for run in runs]
    there = [run for run in runs if run.name in rates and runner.last(run.command, flag)]
    assert len(there) > 20
    assert {run.name: float(runner.last(run.command, flag)) for run in there} == {r.name: rates[r.name] for r in there}


def test_the_fronts_keep_the_sources_flags():
    from vit_sparse_fl.run_all_experiments import parse

    args, words = parse("--quick --num-runs 2 --seed 3 --only-sparse --only-extension --data-root x".split())
    assert (args.preset, args.seeds, args.only) == ("quick", [3, 4], ["sparse", "extension"])
    assert words == ["--data-root", "x"]
    epochs = "failure_scaffold_topic_skew_epochs_5_ag_news_distilgpt2_seed_42"
    for line, part in (
        ("vit_sparse_fl/run_all_experiments.py --full --only-centralized", "centralized_seed_0"),
        ("llm_noniid/run_experiments.py --mode failure", epochs),
        ("mamba_fl/run_study.py --preset quick", "fed_momentum_server_adam_seed_0"),
        ("lora_glue_fl/run_study.py --model M", "sst2_ranks_stack_seed_0"),
    ):
        code, out, err = call(f"{line} --plan")
        assert code == 0 and f"# {part}: not run yet" in out, err
    for mode in ("compare", "analyze"):
        code, _, err = call(f"llm_noniid/run_experiments.py --mode {mode} --results-dir /nowhere")
        assert code == 2 and "/nowhere" in err
