"""The figures of mamba_fl's gap: which runs are in which mean, ratios and intervals by hand."""

import numpy as np
import pytest
from fixed_runs import change, change_rows, write_mamba
from plotting import figures
from scipy.stats import ttest_1samp

CENTRAL = (100.0, 104.0, 96.0)
KEEP = {1: (110.0, 116.0, 108.0), 8: (120.0, 121.0, 119.0)}
POOLED = {1: (101.0, 103.0, 97.0), 8: (106.0, 111.0, 99.0)}


def write(root, command, seed, ppl, tuned=None, **more):
    """A run whose test perplexity is ppl, and the validation perplexity tuned (by default ppl)."""
    folder = write_mamba(root, command, seed=seed, ppl=(400.0, 200.0, tuned or ppl), **more)
    change(folder, results={"test_ppl_last": ppl, "final_val_ppl": ppl, "tokens": 3000})
    change_rows(folder, lambda row: row | {"bytes_up": 8e6 * row["round"], "bytes_down": 4e6 * row["round"]})


@pytest.fixture
def runs(tmp_path):
    """Three seeds of each cell at its own rate; in tuning/ three rates of central training and of keep, LU 1."""
    root = tmp_path / "runs"
    for seed in range(3):
        write(root, "central", seed, CENTRAL[seed], lr=0.004)
        for form, values in (("keep", KEEP), ("pooled", POOLED)):
            for lu, ppl in values.items():
                write(root, "fed_avg", seed, ppl[seed], lr=0.008, local_updates=lu, client_state=form)
        write(root, "fed_avg", seed, 50.0, lr=0.008, client_state="keep", batch_size=8)  # other methods, other
        write(root, "central", seed, 60.0, lr=0.008, batch_size=32)  # central training: not what keep is measured by
        write(root, "central", seed, 70.0, lr=0.008, beta2=0.99)
    for lr, ppl in ((0.002, 108.0), (0.004, 100.0), (0.008, "inf")):
        write(root / "tuning", "central", 100, 1.0, ppl, lr=lr)
        write(root / "tuning", "fed_avg", 100, 1.0, 130.0, lr=lr, client_state="keep")
    return root


def both(runs):
    return f"--data-dir {runs} {runs}/tuning"


def test_the_gap_is_the_geometric_mean_of_the_ratios_with_the_interval_of_a_paired_t_test(runs, tmp_path):
    left, right = figures("mamba gap", runs, f"gap {both(runs)}", tmp_path / "out")["5_gap.png"].axes
    own, pooled = right.containers
    for container, values in ((own, KEEP), (pooled, POOLED)):
        line, _, (bar,) = container.lines
        for (lu, y), segment in zip(line.get_xydata(), bar.get_segments(), strict=True):
            logs = np.log(values[lu]) - np.log(CENTRAL)
            interval = ttest_1samp(logs, 0).confidence_interval()
            assert y == pytest.approx(np.exp(logs.mean()))
            assert segment[:, 1] == pytest.approx(np.exp([interval.low, interval.high]))
    (line, _) = left.get_lines()  # and the line at 1
    assert line.get_xydata().tolist() == [[1, 1.3]]  # keep at 0.004, the best of the finite ones
    assert "0.004" in left.get_title() and "3 seeds" in right.get_title()


def test_bytes_and_rates(runs, tmp_path):
    drawn = figures("mamba gap", runs, f"frontier rates {both(runs)}", tmp_path / "out")
    keep, pooled, central = drawn["6_frontier.png"].axes[0].get_lines()
    assert keep.get_xydata().tolist() == [[9.0, np.mean(KEEP[1])], [9.0, 120.0]]  # 3 rounds x 12 MB over 4 clients
    assert pooled.get_xydata()[0, 1] == pytest.approx(np.mean(POOLED[1])) and central.get_ydata()[0] == 100.0
    axes = drawn["7_rates.png"].axes
    assert [axis.get_title() for axis in axes] == ["LU 1"]
    central, diverged, *_ = axes[0].get_lines()
    assert central.get_xydata().tolist() == [[0.002, 108.0], [0.004, 100.0]]
    assert diverged.get_xdata().tolist() == [0.008]
