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


def test_every_client_makes_as_many_steps_of_as_many_texts(runs):
    for name, (_, args) in runs.items():
        if args.algorithm == "central":
            steps = args.num_rounds * args.local_steps * args.num_clients
            assert steps * args.batch_size == 10 * regimes.STEPS * 8, name
            assert steps == (regimes.STEPS if name == "central_steps" else 10 * regimes.STEPS)
        else:
            assert (args.num_rounds * args.local_steps, args.batch_size) == (regimes.STEPS, 8), name
        assert args.num_rounds / args.eval_every == min(12, args.num_rounds), name
        assert args.num_clients == 10 and args.participation_rate == (0.3 if "participation" in name else 1), name


def test_rows_are_the_base_but_for_what_they_are_about(runs):
    base = vars(runs["fedavg_h50_alpha_0.03"][1])
    assert (base["sizes"], base["target"], base["train"], base["alpha"]) == ("equal", "label", "full", 0.03)
    for name, (_, args) in runs.items():
        away = {key for key, value in vars(args).items() if value != base[key]}
        away -= {"seed", "run_name", "num_rounds", "eval_every", "notes", "given", "argv"}
        iid = {"partition", "alpha", "sizes"} if args.partition == "iid" else set()
        sgd = {"learning_rate"} if "sgd" in name or "lora" in name else set()
        ends = {"local_steps", "batch_size", "threads"} if args.algorithm == "central" else {"server_lr"}
        assert len(away - iid - sgd - ends - {"num_clusters"}) <= 2, (name, away)


def test_every_skewed_cell_of_the_map_and_every_repair_has_its_control(runs):
    for name, (row, args) in runs.items():
        if row.group in ("map", "lora") and args.partition == "topic_skew":
            assert f"{name.split('_alpha')[0]}_iid" in runs
    assert {f"{name}_h50_iid" for name in regimes.REPAIRS} <= runs.keys()


def test_rates_are_three_by_factors_of_three_around_the_rows_own(runs):
    for name, (row, args) in runs.items():
        grid = {flag.replace("-", "_"): values for flag, values in row.tune.items()}
        low, middle, high = grid.pop("learning_rate")
        assert middle == args.learning_rate and 2.9 < middle / low < 3.4 and 2.9 < high / middle < 3.4, name
        assert grid.keys() == {flag.replace("-", "_") for flag in regimes.REPAIRS.get(args.algorithm, ())}, name
        of_clients = args.cluster != "none" or args.algorithm == "local"
        assert row.objective == (regimes.MEAN_CLIENT if of_clients else ""), name
