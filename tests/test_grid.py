"""The runner of all four studies, on a script of a few lines; the plans of their presets; small grids of real runs."""

import hashlib
import importlib
import json
import os
import shlex
import signal
import time
from pathlib import Path

import harness
import pytest

from common import grid, records
from common.cli import RunFailed, UsageError, run_main
from common.early import CHECK
from common.grid import Preset, Run, Setting
from common.processes import cores

# ---------------------------------------------------------------------------------- the runner, on a made-up script

SCRIPT = """
import json, os, pathlib, sys, time
from common.early import stop_if_checked
flags = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))          # all flags but --resume at the end have a value
assert sys.argv[-1] == "--resume"
out = pathlib.Path(flags["--output-dir"])
folder = out / flags["--run-name"]
kind = flags["--kind"].rstrip("0123456789")
if kind == "misspelt":
    sys.stderr.write("usage: fake\\nfake.py: error: --kind misspelt: spell it (see --help)\\n")
    sys.exit(2)
stop_if_checked("flags")
if kind == "lacks":
    sys.stderr.write("error: no data in /nowhere: put them there\\n")
    sys.exit(2)
stop_if_checked("study")
print("started with", os.environ["OMP_NUM_THREADS"], "thread,", os.environ.get("WORLD_SIZE", "any"), flush=True)
if kind == "late":
    sys.stderr.write("error: --kind late: take another\\n")
    sys.exit(2)
if kind == "refuses":
    sys.exit("error: --kind refuses: take another")
folder.mkdir(parents=True, exist_ok=True)
(out / "alive").mkdir(exist_ok=True)
here = out / "alive" / str(os.getpid())
here.write_text("")
with open(out / "most_alive", "a") as file:
    print(len(list((out / "alive").iterdir())), file=file)
patience = time.monotonic() + float(os.environ.get("FAKE_PATIENCE", 0))  # seconds until another run is alive too
while "2" not in (out / "most_alive").read_text() and time.monotonic() < patience:
    time.sleep(0.02)
manifest = {
    "command": "fake", "argv": sys.argv, "status": "running", "reason": None, "results": None,
    "data": {"source": "/x", "model": "/some/where/small"},
    "args": {"kind": kind, "model": "/some/where/small", "output_dir": str(out), "seed": int(flags["--seed"])},
}
def write(**more):
    (folder / "run.json").write_text(json.dumps(manifest | more))
write()
if kind == "sleeps":
    time.sleep(120)
time.sleep(0.3)
here.unlink()
with open(folder / "metrics.jsonl", "a") as file:
    print(json.dumps({"round": 1, "val_loss": 2.0, "seconds": 0.3, "tokens_per_second": 9.0}), file=file)
if kind == "breaks":
    write(status="failed", reason="no space left")
    sys.exit("failed: no space left")
if kind == "diverges":
    ended = {"how": "failed", "by": "left_out", "round": 2, "clients": [0, 1], "reason": "round 2: lower --lr"}
    write(status="failed", ended=ended)
    sys.exit(1)
write(status="finished", results={"seconds": 0.3}, method={"model": "/some/where/small"})
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """grid runs `fake.py` of a folder of its own. Returns a maker of runs: kinds -> settings x seeds."""
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    (tmp_path / "fake.py").write_text(SCRIPT)

    def make(*kinds, seeds=(0,), **more):
        settings = [Setting(kind, "fake.py", ("--kind", kind)) for kind in kinds]
        return grid.expand(settings, (), seeds, tmp_path / "out", **more)

    return make


def starts(out, name):
    return (out / "output" / f"{name}.txt").read_text().count("started with 1 thread, 1")  # and one process


def lines_of(out):
    return {line["name"]: line for line in map(json.loads, (out / "results.jsonl").read_text().splitlines())}


def study(out, runs, jobs=2, plan=False, show=()):
    parser = grid.build_parser("x", {"p": Preset((), ())}, "p", "results/{preset}")
    words = ["--output-dir", str(out), "--jobs", str(jobs), *(["--plan"] if plan else [])]
    return grid.run_study(grid.complete(parser.parse_args(words), {"p": Preset((), ())}), runs, show)


def test_a_grid_runs_goes_on_and_names_what_failed(scripted, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("FAKE_PATIENCE", "20")  # on a busy machine the first would end before the second starts
    runs = scripted("works", "breaks", "diverges", "refuses", seeds=(0, 1))
    (tmp_path / "table.py").write_text("import sys; print('the table of', sys.argv[1])")
    with pytest.raises(RunFailed) as error:
        study(out, runs, show=[["table.py", "{output}"]])
    assert "4 of 8 runs did not finish" in str(error.value)
    for name in ("breaks_seed_0", "refuses_seed_0", "breaks_seed_1", "refuses_seed_1"):
        assert name in str(error.value)  # training that broke down is a result, not a failure
    said = capsys.readouterr().out
    assert "exit code 1: error: --kind refuses: take another (see" in said and "round 2: lower --lr" in said
    assert said.count("finished, took 0 s") == 2 and "left" in said
    assert max(map(int, (out / "most_alive").read_text().split())) == 2  # --jobs

    lines = lines_of(out)
    assert list(lines) == sorted(f"{kind}_seed_{s}" for kind in ("works", "breaks", "diverges") for s in (0, 1))
    one = lines["works_seed_1"]
    assert one["args"] == {"kind": "works", "model": "small", "seed": 1} and one["method"] == {"model": "small"}
    assert one["data"] == {"model": "small"} and one["curve"] == [{"round": 1, "val_loss": 2.0}]
    assert one["ended"]["how"] == "finished" and lines["diverges_seed_0"]["ended"]["clients"] == [0, 1]
    assert lines["breaks_seed_0"]["ended"]["reason"] == "no space left" and str(tmp_path) not in json.dumps(lines)

    # once more: what has a result is not started again, what has none is
    with pytest.raises(RunFailed, match="4 of 8"):
        study(out, runs)
    assert [starts(out, f"{kind}_seed_0") for kind in ("works", "diverges", "breaks", "refuses")] == [1, 1, 2, 2]
    # nor is a folder that holds a run with other flags taken for this one
    other = [Run(runs[0].name, (*runs[0].command[:-1], "--more", "1", "--resume"))]
    assert study(out, other) == 0 and starts(out, "works_seed_0") == 2
    capsys.readouterr()
    assert study(out, runs[:2], plan=True) == 0
    plan = capsys.readouterr().out
    assert "# breaks_seed_0: failed, goes on\npython fake.py --kind breaks" in plan and starts(out, "works_seed_0") == 2


def test_runs_wait_for_the_one_that_they_need(scripted, tmp_path, capsys):
    out = tmp_path / "out"
    first = scripted("breaks")[0]
    rest = scripted("works1", "works2", needs=first.name)
    with pytest.raises(RunFailed, match="3 of 3 runs did not finish"):
        study(out, [first, *rest])
    assert "not started: works1_seed_0, works2_seed_0, which need breaks_seed_0" in capsys.readouterr().out
    assert not (out / "works1_seed_0").exists()
    first = scripted("works")[0]
    assert study(out, [first, *scripted("works1", "works2", needs=first.name)]) == 0
    order = [(out / name / "run.json").stat().st_mtime_ns for name in ("works_seed_0", "works1_seed_0")]
    assert order == sorted(order)


def test_figures_and_the_table_come_after_the_runs(scripted, tmp_path, capfd):
    out = tmp_path / "out"
    (tmp_path / "figures.py").write_text("raise SystemExit('nothing to draw')")
    (tmp_path / "table.py").write_text("import os, sys; print(os.listdir(sys.argv[1])); sys.exit(int(sys.argv[2]))")
    assert study(out, scripted("works"), show=[["figures.py"], ["table.py", "{output}", "0"]]) == 0
    said = capfd.readouterr()
    assert "results.jsonl" in said.out and said.out.splitlines()[-1] == str(out) and "nothing to draw" in said.err
    with pytest.raises(RunFailed, match="table.py ended with exit code 3"):
        study(out, scripted("works"), show=[["table.py", "{output}", "3"]])


def test_a_grid_inside_a_grid_and_older_manifests(scripted, tmp_path):
    out = tmp_path / "out"
    grid.run_all(scripted("works"), out, jobs=1)
    inner = tmp_path / "out" / "map"
    grid.run_all(grid.expand([Setting("works", "fake.py", ("--kind", "works"))], (), (7,), inner), inner, jobs=1)
    records.collect(inner)
    old = {"command": "fake", "args": {"seed": 3}, "status": "failed", "reason": "the updates of all are not finite"}
    (out / "old").mkdir()
    (out / "old" / "run.json").write_text(json.dumps(old | {"results": None, "data": {}}))
    records.collect(out)
    lines = lines_of(out)
    assert list(lines) == ["old", "works_seed_0"] and list(lines_of(inner)) == ["works_seed_7"]
    assert lines["old"]["ended"] == {
        **{"how": "failed", "by": None, "round": None, "clients": None},
        "reason": "the updates of all are not finite",
    }
    assert records.broke_down(old) and not records.broke_down(old | {"reason": "no space left"})


@pytest.mark.parametrize("plan", [False, True])
@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        (["works", "misspelt"], "misspelt_seed_0: --kind misspelt: spell it"),
        (["lacks", "works"], "lacks_seed_0: no data in /nowhere: put them there"),
    ],
)
def test_what_a_script_refuses_ends_the_grid_before_its_first_run(scripted, tmp_path, capfd, kinds, error, plan):
    with pytest.raises(UsageError) as stop:
        study(tmp_path / "out", scripted(*kinds), plan=plan, show=[["table.py"]])
    said = capfd.readouterr()
    assert str(stop.value).startswith(error) and not said.out and not said.err
    assert [path.name for path in tmp_path.iterdir()] == ["fake.py"]


def test_a_run_that_refuses_later_ends_the_grid_and_leaves_nothing(scripted, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="late[12]_seed_0: --kind late: take another"):
        study(out, scripted("late1", "late2", "works"))
    assert [path.name for path in tmp_path.iterdir()] == ["fake.py"]
    with pytest.raises(UsageError, match="late_seed_0: --kind late: take another"):
        study(out, scripted("works1", "late", "works2"), jobs=1)
    kept = {str(path.relative_to(out)) for path in out.rglob("*_seed_0*")}
    assert kept == {"works1_seed_0", "output/works1_seed_0.txt"}


def test_data_and_model_are_looked_at_once_and_not_where_the_grid_makes_them(tmp_path, monkeypatch):
    looked, out = [], tmp_path / "out"
    monkeypatch.setattr(grid, "read_flags", lambda command: (0, ""))
    monkeypatch.setattr(grid, "read_study", lambda command: looked.append(command[2]) or (0, ""))
    lines = [
        *("a --init-from {out}/pretrain", "b --model tiny", "c --model tiny", "d --model tiny --dataset demo"),
        *("e --model large", "f --model {out}/there"),
    ]
    (out / "there").mkdir(parents=True)
    (out / "e").mkdir()
    (out / "e" / "run.json").write_text("{}")  # finished
    runs = [Run(line[0], ("x.py", "--name", *line.replace("{out}", str(out)).split())) for line in lines]
    grid.check([*runs, Run("g", ("x.py", "--name", "g"), record="other.json")], out)
    assert looked == ["b", "d", "f"]


def test_a_reader_of_the_plan_may_stop_reading(monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        grid.put(f"line {i}" for i in range(10_000))
        print("nobody reads this either")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_ends_the_runner_ends_its_runs(scripted, tmp_path, signum, code):
    runner = tmp_path / "runner.py"
    runner.write_text(f"""
import pathlib, sys
from common import grid
from common.cli import run_main
grid.ROOT = pathlib.Path({str(tmp_path)!r})
runs = grid.expand([grid.Setting(str(i), "fake.py", ("--kind", "sleeps")) for i in range(3)], (), (0,), sys.argv[2])
parse = grid.build_parser("x", ["p"], "p", "x").parse_args
run_main(lambda args: grid.run_study(args, runs), grid.complete(parse(sys.argv[1:]), {{}}))
""")
    started = harness.Started([runner, "--output-dir", tmp_path / "out", "--jobs", "2"])
    alive = tmp_path / "out" / "alive"
    end = time.monotonic() + 60
    while time.monotonic() < end and (not alive.exists() or len(list(alive.iterdir())) < 2):
        time.sleep(0.05)
    os.kill(started.process.pid, signum)
    ended = started.ended()
    assert ended.code == code, ended.err
    assert len(list(alive.iterdir())) == 2  # the third was not started
    for child in alive.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(child.name), 0)


def test_flags_of_the_runner(capsys):
    presets = {"small": Preset((), (), (0, 1, 2)), "quick": Preset((), (), (5,))}
    parser = grid.build_parser("x", presets, "small", "results/a_{preset}", ["--mode"], ["--results-dir"])

    def parsed(line):
        return grid.complete(parser.parse_args(line.split()), presets)

    args = parsed("")
    assert (args.seeds, grid.jobs_of(args), args.output_dir, args.only) == ([0, 1, 2], 1, "results/a_small", None)
    args = parsed("--mode quick --results-dir x --seeds 3")
    assert (args.preset, args.seeds, args.output_dir, grid.jobs_of(args)) == ("quick", [3], "x", cores())
    with pytest.raises(UsageError, match="--seeds 1 1: one is there twice"):
        parsed("--seeds 1 1")
    settings = [Setting("a", "s.py", group="g"), Setting("b", "s.py", ("--at", "x{seed}"), group="g", seeds=1)]
    settings.append(Setting("c", "s.py"))
    assert [s.name for s in grid.select(settings, ["g"])] == ["a", "b"]
    with pytest.raises(UsageError, match="--only d: not in this preset; choose from g, a, b, c"):
        grid.select(settings, ["a", "d"])
    with pytest.raises(UsageError, match="nothing to run"):
        grid.run_study(args, [])
    runs = grid.expand(settings[1:], ["--all"], [4, 9], "out")
    assert [run.name for run in runs] == ["b_seed_4", "c_seed_4", "c_seed_9"]
    assert shlex.join(runs[0].command) == "s.py --all --at x4 --seed 4 --output-dir out --run-name b_seed_4 --resume"
    assert [grid.duration(s) for s in (12.3, 89, 300, 12000)] == ["12 s", "89 s", "5 min", "3 h 20 min"]


# --------------------------------------------------------------------------------------- the plans of the studies

# (runner, its flags) -> number of runs, the start of the SHA-256 of the sorted command lines. A plan that changes on
# purpose changes here too: `RUNNER FLAGS --plan` of both versions shows what.
PLANS = {
    ("mamba_fl/run_study", "--preset gap"): (45, "8e823dd81693"),
    ("mamba_fl/run_study", "--preset gap-more"): (55, "72b089b9e34e"),
    ("mamba_fl/run_study", "--preset gap-demo"): (110, "09252450a972"),
    ("mamba_fl/run_study", "--preset source-tuned"): (9, "882d1eaf7fc0"),
    ("mamba_fl/run_study", "--preset source"): (12, "6c4d7643e591"),
    ("mamba_fl/run_study", "--preset quick"): (13, "f2620417502b"),
    ("mamba_fl/run_study", "--preset quick --only central fed_fisher --seeds 5"): (2, "cec496ec505c"),
    ("vit_sparse_fl/run_all_experiments", ""): (96, "d6f9a29f6379"),
    ("vit_sparse_fl/run_all_experiments", "--num-runs 1 --only-sparse --only-federated --seed 3"): (
        23,
        "8fa6093b10d7",
    ),
    ("vit_sparse_fl/run_all_experiments", "--quick"): (20, "eb335890ea3b"),
    ("lora_glue_fl/run_study", "--model FOLDER"): (143, "4cdbec1c6eb7"),
    ("lora_glue_fl/run_study", "--preset full --model_size base"): (540, "ac2725a531b7"),
    ("lora_glue_fl/run_study", "--preset replay --model FOLDER"): (39, "cffa25d8e7a5"),
    ("lora_glue_fl/run_study", "--preset trajectories --model FOLDER"): (85, "927abe7a3c4d"),
    ("lora_glue_fl/run_study", "--preset quick"): (25, "d4d9e83cc28c"),
    ("lora_glue_fl/run_study", "--model FOLDER --tasks mrpc rte --settings base --seeds 1"): (16, "3b5f00a11a28"),
    ("llm_noniid/run_experiments", ""): (13, "ced5e8d4733a"),
    ("llm_noniid/run_experiments", "--mode quick --model tiny --dataset demo"): (13, "f7ab8b1bdc2c"),
    ("llm_noniid/run_experiments", "--mode main --seeds 1 2"): (72, "651a66d65ca7"),
    ("llm_noniid/run_experiments", "--mode failure --mu 0.5"): (12, "ba2ebb1445ff"),
    ("llm_noniid/run_experiments", "--mode study --model models/small --amp auto"): (76, "3733cced247e"),
    ("llm_noniid/run_experiments", "--mode regimes --model models/small"): (110, "e843704fc593"),
    ("llm_noniid/run_experiments", "--mode regimes-more --model models/small"): (57, "075b09ecb527"),
    ("llm_noniid/run_experiments", "--mode study --model tiny --dataset demo --rounds 3"): (
        74,
        "23a7881cf8b5",
    ),
}


def planned(runner, line):
    """The runs that a study's runner has for a command line."""
    module = importlib.import_module(runner.replace("/", "."))
    parsed = module.parse(line.split())
    return module.plan(*(parsed if isinstance(parsed, tuple) else (parsed,)))


def flags_of(command):
    """The flags of a planned command as its own script reads them."""
    script = importlib.import_module(command[0].removesuffix(".py").replace("/", "."))
    study = command[0].split("/")[0]
    words = list(command[1:])
    if study == "mamba_fl":
        from mamba_fl.flags import complete_flags

        return complete_flags(script.build_parser().parse_args(words))
    if study == "lora_glue_fl" or "pretrain" in command[0]:
        return script.build_parser().parse_args(words)
    return importlib.import_module(f"{study}.flags").parse(script.build_parser(), words)


@pytest.mark.parametrize(("runner", "line"), PLANS)
def test_the_plan_of_a_preset_is_what_it_was_and_its_commands_are_good(runner, line):
    runs = planned(runner, line)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        args = flags_of(run.command)
        if hasattr(args, "run_name"):
            assert args.resume and args.run_name == run.name.split("/")[-1]
    text = "\n".join(sorted(shlex.join(run.command) for run in runs))
    assert (len(runs), hashlib.sha256(text.encode()).hexdigest()[:12]) == PLANS[runner, line]


def test_every_row_of_the_gap_sees_as_many_tokens_as_central_training():
    for preset, steps in (("gap", 768), ("gap-more", 768), ("gap-demo", 256), ("source-tuned", 34)):
        for run in planned("mamba_fl/run_study", f"--preset {preset} --seeds 0"):
            args = flags_of(run.command)
            sequences = args.rounds * args.local_updates * args.batch_size * (1 if "central" in run.name else 4)
            assert sequences == steps * 16 * (3 if "three" in run.name else 1), run.name
            assert 10 * args.warmup_steps == pytest.approx(args.rounds * args.local_updates, abs=10)


def test_the_study_of_llm_noniid_varies_one_factor_at_a_time_in_at_most_100_runs():
    runs = planned("llm_noniid/run_experiments", "--mode study --model models/small")
    parsed = [vars(flags_of(run.command)) for run in runs]
    assert len(parsed) <= 100
    base = next(p for p in parsed if p["algorithm"] == "fedavg" and p["partition"] == "topic_skew" and p["seed"] == 0)
    for args in parsed:
        away = {k for k, v in args.items() if v != base[k] and k not in ("seed", "run_name", "num_clusters")}
        assert len(away - {"partition"}) <= 1, away


@pytest.mark.parametrize(
    ("runner", "line", "error"),
    [
        (
            "mamba_fl/run_study",
            "--only nosuch",
            "--only nosuch: not in this preset; choose from central, keep, keep_lu1",
        ),
        ("vit_sparse_fl/run_all_experiments", "--preset rates --model tiny", "--preset rates decides --model itself"),
        ("lora_glue_fl/run_study", "--tasks mrpc wnli", "--tasks wnli: not in the preset; choose from sst2, mrpc"),
        ("llm_noniid/run_experiments", "--mode quick --algorithm fedavg", "--algorithm is set for each run by this"),
        ("llm_noniid/run_experiments", "--mode quick --run_name=x", "--run-name is set for each run by this script"),
        ("llm_noniid/run_experiments", "--mode main --participation-rate 0.2", "--participation-rate is set for each"),
    ],
)
def test_bad_usage_of_the_runners(runner, line, error):
    with pytest.raises(UsageError, match=error):
        planned(runner, line)


def test_modes_that_run_nothing_take_no_flag_of_a_run(capsys):
    from llm_noniid import run_experiments

    with pytest.raises(UsageError, match="runs nothing"):
        run_experiments.main(*run_experiments.parse(["--mode", "compare", "--batch-size", "3"]))
    for words in (["--no-such-flag", "3"], ["--alpha", "0"], ["--model"]):
        with pytest.raises(SystemExit) as stop:
            planned("llm_noniid/run_experiments", " ".join(words))
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------ with real runs


class Forked:
    """What `grid.start` gives, of a script that is forked from the tests' server: nothing is imported again."""

    def __init__(self, command, log, alone):
        self.log, self.started, self.returncode = Path(log), harness.Started(command), None

    def poll(self):
        if self.returncode is None and self.started.process.exitcode is not None:
            ended = self.started.ended()
            self.log.parent.mkdir(parents=True, exist_ok=True)
            self.log.write_text(ended.out + ended.err)
            self.returncode = ended.code
        return self.returncode


def forked_study(command):
    ended = harness.run(command, env={**grid.ONE_THREAD, CHECK: "study"})
    return ended.code, ended.err


def forked_call(command):
    ended = harness.run(command)
    print(ended.out + ended.err)
    return ended.code


def run_study(runner, line, out):
    """A runner in this process. Returns its exit code."""
    module = importlib.import_module(runner.replace("/", "."))
    words = [*line.split(), "--output-dir", str(out)]

    def main(argv):
        parsed = module.parse(argv)
        return module.main(*(parsed if isinstance(parsed, tuple) else (parsed,)))

    with pytest.raises(SystemExit) as stop:
        run_main(main, words)
    return stop.value.code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "line", "names", "table"),
    [
        ("mamba_fl/run_study", "--preset quick --only fed_avg_lu8", ["fed_avg_lu8_seed_0"], "| FedAvg"),
        (
            "vit_sparse_fl/run_all_experiments",
            "--quick --only centralized --seed 4 --classes 0:4",
            ["centralized_seed_4", "pretrain"],
            "| Central |",
        ),
        (
            "lora_glue_fl/run_study",
            "--preset quick --only sst2_tiny/central",
            ["sst2_tiny/central_seed_0"],
            "| Central LoRA |",
        ),
        (
            "llm_noniid/run_experiments",
            "--mode quick --num-rounds 1 --max-samples 120 --num-clients 4 --eval-samples 20 --only fedavg_iid",
            ["quick_fedavg_iid_demo_tiny_seed_42"],
            "| FedAvg |",
        ),
    ],
)
def test_a_small_grid_of_real_runs(runner, line, names, table, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(grid, "start", Forked)
    monkeypatch.setattr(grid, "call", forked_call)
    out, looked = tmp_path / "out", []

    def read_study(command):
        looked.append(forked_study(command))
        assert not out.exists()
        return looked[-1]

    monkeypatch.setattr(grid, "read_study", read_study)
    assert run_study(runner, line, out) == 0
    said = capfd.readouterr().out
    assert said.splitlines()[-1] == str(out) and table in said, said
    lines = lines_of(out)
    assert list(lines) == names and all(line["ended"]["how"] == "finished" for line in lines.values())
    assert all(line["curve"] and str(tmp_path) not in json.dumps(line) for line in lines.values())
    before = [(out / "output" / f"{name}.txt").stat().st_size for name in names]
    assert run_study(runner, f"{line} --plan", out) == 0
    assert [code for code, _ in looked] == [0]  # not again
    assert capfd.readouterr().out.count(": finished, took") == len(names)
    parsed = grid.run_all([run for run in planned(runner, f"{line} --output-dir {out}")], out, jobs=1)
    assert parsed == [] and [(out / "output" / f"{name}.txt").stat().st_size for name in names] == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "line", "error"),
    [
        ("mamba_fl/run_study", "--only keep_lu8 --data-root {tmp}", "keep_lu8_seed_0: no WikiText-2 under {tmp}"),
        (
            "vit_sparse_fl/run_all_experiments",
            "--preset rates --tune --data-root {tmp}",
            "pretrain_seed_3: no CIFAR-100 under {tmp}",
        ),
        ("vit_sparse_fl/run_all_experiments", "--quick --classes 5:5", "pretrain: argument --classes: '5:5'"),
        (
            "lora_glue_fl/run_study",
            "--settings dirichlet --dataset demo --model {tmp}/none",
            "central_seed_0: no model {tmp}/none",
        ),
        ("llm_noniid/run_experiments", "--mode study --dataset demo --model {tmp}/none", "no model {tmp}/none"),
        ("llm_noniid/run_experiments", "--mode quick --max-samples 3", "3 texts cannot give 10 clients"),
    ],
)
def test_a_grid_of_real_runs_ends_before_anything_is_written(runner, line, error, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(grid, "start", Forked)
    monkeypatch.setattr(grid, "read_study", forked_study)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line, error = (text.replace("{tmp}", str(tmp_path)) for text in (line, error))
    assert run_study(runner, line, tmp_path / "out") == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and error in said.err and not said.out, said
    assert not list(tmp_path.iterdir())


def test_shards_are_dealt_when_all_tasks_are_there(tmp_path, monkeypatch, capsys):
    from lora_glue_fl import glue_data

    load_task = glue_data.load_task

    def all_but_rte(task, *where, **which):
        if task == "rte":
            raise UsageError("no GLUE task rte")
        return load_task(task, *where, **which)

    monkeypatch.setattr(glue_data, "load_task", all_but_rte)
    monkeypatch.setattr(grid, "read_study", lambda command: (0, ""))
    assert run_study("lora_glue_fl/run_study", "--tasks sst2 rte --dataset demo --seeds 0", tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: no GLUE task rte\n" and not list(tmp_path.iterdir())
