"""The plots of llm_noniid, on made-up run folders: what is compared with what, the numbers drawn, the files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from noniid_folders import TOPICS, write_map, write_run, write_study

from common.cli import UsageError
from llm_noniid import flags, outcomes
from llm_noniid.detectors import DETECTORS
from plots import (
    noniid_clients,
    noniid_curves,
    noniid_drawing,
    noniid_drift,
    noniid_failure_map,
    noniid_figures,
    noniid_partition,
    noniid_runs,
    noniid_similarity,
    noniid_table,
    vit_drawing,
)

ROOT = Path(__file__).resolve().parents[1]


def parse(script, root, *words):
    out = [] if script is noniid_table else ["--out-dir", str(root / "plots")]
    return script.build_parser().parse_args(["--data-dir", str(root), *out, *words])


@pytest.fixture
def figures(monkeypatch):
    """file name -> the figure that was drawn; nothing is written."""
    seen = {}
    for module in (vit_drawing, noniid_failure_map):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: seen.setdefault(path.name, figure))
    return seen


def panels(root):
    runs, notes = noniid_runs.find_runs(root)
    return [panel for _, found in noniid_runs.figures_of(runs, notes) for panel in found]


def lines_of(axis):
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def texts_of(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


# ---- what is compared with what


def test_the_study_s_algorithms_clusters_detectors_and_rates_have_the_names_that_plots_know():
    kinds = {name for name in flags.ALGORITHMS} | {f"clusters_{name}" for name in flags.CLUSTERS if name != "none"}
    assert kinds == set(noniid_runs.KINDS)
    assert set(noniid_drawing.ALARMS) == set(DETECTORS)
    assert noniid_runs.NO_TRAINING == outcomes.START_RATE
    assert noniid_runs.COMMANDS == (outcomes.COMMAND,)


def test_every_flag_of_train_is_a_setting_or_the_method_or_neither_by_decision():
    parsed = vars(flags.build_parser("x").parse_args([]))
    method = {"client_optimizer", "batch_size", "max_length", "tokenizer", "lora_dropout", "target_modules", "amp"}
    method |= {"weight_decay", "max_grad_norm", "client_weights", "min_samples", *noniid_runs._ONLY}
    assert set(parsed) - noniid_runs._NOT_THE_METHOD == method


@pytest.mark.parametrize(
    "other",
    [{"partition": "iid"}, {"alpha": 1.0}, {"style_criterion": "formality", "partition": "style_skew"}]
    + [{"num_clients": 5}, {"participation_rate": 0.5}, {"local_steps": 7}, {"learning_rate": 1e-4}]
    + [{"num_rounds": 8}, {"max_samples": 500}, {"eval_samples": 100}, {"model": "models/big"}, {"lora_r": 4}]
    + [{"dataset": "wikitext"}, {"local_steps": 0}],
)
def test_runs_in_other_settings_are_never_in_one_panel(tmp_path, other):
    write_run(tmp_path)
    write_run(tmp_path, **other)
    assert [len(panel.curves) for panel in panels(tmp_path)] == [1, 1]


@pytest.mark.parametrize(
    "same",
    [{"output_dir": "x"}, {"mu": 0.5}, {"num_clusters": 9}, {"server_lr": 3.0}, {"local_epochs": 3.0}]
    + [{"style_criterion": "formality"}, {"threads": 4}, {"probe_samples": 0}, {"stop_on": "divergence"}],
)
def test_what_fedavg_under_topic_skew_does_not_read_makes_seeds_of_one_curve(tmp_path, same):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, **same)
    (panel,) = panels(tmp_path)
    assert [len(curve.runs) for curve in panel.curves] == [2]


def test_alpha_is_no_setting_of_other_partitions_and_mu_tells_fedprox_apart(tmp_path):
    write_run(tmp_path, partition="iid", alpha=0.1, min_samples=3)
    write_run(tmp_path, partition="iid", alpha=9.0, seed=1)
    for mu in (0.01, 0.01, 0.1):
        write_run(tmp_path, partition="iid", algorithm="fedprox", mu=mu, seed=len(list(tmp_path.iterdir())))
    (panel,) = panels(tmp_path)
    assert {c.label: len(c.runs) for c in panel.curves} == {"FedAvg": 2, "FedProx, mu 0.01": 2, "FedProx, mu 0.1": 1}
    assert panel.title == "IID"


def test_a_central_run_joins_every_partition_and_is_compared_by_client_only_in_its_own(tmp_path):
    write_run(tmp_path, algorithm="central")
    for where in ({}, {"partition": "iid"}, {"alpha": 1.0}):
        write_run(tmp_path, **where)
    found = panels(tmp_path)
    assert [panel.title for panel in found] == ["IID", "topic skew, alpha 1", "topic skew, alpha 0.1"]
    assert [[c.kind for c in panel.references] for panel in found] == [["central"]] * 3
    assert [len(noniid_runs.central_of(panel)) for panel in found] == [0, 0, 1]


def test_a_single_curve_that_a_factor_s_figure_shows_has_no_panel_of_its_own(tmp_path, figures):
    write_study(tmp_path, seeds=1)
    noniid_curves.main(parse(noniid_curves, tmp_path))
    titles = [axis.get_title() for axis in figures["noniid_curves.png"].axes]
    assert titles == ["IID", "topic skew, alpha 0.1", "style skew (length)", "token skew (frequency)"]
    names = [f"noniid_curves{last}_{factor}.png" for factor in noniid_runs.FACTORS for last in ("", "_last")]
    assert sorted(figures) == sorted(["noniid_curves.png", "noniid_curves_worst.png", *names])


def test_runs_of_a_failure_map_those_before_training_and_unfinished_ones_are_left_out(tmp_path, capsys):
    write_run(tmp_path, name="mine")
    write_run(tmp_path, name="start", learning_rate=1e-30)
    write_run(tmp_path, name="half", seed=4, status="interrupted")
    write_map(tmp_path / "map")
    write_run(tmp_path / "map", name="map_run_1_0", learning_rate=9e-4)
    runs, notes = noniid_runs.find_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["mine"]
    assert any("half" in note and "--unfinished" in note for note in notes)
    assert any("1 run of failure maps" in note for note in notes)
    assert len(noniid_runs.find_runs(tmp_path, unfinished=True)[0]) == 2


def test_a_run_whose_updates_were_all_not_finite_counts_as_diverged_in_that_round(tmp_path):
    reason = "round 13: the updates of all 6 clients are not finite: lower --learning-rate (5) or --amp off"
    folder = write_run(tmp_path, status="failed", reason=reason, losses=[5.0, 6.0, 9.0])
    write_run(tmp_path, status="failed", reason="out of memory", seed=1)
    ((run,), notes) = noniid_runs.find_runs(tmp_path)
    assert run.folder == folder and len(notes) == 1
    ((curve,),) = [panel.curves for panel in panels(tmp_path)]
    assert noniid_runs.first_alarms(curve) == {"diverged": [13]}
    assert np.isnan(curve.results("val_loss")).all()
    (folder / "metrics.jsonl").unlink()
    write_run(tmp_path, partition="iid")
    runs, notes = noniid_runs.find_runs(tmp_path)
    assert folder in [run.folder for run in runs] and not any(str(folder) in note for note in notes)
    assert [panel.curves[0].label for panel in panels(tmp_path)] == ["FedAvg", "FedAvg"]


@pytest.mark.parametrize("script", [*noniid_figures.SCRIPTS, noniid_figures, noniid_table])
def test_a_wrong_folder_or_nothing_to_show_is_a_usage_error(tmp_path, script):
    with pytest.raises(UsageError, match="not a folder"):
        script.main(parse(script, tmp_path / "nowhere"))
    write_run(tmp_path, status="failed")
    with pytest.raises(UsageError, match="no finished run of train|failure_map.json is not there"):
        script.main(parse(script, tmp_path))


@pytest.mark.parametrize(
    "script, lacking, drop",
    [(noniid_curves, "val_loss", ["val_loss", "worst_client_val_loss"]), (noniid_clients, "client_val_loss", [])]
    + [(noniid_drift, "relative_drift", []), (noniid_similarity, "update_cosines", [])],
)
def test_a_figure_names_what_the_runs_lack(tmp_path, script, lacking, drop):
    drop += [name for name, *_ in noniid_drift.MEASURES]
    write_run(tmp_path, drop=[*drop, "update_cosines", "client_val_loss", "val_topic_loss"])
    with pytest.raises(UsageError, match=lacking):
        script.main(parse(script, tmp_path))


# ---- figures


def test_every_figure_of_a_study_is_drawn_and_named(tmp_path, capsys):
    write_study(tmp_path, seeds=1)
    noniid_figures.main(parse(noniid_figures, tmp_path))
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    stems = ["curves", "curves_worst", "drift", "clients", "clients_against", "clients_topics", "similarity"]
    stems += ["similarity_last", "similarity_alpha", "failure_map_learning_rate"]
    stems += [f"partition_{what}" for what in ("topics", "divergence", "lengths", "vocabulary")]
    stems += [f"{stem}_{factor}" for stem in ("curves", "curves_last", "drift") for factor in noniid_runs.FACTORS]
    assert drawn == {f"noniid_{stem}.png" for stem in stems}
    assert "not drawn" not in capsys.readouterr().out
    assert (tmp_path / "plots/noniid_curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_show_means_with_standard_deviations_the_central_line_and_first_alarms(tmp_path, figures):
    for seed, last in enumerate((4.0, 4.4)):
        write_run(tmp_path, last, [("drifting", 12), ("slow", 20)][: 1 + seed], seed=seed)
        write_run(tmp_path, 3.9 + last - 4, algorithm="central", seed=seed)
    noniid_curves.main(parse(noniid_curves, tmp_path))
    (axis,) = figures["noniid_curves.png"].axes
    line = lines_of(axis)["FedAvg"]
    assert line.get_xdata().tolist() == list(range(4, 41, 4))
    expected = 4.2 + (5.5 - 4.2) * 0.9 ** (np.arange(4, 41, 4) - 4)
    np.testing.assert_allclose(line.get_ydata(), expected)
    band = axis.collections[0].get_paths()[0].vertices
    ends = band[band[:, 0] == 40, 1]
    sd = np.std([4.0 + 1.5 * 0.9**36, 4.4 + 1.1 * 0.9**36], ddof=1)
    np.testing.assert_allclose([ends.min(), ends.max()], [expected[-1] - sd, expected[-1] + sd])
    central = lines_of(axis)["Central, last round"].get_ydata()[0]
    assert central == pytest.approx(np.mean([3.9 + 1.6 * 0.9**36, 4.3 + 1.2 * 0.9**36]))
    assert texts_of(axis) == ["\u25cf Dr", "\u25cf Sl 1/2"]
    mark = [text for text in axis.texts if text.get_text()][1]
    assert mark.xy == (20, pytest.approx(expected[4]))
    about = figures["noniid_curves.png"].get_suptitle().replace("\n", " ")
    assert "mean of 2 seeds, bands: standard deviation" in about and "ag_news, 2,000 texts, small" in about
    assert "first alarms: Dr drifting, Sl slow" in about
    assert axis.get_ylabel() == "Validation loss (nats)" and axis.get_xlabel() == "Round"


def test_the_central_line_stands_by_the_worst_client_only_in_its_own_partition(tmp_path, figures):
    write_run(tmp_path, algorithm="central")
    for partition in ("iid", "topic_skew"):
        write_run(tmp_path, partition=partition)
    noniid_curves.main(parse(noniid_curves, tmp_path))
    there = {
        name: ["Central, last round" in lines_of(axis) for axis in figures[name].axes]
        for name in ("noniid_curves.png", "noniid_curves_worst.png")
    }
    assert there == {"noniid_curves.png": [True, True], "noniid_curves_worst.png": [False, True]}


def test_a_diverging_curve_does_not_press_the_others_together(tmp_path, figures):
    for rate in (1e-4, 1e-3, 3e-3):
        write_run(tmp_path, learning_rate=rate)
    wild = [5.5, 6, 20, 50, 80, 90, 90, 90, 90, 90]
    write_run(tmp_path, 90.0, [("diverged", 12)], losses=[float(x) for x in wild], learning_rate=0.1)
    noniid_curves.main(parse(noniid_curves, tmp_path))
    figure = figures["noniid_curves_learning_rate.png"]
    (axis,) = figure.axes
    low, high = axis.get_ylim()
    assert 3.5 < low < 4.1 and 6 < high < 9
    assert "the curve leaves the axis" in figure.get_suptitle()
    (arrow,) = [text for text in axis.texts if text.arrow_patch is not None and text.anncoords == "data"]
    crossing = 8 + 4 * (high - 6) / 14
    np.testing.assert_allclose(np.array(arrow.xy, dtype=float), [crossing, high])
    assert list(lines_of(axis)) == ["lr 0.0001", "lr 0.001", "lr 0.003", "lr 0.1"]
    (last,) = figures["noniid_curves_last_learning_rate.png"].axes
    assert last.get_yscale() == "log"
    (bar,) = last.containers
    np.testing.assert_allclose(bar.lines[0].get_ydata()[[0, 3]].astype(float), [4 + 1.5 * 0.9**36, 90])


def test_a_loss_that_is_not_finite_is_said_where_it_cannot_be_drawn(tmp_path, figures):
    write_run(tmp_path, participation_rate=1.0)
    write_run(tmp_path, participation_rate=0.5, losses=[5.0] * 9 + ["nan"])
    noniid_curves.main(parse(noniid_curves, tmp_path))
    (axis,) = figures["noniid_curves_last_participation.png"].axes
    assert texts_of(axis) == ["not\nfinite"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["participation 1", "participation 0.5"]
    assert len(axis.containers[0].lines[0].get_xdata()) == 1


def test_algorithms_look_the_same_in_every_figure_and_unlike_each_other_in_grey(tmp_path, figures):
    for algorithm in flags.ALGORITHMS:
        write_run(tmp_path, algorithm=algorithm)
    for cluster in ("updates", "labels"):
        write_run(tmp_path, cluster=cluster)
    noniid_curves.main(parse(noniid_curves, tmp_path))
    noniid_drift.main(parse(noniid_drift, tmp_path))
    looks = {}
    for name in ("noniid_curves.png", "noniid_curves_worst.png", "noniid_drift.png"):
        for label, line in lines_of(figures[name].axes[0]).items():
            look = line.get_linestyle(), line.get_marker(), line.get_color()
            assert looks.setdefault(label, look) == look
    federated = {label: look for label, look in looks.items() if label in noniid_runs.KINDS.values()}
    assert len(federated) == 9 and len({look[1] for look in federated.values()}) == 9


def test_drift_has_a_row_per_measure_and_the_line_of_orthogonal_updates(tmp_path, figures):
    for partition in ("iid", "topic_skew"):
        for seed in range(2):
            write_run(tmp_path, partition=partition, seed=seed)
        write_run(tmp_path, algorithm="central", partition=partition)
        write_run(tmp_path, algorithm="local", partition=partition)
    noniid_drift.main(parse(noniid_drift, tmp_path))
    axes = np.array(figures["noniid_drift.png"].axes).reshape(4, 2)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == [label for _, label, *_ in noniid_drift.MEASURES]
    assert [axis.get_title() for axis in axes[0]] == ["IID", "topic skew, alpha 0.1"]
    lines = [lines_of(axis) for axis in axes[:, 1]]
    np.testing.assert_allclose(lines[0]["FedAvg"].get_ydata()[0], 1 + 4 / 20 + 0.05)
    orthogonal = [line["orthogonal updates"].get_ydata()[0] for line in lines[:3]]
    np.testing.assert_allclose(orthogonal, [np.sqrt(5), 1, 1 / np.sqrt(6)])
    assert all(list(line)[0] == "FedAvg" and "Local only" not in line for line in lines)


def test_clients_stand_by_main_topic_and_the_cosines_move_with_them(tmp_path, figures):
    folder = write_run(tmp_path, participation_rate=0.9)
    (run,), _ = noniid_runs.find_runs(tmp_path)
    cosines, ids, blocks = noniid_similarity.picture(run, 0)
    assert len(ids) == 5, "one of six clients stays away in each round"
    facts = json.loads((folder / "partition.json").read_text())
    main = [np.argmax(facts["label_histograms"][k]) for k in ids]
    assert main == sorted(main) and [name for name, *_ in blocks] == [TOPICS[c] for c in sorted(set(main))]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    at = [row["clients"].index(k) for k in ids]
    np.testing.assert_array_equal(cosines, np.array(row["update_cosines"])[np.ix_(at, at)])
    noniid_similarity.main(parse(noniid_similarity, tmp_path))
    axis = figures["noniid_similarity.png"].axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [str(k) for k in ids]
    assert "round 4" in axis.get_title() and "round 40" in figures["noniid_similarity_last.png"].axes[0].get_title()
    assert axis.images[0].get_array().mask.diagonal().all()


def test_clients_that_were_drawn_for_the_comparison_have_their_own_names(tmp_path):
    folder = write_run(tmp_path, partition="style_skew")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    some = {"compared": [1, 4], "update_cosines": [[1.0, 0.3], [0.3, 1.0]]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | some) + "\n" for line in lines))
    (run,), _ = noniid_runs.find_runs(tmp_path)
    assert noniid_similarity.picture(run, 0)[1] == [1, 4]


def test_clients_of_other_partitions_stand_by_id(tmp_path):
    write_run(tmp_path, partition="style_skew")
    (run,), _ = noniid_runs.find_runs(tmp_path)
    _, ids, blocks = noniid_similarity.picture(run, 0)
    assert ids == list(range(6)) and blocks == []


def test_partitions_are_drawn_once_each_with_topics_divergence_lengths_and_vocabulary(tmp_path, figures):
    for seed in (3, 1):
        for where in ({"partition": "iid"}, {}, {"algorithm": "scaffold", "learning_rate": 1e-2}):
            write_run(tmp_path, seed=seed, **where)
    noniid_partition.main(parse(noniid_partition, tmp_path))
    topics = figures["noniid_partition_topics.png"].axes
    assert [axis.get_title() for axis in topics[:2]] == ["IID\n(seed 1)", "topic skew, alpha 0.1\n(seed 1)"]
    assert texts_of(topics[1])[:3] == ["60", "70", "5"]
    shares = topics[1].images[0].get_array()
    np.testing.assert_allclose(shares[1].compressed(), [100 * 70 / 75, 100 * 5 / 75])
    above = figures["noniid_partition_divergence.png"].axes[0]
    drawn = {(line.get_label(), float(np.round(line.get_xdata().mean()))): line.get_ydata() for line in above.lines}
    np.testing.assert_allclose(drawn["a client", 1.0], 0.4 + 0.02 * np.arange(6))
    np.testing.assert_allclose(drawn["a random part of its size", 1.0], 0.002 + 0.001 * np.arange(6))
    assert above.get_ylabel().endswith("(bits)")
    assert figures["noniid_partition_lengths.png"].axes[0].get_ylabel() == "Tokens of a text"
    overlap = figures["noniid_partition_vocabulary.png"].axes[0]
    assert overlap.images[0].get_array().mask.diagonal().all() and "mean 28 %" in overlap.get_title()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"label_histograms": [[1, 2]]}', '{"label_histograms": [[1], [2]], "counts": [1]}']
)
def test_a_damaged_partition_is_named(tmp_path, text):
    folder = write_run(tmp_path)
    (folder / "partition.json").write_text(text)
    with pytest.raises(UsageError, match="partition.json is damaged"):
        noniid_partition.main(parse(noniid_partition, tmp_path))


def test_each_client_is_compared_with_itself_under_fedavg_with_the_same_seed(tmp_path, figures):
    for seed, (base, clustered) in enumerate(((4.0, 3.8), (4.6, 4.5))):
        flat = {"losses": [base] * 10, "seed": seed}
        write_run(tmp_path, base, **flat)
        write_run(tmp_path, clustered, losses=[clustered] * 10, seed=seed, cluster="updates")
    write_run(tmp_path, 1.0, losses=[1.0] * 10, seed=9, cluster="updates")
    noniid_clients.main(parse(noniid_clients, tmp_path))
    (axis,) = figures["noniid_clients_against.png"].axes
    dots = lines_of(axis)["a client"].get_ydata()
    np.testing.assert_allclose(sorted(dots), [-0.2] * 6 + [-0.1] * 6)
    (bar,) = axis.containers
    low, high = bar.lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose([bar.lines[0].get_ydata()[0], (high - low) / 2], [-0.15, np.std([-0.2, -0.1], ddof=1)])
    assert texts_of(axis) == ["100 %"]
    (own,) = figures["noniid_clients.png"].axes
    worst = [c.lines[0].get_ydata()[0] for c in own.containers if c.get_label() == "worst client"]
    np.testing.assert_allclose(worst[0], np.mean([4.0, 4.6]) + 5 / 20)


def test_topics_have_their_losses_and_names(tmp_path, figures):
    write_run(tmp_path, losses=[4.0] * 10)
    noniid_clients.main(parse(noniid_clients, tmp_path))
    (axis,) = figures["noniid_clients_topics.png"].axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == list(TOPICS)
    np.testing.assert_allclose(axis.containers[0].lines[0].get_ydata(), 4 + np.arange(4) / 10)


def test_a_failure_map_shows_its_points_by_verdict_brackets_and_open_ends(tmp_path, figures):
    write_map(tmp_path / "a")
    write_map(tmp_path / "b", "scaffold")
    write_map(tmp_path / "c", axis="local_steps")
    noniid_failure_map.main(parse(noniid_failure_map, tmp_path))
    assert sorted(figures) == [f"noniid_failure_map_{name}.png" for name in ("learning_rate", "local_steps")]
    figure = figures["noniid_failure_map_learning_rate.png"]
    assert [axis.get_title() for axis in figure.axes] == ["FedAvg (13 runs)", "SCAFFOLD (13 runs)"]
    axis = figure.axes[0]
    lines = lines_of(axis)
    assert len(lines["works"].get_xdata()) == 6 and len(lines["fails"].get_xdata()) == 7
    assert lines["works"].get_marker() != lines["fails"].get_marker()
    np.testing.assert_allclose(lines["boundary"].get_xdata(), [0.1, 1, 100])
    np.testing.assert_allclose(lines["boundary"].get_ydata(), np.sqrt(0.98) * np.array([1e-3, 4e-3, 8e-3]))
    (arrow,) = axis.texts
    assert arrow.xyann == (0.01, 1e-3) and arrow.xy[1] < 1e-3, "without a value that works the boundary is below"
    assert axis.get_xscale() == axis.get_yscale() == "log" and axis.get_ylabel() == "Learning rate"
    assert "10 clients" in figure.get_suptitle() and "seed 0" in figure.get_suptitle()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"points": [{"alpha": 0, "value": 1, "failed": true}]}', '{"points": []}']
)
def test_a_damaged_failure_map_is_named(tmp_path, text):
    (tmp_path / "failure_map.json").write_text(text)
    with pytest.raises(UsageError, match="failure_map.json is damaged"):
        noniid_failure_map.main(parse(noniid_failure_map, tmp_path))


# ---- table


def test_the_table_has_means_spreads_paired_differences_and_alarms(tmp_path, capsys):
    for seed, last in enumerate((4.0, 4.4)):
        write_run(tmp_path, losses=[6.0] * 9 + [last], alarms=[("slow", 20)][seed:], seed=seed)
        write_run(tmp_path, losses=[6.0] * 9 + [last - 0.1 - 0.1 * seed], algorithm="scaffold", seed=seed)
        write_run(tmp_path, losses=[6.0] * 9 + [last], partition="iid", seed=seed)
    noniid_table.main(parse(noniid_table, tmp_path, "--markdown", "--target", "4.1"))
    out = capsys.readouterr().out
    head, *rows = [[c.strip() for c in line.strip("| ").split("|")] for line in out.splitlines() if line[:1] == "|"]
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows[1:]}
    assert list(cells) == ["FedAvg", "FedAvg, IID", "SCAFFOLD"]
    assert cells["FedAvg"]["val loss"] == "4.200 +- 0.283" and cells["FedAvg"]["vs FedAvg"] == "-"
    assert cells["SCAFFOLD"]["vs FedAvg"] == "-0.150 +- 0.071", "of the same partition, seed by seed"
    assert cells["FedAvg"]["alarms"] == "slow 1/2" and cells["SCAFFOLD"]["alarms"] == "-"
    assert cells["FedAvg"]["worst client"] == "4.450 +- 0.283"
    assert cells["FedAvg"]["to 4.1"] == ">40", "one seed never had it"
    noniid_table.main(parse(noniid_table, tmp_path, "--target", "6"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FedAvg")]
    assert len(rows) == 2 and all(line.endswith(" 4.0 +- 0.0") for line in rows), "the first evaluation"
    assert "small, 6 clients, alpha 0.1, participation 1, 5 local steps, lr 0.001, 40 rounds" in out
    assert "Unless said otherwise: topic skew." in out


def test_a_script_exits_with_2_and_one_line_that_says_what_to_run(tmp_path):
    write_run(tmp_path, drop=["update_cosines"])
    command = [sys.executable, str(ROOT / "plots/noniid_similarity.py"), "--data_dir", str(tmp_path)]
    done = subprocess.run(command + ["--out_dir", str(tmp_path / "plots")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "update_cosines" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "plots").exists()
