"""Figures and tables of vit_sparse_fl: diverged runs, lines to judge by, tuned rates, paired differences, shards."""

import json
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from fixed_runs import DENSE, SPARSE, change, change_rows, write_vit
from plotting import ROOT, figures, lines_of, table, tables, texts_of, ticks
from scipy.stats import ttest_1samp

from common.records import collect
from plots import vit

SPLITS = ((0, 50), (50, 100), (25, 75))
CROSS = {"interference_own": -0.3, "interference_others": 0.02, "interference_chance": 0.01, "merge_gap": 0.2}
CROSS |= {"cosine_excess": -0.2, "cosine_chance": 0.05}


def write(root, name, seed, command=SPARSE, accuracy=0.45, rate=0.3, **more):
    """A run of the preset `rates`: from the pretraining on its seed's split, on the other classes."""
    low, high = SPLITS[seed % 3]
    args = {"sharding": "non_iid", "nc": 5, "local_steps": 16, "freeze_head": True, "head": "ridge"}
    args |= {"classes": "rest", "init_from": f"results/pretrain_seed_{seed % 3}", "lr": rate} | more
    folder = write_vit(root, command, seed, accuracy, f"{name}_seed_{seed}", start=0.36, **args)
    rest = [c for c in range(100) if not low <= c < high]
    method = {"seed": seed, "lr": rate} | {key: args[key] for key in args if "freeze" in key or key == "download"}
    change(folder, data={"dataset": "cifar100", "sha256": {"train": "abc"}, "classes": rest}, method=method)
    return folder


def write_rates(root, seeds=6):
    """Dense and random masks at two federations, rows at matched rates, the head alone, the tuning's runs."""
    for seed in range(seeds):
        x = 0.002 * seed
        rows = [write(root, "dense_nc5_J16", seed, DENSE, 0.46 + x, 0.03)]
        rows += [write(root, "random_nc5_J16", seed, accuracy=0.44 + 0.9 * x, rate=1.0)]
        rows += [write(root, "topk_nc5_J16", seed, accuracy=0.455 + x, rate=0.03, upload="topk")]
        if seed < 3:
            rows += [write(root, "matched_dense_nc5_J16", seed, DENSE, 0.42 + x, 0.011)]
            alone = {"freeze_backbone": True, "freeze_head": False}
            rows += [write(root, "head_only_nc5_J16", seed, DENSE, 0.40 + x, 0.1, **alone)]
            for name, sharding, rate in (("nc1", "non_iid", 0.01), ("iid", "iid", 0.1)):
                place = {"sharding": sharding, "nc": 1, "local_steps": 4}
                rows += [write(root, f"dense_{name}_J4", seed, DENSE, 0.4 + 5 * rate, rate, **place)]
                rows += [write(root, f"random_{name}_J4", seed, accuracy=0.39 + rate, rate=10 * rate, **place)]
        for folder in rows:
            cross = CROSS | ({"interference_others": 0.05 + 0.01 * seed**2} if "random" in folder.name else {})
            change_rows(folder, lambda row, cross=cross: row | (cross if row["round"] else {}))
    write(root / "tuning", "dense_nc5_J16", 100, DENSE, 0.9, 0.3)


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    root = tmp_path_factory.mktemp("rates")
    write_rates(root)
    return root


def interval_of(differences, digits=2):
    """Of the means over the two seeds of each split."""
    differences = np.mean([differences[:3], differences[3:]], axis=0)
    low, high = ttest_1samp(differences, 0).confidence_interval()
    mean = np.mean(differences)
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}], {len(differences)}"


def test_the_questions_table_has_paired_differences_over_splits_and_matched_rows_by_their_name(rates, tmp_path):
    every = dict(tables("table vit", rates, "--against dense"))
    found = {heading.split("0.1, ")[1].split(", ")[0]: rows for heading, rows in every.items()}
    assert sorted(found) == ["IID", "Nc 1", "Nc 5"], "a table a federation"
    dense = found["Nc 5"]
    assert sum(map(len, found.values())) == 9, "the tuning's run is apart"
    assert {row["seeds"] for rows in found.values() for row in rows.values()} == {"3", "6"}
    random = dense["Random, lr 1.0"]
    assert random["vs dense"] == interval_of([-2 - 0.02 * seed for seed in range(6)]) and random["seeds"] == "6"
    assert dense["Dense FedAvg, lr 0.03"]["vs dense"] == "-"
    assert dense["Dense FedAvg, drift matched, lr 0.011"]["vs dense"].startswith("-4.00 [")
    assert dense["Dense FedAvg, head trained, lr 0.1"]["vs dense"].startswith("-6.00 [")
    assert found["Nc 1"]["Random, lr 0.1"]["vs dense"].startswith("-5.00 ["), "in the same federation"
    shown = [random[head] for head in ("own loss", "others' loss", "random signs", "merge gap", "at random", "lr")]
    assert shown[:2] == ["-0.3000 ± 0.0000", "0.1417 ± 0.0975"] and shown[-1] == "1.0"
    harms = [(0.05 + 0.01 * seed**2 - 0.02) / 0.3 for seed in range(6)]
    assert random["others / own vs dense"] == interval_of(harms, 3)
    assert dense["Dense FedAvg, lr 0.03"]["others / own vs dense"] == "-"
    assert dense["Top-k updates, lr 0.03"]["others / own vs dense"].startswith("+0.000 [")
    rows = next(rows for heading, rows in tables("table vit", rates, "--against random") if "Nc 5" in heading)
    against = {label: row["vs random"] for label, row in rows.items()}
    assert against["Random, lr 1.0"] == "-" and against["Top-k updates, lr 0.03"] == interval_of(
        [1.5 + 0.02 * seed for seed in range(6)]
    )
    collect(rates / "tuning")
    collect(rates)
    log = tmp_path / "rates.jsonl"
    log.write_text((rates / "results.jsonl").read_text() + (rates / "tuning" / "results.jsonl").read_text())
    assert dict(tables("table vit", log, "--against dense")) == every, "from the log too"


def test_what_is_measured_of_loras_factors_is_no_number_of_weights(tmp_path):
    write(tmp_path, "dense", 0, DENSE)
    change_rows(write(tmp_path, "lora", 0, DENSE, lora_r=7), lambda row: row | (CROSS if row["round"] else {}))
    for more, some in (("", ("cosine", "drift %")), ("--against dense", ("drift %", "random signs", "at random"))):
        rows = table("table vit", tmp_path, more)
        (lora,) = [row for label, row in rows.items() if label.startswith("Federated LoRA")]
        assert {lora[name] for name in some} == {"-"} and rows["Dense FedAvg"]["drift %"] != "-"
        assert lora["own loss"] == "-0.3000"


def test_what_goes_down_sets_rows_apart(tmp_path):
    for name, accuracy, more in (("up", 0.45, {}), ("both_ways", 0.42, {"download": "topk"})):
        write(tmp_path, name, 0, accuracy=accuracy, rate=0.01, upload="topk", **more)
    rows = table("table vit", tmp_path)
    assert {label: row["test % (last)"] for label, row in rows.items()} == {
        "Top-k updates": "45.00",
        "Top-k updates, top-k down too": "42.00",
    }


def test_a_matched_row_is_compared_with_the_dense_row_at_the_matched_rate(tmp_path):
    for seed in (0, 1):
        for name, command, accuracy in (
            ("dense_nc5", DENSE, 0.5),
            ("matched_dense_nc5", DENSE, 0.4),
            ("matched_random_nc5", SPARSE, 0.45),
            ("random_nc5", SPARSE, 0.48),
        ):
            write(tmp_path, name, seed, command, accuracy)
    rows = table("table vit", tmp_path, "--against dense")
    found = {label: row["vs dense"][:5] for label, row in rows.items() if label.startswith("Random")}
    assert found == {"Random": "-2.00", "Random, drift matched": "+5.00"}


def test_what_others_lose_is_compared_with_dense_training_where_clients_gain_as_much(tmp_path):
    def run(name, seed, command, rate, gain, loss, **more):
        end = (0.5 if name == "lowest" else gain / 100, 9.0 if seed else -0.001)
        rows = {10: (gain, loss), 20: (gain / 2, loss / 3), 30: end}

        def cross(row):
            own, others = rows.get(row["round"], (None, None))
            return row | ({"interference_own": -own, "interference_others": others} if own else {})

        change_rows(write(tmp_path, name, seed, command, rate=rate, **more), cross)

    for seed in range(6):
        for rate, gain in ((0.03, 1.6), (0.01, 0.4)):  # others lose 2 gain^1.5
            run(f"dense_{rate}", seed, DENSE, rate, gain, 2 * gain**1.5)
        factor = 0.5 + 0.1 * seed
        run("random", seed, SPARSE, 1.0, 0.9, factor * 2 * 0.9**1.5)
        run("lowest", seed, SPARSE, 1.0, 1.7, 9.0, mask_strategy="lowest_magnitude", interference_every=10)
        run("head", seed, DENSE, 0.1, 0.4, 2 * 0.4**1.5, accuracy=0.4, freeze_backbone=True, freeze_head=False)
        run("iid", seed, SPARSE, 1.0, 0.9, 9.0, sharding="iid")
    diverge(tmp_path / "lowest_seed_5", "left out")  # before anything was measured
    for seed in range(6):  # of two rates the better on validation images is what the others are compared with
        change_rows(
            tmp_path / f"dense_0.01_seed_{seed}", lambda row: row | {"val_accuracy": row["val_accuracy"] - 0.01}
        )
    head = "others' loss, times dense's at equal gain"
    (_, without), (_, rows) = sorted(tables("table vit", tmp_path, "--against dense"))
    logs = np.mean(np.log([[0.5 + 0.1 * (s + k) for s in range(3)] for k in (0, 3)]), axis=0)
    low, high = np.exp(ttest_1samp(logs, 0).confidence_interval())
    best = {label: row["vs dense"] == "-" for label, row in rows.items()}
    assert best.pop("Dense FedAvg, lr 0.03") and not any(best.values())
    cells = {label: row[head] for label, row in rows.items()}
    (random,) = [label for label in cells if label.startswith("Random")]
    (head_only,) = [label for label in cells if "head trained" in label]
    assert cells.pop(random) == f"{np.exp(logs.mean()):.2f} [{low:.2f}, {high:.2f}], 3"
    assert cells.pop(head_only) == "1.00 [1.00, 1.00], 3"
    assert set(cells.values()) == {"-"} and len(cells) == 3, "beyond dense training's gains"
    assert [row[head] for row in without.values()] == ["-"], "nor where no dense row is"

    (_, figure), _ = sorted(figures("vit", tmp_path, "gains").items())  # and one of IID shards
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("Lowest magnitude" in name and "1 of 6 diverged" in name for name in names)
    assert [axis.get_title() for axis in figure.axes] == ["round 10", "round 20"], "hardly a gain in round 30"
    for axis, share in zip(figure.axes, (1, 3), strict=True):
        (line,) = [line for line in axis.lines if len(line.get_xdata()) == 2]
        gain = np.array([0.4, 1.6])
        assert line.get_xdata() == pytest.approx(gain / (1 if share == 1 else 2))
        assert line.get_ydata() == pytest.approx(2 * gain**1.5 / share)
        assert {text.get_text() for text in axis.texts} == {"1", "2", "3", "4", "5"}


def diverge(folder, how):
    """Makes a run one that diverged, or nearly."""
    last = {"below": {"val_accuracy": 0.179}, "nearly": {"val_accuracy": 0.181}, "loss": {"val_loss": "nan"}}
    last["some left out"] = {"left_out_updates": 1}
    if how == "left out":
        (folder / "metrics.jsonl").unlink()
        ended = {"how": "failed", "by": "left_out", "round": 2, "clients": [3], "reason": "not finite"}
        change(folder, status="failed", ended=ended, results=None)
    else:
        change_rows(folder, lambda row: row | (last[how] if row["round"] == 30 else {}))


@pytest.mark.parametrize("how", ["below", "nearly", "loss", "left out", "some left out"])
def test_a_run_that_diverged_is_counted_and_in_no_mean(how, tmp_path):
    for seed, accuracy in enumerate((0.5, 0.45, 0.6)):
        write(tmp_path, "dense", seed, DENSE, accuracy=accuracy)
        folder = write(tmp_path, "random", seed, accuracy=accuracy - 0.05)
    diverge(folder, how)
    rows = table("table vit", tmp_path)
    row, good = rows["Random"], how == "nearly"
    assert rows["Dense FedAvg"]["diverged"] == "0 of 3" and row["seeds"] == "3"
    assert row["diverged"] == ("0 of 3" if good else "1 of 3")
    assert row["test % (last)"] == ("46.67 ± 7.64" if good else "42.50 ± 3.54")
    assert row["vs dense"] == "-5.00 ± 0.00"
    if how == "below":  # it may yet rise
        change(folder, status="interrupted")
        assert table("table vit", tmp_path, "--unfinished")["Random"]["diverged"] == "0 of 3"


def test_figures_draw_the_others_and_say_how_many_diverged(tmp_path):
    write_rates(tmp_path, seeds=3)
    for name, seeds in (("random_nc1_J4", (0, 1, 2)), ("dense_iid_J4", (1,))):
        for seed in seeds:
            diverge(tmp_path / f"{name}_seed_{seed}", "below")
    drawn = figures("vit", tmp_path)
    (axes,) = drawn["heterogeneity.png"].axes
    assert ticks(axes.xaxis) == ["Nc 1", "IID"] and texts_of(axes) == ["1 of 3 diverged", "3 of 3 diverged"]
    points = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axes.containers if c.lines[0] is not None}
    assert points["Dense FedAvg"] == pytest.approx([45, 90]) and points["Random"] == pytest.approx([49])
    about = " ".join(drawn["heterogeneity.png"].get_suptitle().split())
    assert (
        "without diverged runs (an update or the loss not finite, or below half of the accuracy before training)"
        in about
    )
    assert "each point at its own lr" in about, "one line for a method's tuned rates"
    (rows,) = drawn["strategy_comparison_shards_Nc_1_local_steps_4.png"].axes
    assert texts_of(rows) == ["45.0", "3 of 3 diverged"]
    accuracy, _ = drawn["strategies_curves_shards_Nc_1_local_steps_4.png"].axes
    assert "Random, lr 0.1 (3 of 3 diverged)" in lines_of(accuracy)
    own = drawn["cross_losses_shards_Nc_1_local_steps_4.png"].axes[0]
    assert ticks(own.yaxis) == ["Dense FedAvg, lr 0.01", "Random, lr 0.1 3 of 3 diverged"]


def test_accuracies_have_a_line_before_training_and_one_at_chance_where_the_axis_reaches_it(rates, tmp_path):
    drawn = figures("vit strategies", rates, out=tmp_path / "a")["strategy_comparison.png"]
    assert lines_of(drawn.axes[0])["before training (validation): 36.0 %"].get_xdata() == [36, 36]
    assert "chance: 2 %" in drawn.get_suptitle() and not any("chance" in name for name in lines_of(drawn.axes[0]))
    for seed, start in enumerate((0.02, 0.04)):
        folder = write(tmp_path / "low", "dense", seed, DENSE, 0.05)
        change_rows(folder, lambda row, x=start: row | ({"val_accuracy": x} if not row["round"] else {}))
        write(tmp_path / "low", "random", seed, accuracy=0.06)
    drawn = figures("vit curves", tmp_path / "low", out=tmp_path / "b")["strategies_curves.png"]
    lines = lines_of(drawn.axes[0])
    assert lines["chance: 2 %"].get_ydata() == [2, 2] and "chance" not in drawn.get_suptitle()


def test_measures_of_interference_have_the_level_of_updates_that_have_nothing_to_do_with_each_other(rates, tmp_path):
    figure = figures("vit interference", rates, out=tmp_path)["strategies_interference.png"]
    panels = {axes.get_ylabel().split()[0]: lines_of(axes) for axes in figure.axes[:5]}
    level = "orthogonal updates"
    at = [panels[name][level].get_ydata()[0] for name in ("Cosine", "Gradient")] + [
        figure.axes[4].lines[-1].get_ydata()[0]
    ]
    assert at == [0, 1, 3], "m = 10"
    conflicts = [1 - abs(sum(signs)) / 10 for signs in product((-1, 1), repeat=10)]
    (signs,) = [line for name, line in panels["Sign"].items() if name == "random signs of 10 clients"]
    assert signs.get_ydata()[0] == pytest.approx(100 * np.mean(conflicts))
    assert not set(lines_of(figure.axes[3])) & {level, "random signs of 10 clients"}, "drift has none"


def test_shards_are_drawn_from_a_log_with_the_counts_beside_it(tmp_path):
    counts = [[3, 0, 7], [0, 4, 1]]
    for nc in (5, 1):
        write_vit(tmp_path / "runs", sharding="non_iid", nc=nc, counts=counts, name=f"dense_nc{nc}_seed_0")
    collect(tmp_path / "runs")
    beside = tmp_path / "study" / "shards"
    beside.mkdir(parents=True)
    log = (tmp_path / "runs" / "results.jsonl").rename(beside.parent / "rates.jsonl")
    name = "dense_nc5_seed_0"
    line = ["-m", "json.tool", "--compact", tmp_path / "runs" / name / "shards.json", beside / f"{name}.json"]
    subprocess.run([sys.executable, *map(str, line)], check=True)  # the README's way
    assert (beside / f"{name}.json").read_text().count("\n") == 1
    drawn = figures("vit shards", log, out=tmp_path / "out")["shards.png"]
    assert drawn.axes[0].get_title().startswith("Nc 5 (seed 0)") and len(drawn.axes) == 2
    assert drawn.axes[0].images[0].get_array().filled(0).tolist() == counts


def test_the_repositorys_shards_are_of_runs_of_its_logs_and_of_no_machine():
    results = ROOT / "vit_sparse_fl" / "results"
    lines = [json.loads(line) for log in results.glob("*.jsonl") for line in log.read_text().splitlines()]
    for path in (results / "shards").glob("*.json"):
        assert path.stem in {line["name"] for line in lines}, path
        assert vit.read_counts(path).sum() > 0 and "/" not in path.read_text() and path.stat().st_size < 40_000
