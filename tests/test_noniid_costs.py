"""Paired differences with their intervals, what skew costs, which runs are broken, and the map of it."""

import json
import math

import numpy as np
import pytest
from noniid_made import made_args, write_regimes
from plotting import figures, texts_of, ticks
from plotting import tables as printed_tables
from scipy import stats

from plots.noniid_costs import cells_of, has_diverged
from plots.noniid_runs import STUDY
from plots.runs import read_runs
from plots.seeds import interval


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_interval_is_that_of_a_paired_t_test(n):
    a, b = np.random.default_rng(n).standard_normal((2, n))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert interval(a - b) == pytest.approx(tuple(expected), rel=1e-12)
    assert interval(np.full(n, 0.5)) == (0.5, 0.5) and np.isnan(interval(np.array([0.5]))).all()


def by_place(path, name="val_loss"):
    """{(algorithm, local work, alpha): Cell} of a log, and the notes."""
    runs, notes = read_runs([path], STUDY)
    found = [cell for *_, cells in cells_of(runs, notes, name) for cell in cells]
    return {(c.curve.kind, c.curve.args["local"], c.curve.args["alpha"]): c for c in found}, list(map(str, notes))


def test_a_cost_is_paired_by_seed_at_other_learning_rates_and_broken_above_two_deviations_of_iid(tmp_path):
    """IID's losses 0.50, 0.51, 0.52 have a deviation of 0.01: the margin is 0.02."""
    means = {100.0: 0.0, 1.0: 0.019, 0.1: 0.021}
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, seed: means[alpha] + 0.004 * (seed - 1))
    cells, _ = by_place(log)
    assert len(cells) == 2 * 3
    for (_, local, alpha), cell in cells.items():
        assert cell.control.args["local"] == local and cell.control.args["partition"] == "IID"
        assert cell.control.runs[0].args["learning_rate"] != cell.curve.runs[0].args["learning_rate"]
        assert cell.margin == pytest.approx(0.02) and cell.level == pytest.approx(0.51) and not cell.diverged
        assert cell.costs == pytest.approx({seed: means[alpha] + 0.004 * (seed - 1) for seed in range(3)})
        assert cell.broken == (alpha == 0.1)
        broken = {run.seed: is_broken for run, is_broken in cell.broken_runs()}
        assert broken == {seed: cost > 0.02 for seed, cost in cell.costs.items()}
    cells, _ = by_place(log, "val_accuracy")  # its opposite: lower is worse
    assert cells["fedavg", "4 local steps", 0.1].mean == pytest.approx(0.021 / 4)


def test_diverged_runs_are_broken_and_no_part_of_the_mean(tmp_path):
    ends = {0: 0.01, 1: math.inf, 2: 2.0}  # the last ends above the loss before training
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, seed: ends[seed] if alpha == 0.1 else 0.0)
    cell = by_place(log)[0]["fedavg", "32 local steps", 0.1]
    assert cell.costs == pytest.approx({0: 0.01}) and [run.seed for run in cell.diverged] == [1, 2]
    assert cell.broken and [(run.seed, broken) for run, broken in cell.broken_runs()] == [
        (0, False),
        (1, True),
        (2, True),
    ]


def test_an_alarm_does_not_make_a_run_broken_but_its_end_does(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.0, seeds=1, alphas=(1.0,))
    run = read_runs([log], STUDY)[0][0]
    run.rows[2]["alarms"] = [{"detector": "diverged", "round": 2}]
    assert not has_diverged(run)
    for end in ({"how": "stopped", "by": "diverged"}, {"how": "failed", "by": "left_out"}):
        run.ended.update(end)
        assert has_diverged(run)


def test_one_seed_has_no_margin_and_a_setting_without_its_control_no_cost(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.1 / place[2], seeds=1, alphas=(0.1, 1.0), steps=(4,))
    ends, one = (by_place(log)[0]["fedavg", "4 local steps", alpha] for alpha in (0.1, 1.0))
    assert math.isnan(ends.margin) and ends.broken and has_diverged(ends.curve.runs[0])  # 1.5 from 1.4
    assert one.mean == pytest.approx(0.1) and one.broken is None and one.broken_runs() == []
    lines = log.read_text().splitlines()
    log.write_text("\n".join(line for line in lines if '"iid"' not in line))
    cells, notes = by_place(log)
    assert not cells and any("no run under IID" in note for note in notes)


def test_of_several_rates_that_with_most_seeds_counts_then_the_one_with_the_lowest_loss(tmp_path):
    def line(seed, rate, loss, **place):
        args = made_args(seed=seed, learning_rate=rate, num_rounds=1, **place)
        rows = [{"round": t, "val_loss": value} for t, value in enumerate((9.0, loss))]
        return json.dumps({"name": f"{rate}_{seed}", "args": args, "curve": rows, "command": "train"})

    iid, skew = {"partition": "iid"}, {"partition": "topic_skew", "alpha": 0.1}
    lines = [line(9, 0.5, 1.0, **iid), line(9, 0.6, 1.0, **skew)]  # the seed of tuning
    for seed in range(3):
        lines += [line(seed, 0.1, 3.0 + seed, **iid), line(seed, 0.2, 2.0 + seed, **iid)]
        lines += [line(seed, 0.3, 4.0 + seed, **skew), line(seed, 0.4, 7.0, **skew)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    (cell,), notes = (
        list(part.values()) if isinstance(part, dict) else part for part in by_place(tmp_path / "log.jsonl")
    )
    assert cell.curve.runs[0].args["learning_rate"] == 0.3 and cell.control.runs[0].args["learning_rate"] == 0.2
    assert cell.costs == {0: 2, 1: 2, 2: 2} and sum("another learning rate" in note for note in notes) == 4


def test_the_table_of_differences_counts_pairs_that_are_finite(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, s: math.inf if s == 2 else 0.1, alphas=(0.1,))
    ((_, rows),) = printed_tables("table noniid", log, "--against iid --fields val_loss val_accuracy")
    cells = {row["val loss vs IID"] for row in rows.values()}
    assert cells == {"-", "+0.100 [+0.100, +0.100], 2 of 3"}
    ((_, rows),) = printed_tables("table noniid", log, "--against fedavg")
    assert {row["val loss vs FedAvg"] for row in rows.values()} == {"-"}


def test_the_map_has_the_numbers_the_boundary_and_the_diverged(tmp_path):
    """Two panels; FedAvg is broken at alpha 0.1, with 32 steps from 1 on, where a seed diverged at 0.1."""

    def cost(algorithm, steps, alpha, seed):
        if algorithm == "scaffold" or alpha == 100:
            return -0.002
        return math.inf if (steps, alpha, seed) == (32, 0.1, 2) else 0.001 * steps / alpha

    log = write_regimes(tmp_path / "log.jsonl", cost, algorithms=("fedavg", "scaffold"))
    drawn = figures("noniid cost_map", log, out=tmp_path / "plots")
    assert sorted(drawn) == ["noniid_cost_map.png", "noniid_cost_map_accuracy.png"]
    figure = drawn["noniid_cost_map.png"]
    fedavg, scaffold, bar = figure.axes
    assert fedavg.get_title() == "FedAvg, 128 steps a client" and bar.get_ylabel().endswith("(nats a token)")
    assert ticks(fedavg.xaxis) == ["IID", "100", "1", "0.1"] and ticks(fedavg.yaxis) == ["32", "4"]
    at = {text.get_position(): text.get_text() for text in fedavg.texts}
    assert at[1, 0] == "-0.002" and at[2, 0] == "+0.032" and at[3, 0] == "+0.320\n1/3 div." and at[3, 1] == "+0.040"
    assert at[0, 0] == "0.510\n± 0.020" and "+0.004" == at[2, 1]
    lines = {tuple(zip(*line.get_data(), strict=True)) for line in fedavg.lines}
    assert lines == {((1.5, -0.5), (1.5, 0.5)), ((1.5, 0.5), (2.5, 0.5)), ((2.5, 0.5), (2.5, 1.5))}
    assert [patch.get_xy() for patch in fedavg.patches] == [(2.5, -0.5)] and fedavg.patches[0].get_hatch()
    assert not scaffold.lines and not scaffold.patches and len(texts_of(scaffold)) == 8
    accuracy = drawn["noniid_cost_map_accuracy.png"].axes[0]
    assert "+0.8" in texts_of(accuracy) and "2 standard deviations" in figure.get_suptitle()


def test_equal_sizes_have_panels_of_their_own_and_the_same_control(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.01)
    equal = [line for line in log.read_text().splitlines() if '"topic_skew"' in line]
    with log.open("a") as file:
        file.writelines(line.replace('"sizes": "dirichlet"', '"sizes": "equal"') + "\n" for line in equal)
    *panels, _ = figures("noniid cost_map", log, out=tmp_path / "plots")["noniid_cost_map.png"].axes
    assert {axis.get_title() for axis in panels} == {
        "FedAvg, topic skew, 128 steps a client",
        "FedAvg, topic skew (equal sizes), 128 steps a client",
    }
    assert all(texts_of(axis).count("+0.010") == 6 for axis in panels)
