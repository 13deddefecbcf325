"""The rows of llm_noniid's regimes: they parse, have one budget, and differ from the base in what they say."""

import pytest
from test_grid import flags_of, planned

from llm_noniid import regimes

ROWS = [*regimes.regimes(), *regimes.more()]


@pytest.fixture(scope="module")
def runs():
    """{setting: (its `Setting`, the flags of one of its runs)} of both presets."""
    modes = ("regimes", "regimes-more")
    both = [run for mode in modes for run in planned("llm_noniid/run_experiments", f"--mode {mode} --model small")]
    return {run.setting.name: (run.setting, flags_of(run.command)) for run in both}


def test_every_row_is_there_once(runs):
    assert list(runs) == [row.name for row in ROWS] and len(runs) == len(ROWS)


def test_as_many_runs_as_is_said():
    for rows, said in ((regimes.regimes(), "164 runs"), (regimes.more(), "84")):
        rows = list(rows)
        count = sum(row.seeds + sum(map(len, row.tune.values())) for row in rows)
        assert said.split()[0] == str(count) and f" {said}" in regimes.__doc__


def test_every_client_makes_as_many_steps_of_as_many_texts(runs):
    for name, (row, args) in runs.items():
        steps = args.num_rounds * args.local_steps
        if args.algorithm == "central":
            assert 10 * steps * args.batch_size == 10 * regimes.STEPS * 8, name
            assert 10 * steps == (regimes.STEPS if name == "central_steps" else 10 * regimes.STEPS)
        else:
            assert args.batch_size == 8, name
            share = 0.3 if "participation" in name else 1
            times = 3 if share < 1 or row.group == "longer" else 1
            assert args.participation_rate == share and steps == times * regimes.STEPS, name
        evaluations = args.num_rounds // args.eval_every
        wanted = 20 if row.group == "watched" else 2 if args.local_steps == 100 else 4
        assert evaluations == wanted and args.num_clients == 10, name


def test_rows_are_the_base_but_for_what_they_are_about(runs):
    base = vars(runs["fedavg_h50_alpha_0.3"][1])
    assert (base["sizes"], base["target"], base["train"], base["alpha"]) == ("equal", "label", "full", 0.3)
    for name, (_, args) in runs.items():
        away = {key for key, value in vars(args).items() if value != base[key]}
        away -= {"seed", "run_name", "num_rounds", "eval_every", "notes", "given", "argv"}
        iid = {"partition", "alpha", "sizes"} if args.partition == "iid" else set()
        sgd = {"learning_rate"} if any(word in name for word in ("sgd", "lora", "_lr_")) else set()
        lora = {"lora_dropout"} if "lora" in name else set()
        ends = {"local_steps", "batch_size", "threads"} if args.algorithm == "central" else {"server_lr"}
        assert len(away - iid - sgd - lora - ends - {"num_clusters", "drift_samples"}) <= 2, (name, away)


def test_every_skewed_cell_of_the_map_and_every_comparison_has_its_control(runs):
    for name, (row, _) in runs.items():
        if row.group in ("map", "lora") or name.startswith(("participation", "sgd")):
            assert f"{name.split('_alpha')[0].removesuffix('_iid')}_iid" in runs


def test_rates_are_three_by_factors_of_three_around_the_rows_own_or_anothers(runs):
    for name, (row, args) in runs.items():
        grid = dict(row.tune)
        if row.tuned_as:
            other, taken = runs[row.tuned_as]
            assert taken.local_steps == args.local_steps and ("learning-rate" in other.tune or other.tuned_as)
            assert grid == regimes.SECOND.get(args.algorithm, {}), name
        elif "_lr_" in name:
            assert not grid and args.learning_rate == float(name.rpartition("_")[2])
        else:
            low, middle, high = grid.pop("learning-rate")
            assert middle == args.learning_rate and 2.9 < middle / low < 3.4 and 2.9 < high / middle < 3.4, name
            assert not grid and args.algorithm not in regimes.SECOND, name
        assert not row.objective, name
