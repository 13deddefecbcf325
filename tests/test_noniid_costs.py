"""Paired differences with their intervals, what skew costs, which runs are broken, and the map of it."""

import json
import math

import numpy as np
import pytest
from noniid_made import made_args, write_regimes
from plotting import figures, lines_of, texts_of, ticks
from plotting import tables as printed_tables
from scipy import stats

from plots.noniid_costs import cells_of, has_diverged, no_better, noise
from plots.noniid_runs import STUDY, prior
from plots.runs import read_runs
from plots.seeds import interval


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_interval_is_that_of_a_paired_t_test(n):
    a, b = np.random.default_rng(n).standard_normal((2, n))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert interval(a - b) == pytest.approx(tuple(expected), rel=1e-12)
    assert interval(np.full(n, 0.5)) == (0.5, 0.5) and np.isnan(interval(np.array([0.5]))).all()


def by_place(path):
    """{(algorithm, local work, alpha): Cell} of a log, and the notes."""
    runs, notes = read_runs([path], STUDY)
    found = [cell for *_, cells in cells_of(runs, notes) for cell in cells]
    return {(c.curve.kind, c.curve.args["local"], c.curve.args["alpha"]): c for c in found}, list(map(str, notes))


@pytest.mark.parametrize("target, field", [("label", "val_accuracy"), ("text", "val_loss")])
def test_a_cell_is_broken_above_the_threshold_where_the_paired_interval_excludes_0(target, field, tmp_path):
    """At other learning rates, and mu, than its control; 3 pairs 0.06 +- 0.03 have the interval [-0.014, 0.134]."""
    at = {100.0: (0.049, 0.0), 1.0: (0.06, 0.03), 0.1: (0.051, 0.001)}
    cost = {alpha: [mean + d * seed for seed in (-1, 0, 1)] for alpha, (mean, d) in at.items()}
    made = {"algorithms": ("fedprox",), "target": target}
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, seed: cost[alpha][seed], **made)
    cells, _ = by_place(log)
    assert len(cells) == 2 * 3
    for (_, local, alpha), cell in cells.items():
        assert cell.control.args["local"] == local and cell.control.args["partition"] == "IID" and not cell.diverged
        mine, base = cell.curve.runs[0].args, cell.control.runs[0].args
        assert mine["learning_rate"] != base["learning_rate"] and mine["mu"] != base["mu"]
        assert cell.costs() == cell.costs(field) == pytest.approx(dict(enumerate(cost[alpha])))
        assert cell.broken is {100.0: False, 1.0: None, 0.1: True}[alpha]  # 0.06 with 0 in its interval: not decided
        assert {run.seed: broken for run, broken in cell.broken_runs()} == {
            seed: value > 0.05 for seed, value in cell.costs().items()
        }
    assert noise(list(cells.values()), field) == pytest.approx(math.sqrt((0.03**2 + 0.001**2) / 3))
    assert math.isnan(noise([], field))
    cells, _ = by_place(write_regimes(tmp_path / "two.jsonl", lambda *place: 0.3, seeds=2, **made))
    assert all(c.broken is None and c.costs() == pytest.approx({0: 0.3, 1: 0.3}) for c in cells.values())


@pytest.mark.parametrize("target", ["label", "text"])
def test_diverged_runs_are_broken_and_no_part_of_the_mean(target, tmp_path):
    """A last loss above that before training is one of texts; of labels, which begin at 7 nats, accuracy decides."""
    ends = {0: 0.01, 1: math.inf, 2: 8.0}
    made = {"target": target}
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, s: ends[s] if alpha == 0.1 else 0.0, **made)
    cell = by_place(log)[0]["fedavg", "32 local steps", 0.1]
    assert cell.costs() == pytest.approx({0: 0.01} | ({2: 0.7} if target == "label" else {}))
    assert [run.seed for run in cell.diverged] == ([1] if target == "label" else [1, 2]) and cell.broken
    assert sorted((run.seed, broken) for run, broken in cell.broken_runs()) == [(0, False), (1, True), (2, True)]


def test_no_detector_makes_a_run_broken_and_what_an_alarm_may_end_is_left_out(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.0, seeds=1, alphas=(1.0,))
    run = read_runs([log], STUDY)[0][0]
    run.rows[2]["alarms"] = [{"detector": "diverged", "round": 2}]
    run.ended.update({"how": "stopped", "by": "diverged"})
    assert not has_diverged(run)
    run.ended.update({"how": "failed", "by": "left_out"})
    assert has_diverged(run)
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.0, stop_on="any")
    cells, notes = by_place(log)
    assert not cells and sum("--stop-on" in note for note in notes) == 2 * 4 * 3


def test_a_setting_without_its_control_has_no_cost(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.1, seeds=1)
    lines = log.read_text().splitlines()
    log.write_text("\n".join(line for line in lines if '"iid"' not in line))
    cells, notes = by_place(log)
    assert not cells and any("no run under IID" in note for note in notes)


def test_at_chance_is_an_accuracy_within_a_standard_error_of_one_topic_in_four(tmp_path):
    """Of 300 texts 0.025, of the 75 that there are 0.05; the loss is at the prior from ln 4 on."""
    accuracy = {100.0: 0.2751, 1.0: 0.2749, 0.1: 0.1}
    made = {"seeds": 1, "steps": (4,)}
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, s: 0.9 - accuracy[alpha], **made)
    cells, _ = by_place(log)
    assert {c.curve.args["alpha"]: no_better(c.curve, "val_accuracy") for c in cells.values()} == {
        100.0: False,
        1.0: True,
        0.1: True,
    }
    curve = cells["fedavg", "4 local steps", 100.0].curve
    assert not no_better(curve, "val_loss")
    curve.runs[0].data["counts"] = {"validation": 75}
    assert no_better(curve, "val_accuracy")
    curve.runs[0].rows[-1]["val_loss"] = math.log(4)
    assert no_better(curve, "val_loss") and prior(curve.runs[0]) == {"val_loss": math.log(4), "val_accuracy": 0.25}
    text = write_regimes(tmp_path / "text.jsonl", lambda *place: 0.8, target="text", **made)
    assert not prior(read_runs([text], STUDY)[0][0])


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
    assert cell.costs() == {0: 2, 1: 2, 2: 2} and sum("another learning rate" in note for note in notes) == 4


def test_the_table_of_differences_counts_pairs_that_are_finite(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda a, h, alpha, s: math.inf if s == 2 else 0.1, alphas=(0.1,))
    ((_, rows),) = printed_tables("table noniid", log, "--against iid --fields val_loss")
    cells = {row["val loss vs IID"] for row in rows.values()}
    assert cells == {"-", "+0.100 [+0.100, +0.100], 2 of 3"}
    ((_, rows),) = printed_tables("table noniid", log, "--against fedavg")
    assert {row["val loss vs FedAvg"] for row in rows.values()} == {"-"}


def test_personal_layers_are_compared_with_plain_fedavg_and_are_nobodys_baseline(tmp_path):
    def line(seed, loss, **more):
        args = made_args(seed=seed, num_rounds=1, partition="topic_skew", alpha=0.1, **more)
        rows = [{"round": t, "val_loss": value} for t, value in enumerate((9.0, loss))]
        return json.dumps({"name": f"{loss}_{seed}", "args": args, "curve": rows, "command": "train"})

    lines = []
    for seed in range(3):
        lines += [line(seed, 3.0 + seed, learning_rate=0.1), line(seed, 2.0 + seed, learning_rate=0.2, personal="last")]
        lines += [line(seed, 5.0 + seed, learning_rate=0.2, algorithm="local")]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    ((_, rows),) = printed_tables("table noniid", tmp_path / "log.jsonl", "--against fedavg")
    cells = {row["val loss"]: row["val loss vs FedAvg"].partition(" ")[0] for row in rows.values()}
    assert cells == {"4.000 ± 1.000": "-", "3.000 ± 1.000": "-1.000", "6.000 ± 1.000": "+2.000"}


def test_the_map_has_the_numbers_the_boundary_the_diverged_and_chance(tmp_path):
    """FedAvg is broken at alpha 0.1, with 32 steps from 1 on, where a seed diverged at 0.1; FedProx is at chance."""

    costs = {(32, 1.0): 0.064, (4, 1.0): 0.008, (32, 0.1): 0.5005, (4, 0.1): 0.08}

    def cost(algorithm, steps, alpha, seed):
        if algorithm == "fedprox":
            return 0.65 - 0.01 * seed
        if (steps, alpha, seed) == (32, 0.1, 2):
            return math.inf
        return costs[steps, alpha] + 0.001 * (seed - 1) if alpha < 100 else -0.002

    log = write_regimes(tmp_path / "log.jsonl", cost, algorithms=("fedavg", "fedprox"))
    drawn = figures("noniid cost_map", log, out=tmp_path / "plots")
    assert sorted(drawn) == ["noniid_cost_map.png", "noniid_cost_map_loss.png"]
    figure = drawn["noniid_cost_map.png"]
    fedavg, fedprox, bar = figure.axes
    assert fedavg.get_title() == "FedAvg, 128 steps a client" and bar.get_ylabel().endswith("accuracy (points)")
    assert ticks(fedavg.xaxis) == ["IID", "100", "1", "0.1"] and ticks(fedavg.yaxis) == ["32", "4"]
    at = {text.get_position(): text.get_text() for text in fedavg.texts}
    assert at[1, 0] == "-0.2" and at[2, 0] == "+6.4" and at[3, 0] == "+50.0\n1/3 div." and at[3, 1] == "+8.0"
    assert at[0, 0] == "89.0" and "+0.8" == at[2, 1]
    lines = {tuple(zip(*line.get_data(), strict=True)) for line in fedavg.lines}
    assert lines == {((1.5, -0.5), (1.5, 0.5)), ((1.5, 0.5), (2.5, 0.5)), ((2.5, 0.5), (2.5, 1.5))}
    assert [patch.get_xy() for patch in fedavg.patches] == [(2.5, -0.5)] and fedavg.patches[0].get_hatch()
    assert len(fedprox.lines) == 2 and not fedprox.patches and texts_of(fedprox).count("+64.0\nchance") == 6
    about = " ".join(figure.get_suptitle().split())
    for words in ("accuracy worse by over 5 points", "(12 cells)", "label prior: 1.39 nats a text, 25 %"):
        assert words in about
    assert "pooled over cells: 0.72 points" in about  # sqrt((6 x 2 x 1 + 3 x 2 x 0.01 + 0.005) / 23)
    loss = drawn["noniid_cost_map_loss.png"].axes[0]  # the same verdicts
    assert "+0.064" in texts_of(loss) and {tuple(zip(*line.get_data(), strict=True)) for line in loss.lines} == lines


def test_equal_sizes_have_panels_of_their_own_and_the_same_control(tmp_path):
    log = write_regimes(tmp_path / "log.jsonl", lambda *place: 0.01, seeds=2)
    equal = [line for line in log.read_text().splitlines() if '"topic_skew"' in line]
    with log.open("a") as file:
        file.writelines(line.replace('"sizes": "dirichlet"', '"sizes": "equal"') + "\n" for line in equal)
    *panels, _ = figures("noniid cost_map", log, out=tmp_path / "plots")["noniid_cost_map.png"].axes
    assert {axis.get_title() for axis in panels} == {
        "FedAvg, topic skew, 128 steps a client",
        "FedAvg, topic skew (equal sizes), 128 steps a client",
    }
    assert all(texts_of(axis).count("+1.0\nnot decided") == 6 and not axis.lines for axis in panels)


def test_corrections_stand_beside_the_drift_and_its_chance_level_in_figure_and_table(tmp_path):
    place = {"steps": (4,), "alphas": (0.1,), "client_optimizer": "adamw"}
    log = write_regimes(
        tmp_path / "log.jsonl", lambda *cell: 0.5, algorithms=("fedavg", "scaffold", "fedprox"), **place
    )
    figure = figures("noniid corrections", log, out=tmp_path / "plots")["noniid_corrections.png"]
    (iid, skew), ratio = figure.axes[:2], figure.axes[-1]
    assert [axis.get_title() for axis in (iid, skew)] == ["IID", "topic skew, alpha 0.1"] and len(figure.axes) == 6
    (line,) = lines_of(skew).values()
    assert line.get_label() == "SCAFFOLD" and line.get_ydata()[2:].tolist() == pytest.approx([0.6] * 31)
    assert np.isnan(line.get_ydata()[:2]).all()  # not yet a correction
    assert lines_of(ratio).keys() == {"FedAvg", "SCAFFOLD", "chance level"}
    assert lines_of(ratio)["FedAvg"].get_ydata()[-1] == 2 + 0.5 * 33
    assert set(lines_of(ratio)["chance level"].get_ydata()) == {2}
    ((_, rows),) = printed_tables("table noniid", log, "--columns accuracy correction")
    cells = {name: (row["accuracy"], row["correction"]) for name, row in rows.items() if "IID" not in name}
    assert sorted(cells.values()) == [("39.0 ± 1.0", "-")] * 2 + [("39.0 ± 1.0", "0.60 ± 0.10")]


def test_the_prior_is_a_line_of_labels_curves_alone(tmp_path):
    for target in ("label", "text"):
        log = write_regimes(tmp_path / target / "log.jsonl", lambda *place: 0.1, target=target)
        drawn = figures("noniid curves", log, out=tmp_path / target / "plots")
        level = {"noniid_curves_accuracy.png": 0.25, "noniid_curves.png": math.log(4)}
        for file, expected in level.items():
            line = lines_of(drawn[file].axes[0]).get("label prior")
            assert (line and line.get_ydata()[0]) == (expected if target == "label" else None)
