"""Figures: what they draw against the committed logs, computed a second time; and that every one is drawn."""

import math
import re
import statistics

import numpy as np
import pytest
from made_runs import ROOT, call, figures, log, mamba, run, tables, vit

from common import curves
from plots.visualize_deltas import energy_rank

GAP = [ROOT / "mamba_fl" / "results" / name for name in ("gap.jsonl", "tuning/gap.jsonl")]


def bars_of(axis):
    """{label: [(x, y, low, high)]} of an axis' points with bars in y."""
    found = {}
    for container in axis.containers:
        line, _, (bars, *_) = container
        ends = [segment[:, 1] for segment in bars.get_segments()]
        x, y = line.get_data()
        points = [(a, b, *sorted(c)) for a, b, c in zip(x, y, ends, strict=True)]
        found[container.get_label()] = found.get(container.get_label(), []) + points
    return found


# ---- the figures of the READMEs


def test_the_gap_is_the_ratio_of_the_logs_perplexities(tmp_path):
    (axis,) = figures("plots/mamba.py gap --data-dir", *GAP, out=tmp_path)["gap.png"].axes
    every = log(GAP[0])
    points = bars_of(axis)["each at its best rate"]
    for lu, above, low, high in points:
        pairs = [
            (line["results"]["test_ppl_last"], every["central"][seed]["results"]["test_ppl_last"])
            for seed, line in every[f"keep_lu{lu:g}"].items()
        ]
        assert above == pytest.approx(100 * math.exp(statistics.fmean(math.log(a / b) for a, b in pairs)) - 100)
        assert low < above < high
    assert [lu for lu, *_ in points] == [1, 8, 64, 256]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1\n768", "8\n96", "64\n12", "256\n3"]
    # the runs of --tune at central training's lowest rate, by the same measure
    tried = [line for lines in log(GAP[1]).values() for line in lines.values()]
    at = min(line["args"]["lr"] for line in tried if line["name"].startswith("central"))
    last = {
        line["name"].partition("_seed")[0]: line["results"]["test_ppl_last"]
        for line in tried
        if line["args"]["lr"] == at
    }
    (line,) = [line for line in axis.lines if line.get_marker() == "x"]
    for lu, y in zip(*line.get_data(), strict=True):
        assert y == pytest.approx(100 * last[f"keep_lu{lu:g}"] / last["central"] - 100)


def test_the_lag_is_the_logs(tmp_path):
    place = ROOT / "lora_glue_fl" / "results" / "trajectories.jsonl"
    left, right = figures("plots/glue.py lag --data-dir", place, out=tmp_path)["lag_2.png"].axes
    exact, naive = (log(place)[f"sst2_skew_8_{rule}"] for rule in ("residual", "naive"))
    (line,) = [line for line in left.lines if line.get_label().startswith("Naive")]
    for t, y in zip(*line.get_data(), strict=True):
        assert y == pytest.approx(statistics.fmean(run["curve"][int(t)]["val_loss"] for run in naive.values()))
        apart = [
            exact[seed]["curve"][int(t)]["val_loss"] - run["curve"][int(t)]["val_loss"] for seed, run in naive.items()
        ]
        half = 2.776 * statistics.stdev(apart) / math.sqrt(5)
        mean, points = statistics.fmean(apart), [one for one in sum(bars_of(right).values(), []) if int(one[0]) == t]
        assert any(one[1:] == pytest.approx((mean, mean - half, mean + half), abs=1e-5) for one in points)


def test_accuracy_under_skew_is_the_logs(tmp_path):
    place, shares = ROOT / "llm_noniid" / "results" / "rounds.jsonl", {"10 of 10": "all", "3 of 10": "some"}
    (figure,), every = figures("plots/noniid.py skew --data-dir", place, out=tmp_path).values(), log(place)
    skews = ["IID", "1", "0.3", "0.1", "0.03"]
    for axis in figure.axes:
        share = shares[axis.get_title().partition(" clients")[0]]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == skews
        lines = {line.get_label(): line for line in axis.lines if " rounds" in line.get_label()}
        assert len(lines) == {"all": 3, "some": 2}[share]
        for label, line in lines.items():
            algorithm, rounds = re.fullmatch(r"(\w+), (\d+) rounds", label).groups()
            preset, more = ("rounds-more", "_rounds_80") if rounds == "80" else ("rounds", "")
            points = [(x, y) for x, y in zip(*line.get_data(), strict=True) if math.isfinite(y)]
            assert len(points) == (2 if more else 5) and len(line.get_xdata()) == (3 if more else 5)
            for x, y in points:
                name = "iid" if round(x) == 0 else f"alpha_{skews[round(x)]}"
                runs = every[f"{preset}_{algorithm.lower()}_{name}_{share}{more}_ag_news_small"].values()
                assert y == pytest.approx(100 * statistics.fmean(one["results"]["test_accuracy"] for one in runs))


def test_the_ratios_are_those_of_the_table(tmp_path):
    place = ROOT / "vit_sparse_fl" / "results" / "replay.jsonl"
    panels = figures("plots/vit.py replay --data-dir", place, out=tmp_path)["replay.png"].axes
    for axis, (about, rows) in zip(panels, tables("vit_sparse_fl --data-dir", place), strict=True):
        assert axis.get_title().partition(",")[0] in about
        cells = [re.findall(r"\d+\.\d+", row["over dense"]) for row in rows.values()]
        assert [text.get_text() for text in axis.texts] == [mean for mean, *_ in cells]
        for container in axis.containers:
            line, _, (bars,) = container
            (x,), (i,), (ends,) = *line.get_data(), bars.get_segments()
            assert [f"{one:.2f}" for one in (x, *ends[:, 0])] == cells[i]
        assert len(axis.containers) + len([line for line in axis.lines if line.get_marker() == ">"]) == len(rows)


def test_a_run_that_diverged_is_said_and_no_part_of_the_mean(tmp_path):
    for seed in range(6):
        ends = ("iid", 0.5, 0.8), ("topic_skew", 0.3, math.nan if seed == 5 else 0.5 + seed / 100)
        for name, alpha, y in (*ends, ("topic_skew", 0.1, math.nan)):
            results, args = {"test_accuracy": y, "val_loss": 1.0}, {"num_rounds": 30, "num_clients": 4}
            args |= {"algorithm": "fedavg", "partition": name, "alpha": alpha, "seed": seed, "target": "label"}
            rows = [{"val_loss": 1.0, "val_accuracy": 0.25}] * 31
            broken = {"status": "failed", "ended": {"how": "failed", "by": "not_finite"}} if math.isnan(y) else {}
            run(
                tmp_path, f"{name}_{alpha}_{seed}", "train", args | {"participation_rate": 0.5}, rows, results, **broken
            )
    (figure,) = figures("plots/noniid.py skew --data-dir", tmp_path, out=tmp_path / "plots").values()
    (axis,) = figure.axes
    (line,) = [line for line in axis.lines if line.get_label() == "FedAvg, 30 rounds"]
    assert list(line.get_ydata()) == pytest.approx([80, 52, math.nan], nan_ok=True)  # 0.50 to 0.54
    assert [text.get_text() for text in axis.texts] == ["1 of 6 diverged", "6 of 6 diverged"]
    low, high = axis.get_ylim()
    assert all(low < text.xy[1] < high for text in axis.texts)


# ---- those that a source names


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two depths of mamba_fl, two LU and methods, two seeds, with stored updates."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        for layers in (1, 2):
            folder = mamba(root, f"central_config_{layers}_seed_{seed}", "central", seed, 90.0 + seed, layers=layers)
            write_deltas(folder / "server" / "deltas", layers, seed)
            folder = mamba(root, f"fed_{layers}_seed_{seed}", "fed_avg", seed, 100.0 + seed, layers=layers)
            write_deltas(folder / "server" / "deltas", layers, seed)
            for k in range(2):
                write_deltas(folder / f"client_{k}" / "deltas", layers, 10 * k + seed)
        mamba(root, f"fed_lu8_seed_{seed}", "fed_avg", seed, 120.0, local_updates=8)
        mamba(root, f"fisher_seed_{seed}", "fed_fisher", seed, 95.0)
    return root


def write_deltas(folder, layers, seed, steps=(1, 2, 3)):
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    for step in steps:
        arrays = {f"layers.{i}.in_proj": draw.normal(size=(12, 6)).astype(np.float32) for i in range(layers)}
        np.savez(folder / f"step_{step:06d}.npz", **arrays)


def test_figures_1_to_4_have_the_sources_names_and_final_perplexities(runs, tmp_path):
    drawn = figures("plots/plot_perplexities.py --data_dir", runs, out=tmp_path)
    both = [f"{stem}_pure_ssm_{n}_layer.png" for stem in ("1_central_vs_fed",) for n in (1, 2)]
    one = ["2_lu_comparison_pure_ssm_1_layer.png", "3_method_comparison_pure_ssm_1_layer.png"]
    assert {*both, *one, "4_multi_config_comparison.png"} <= set(drawn)
    labels = drawn[both[0]].legends[0].get_texts()
    assert [text.get_text() for text in labels] == ["Central: 90.5", "FedAvg: 100.5"]
    (x, y) = drawn[both[0]].axes[0].lines[0].get_data()
    assert y.tolist() == [181, 135.75, 90.5] and x.tolist() == [0, 1000, 2000]
    names = [text.get_text().partition(":")[0] for text in drawn[one[1]].legends[0].get_texts()]
    assert names == ["Central", "FedAvg", "FedFisher"]


def test_updates_are_drawn_under_the_sources_names(runs, tmp_path):
    for line, names in (
        ("plots/visualize_deltas.py", ["heatmap_structure_central_config_1_seed_0_layer_0", "averaged_svd_evolution_"]),
        ("plots/visualize_federated_deltas.py --entity server", ["_layer_1_server", "svd_evolution_", "svd_spectrum_"]),
        ("plots/visualize_federated_deltas.py --entity client", ["_layer_0_client", "pure_ssm_2_layer_lu_1_client"]),
    ):
        drawn = figures(f"{line} --data-dir", runs, out=tmp_path / line.split()[-1].replace("/", "_"))
        assert all(any(name in file for file in drawn) for name in names), drawn
    code, _, err = call("plots/visualize_deltas.py --data-dir", runs / "fisher_seed_0")
    assert code == 2 and "--save-deltas" in err
    # the mean over two seeds of the largest singular value of step 1
    updates = [
        np.load(runs / f"fed_1_seed_{seed}/server/deltas/step_000001.npz")["layers.0.in_proj"] for seed in (0, 1)
    ]
    first = (
        figures("plots/visualize_federated_deltas.py --data_dir", runs, out=tmp_path / "server")[
            "svd_evolution_federated_pure_ssm_1_layer_lu_1.png"
        ]
        .axes[0]
        .lines[0]
    )
    assert first.get_ydata()[0] == pytest.approx(np.mean([np.linalg.norm(one, 2) for one in updates]))


def test_the_rank_that_holds_the_energy():
    assert energy_rank(np.array([3.0, 1.0, 0.1])) == 2 and energy_rank(np.zeros(3)) == 0  # 9 of 10.01 are 89.9 %


def test_strategies_take_each_methods_best_rate(tmp_path):
    for seed in range(2):
        for lr, accuracy in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.4)):
            vit(tmp_path, f"dense_{lr}_seed_{seed}", seed=seed, lr=lr, accuracy=accuracy)
        vit(tmp_path, f"mask_seed_{seed}", "train_federated_sparse", seed, 0.55, mask_strategy="random")
    (figure,) = figures("plots/vit.py strategies --data-dir", tmp_path, out=tmp_path / "a").values()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["Dense FedAvg, lr 0.2", "Random, lr 0.1"]
    assert "60.0 ± 0.0" in [text.get_text() for text in figure.axes[0].texts]


# ---- the page, the files


def test_the_page_of_a_studys_log_is_small_and_needs_nothing_else(tmp_path):
    code, text, err = call("plots/report.py", GAP[0], "--out", tmp_path / "page.html")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert "gap" in page and page.count("data:image/webp") >= 1 and len(page) < 1e6 and " finished." in page
    assert "http" not in page.replace("http://www.w3.org", "")
    (cells,) = [row for row in tables("mamba_fl --data-dir", GAP[0])[0][1].items() if row[0] == "Central"]
    assert "<tr><td>" + "</td><td>".join([*cells[1].values()]) + "</td></tr>" in page


def test_what_cannot_be_drawn_is_said(tmp_path):
    mamba(tmp_path, "a")
    for words, said in (("nonsense", "no figure 'nonsense'"), ("multi_config_comparison", "needs runs of one method")):
        code, _, err = call(f"plots/mamba.py {words} --data-dir", tmp_path, "--out-dir", tmp_path / "plots")
        assert code == 2 and said in err and not (tmp_path / "plots").exists()


def test_a_runs_own_curves(tmp_path):
    folder = mamba(tmp_path, "a")
    assert curves.draw_curve(folder) == folder / "curve.png" and (folder / "curve.png").stat().st_size > 1000
    assert curves.draw_accuracy(vit(tmp_path, "b"), tmp_path / "b_curves.png").exists()
    assert curves.draw_curve(run(tmp_path, "c", "fed_avg", {}, [{"val_ppl": "inf", "tokens": 0}])) is None
