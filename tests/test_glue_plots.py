"""The plots of lora_glue_fl, on made-up run folders: what is compared with what, the numbers drawn, the files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from glue_folders import CENTRAL, FULL, parse, write_run, write_study

from common.before.lowrank import RULES
from common.cli import UsageError
from lora_glue_fl.glue_tasks import TASKS
from plots import (
    glue_bytes,
    glue_clients,
    glue_drawing,
    glue_error,
    glue_figures,
    glue_metric,
    glue_runs,
    glue_table,
    vit_drawing,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def figures(monkeypatch):
    """file name -> the figure that was drawn; nothing is written."""
    seen = {}
    monkeypatch.setattr(vit_drawing, "save_figure", lambda figure, path: seen.setdefault(path.name, figure))
    return seen


def panels(root, **kwargs):
    runs, notes = glue_runs.find_runs(root)
    return [panel for _, found in glue_runs.figures_of(runs, notes, **kwargs) for panel in found]


def lines_of(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


# ---- what is compared with what


def test_names_of_rules_tasks_and_metrics_are_those_of_the_study():
    assert set(glue_runs.RULES) == set(RULES)
    assert set(glue_runs.TASKS) == set(TASKS)
    assert {name: glue_runs.headline(name) for name in TASKS} == {n: task.metrics[0] for n, task in TASKS.items()}
    assert {metric for task in TASKS.values() for metric in task.metrics} <= set(glue_runs.METRICS)


@pytest.mark.parametrize(
    "other",
    [{"task_name": "mrpc"}, {"model": "elsewhere/bert"}, {"model_size": "large"}, {"lora_r": 8}, {"lora_alpha": 4.0}]
    + [{"rounds": 5}, {"local_epochs": 2.0}, {"data": {"clients": 9}}, {"data": {"mode": "dirichlet"}}]
    + [{"data": {"sha256": {"train": "other"}}}, {"data": {"examples": [20] * 3}}, {"data": {"dataset": "demo"}}]
    + [{"client_ranks": [2, 4], "data": {"ranks": [2, 4, 2]}}],
)
def test_runs_in_other_settings_are_never_in_one_panel(tmp_path, other):
    write_run(tmp_path)
    write_run(tmp_path, **other)
    assert [len(panel.curves) for panel in panels(tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    "same",
    [{"shard_dir": "elsewhere"}, {"eval_batch_size": 7}, {"server_lr": 0.1}, {"output_dir": "x"}, {"threads": 3}]
    + [{"save_clients": False}, {"data": {"source": "hub", "shard_seed": 9}}, {"lora_alpha": 8}],
)
def test_what_does_not_change_the_method_makes_seeds_of_one_curve(tmp_path, same):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, **same)
    (panel,) = panels(tmp_path)
    assert [len(curve.runs) for curve in panel.curves] == [2]


def test_only_svd_reads_its_split_and_rank_and_skip_svd_is_naive(tmp_path):
    write_run(tmp_path, seed=0, aggregate="naive")
    write_run(tmp_path, seed=1, skip_svd=True, svd_rank=2, svd_split="balanced")
    for seed, split in enumerate(("us", "us", "balanced")):
        write_run(tmp_path, seed=seed, svd_split=split)
    write_run(tmp_path, seed=5, svd_rank=2)
    (panel,) = panels(tmp_path)
    found = {curve.label: len(curve.runs) for curve in panel.curves}
    svd = "SVD (FlexLoRA)"
    assert found == {
        svd: 2,
        f"{svd}, served at rank 2": 1,
        f"{svd}, balanced split": 1,
        "Naive (FedIT)": 2,
    }


def test_what_only_some_runs_switch_on_is_in_their_labels(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, mu=0.01)
    (panel,) = panels(tmp_path)
    names = ["SVD (FlexLoRA)", "SVD (FlexLoRA), FedProx 0.01"]
    assert [curve.label for curve in panel.curves] == names
    for rule in ("naive", "ffa"):
        write_run(tmp_path, aggregate=rule)
    write_run(tmp_path, aggregate="naive", server_optimizer="momentum", server_beta=0.9)
    (panel,) = panels(tmp_path)
    names += ["Naive (FedIT)", "Naive (FedIT), server momentum", "FFA-LoRA"]
    assert [curve.label for curve in panel.curves] == names


def test_central_runs_join_every_federation_on_their_data_and_full_ones_every_rank(tmp_path):
    write_run(tmp_path, CENTRAL)
    write_run(tmp_path, CENTRAL, data={"examples": 40})
    write_run(tmp_path, FULL)
    write_run(tmp_path)
    write_run(tmp_path, data={"mode": "dirichlet", "dirichlet_alpha": 0.5})
    write_run(tmp_path, lora_r=8, lora_alpha=16.0)
    found = {(p.title, p.setting["rank"]): [c.kind for c in p.references] for p in panels(tmp_path)}
    both = ["central", "full"]
    assert found == {
        ("RTE, 3 clients, IID", 4): both,
        ("RTE, 3 clients, Dirichlet 0.5", 4): both,
        ("RTE, 3 clients, IID", 8): ["full"],
    }


def test_titles_say_more_only_where_two_panels_would_be_called_the_same(tmp_path):
    write_run(tmp_path, rounds=3)
    write_run(tmp_path, rounds=9)
    write_run(tmp_path, task_name="cola", data={"mode": "category_overlap", "overlap_ratio": 0.2})
    names = ["RTE, 3 clients, IID, 3 rounds", "RTE, 3 clients, IID, 9 rounds"]
    assert [p.title for p in panels(tmp_path)] == [*names, "CoLA, 3 clients, category overlap 0.2, 3 rounds"]


def test_of_two_runs_with_one_seed_the_later_counts_and_the_other_is_named(tmp_path, capsys):
    for name, written_at in (("a", 2_000), ("b", 1_000)):
        os.utime(write_run(tmp_path, name=name) / "metrics.jsonl", (written_at, written_at))
    glue_table.main(parse(glue_table, tmp_path))
    assert f"left out {tmp_path / 'b'}" in capsys.readouterr().out


@pytest.mark.parametrize("script", [*glue_figures.SCRIPTS, glue_figures, glue_table])
def test_a_wrong_folder_or_nothing_to_show_is_a_usage_error(tmp_path, script):
    with pytest.raises(UsageError, match="not a folder"):
        script.main(parse(script, tmp_path / "nowhere"))
    write_run(tmp_path, status="failed")
    with pytest.raises(UsageError, match="no finished run of fedavg_rounds, main_glue_lora, baseline_run"):
        script.main(parse(script, tmp_path))
    write_run(tmp_path)
    with pytest.raises(UsageError, match="no run of --tasks qqp in .*: there are rte"):
        script.main(parse(script, tmp_path, "--tasks", "qqp"))


@pytest.mark.parametrize(
    "script, lacking",
    [(glue_metric, "--eval-each-round"), (glue_bytes, "bytes_up"), (glue_clients, "--eval-clients")]
    + [(glue_error, "aggregation_error")],
)
def test_a_figure_names_what_the_runs_lack(tmp_path, script, lacking):
    drop = ["val_accuracy", "bytes_up", "bytes_down", "client_val_accuracy", "aggregation_error"]
    write_run(tmp_path, drop=drop)
    with pytest.raises(UsageError, match=lacking):
        script.main(parse(script, tmp_path))


# ---- figures


def test_every_figure_of_a_study_is_drawn_and_named(tmp_path, capsys):
    write_study(tmp_path, seeds=1)
    glue_figures.main(parse(glue_figures, tmp_path))
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    stems = ["bytes_both", "bytes_up", "clients", "clients_rounds", "error_rounds", "metric"]
    names = [f"{stem}{more}.png" for stem in stems for more in ("", "_rank_8_lora_alpha_16")]
    assert drawn == sorted([*names, "error_clients.png", "error_rank.png"])
    assert "not drawn" not in capsys.readouterr().out
    assert (tmp_path / "plots" / drawn[0]).read_bytes().startswith(b"\x89PNG")


def test_metric_shows_means_with_standard_deviations_at_evaluated_rounds_and_the_central_line(tmp_path, figures):
    write_study(tmp_path)
    glue_metric.main(parse(glue_metric, tmp_path))
    figure = figures["metric.png"]
    titles = ["RTE, 3 clients, IID", "RTE, 3 clients, Dirichlet 0.5", "RTE, 20 clients, IID", "CoLA, 3 clients, IID"]
    assert [axis.get_title() for axis in figure.axes if axis.axison] == titles
    axis = figure.axes[0]
    svd = lines_of(axis)["SVD (FlexLoRA)"]
    assert svd.get_xdata().tolist() == [1, 3], "no gap and no value at the round without evaluation"
    np.testing.assert_allclose(svd.get_ydata(), [52, 62])
    sd = 100 * np.std([0.60, 0.64], ddof=1)
    band = next(c.get_paths()[0].vertices[:, 1] for c in axis.collections)
    np.testing.assert_allclose([band.min(), band.max()], [52 - sd, 62 + sd])
    assert lines_of(axis)["Central LoRA"].get_ydata()[0] == pytest.approx(71)
    (span,) = [patch for patch in axis.patches if patch.get_alpha() == 0.13]
    central_sd = 100 * np.std([0.70, 0.72], ddof=1)
    np.testing.assert_allclose([span.get_y(), span.get_height()], [71 - central_sd, 2 * central_sd])
    assert axis.get_ylabel() == "Accuracy (%)" and axis.get_xlabel() == "Round"
    assert figure.axes[3].get_ylabel() == "Matthews correlation (x 100)"
    assert "mean of 2 seeds, bands: standard deviation" in figure.get_suptitle()
    assert "glue, roberta-base, r 4, alpha 8, 3 rounds, 1 local epoch" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "Central LoRA"


def test_rules_look_the_same_in_every_figure_and_unlike_each_other_in_grey(tmp_path, figures):
    write_study(tmp_path)
    glue_metric.main(parse(glue_metric, tmp_path))
    write_run(tmp_path, lora_r=8, lora_alpha=16.0, aggregate="naive", mu=0.1, value=0.3, seed=7)
    glue_bytes.main(parse(glue_bytes, tmp_path))
    looks = {}
    for figure in (figures["metric.png"], figures["bytes_up_rank_8_lora_alpha_16.png"]):
        for name, line in lines_of(figure.axes[0]).items():
            look = line.get_linestyle(), line.get_marker(), line.get_color()
            assert looks.setdefault(name, look) == look
    rules = {name: look for name, look in looks.items() if not name.startswith("Central")}
    assert len(rules) == 7 and "Naive (FedIT), FedProx 0.1" in rules
    assert len({look[:2] for look in rules.values()}) == 7


def test_a_panel_says_its_seeds_where_they_differ(tmp_path, figures):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1)
    write_run(tmp_path, task_name="cola")
    glue_metric.main(parse(glue_metric, tmp_path))
    titles = [axis.get_title() for axis in figures["metric.png"].axes]
    assert titles == ["RTE, 3 clients, IID (2 seeds)", "CoLA, 3 clients, IID (1 seed)"]


def test_error_over_rounds_is_in_percent_and_exact_rules_share_one_line(tmp_path, figures):
    write_study(tmp_path)
    glue_error.main(parse(glue_error, tmp_path))
    figure = figures["error_rounds.png"]
    lines = lines_of(figure.axes[0])
    assert list(lines) == ["SVD (FlexLoRA)", "Naive (FedIT)", "Exact rules, see above"]
    np.testing.assert_allclose(lines["SVD (FlexLoRA)"].get_ydata(), [18, 20, 22])
    assert "exact (error at most 1e-05 %): FFA-LoRA, Stack (FLoRA), Residual" in figure.get_suptitle().replace(
        "\n", " "
    )
    assert "Exact rules, see above" not in lines_of(figure.axes[1]), "none of them ran with Dirichlet shards"


@pytest.mark.parametrize("value", [0.02, "nan"])
def test_a_rule_that_is_not_exact_once_is_not_called_so(tmp_path, figures, value):
    for seed in range(2):
        folder = write_run(tmp_path, aggregate="ffa", seed=seed)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1]["aggregation_error"] = value
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    glue_error.main(parse(glue_error, tmp_path))
    assert list(lines_of(figures["error_rounds.png"].axes[0])) == ["FFA-LoRA"]


def test_error_against_clients_and_rank_is_the_mean_of_rounds_at_named_places(tmp_path, figures):
    write_study(tmp_path)
    for seed in range(2):
        write_run(tmp_path, seed=seed, aggregate="naive", lora_r=16, lora_alpha=32.0)
    glue_error.main(parse(glue_error, tmp_path))
    (clients,) = figures["error_clients.png"].axes
    assert clients.get_title() == "RTE, IID" and clients.get_xlabel() == "Clients"
    assert [tick.get_text() for tick in clients.get_xticklabels()] == ["3", "20"]
    (rank,) = figures["error_rank.png"].axes
    ticks = [tick.get_text() for tick in rank.get_xticklabels()]
    assert ticks == ["4\n(alpha 8)", "8\n(alpha 16)", "16\n(alpha 32)"]
    lines = {container.get_label(): container.lines[0] for container in rank.containers}
    np.testing.assert_allclose(lines["SVD (FlexLoRA)"].get_xydata()[:, 1], [20, 20])
    np.testing.assert_allclose(lines["Naive (FedIT)"].get_xydata()[:, 1], [50, 50, 50])
    assert np.round(lines["Naive (FedIT)"].get_xydata()[:, 0]).tolist() == [0, 1, 2]


def test_bytes_are_megabytes_so_far_and_the_axis_is_logarithmic_only_where_it_helps(tmp_path, figures):
    write_run(tmp_path)
    folder = write_run(tmp_path, aggregate="stack")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | {"bytes_down": 50_000_000 * line["round"]}) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    glue_bytes.main(parse(glue_bytes, tmp_path))
    (up,), (both,) = figures["bytes_up.png"].axes, figures["bytes_both.png"].axes
    assert lines_of(up)["Stack (FLoRA)"].get_xdata().tolist() == [1, 3] and up.get_xscale() == "linear"
    assert lines_of(both)["SVD (FlexLoRA)"].get_xdata().tolist() == [4, 12]
    assert lines_of(both)["Stack (FLoRA)"].get_xdata().tolist() == [51, 153] and both.get_xscale() == "log"
    assert up.get_xlabel() == "Sent by clients (MB)" and both.get_xlabel() == "Sent up and down (MB)"


def test_clients_of_all_seeds_stand_beside_the_global_model(tmp_path, figures):
    for seed, value in enumerate((0.5, 0.6)):
        write_run(tmp_path, value=value, seed=seed)
    write_run(tmp_path, aggregate="naive", drop=["client_val_accuracy"])
    glue_clients.main(parse(glue_clients, tmp_path))
    (axis,) = figures["clients.png"].axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["SVD"], "the other has no clients' metric"
    dots = lines_of(axis)["a client's own model"].get_ydata()
    np.testing.assert_allclose(sorted(dots), [46, 48, 56, 58])
    (bar,) = axis.containers
    assert bar.get_label() == "SVD (FlexLoRA), global"
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose([bar.lines[0].get_ydata()[0], (high - low) / 2], [55, 100 * np.std([0.5, 0.6], ddof=1)])
    gains = lines_of(figures["clients_rounds.png"].axes[0])["SVD (FlexLoRA)"]
    np.testing.assert_allclose([gains.get_xdata(), gains.get_ydata()], [[1, 3], [3, 3]])


def test_a_script_exits_with_2_and_one_line_that_says_what_to_run(tmp_path):
    write_run(tmp_path, drop=["client_val_accuracy"])
    command = [sys.executable, str(ROOT / "plots/glue_clients.py"), "--data_dir", str(tmp_path)]
    done = subprocess.run(command + ["--out_dir", str(tmp_path / "plots")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--eval-clients" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_panels_make_a_grid_of_tasks_and_federations_where_that_leaves_few_gaps(tmp_path):
    for task in ("rte", "mrpc"):
        for mode in ({}, {"mode": "dirichlet", "dirichlet_alpha": 0.5}):
            write_run(tmp_path, task_name=task, data=mode)
    found = panels(tmp_path)
    figure, axes = glue_drawing.panel_axes(found)
    places = [axis.get_subplotspec().get_geometry()[:3] for axis in axes]
    assert places == [(2, 2, i) for i in range(4)]
    figure, axes = glue_drawing.panel_axes(found[:3][::2] + found[3:])
    assert [axis.get_subplotspec().get_geometry()[:3] for axis in axes] == [(2, 2, 0), (2, 2, 2), (2, 2, 3)]
    figure, axes = glue_drawing.panel_axes([found[0], found[3]])
    assert [axis.get_subplotspec().get_geometry()[:3] for axis in axes] == [(1, 2, 0), (1, 2, 1)]
