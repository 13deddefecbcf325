"""The numbers in figures and tables, computed by hand from runs with known values."""

import json
import subprocess
import sys

import numpy as np
import pytest
from fixed_runs import CENTRAL, LORA, SPARSE, change, change_rows, vit_study, write_glue, write_mamba, write_vit
from noniid_folders import write_run as write_noniid
from plotting import ROOT, figures, lines_of, table, tables, texts_of, ticks
from scipy.stats import ttest_1samp

from common import curves
from plots import vit
from plots.runs import read_runs
from plots.seeds import curves_of, usual_variants


def spread(values):
    return np.std(values, ddof=1)


def bars_of(axes):
    """[(x, mean, half the bar's length)] of every point with a bar, from left to right."""
    bars = []
    for container in axes.containers:
        line, _, (bar,) = container.lines
        for (x, mean), segment in zip(line.get_xydata(), bar.get_segments(), strict=True):
            bars.append((round(x, 3), mean, (segment[1, 1] - segment[0, 1]) / 2))
    return sorted(bars)


def band_at(axes, x):
    """(lowest, highest) of an axes' first band at x."""
    corners = axes.collections[0].get_paths()[0].vertices
    values = corners[corners[:, 0] == x, 1]
    return values.min(), values.max()


# ---- tables


def test_the_table_of_mamba_fl_has_mean_spread_and_the_ratio_to_central(tmp_path):
    for seed, (central, federated) in enumerate([(100.0, 130.0), (110.0, 140.0), (120.0, 150.0)]):
        for command, ppl in (("central", (300.0, central)), ("fed_avg", (100.0, federated))):
            folder = write_mamba(tmp_path, command, seed=seed, ppl=ppl)
            results = json.loads((folder / "run.json").read_text())["results"]
            change(folder, results=results | {"test_ppl_last": ppl[1] - 5})
    rows = table("table mamba", tmp_path)
    assert rows["Central"]["final val ppl"] == "110.0 ± 10.0"
    row = rows["FedAvg"]
    assert row["final val ppl"] == "140.0 ± 10.0" and row["best val ppl"] == "100.0 ± 0.0"
    logs = np.log(np.array([125, 135, 145]) / [95, 105, 115])
    ends = np.exp(ttest_1samp(logs, 0).confidence_interval())
    assert row["test ratio to central"] == f"{np.exp(logs.mean()):.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"
    assert row["test ppl (best)"] == "90.00 ± 0.00" and row["test ppl (last)"] == "135.0 ± 10.0"
    assert (row["tokens"], row["minutes"], row["seeds"]) == ("2,000", "2.00 ± 0.00", "3")


def test_the_ratio_to_fedavg_is_at_the_same_local_updates(tmp_path):
    for lu, plain, pooled in ((1, 100.0, 90.0), (8, 200.0, 150.0)):
        for state, ppl in (("keep", plain), ("pooled", pooled)):
            folder = write_mamba(tmp_path, local_updates=lu, client_state=state)
            change(folder, results={"test_ppl_last": ppl, "tokens": 1000})
    rows = table("table mamba", tmp_path).values()
    assert sorted(row["to FedAvg at its LU"] for row in rows) == ["0.750", "0.900", "1", "1"]


def test_ratios_on_the_clients_own_text_with_personal_parameters_against_fedavg_of_all(tmp_path):
    for command, loss, more in (("central", 1.0, {}), ("fed_avg", 2.0, {}), ("fed_avg", 1.5, {"personal": "ssm"})):
        folder = write_mamba(tmp_path, command, **more)
        change(folder, results={"test_ppl_last": 5.0, "tokens": 1000, "held_out_loss": loss})
    rows = table("table mamba", tmp_path, "--held-out")
    assert [row["held-out ppl"] for row in rows.values()] == [f"{np.exp(x):.2f}" for x in (1.0, 2.0, 1.5)]
    assert [row["held-out ratio to central"] for row in rows.values()] == ["1", f"{np.e:.3f}", f"{np.exp(0.5):.3f}"]
    assert [row["to FedAvg at its LU"] for row in rows.values()] == ["1", "1", f"{np.exp(-0.5):.3f}"]


def test_the_ratio_is_to_the_best_central_run_on_as_many_tokens_and_as_large_a_batch(tmp_path):
    """And as much else alike; of two rates the better one."""
    for lr, ppl, tokens, batch, more in (
        (5e-4, 100.0, 1000, 16, {}),
        (1e-3, 47.5, 1000, 16, {}),
        (5e-4, 10.0, 3000, 16, {}),
        (5e-4, 20.0, 1000, 64, {}),
        (5e-4, 30.0, 1000, 16, {"beta2": 0.99}),
    ):
        folder = write_mamba(tmp_path, "central", lr=lr, n_epochs=tokens // 1000, batch_size=batch, **more)
        change(folder, results={"test_ppl_last": ppl, "final_val_ppl": ppl, "tokens": tokens})
    write_mamba(tmp_path, ppl=(100.0,), lr=5e-4)
    assert table("table mamba", tmp_path)["FedAvg"]["test ratio to central"] == "2.000"


def test_runs_that_start_from_the_run_of_their_seed_are_seeds_of_one_curve(tmp_path):
    for seed in range(2):
        start = f"runs/central_seed_{seed}"
        write_mamba(
            tmp_path, seed=seed, init_from=start, tokenizer=f"{start}/final", held_out_sequences=seed, final="best"
        )
    assert table("table mamba", tmp_path)["FedAvg"]["seeds"] == "2"


def test_a_newer_flag_is_said_where_it_is_on_and_the_reference_is_the_run_without_it(tmp_path):
    for command, more in (
        ("central", {}),
        ("fed_avg", {}),
        ("fed_avg", {"server_lr": 0.5}),
        ("fed_avg", {"max_grad_norm": 0.1, "lr_scheduler": "cosine"}),
        ("fed_fisher", {"server_lr": 0.5}),
        ("fed_entropy", {"server_lr": 0.5}),
    ):
        write_mamba(tmp_path / "mamba", command, **more)
    names = ["Central", "FedAvg", "FedAvg, server lr 0.5", "FedAvg, cosine rate, clipped to 0.1"]
    assert list(table("table mamba", tmp_path / "mamba")) == [
        *names, "FedEntropy, server lr 0.5", "FedFisher, server lr 0.5"
    ]  # fmt: skip
    for last, algorithm, method in (
        (4.0, "fedavg", {"seed": 0}),
        (3.9, "fedavg", {"seed": 0, "server_lr": 0.5}),
        (3.8, "scaffold", {"seed": 0}),
        (3.7, "fedadam", {"seed": 0, "server_lr": 0.01}),
    ):
        change(write_noniid(tmp_path / "llm", losses=[last] * 10, algorithm=algorithm), method=method)
    rows = table("table noniid", tmp_path / "llm")
    against = {name: row["vs FedAvg"] for name, row in rows.items()}
    assert against.pop("FedAdam, server lr 0.01") == "-0.300"
    assert against == {"FedAvg": "-", "FedAvg, server lr 0.5": "-0.100", "SCAFFOLD": "-0.200"}
    for accuracy, more in ((0.5, {}), (0.6, {"server_lr": 0.5})):
        write_vit(tmp_path / "vit", accuracy=accuracy, **more)
    write_vit(tmp_path / "vit", SPARSE, accuracy=0.4)
    assert table("table vit", tmp_path / "vit")["Random"]["vs dense"] == "-10.00"
    dense, *_ = usual_variants(curves_of(read_runs(tmp_path / "vit", vit.STUDY)[0]), [])
    assert "server_lr" not in dense.args


def test_what_another_flag_switches_off_is_said_only_where_labels_would_be_the_same(tmp_path):
    write_mamba(tmp_path, "fed_momentum", server_optimizer="momentum", server_tau=1e-3, server_lr=0.7)
    write_mamba(tmp_path, "fed_momentum", server_optimizer="adam", server_tau=1e-8, server_lr=0.7)
    write_mamba(tmp_path)
    assert list(table("table mamba", tmp_path)) == ["FedAvg", "FedMomentum, adam", "FedMomentum, momentum"]
    write_mamba(tmp_path, unheard_of=3)
    assert list(table("table mamba", tmp_path))[:2] == ["FedAvg", "FedAvg, unheard of 3"]


def test_a_warm_start_stands_in_the_table_of_its_tokenizer_told_apart_by_its_start(tmp_path):
    for sha, start in (("abc", "runs/s0"), ("def", "runs/s1")):
        data = {"variant": "raw", "tokenizer_sha256": sha}
        change(write_mamba(tmp_path, init_from=start, tokenizer=f"{start}/final"), data=data)
        change(write_mamba(tmp_path, "central", tokenizer={"abc": "bpe:4096", "def": "gpt2"}[sha]), data=data)
    write_mamba(tmp_path, tokenizer="bpe:4096")  # of before tokenizers had a fingerprint
    (first, bpe), (second, gpt2) = tables("table mamba", tmp_path)
    assert "tokenizer bpe:4096" in first and list(bpe) == ["Central", "FedAvg", "FedAvg, from s0"]
    assert "tokenizer gpt2" in second and list(gpt2) == ["Central", "FedAvg, from s1"]


def test_the_table_of_vit_sparse_fl_has_differences_to_dense_seed_by_seed(tmp_path):
    for seed, (dense, sparse) in enumerate([(0.50, 0.49), (0.60, 0.58), (0.70, 0.67)]):
        write_vit(tmp_path, CENTRAL, accuracy=0.8, seed=seed)
        write_vit(tmp_path, accuracy=dense, seed=seed)
        write_vit(tmp_path, accuracy=0.3, seed=seed, sharding="non_iid", nc=5)
        write_vit(tmp_path, SPARSE, accuracy=sparse, seed=seed)
    write_vit(tmp_path, SPARSE, seed=1, sharding="non_iid", nc=5, accuracy=0.25)
    write_vit(tmp_path, SPARSE, seed=9, sparsity_ratio=0.5, accuracy=0.2)
    rows = table("table vit", tmp_path)
    dense, sparse = rows["Dense FedAvg"], rows["Random"]
    assert (dense["test % (last)"], dense["vs dense"], dense["seeds"]) == ("60.00 ± 10.00", "-", "3")
    assert dense["test % (best)"] == "61.00 ± 10.00" and dense["val % (best)"] == "60.00 ± 10.00"
    assert dense["MB up"] == "30.00" and dense["rounds"] == "30" and dense["minutes"] == "1.0 ± 0.0"
    assert sparse["vs dense"] == "-2.00 ± 1.00", "the spread of the pairs, not of the runs"
    assert rows["Random, Nc 5"]["vs dense"] == "-5.00", "to dense with the same shards"
    assert rows["Random, sparsity 0.5"]["vs dense"] == "-", "no dense run of that seed"
    assert rows["Central"]["MB up"] == "-"
    row = table("table vit", tmp_path)["Dense FedAvg"]
    names = ("cosine", "sign conflict %", "drift %")
    assert [row[name] for name in names] == ["0.200 ± 0.000", "50.0 ± 0.0", "1.000 ± 0.000"]


def test_the_table_of_lora_glue_fl_has_differences_to_central_or_a_rule_seed_by_seed(tmp_path):
    for seed, (central, svd, naive) in enumerate([(0.70, 0.60, 0.59), (0.72, 0.65, 0.63), (0.74, 0.70, 0.67)]):
        write_glue(tmp_path, LORA, central, seed)
        write_glue(tmp_path, value=svd, seed=seed)
        write_glue(tmp_path, value=naive, seed=seed, aggregate="naive")
    write_glue(tmp_path, value=0.5, seed=9, aggregate="ffa")
    rows = table("table glue", tmp_path)
    svd = rows["SVD (FlexLoRA)"]
    assert (svd["Accuracy (%)"], svd["best"]) == ("65.00 ± 5.00", "66.00 ± 5.00")
    assert svd["vs central"] == "-7.00 ± 3.00", "the spread of the pairs, not of the runs"
    assert (svd["error %"], svd["discarded %"]) == ("20.00 ± 0.00", "4.00 ± 0.00")
    assert (svd["MB up"], svd["MB down"], svd["minutes"], svd["seeds"]) == ("3.00", "9.00", "1.0 ± 0.0", "3")
    assert rows["FFA-LoRA"]["error %"] == "<0.01" and rows["FFA-LoRA"]["discarded %"] == "-"
    assert rows["FFA-LoRA"]["vs central"] == "-", "no central run of that seed"
    assert rows["Central LoRA"]["MB up"] == "-" and rows["Central LoRA"]["vs central"] == "-"
    rows = table("table glue", tmp_path, "--against svd")
    assert rows["Naive (FedIT)"]["vs svd"] == "-2.00 ± 1.00" and rows["Central LoRA"]["vs svd"] == "+7.00 ± 3.00"
    write_glue(tmp_path / "other", LORA, 0.9, 9, pooling="mean")
    write_glue(tmp_path / "other", value=0.5, seed=9)
    assert {row["vs central"] for _, rows in tables("table glue", tmp_path / "other") for row in rows.values()} == {"-"}


def test_rules_at_rates_of_their_own_are_compared_by_paired_losses(tmp_path):
    losses = {"naive": (0.5, 0.6, 0.7), "residual": (0.52, 0.61, 0.76)}
    for rule, rate in (("naive", 1e-3), ("residual", 2e-3)):
        for seed, loss in enumerate(losses[rule]):
            folder = write_glue(tmp_path, seed=seed, aggregate=rule, learning_rate=rate, data={"held_out": 40})
            change_rows(folder, lambda row, x=loss: row | ({"val_loss": x} if row["round"] == 3 else {}))
    rows = table("table glue", tmp_path, "--against naive")
    low, high = ttest_1samp([0.02, 0.01, 0.06], 0).confidence_interval()
    assert list(rows) == ["Naive (FedIT), lr 0.001", "Residual (FedEx-LoRA), lr 0.002"]
    assert rows["Residual (FedEx-LoRA), lr 0.002"]["val loss vs naive"] == f"+0.0300 [{low:+.4f}, {high:+.4f}], 3"
    assert rows["Naive (FedIT), lr 0.001"]["val loss"] == "0.6000 ± 0.1000"
    (axis,) = figures("glue losses", tmp_path)["losses.png"].axes
    (bar,) = axis.containers
    mean, (segments, *_) = bar.lines[0], bar.lines[2:]
    assert mean.get_xdata() == pytest.approx([0.03]) and [t.get_text() for t in axis.get_yticklabels()] == [
        "Residual, lr 0.002"
    ]
    assert segments[0].get_segments()[0][:, 0] == pytest.approx([low, high])
    assert sorted(next(x.get_xdata() for x in axis.lines if len(x.get_xdata()) == 3)) == pytest.approx(
        [0.01, 0.02, 0.06]
    )
    for rule, loss in (("naive", 0.9), ("residual", 0.8)):  # with fewer clients a round: a table of its own
        more = {"participation": 0.3, "data": {"held_out": 40}, "learning_rate": 1e-3}
        folder = write_glue(tmp_path, aggregate=rule, name=f"{rule}_some", **more)
        change_rows(folder, lambda row, x=loss: row | ({"val_loss": x} if row["round"] == 3 else {}))
    (_, all_take_part), (about, some) = tables("table glue", tmp_path, "--against naive")
    assert all_take_part == rows and "participation 0.3" in about
    assert [row["val loss vs naive"][:7] for row in some.values()] == ["-", "-0.1000"]


def test_the_table_of_llm_noniid_has_paired_differences_alarms_and_rounds_to_a_loss(tmp_path):
    for seed, last in enumerate((4.0, 4.4)):
        write_noniid(tmp_path, losses=[6.0] * 9 + [last], alarms=[("slow", 20)][seed:], seed=seed)
        write_noniid(tmp_path, losses=[6.0] * 9 + [last - 0.1 - 0.1 * seed], algorithm="scaffold", seed=seed)
        write_noniid(tmp_path, losses=[6.0] * 9 + [last], partition="iid", seed=seed)
    rows = table("table noniid", tmp_path, "--target 4.1")
    assert list(rows) == ["FedAvg", "FedAvg, IID", "SCAFFOLD"]
    assert rows["FedAvg"]["val loss"] == "4.200 ± 0.283" and rows["FedAvg"]["vs FedAvg"] == "-"
    assert rows["SCAFFOLD"]["vs FedAvg"] == "-0.150 ± 0.071", "of the same partition, seed by seed"
    assert rows["FedAvg"]["alarms"] == "slow 1/2" and rows["SCAFFOLD"]["alarms"] == "-"
    assert rows["FedAvg"]["worst client"] == "4.450 ± 0.283"
    assert rows["FedAvg"]["to 4.1"] == ">40", "one seed never had it"
    assert table("table noniid", tmp_path, "--target 6")["FedAvg"]["to 6"] == "4.0 ± 0.0", "the first evaluation"


def test_a_seed_without_a_result_is_a_dash_not_a_mean_of_the_others(tmp_path):
    for study, write, field, column in (
        ("mamba", write_mamba, "val_ppl", "final val ppl"),
        ("vit", write_vit, "test_accuracy_last", "test % (last)"),
        ("glue", write_glue, "val_accuracy", "Accuracy (%)"),
        ("noniid", write_noniid, "val_loss", "val loss"),
    ):
        for seed in range(2):
            folder = write(tmp_path / study, seed=seed)
        change(folder, results={field: "nan", "final_val_ppl": "nan"})
        change_rows(folder, lambda row, field=field: row | {field: "nan"} if field in row else row)
        (row,) = table(f"table {study}", tmp_path / study).values()
        assert row[column] == "-" and row["seeds"] == "2", study


# ---- figures


def test_perplexity_is_drawn_against_tokens_as_mean_and_range_with_gaps_where_a_seed_is_not_finite(tmp_path):
    for seed, middle in enumerate((300.0, "inf")):
        write_mamba(tmp_path, seed=seed, ppl=(400.0 + 200 * seed, 200.0 + 100 * seed))
        write_mamba(tmp_path, seed=seed, ppl=(300.0 + 200 * seed, middle, 100.0), local_updates=8)
    figure = figures("mamba", tmp_path)["2_lu_comparison_pure_ssm_1_layer.png"]
    (axes,) = figure.axes
    assert axes.get_xlabel().startswith("Tokens seen, all clients together") and axes.get_yscale() == "log"
    first, second = axes.lines[:2]
    assert (
        first.get_ydata().tolist() == [500, 250] and first.get_xdata()[-1] == 2000 and band_at(axes, 1000) == (400, 600)
    )
    np.testing.assert_array_equal(second.get_ydata(), [400, np.nan, 100])
    assert texts_of(axes) == [] and "mean of 2 seeds, band: minimum to maximum" in figure.get_suptitle()


def write_updates(root, seed, matrices):
    """A central run whose stored updates of in_proj are these, one list of layers a step."""
    folder = write_mamba(root, "central", seed=seed, layers=len(matrices[0])) / "deltas"
    folder.mkdir()
    for step, layers in enumerate(matrices, start=1):
        arrays = {f"layers.{i}.in_proj": matrix.astype("f4") for i, matrix in enumerate(layers)}
        np.savez(folder / f"step_{step:06d}.npz", **arrays)


def test_singular_values_are_averaged_over_layers_then_seeds_with_the_rank_of_the_energy(tmp_path):
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0][:, :3]
    for seed, scale in enumerate((1.0, 3.0)):
        # squares 16, 3.1, 0.9 of 20: 80 %, 95.5 %, 100 %
        matrix = scale * turn * np.sqrt([16.0, 3.1, 0.9])
        write_updates(tmp_path, seed, [[matrix, 2 * matrix]])
    drawn = figures("mamba central updates", tmp_path)
    (axes,) = drawn["averaged_final_spectrum_pure_ssm_2_layer.png"].axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 3 * np.sqrt([16.0, 3.1, 0.9]), rtol=1e-5)
    np.testing.assert_allclose(band_at(axes, 1), (1.5 * 4, 4.5 * 4), rtol=1e-5)
    assert "rank 2 of 3" in axes.get_title()


def test_a_heat_map_takes_the_rows_and_columns_with_the_largest_norm_at_ten_steps(tmp_path):
    first, second = np.zeros((200, 100)), np.zeros((200, 100))
    first[150:] = second[40:70] = 1.0
    first[:, 90:] *= 0.5
    second[:, 90:] *= 0.5
    write_updates(tmp_path, 0, [[first]] * 50 + [[second]] * 50)
    drawn = figures("mamba central updates", tmp_path)
    (figure,) = [figure for name, figure in drawn.items() if name.startswith("heatmap_structure")]
    maps = [axes for axes in figure.axes if axes.get_title().startswith("step")]
    assert [axes.get_title() for axes in maps] == [f"step {step}" for step in (1, 12, 23, 34, 45, 56, 67, 78, 89, 100)]
    images = [np.asarray(axes.images[0].get_array()) for axes in maps]
    assert all(image.shape == (80, 80) for image in images)
    assert images[0][30:].all() and not images[0][:30].any() and images[-1][:30].all() and not images[-1][30:].any()


def test_heterogeneity_goes_up_to_iid_in_percent_with_standard_deviations_and_the_ceiling(tmp_path):
    vit_study(tmp_path)
    drawn = figures("vit", tmp_path)
    (axes,) = drawn["heterogeneity.png"].axes
    assert ticks(axes.xaxis) == ["Dirichlet 0.1", "Nc 1", "Nc 5", "IID"]
    expected = [(0, 35, 0), (1, 30, 0), (2, 42, 100 * spread([0.4, 0.44])), (3, 51, 100 * spread([0.50, 0.52]))]
    np.testing.assert_allclose(bars_of(axes), expected, atol=1e-9)
    assert axes.containers[0].lines[0].get_xdata().tolist() == [1, 2, 3], "no line leads to Dirichlet"
    assert lines_of(axes)["Central: 60.0 %"].get_ydata()[0] == 60
    accuracy, loss = drawn["heterogeneity_curves.png"].axes
    np.testing.assert_allclose(lines_of(accuracy)["Dense FedAvg, IID"].get_ydata(), [17, 34, 51])
    np.testing.assert_allclose([band_at(accuracy, x) for x in (10, 30)], [(50 / 3, 52 / 3), (50, 52)])


def test_a_curve_is_over_the_rounds_that_all_seeds_have_and_a_gap_where_one_is_not_finite(tmp_path):
    for seed in range(2):
        folder = write_vit(tmp_path, CENTRAL, seed=seed)
    change_rows(folder, lambda row: row | ({"val_accuracy": "nan"} if row["round"] == 20 else {}))
    path = folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    line = lines_of(figures("vit curves", tmp_path)["central_curves.png"].axes[0])["Central"]
    np.testing.assert_allclose([line.get_xdata(), line.get_ydata()], [[10, 20], [50 / 3, np.nan]])


def test_equal_masks_of_several_seeds_are_drawn(tmp_path):
    name = "vit.layers.0.mlp.fc1.weight"
    write_vit(tmp_path, SPARSE, kept={name: 0.75})
    for seed in range(3):  # the mean of equal fractions may round past them
        write_vit(tmp_path, SPARSE, seed=seed, mask_strategy="least_sensitive", kept={name: 0.07})
    (figure,) = figures("vit layers", tmp_path).values()
    lines = lines_of(figure.axes[0])
    np.testing.assert_allclose([lines[name].get_ydata() for name in ("Least sensitive", "Random")], [[7], [75]])


def test_shards_are_one_map_per_sharding_of_the_lowest_seed(tmp_path):
    for seed in (10, 9):
        write_vit(tmp_path, seed=seed, counts=[[seed, 1], [1, 1]])
        write_vit(tmp_path, seed=seed, sharding="non_iid", nc=1, counts=[[seed, 0], [0, 3]])
    iid, skewed, _ = figures("vit shards", tmp_path)["shards.png"].axes
    assert iid.get_title() == "IID (seed 9)\n2 classes a client"
    assert skewed.get_title() == "Nc 1 (seed 9)\n1 class a client"
    shown = skewed.images[0].get_array()
    assert shown.mask.tolist() == [[False, True], [True, False]] and shown[0, 0] == 9


def test_a_metric_of_glue_has_standard_deviations_at_evaluated_rounds_and_the_central_line(tmp_path):
    for seed in range(2):
        write_glue(tmp_path, LORA, 0.70 + 0.02 * seed, seed)
        write_glue(tmp_path, value=0.60 + 0.04 * seed, seed=seed)
    write_glue(tmp_path, task_name="cola")
    axes, cola = figures("glue metric", tmp_path)["metric.png"].axes
    assert [a.get_title() for a in (axes, cola)] == ["RTE, 3 clients, IID (2 seeds)", "CoLA, 3 clients, IID (1 seed)"]
    svd = lines_of(axes)["SVD (FlexLoRA)"]
    assert svd.get_xdata().tolist() == [1, 3], "no gap and no value at the round without evaluation"
    np.testing.assert_allclose(svd.get_ydata(), [52, 62])
    sd = 100 * spread([0.60, 0.64])
    np.testing.assert_allclose([band_at(axes, 1), band_at(axes, 3)], [(52 - sd, 52 + sd), (62 - sd, 62 + sd)])
    assert lines_of(axes)["Central LoRA"].get_ydata()[0] == pytest.approx(71)
    spans = [(patch.get_y(), patch.get_height()) for patch in axes.patches]
    central = 100 * spread([0.70, 0.72])
    assert any(np.allclose(span, (71 - central, 2 * central)) for span in spans)


def test_a_metric_of_glue_begins_before_training_and_has_the_lines_of_the_majority_and_of_the_head_alone(tmp_path):
    def begun(folder):
        lines = folder / "metrics.jsonl"
        lines.write_text('{"round": 0, "val_accuracy": 0.45}\n' + lines.read_text())

    labels = {"label_counts": {"train": [9, 1], "validation": [3, 5]}}
    begun(write_glue(tmp_path, value=0.6, data=labels))
    for seed, value in enumerate((0.52, 0.56)):
        begun(write_glue(tmp_path, value=value, aggregate="head", data=labels, seed=seed))
    write_glue(tmp_path, task_name="cola", data=labels)
    drawn = figures("glue", tmp_path)
    axes, cola = drawn["metric.png"].axes
    lines = lines_of(axes)
    assert [line.tolist() for line in lines["SVD (FlexLoRA)"].get_data()] == [[0, 1, 3], pytest.approx([45, 50, 60])]
    assert lines["Majority label, RTE (62.5 %)"].get_ydata() == pytest.approx([62.5, 62.5])
    assert lines["Head only"].get_ydata() == pytest.approx([54, 54]) and lines["Head only"].get_linestyle() == "--"
    assert list(lines_of(cola)) == ["SVD (FlexLoRA)"], "a correlation has no majority"
    assert "Head only" in lines_of(drawn["bytes_up.png"].axes[0])


def test_a_panel_of_exact_rules_alone_is_not_drawn_and_runs_of_the_head_alone_are_a_curve(tmp_path):
    for rule in ("svd", "ffa"):
        write_glue(tmp_path, aggregate=rule)
    for rule in ("ffa", "stack"):
        write_glue(tmp_path, aggregate=rule, task_name="mrpc")
    write_glue(tmp_path, aggregate="head", task_name="cola")
    drawn = figures("glue", tmp_path)
    errors = drawn["error_rounds.png"]
    assert [axes.get_title() for axes in errors.axes] == ["RTE, 3 clients, IID"]
    assert "left out: MRPC, 3 clients" in errors.get_suptitle()
    assert lines_of(drawn["metric.png"].axes[2])["Head only"].get_xdata().tolist() == [1, 3]


@pytest.mark.parametrize("value", [0.02, "nan"])
def test_a_rule_that_is_not_exact_once_is_not_called_so(tmp_path, value):
    for seed in range(2):
        folder = write_glue(tmp_path, aggregate="ffa", seed=seed)
    change_rows(folder, lambda row: row | ({"aggregation_error": value} if row["round"] == 2 else {}))
    assert list(lines_of(figures("glue error", tmp_path)["error_rounds.png"].axes[0])) == ["FFA-LoRA"]


def test_losses_have_standard_deviations_the_central_line_and_first_alarms(tmp_path):
    ends = [last + (5.5 - last) * 0.9**36 for last in (4.0, 4.4)]
    for seed, last in enumerate((4.0, 4.4)):
        write_noniid(tmp_path, last, [("drifting", 12), ("slow", 20)][: 1 + seed], seed=seed)
        write_noniid(tmp_path, last - 0.1, algorithm="central", seed=seed)
    figure = figures("noniid curves", tmp_path)["noniid_curves.png"]
    (axes,) = figure.axes
    line = lines_of(axes)["FedAvg"]
    assert line.get_xdata().tolist() == list(range(4, 41, 4))
    expected = 4.2 + (5.5 - 4.2) * 0.9 ** (np.arange(4, 41, 4) - 4)
    np.testing.assert_allclose(line.get_ydata(), expected)
    np.testing.assert_allclose(band_at(axes, 40), [np.mean(ends) - spread(ends), np.mean(ends) + spread(ends)])
    central = [last - 0.1 + (5.6 - last) * 0.9**36 for last in (4.0, 4.4)]
    assert lines_of(axes)["Central, last round"].get_ydata()[0] == pytest.approx(np.mean(central))
    assert texts_of(axes) == ["\u25cf Dr", "\u25cf Sl 1/2"]
    assert [text for text in axes.texts if text.get_text()][1].xy == (20, pytest.approx(expected[4]))
    assert "first alarms: Dr drifting, Sl slow" in " ".join(figure.get_suptitle().split())


def test_a_diverging_curve_leaves_the_axis_and_a_loss_that_is_not_finite_is_said(tmp_path):
    for rate in (1e-4, 1e-3, 3e-3):
        write_noniid(tmp_path / "a", learning_rate=rate)
    wild = [5.5, 6.0, 20.0, 50.0, 80.0, 90.0, 90.0, 90.0, 90.0, 90.0]
    write_noniid(tmp_path / "a", 90.0, [("diverged", 12)], losses=wild, learning_rate=0.1)
    drawn = figures("noniid curves", tmp_path / "a")
    figure = drawn["noniid_curves_learning_rate.png"]
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 3.5 < low < 4.1 and 6 < high < 9 and "the curve leaves the axis" in figure.get_suptitle()
    (arrow,) = [text for text in axes.texts if text.arrow_patch is not None and text.anncoords == "data"]
    np.testing.assert_allclose(np.array(arrow.xy, dtype=float), [8 + 4 * (high - 6) / 14, high])
    (last,) = drawn["noniid_curves_last_learning_rate.png"].axes
    assert last.get_yscale() == "log"
    write_noniid(tmp_path / "b", participation_rate=1.0)
    write_noniid(tmp_path / "b", participation_rate=0.5, losses=[5.0] * 9 + ["nan"])
    (axes,) = figures("noniid curves", tmp_path / "b")["noniid_curves_last_participation.png"].axes
    assert texts_of(axes) == ["not\nfinite"] and len(bars_of(axes)) == 1


def test_the_line_of_orthogonal_updates_is_that_of_as_many_clients_as_take_part(tmp_path):
    write_noniid(tmp_path, participation_rate=1.0)
    figure = figures("noniid drift", tmp_path)["noniid_drift.png"]
    lines = [lines_of(axes)["orthogonal updates"].get_ydata()[0] for axes in figure.axes[:3]]
    np.testing.assert_allclose(lines, [np.sqrt(5), 1, 1 / np.sqrt(6)])


def test_clients_that_were_drawn_for_the_comparison_have_their_own_names(tmp_path):
    some = {"compared": [1, 4], "update_cosines": [[1.0, 0.3], [0.3, 1.0]]}
    change_rows(write_noniid(tmp_path, partition="style_skew"), lambda row: row | some)
    axes = figures("noniid similarity", tmp_path)["noniid_similarity.png"].axes[0]
    assert ticks(axes.xaxis) == ["1", "4"] and axes.images[0].get_array()[0, 1] == 0.3


def test_each_client_is_compared_with_itself_under_fedavg_with_the_same_seed(tmp_path):
    for seed, (base, clustered) in enumerate(((4.0, 3.8), (4.6, 4.5))):
        write_noniid(tmp_path, base, losses=[base] * 10, seed=seed)
        write_noniid(tmp_path, clustered, losses=[clustered] * 10, seed=seed, cluster="updates")
    write_noniid(tmp_path, 1.0, losses=[1.0] * 10, seed=9, cluster="updates")
    drawn = figures("noniid clients", tmp_path)
    (axes,) = drawn["noniid_clients_against.png"].axes
    np.testing.assert_allclose(sorted(lines_of(axes)["a client"].get_ydata()), [-0.2] * 6 + [-0.1] * 6)
    np.testing.assert_allclose(bars_of(axes)[0][1:], [-0.15, spread([-0.2, -0.1])])
    assert texts_of(axes) == ["100 %"]
    (own,) = drawn["noniid_clients.png"].axes
    worst = [c.lines[0].get_ydata()[0] for c in own.containers if c.get_label() == "worst client"]
    np.testing.assert_allclose(worst[0], np.mean([4.0, 4.6]) + 5 / 20)


# ---- a run's own curve


def test_a_log_axis_has_three_to_eight_round_numbers():
    for low, high in ((100, 110), (99, 310), (90, 60_000), (0.02, 0.7), (1.001, 1.002), (500, 501)):
        marks = curves.round_ticks(low, high)
        assert 3 <= len(marks) <= 8 and marks == sorted(set(marks)) and all(low <= mark <= high for mark in marks)


def test_draw_curve_writes_the_figure_and_needs_a_finite_perplexity(tmp_path):
    path = curves.draw_curve(write_mamba(tmp_path, ppl=(300.0, "inf", 200.0)))
    assert path.name == "curve.png" and path.read_bytes().startswith(b"\x89PNG")
    assert not list(path.parent.glob(".curve*")), "the temporary file stays behind"
    assert curves.draw_curve(write_mamba(tmp_path, ppl=("inf", "nan"))) is None


def test_drawing_in_a_training_process_needs_no_pyplot(tmp_path):
    folder = write_mamba(tmp_path)
    code = "import sys; from common.curves import draw_curve; assert 'matplotlib' not in sys.modules; "
    code += f"draw_curve({str(folder)!r}); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
