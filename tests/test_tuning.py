"""--tune: the search by hand, then the runner on a script of a few lines whose loss is known."""

import importlib
import json
import math
from dataclasses import replace

import pytest

from common import grid, tuning
from common.cli import RunFailed, UsageError
from common.grid import Preset, Setting

# ------------------------------------------------------------------------------------------------ the search


def searched(loss, grids, higher=False):
    """(what `tuning.search` returns, the points that it asked for, batch by batch)."""
    search, points = tuning.search(grids, higher), []
    try:
        points.append(next(search))
        while True:
            points.append(search.send([loss(**point) for point in points[-1]]))
    except StopIteration as stop:
        return stop.value, points


def steps_from(best):
    """A loss of lr: the number of doublings that it is away from the best."""
    return lambda lr: abs(math.log2(lr / best))


def test_a_best_in_the_middle_ends_the_search():
    found, points = searched(steps_from(2), {"lr": [1, 2, 4]})
    assert found == {"lr": {"best": 2, "edge": False, "tried": {"1": 1.0, "2": 0.0, "4": 1.0}}}
    assert points == [[{"lr": 1}, {"lr": 2}, {"lr": 4}]]
    assert searched(lambda lr: -steps_from(2)(lr), {"lr": [1, 2, 4]}, higher=True) == (
        {"lr": {"best": 2, "edge": False, "tried": {"1": -1.0, "2": -0.0, "4": -1.0}}},
        points,
    )


@pytest.mark.parametrize(
    ("at", "more", "best", "edge"),
    [
        (9, [8, 16], 8, False),
        (0.5, [0.5, 0.25], 0.5, False),
        (1000, [8, 16, 32], 32, True),
        (1e-3, [0.5, 0.25, 0.125], 0.125, True),
    ],
)
def test_a_best_at_the_edge_extends_the_grid_three_times_at_most(at, more, best, edge):
    found, points = searched(steps_from(at), {"lr": [1, 2, 4]})
    assert points[1:] == [[{"lr": x}] for x in more]
    assert (found["lr"]["best"], found["lr"]["edge"]) == (best, edge)


def test_the_ratio_is_that_of_the_last_two_and_values_have_six_digits():
    _, points = searched(steps_from(7), {"lr": [0.01, 1, 3]})
    assert points[1:] == [[{"lr": 9}], [{"lr": 27}]]
    _, points = searched(steps_from(9), {"lr": [1, 3, 7]})
    assert points[1:] == [[{"lr": 16.3333}]]


def test_what_diverged_or_is_refused_is_worse_than_any_loss():
    found, points = searched(lambda lr: "diverged" if lr > 2 else 1e9, {"lr": [2, 4]})
    assert found["lr"]["tried"] == {"0.25": 1e9, "0.5": 1e9, "1": 1e9, "2": 1e9, "4": "diverged"}
    found, points = searched(lambda m: "refused" if m > 1 else 1 - m, {"m": [0.25, 0.5, 1]})
    assert found["m"] == {"best": 1, "edge": False, "tried": {"0.25": 0.75, "0.5": 0.5, "1": 0, "2": "refused"}}
    found, points = searched(lambda lr, b=0: "diverged", {"lr": [1, 2], "b": [3, 4]})
    assert found == {
        "lr": {"best": None, "edge": True, "tried": dict.fromkeys(("0.125", "0.25", "0.5", "1", "2"), "diverged")}
    }


def test_two_flags_one_after_the_other():
    def loss(lr, b=1):
        return steps_from(2)(lr) + steps_from(8)(b) + (b == 8) * (lr == 1) * -100  # what is not looked at

    found, points = searched(loss, {"lr": [1, 2, 4], "b": [4, 8, 16]})
    assert points[1] == [{"lr": 2, "b": 4}, {"lr": 2, "b": 8}, {"lr": 2, "b": 16}]
    assert {flag: one["best"] for flag, one in found.items()} == {"lr": 2, "b": 8}


# ------------------------------------------------------------------------------------------------ the runner

SCRIPT = """
import json, math, pathlib, sys
from common.early import stop_if_checked
words = sys.argv[1:-1]
flags = {**dict(zip(words[::2], words[1::2]))}               # the last one wins
if float(flags["--share"]) > 1:
    sys.stderr.write("error: --share above 1\\n")
    sys.exit(2)
stop_if_checked("flags")
stop_if_checked("study")
print("started", flush=True)
folder = pathlib.Path(flags["--output-dir"], flags["--run-name"])
folder.mkdir(parents=True)
lr, best, share = (float(flags[name]) for name in ("--lr", "--best", "--share"))
kind = flags["--kind"]
made = {"command": "fake", "argv": sys.argv, "args": {"lr": lr}, "data": {}, "results": None}
loss = abs(math.log2(lr / best)) + (1 - share)
rows = [{"round": 1, "val_loss": -5.0, "seconds": 30}, {"round": 2, "val_loss": loss, "mine": lr, "seconds": 60}]
end = {"status": "finished"}
if kind == "fragile" and lr > best:
    reason = "round 1: the updates of all clients are not finite: lower --lr"
    end = {"status": "failed", "ended": {"how": "failed", "by": "left_out", "reason": reason}}
if kind == "nan" and lr > best:
    rows[-1]["val_loss"] = "nan"
if kind == "loses" and lr > best:
    rows[-1] |= {"val_loss": -9.0, "left_out_updates": 1}
if kind == "full" and lr > best:
    end = {"status": "failed", "ended": {"how": "failed", "by": None, "reason": "no space left"}}
if kind == "early" and lr > best:                            # it breaks before its first line
    end = {"status": "failed", "ended": {"how": "failed", "by": "left_out", "reason": "not finite"}}
else:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(folder / "run.json").write_text(json.dumps(made | end))
sys.exit(end["status"] == "failed")
"""


def settings(**bests):
    """{kind: its best rate} as settings."""
    return tuple(Setting(kind, "fake.py", ("--kind", kind, "--best", best)) for kind, best in bests.items())


@pytest.fixture
def study(tmp_path, monkeypatch):
    """study(settings, line): a runner's command line. Returns its exit code."""
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    (tmp_path / "fake.py").write_text(SCRIPT)

    def run(settings, line="", shared=("--lr", 64, "--share", 0.5), **more):
        presets = {"p": Preset(shared, settings, seeds=(0, 1), **more)}
        args = grid.build_parser("x", presets, "p", "x").parse_args([*line.split(), "--output-dir", f"{tmp_path}/out"])
        grid.complete(args, presets)
        chosen = grid.select(settings, args.only)
        return tuning.run_study(args, presets["p"], grid.expand(chosen, shared, args.seeds, args.output_dir))

    return run


def logs(out):
    return {
        path.relative_to(out / "output").as_posix(): path.read_text().count("started") for path in out.rglob("*.txt")
    }


def rates(out):
    """{folder: its last --lr and --share} of the runs below `out`."""
    found = {}
    for path in out.rglob("run.json"):
        words = json.loads(path.read_text())["argv"]
        flags = dict(zip(words[1:-1:2], words[2::2], strict=True))
        found[path.parent.relative_to(out).as_posix()] = (flags["--lr"], flags["--share"])
    return found


def test_rates_are_found_for_each_setting_and_the_runs_take_them(study, tmp_path, capsys):
    out, two = tmp_path / "out", settings(sure=2, fragile=4)
    line = "--jobs 4 --tune lr 1 2 --tune share 0.25 0.5"
    assert study(two, f"{line} --plan") == 0 and not out.exists()
    said = capsys.readouterr().out
    assert said.count("python fake.py") == 4 and "# 8 runs, and at most 24 more where a best is at an edge" in said
    assert study(two, line) == 0
    said = capsys.readouterr().out
    assert "| sure | lr | 1: 1.5000, 2: 0.5000, 4: 1.5000 | 2 | 6 | 6.0 |" in said
    assert "| fragile | lr | 1: 2.5000, 2: 1.5000, 4: 0.5000, 8: diverged | 4 | 7 | 7.0 |" in said
    assert "| sure | share | 0.25: 0.7500, 0.5: 0.5000, 1: 0.0000, 2: refused | 1 | | |" in said
    assert "13 runs, 13.0 minutes" in said and said.splitlines()[-1] == f"{out}/tuned.json"
    tuned = json.loads((out / "tuned.json").read_text())
    assert tuned["fragile"]["lr"] == {
        **{"best": 4, "edge": False, "tried": {"1": 2.5, "2": 1.5, "4": 0.5, "8": "diverged"}},
        **{"objective": "val_loss", "seed": 100},
        "words": "fake.py --lr 64 --share 0.5 --kind fragile --best 4",
    }
    names = [json.loads(one)["name"] for one in (out / "tuning" / "results.jsonl").read_text().splitlines()]
    assert len(names) == 13 and "sure_seed_100_lr_2_share_0.25" in names

    # a second call starts nothing
    before = logs(out)
    assert set(before.values()) == {1} and "tuning/sure_seed_100_lr_4.txt" in before
    assert study(two, line) == 0 and logs(out) == before and capsys.readouterr().out.count("| 6 | 6.0 |") == 1
    assert json.loads((out / "tuned.json").read_text()) == tuned

    # the ordinary runs
    assert study(two, "--plan") == 0
    assert "--kind sure --best 2 --lr 2 --share 1 --seed 1 --output-dir" in capsys.readouterr().out
    assert study(two, "--jobs 4") == 0
    own = {name: line for name, line in rates(out).items() if "tuning" not in name}
    expected = {"sure": ("2", "1"), "fragile": ("4", "1")}
    assert own == {f"{kind}_seed_{seed}": line for kind, line in expected.items() for seed in (0, 1)}
    names = [json.loads(one)["name"] for one in (out / "results.jsonl").read_text().splitlines()]
    assert names == sorted(own)
    with pytest.raises(UsageError, match="--seeds 100: .*tuned.json tuned --lr of sure on it: drop it"):
        study(two, "--seeds 100")

    # another setting is not the one that was tuned; where it is, flags of the machine do not matter
    with pytest.raises(
        UsageError, match=r"sure was tuned with other flags \(--best 2; now --best 3\): run it with --tune"
    ):
        study(settings(sure=3))
    assert study(settings(sure=3), "--plan --tuned none") == 0 and study(two, f"--plan --tuned {out}/tuned.json") == 0
    assert study(two, "--plan", shared=("--data-root", "/x", "--lr", 64, "--share", 0.5)) == 0
    capsys.readouterr()
    (out / "tuned.json").rename(tmp_path / "committed.json")
    assert study(two, "--plan", tuned="committed.json") == 0 and capsys.readouterr().out.count("--lr 4 --share 1") == 2
    (out / "tuned.json").write_text('{"sure": {"lr": 3}}')
    with pytest.raises(UsageError, match="tuned.json is damaged: delete it and run with --tune again"):
        study(two)
    with pytest.raises(UsageError, match="none.json: No such file"):
        study(two, "--tuned none.json")


def test_settings_have_grids_of_their_own(study, tmp_path, capsys):
    one, other = settings(sure=2, fragile=4)
    mine = Setting(one.name, one.script, one.words, tune={"lr": (1.0, 2, 4e0)})
    with pytest.raises(UsageError, match="none of these settings has values of its own: give --tune FLAG X1 X2"):
        study((one, other), "--tune")
    with pytest.raises(UsageError, match="sure has no tuned --lr: give --tune first, or --tuned none"):
        study((mine, other))
    assert study((mine, other), "--tune --jobs 3") == 0
    assert list(json.loads((tmp_path / "out" / "tuned.json").read_text())) == ["sure"]
    assert study((mine, other), "--tune lr 4 8 --only fragile --jobs 2") == 0
    tuned = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert {name: row["lr"]["best"] for name, row in tuned.items()} == {"sure": 2, "fragile": 4}


def test_a_setting_has_an_objective_of_its_own(study, tmp_path, capsys):
    one, other = settings(sure=2, fragile=2)
    assert study((replace(one, objective="mine"), other), "--tune lr 1 2 4 --jobs 3") == 0
    tuned = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert [tuned[name]["lr"]["objective"] for name in ("sure", "fragile")] == ["mine", "val_loss"]
    assert (tuned["sure"]["lr"]["best"], tuned["fragile"]["lr"]["best"]) == (0.125, 2)
    assert "| sure (mine) | lr | 0.125: 0.1250" in capsys.readouterr().out


def test_a_setting_takes_what_another_was_tuned_to(study, tmp_path, capsys):
    sure, fragile = settings(sure=2, fragile=4)
    sure = replace(sure, tune={"lr": (1, 2, 4)})
    both = replace(fragile, tuned_as="sure", tune={"share": (0.25, 0.5)})
    all_of_it = replace(fragile, name="same", tuned_as="sure")
    with pytest.raises(UsageError, match="fragile takes what sure is tuned to: --tune that first, or too"):
        study((both,), "--tune")
    with pytest.raises(UsageError, match="same takes what sure is tuned to: --tune that first, or --tuned none"):
        study((all_of_it,))
    assert study((both, all_of_it, sure), "--tune --jobs 3") == 0
    shares = {name: line for name, line in rates(tmp_path / "out").items() if "fragile" in name}
    assert {line[0] for line in shares.values()} == {"2"} and len(
        shares
    ) == 3  # 1 at the edge, then 2, which is refused
    assert study((both, all_of_it, sure), "--jobs 3") == 0
    runs = {name.split("_")[0]: line for name, line in rates(tmp_path / "out").items() if "tuning" not in name}
    assert runs == {"sure": ("2", "0.5"), "same": ("2", "0.5"), "fragile": ("2", "1")}
    with pytest.raises(UsageError, match="--seeds 100: .*tuned.json tuned --lr of same on it"):
        study((all_of_it,), "--seeds 100")


def test_a_rate_at_which_an_update_is_left_out_or_which_breaks_at_once_is_not_taken(study, tmp_path):
    assert study(settings(loses=4, early=4), "--tune lr 2 4 8") == 0
    for row in json.loads((tmp_path / "out" / "tuned.json").read_text()).values():
        assert row["lr"]["best"] == 4 and row["lr"]["tried"] == {"2": 1.5, "4": 0.5, "8": "diverged"}


def test_a_run_that_failed_is_no_run_that_diverged(study, tmp_path, capsys):
    with pytest.raises(RunFailed, match=r"1 runs did not finish \(tuning/full_seed_100_lr_4\): see"):
        study(settings(full=2), "--tune lr 1 2 4 --jobs 3")
    assert not (tmp_path / "out" / "tuned.json").exists()
    with pytest.raises(RunFailed, match="diverged at every value: nan: give lower ones"):
        study(settings(nan=1e-3, sure=2), "--tune lr 1 2 4 --jobs 3")
    tuned = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert list(tuned) == ["sure"] and "| nan | lr | 0.125: diverged, 0.25: diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--tune lr 1 2 --tune-seed 1", "--tune-seed 1 is one of the table's --seeds: take another"),
        ("--tune lr 1", "--tune lr 1: give a flag and at least two different numbers above 0"),
        ("--tune lr 1 1.0", "two different numbers"),
        ("--tune lr 0 1", "numbers above 0"),
        ("--tune lr 1 inf", "numbers above 0"),
        ("--tune lr 1 high", "--tune lr 1 high: give a flag"),
        ("--tune lr 1 2 --tune lr 3 4", "the flag is there twice"),
        ("--tune share 1 2", "tuning/sure_seed_100_share_2: --share"),
    ],
)
def test_bad_usage(study, tmp_path, line, error):
    with pytest.raises(UsageError, match=error):
        study(settings(sure=2), line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("study", ["mamba_fl", "vit_sparse_fl", "lora_glue_fl", "llm_noniid"])
def test_no_preset_is_tuned_on_test_data(study):
    runner = {"vit_sparse_fl": "run_all_experiments", "llm_noniid": "run_experiments"}.get(study, "run_study")
    presets = importlib.import_module(f"{study}.{runner}").PRESETS
    assert all(preset.objective.startswith(("val_", "held_out_")) for preset in presets.values())
