"""Figures and table of --replay on made rows: loss against error and dose, whose numbers are known."""

import numpy as np
import pytest
from fixed_runs import change_rows, write_glue
from plotting import figures, run

from plots.glue_replay import SPLITS
from plots.seeds import interval

ERROR = {"svd": 0.04, "naive": 0.1, "rotate": 0.09, "florana": 0.07, "exact": 0.0}
ERROR |= {"residual_0.5": 0.05, "residual_1": 0.0, "residual_2": 0.1, "start": 0.5}


def losses(row, cell, seed):
    """What a row costs beside exact: 2 error^2 on training data, 3 error on validation data; rounding of 1e-4."""
    cost = ERROR[row] * (1 + cell)
    extra = 1e-4 * (row == "residual_1")
    noise = 0.01 * seed * (row == "svd")
    return {"train_loss": 0.3 + seed + 2 * cost**2 + extra, "val_loss": 0.4 + seed + 3 * cost + extra + noise}


def write(root, cell, seed, **more):
    data = {"clients": 3 + cell, "examples": [30] * 3}
    folder = write_glue(root, seed=seed, aggregate="naive", data=data, **more)

    def replayed(row):
        every = {name: {"error": e * (1 + cell)} | losses(name, cell, seed) for name, e in ERROR.items()}
        return row | ({"replay": every} if row["round"] == 3 else {})

    change_rows(folder, replayed)


def points(axis, label):
    container = next(c for c in axis.containers if c.get_label() == label)
    x, y = container.lines[0].get_data()
    half = [np.ptp(segment[:, 1]) / 2 for segment in container.lines[2][0].get_segments()]
    return np.array(sorted(zip(x, y, half, strict=True)))


def test_loss_stands_against_the_error_and_the_dose(tmp_path):
    for cell in (0, 1):
        for seed in (0, 1, 2):
            write(tmp_path, cell, seed)
    write_glue(tmp_path, seed=7, aggregate="naive")  # without --replay
    drawn = figures("glue replay", tmp_path)
    assert sorted(drawn) == ["replay_dose.png", "replay_error.png", "replay_error_train.png"]
    (train,), (val,) = (drawn[f"replay_error{split}.png"].axes for split in ("_train", ""))
    assert points(train, "Naive") == pytest.approx(np.array([[20, 0.02, 0], [20, 0.08, 0]]), abs=1e-9)
    low, high = interval(3 * 0.04 + 0.01 * np.arange(3))
    assert points(val, "SVD")[0] == pytest.approx([8, 0.13, (high - low) / 2])
    assert [len(points(axis, "FLoRA-NA")) for axis in (train, val)] == [2, 2]
    assert "2 settings, 3 seeds" in drawn["replay_error.png"].get_suptitle()
    assert val.patches[0].get_height() == pytest.approx(2e-4)

    train, val = drawn["replay_dose.png"].axes
    assert [axis.get_ylabel().partition("\n")[0] for axis in (train, val)] == list(SPLITS.values())
    x, loss, half = points(val, "4 clients").T
    assert x == pytest.approx([0, 0.5, 1, 2], abs=0.05)
    assert loss == pytest.approx([0.6, 0.3, 1e-4, 0.6]) and half == pytest.approx([0] * 4, abs=1e-9)
    assert len(points(train, "3 clients")) == 4


def test_a_column_per_number_of_local_epochs_and_a_line_per_setting_that_says_what_sets_it_apart(tmp_path):
    for epochs in (4.0, 1.0):
        write(tmp_path, 0, 0, local_epochs=epochs)
        write(tmp_path, 0, 0, local_epochs=epochs, lora_r=8, lora_alpha=16.0)
        write(tmp_path, 0, 0, local_epochs=epochs, lora_r=8, lora_alpha=16.0, mu=0.1)
    axes = figures("glue replay", tmp_path)["replay_dose.png"].axes
    assert [axis.get_title() for axis in axes] == ["1 local epoch", "4 local epochs", "", ""]
    for axis in axes:
        assert [c.get_label() for c in axis.containers] == ["r 4", "r 8", "r 8, FedProx 0.1"]


def test_a_row_that_is_not_finite_and_one_that_is_missing_are_no_points(tmp_path):
    write(tmp_path, 0, 0)
    folder = next(tmp_path.glob("*/run.json")).parent

    def spoiled(row):
        if "replay" in row:
            row["replay"]["naive"]["val_loss"] = "NaN"
            del row["replay"]["florana"]
        return row

    change_rows(folder, spoiled)
    drawn = figures("glue replay", tmp_path)
    train, val = (drawn[f"replay_error{split}.png"].axes[0] for split in ("_train", ""))
    labels = [{c.get_label() for c in axis.containers} for axis in (train, val)]
    assert labels[0] - labels[1] == {"Naive"} and "FLoRA-NA" not in labels[0] and "SVD" in labels[1]
    assert points(train, "SVD")[0] == pytest.approx([8, 2 * 0.04**2, 0])


def test_the_table_has_a_row_a_setting_and_loss_with_paired_differences(tmp_path):
    for seed in (0, 1, 2):
        write(tmp_path, 0, seed)
    said = run("table glue", tmp_path, "--replay")[0]
    low, high = interval(3 * 0.04 + 0.01 * np.arange(3))
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| mean over seeds")]
    over = ["clients' training examples", "validation examples", "validation examples, refit"]
    assert [row[1] for row in rows] == over[:2]
    assert rows[0][2:4] == ["1.300 ± 1.000", "20.0 ± 0.0"]
    assert rows[0][4:6] == ["-0.4800 [-0.4800, -0.4800], 3", "+0.0200 [+0.0200, +0.0200], 3"]
    assert rows[1][6] == f"+0.1300 [{low:+.4f}, {high:+.4f}], 3" and rows[1][7] == "none of 3 finite"
