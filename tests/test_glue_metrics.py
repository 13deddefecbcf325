"""GLUE's metrics against plain formulas in fp64, and by hand."""

import warnings

import numpy as np
import pytest

from common.cli import RunFailed
from common.seeding import stream
from lora_glue_fl.glue_tasks import TASKS, evaluate, score


def plain_matthews(p, y):
    tp, tn, fp, fn = (float(((p == a) & (y == b)).sum()) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))


def plain_f1(p, y):
    tp = ((p == 1) & (y == 1)).sum()
    return 2 * tp / ((p == 1).sum() + (y == 1).sum())


def plain_pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / np.sqrt((x @ x) * (y @ y))


def mean_ranks(x):
    return np.array([((x < v).sum() + (x <= v).sum() - 1) / 2 for v in x])


def test_by_hand():
    y, p = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])  # tp 2, fn 1, tn 1, fp 1
    assert score("accuracy", p, y) == 3 / 5 and score("f1", p, y) == pytest.approx(2 / 3)
    assert score("matthews", p, y) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert score("pearson", [0, 1, 2, 3], [0, 0, 1, 1]) == pytest.approx(2 / np.sqrt(5))
    assert score("spearman", [1, 10, 100], [1, 3, 2]) == pytest.approx(0.5)


def test_against_plain_formulas():
    generator = stream(0, "metrics")
    for _ in range(20):
        y, p = generator.integers(2, size=(2, 50))
        assert score("f1", p, y) == pytest.approx(plain_f1(p, y), abs=1e-12)
        assert score("matthews", p, y) == pytest.approx(plain_matthews(p, y), abs=1e-12)
        x, z = generator.integers(8, size=50) / 5.0, generator.normal(size=50)  # ties in one
        assert score("pearson", x, z) == pytest.approx(plain_pearson(x, z), abs=1e-12)
        assert score("spearman", x, z) == pytest.approx(plain_pearson(mean_ranks(x), mean_ranks(z)), abs=1e-12)


def test_constant_predictions_are_zero_with_a_warning():
    y, zeros = np.array([0, 1, 1, 0]), np.zeros(4, dtype=int)
    for metric in ("matthews", "pearson", "spearman"):
        with pytest.warns(UserWarning, match=f"all 4 predictions are the same: {metric} correlation"):
            assert score(metric, zeros + 2, y) == 0.0
        with pytest.warns(UserWarning, match="all 4 labels are the same"):
            assert score(metric, y, zeros) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score("f1", zeros, y) == score("f1", zeros, zeros) == 0.0  # class 1 is never predicted, nor there


def test_every_task_has_the_metrics_of_glue():
    others = {"cola": ["val_matthews"], "stsb": ["val_pearson", "val_spearman"]}
    others |= dict.fromkeys(("mrpc", "qqp"), ["val_accuracy", "val_f1"])
    for name, task in TASKS.items():
        labels = np.arange(6) % 5 if task.regression else np.arange(6) % task.num_labels
        perfect = labels[:, None] * 1.0 if task.regression else np.eye(task.num_labels)[labels] * 7 - 3
        metrics = evaluate(task, task.evaluation_splits[0], perfect, labels)
        assert list(metrics) == others.get(name, ["val_accuracy"])
        assert all(type(value) is float and value == pytest.approx(1.0) for value in metrics.values())


def test_outputs_that_are_not_finite():
    outputs = np.zeros((4, 2))
    outputs[1:3, 0] = np.nan
    with pytest.raises(RunFailed, match="2 of 4 outputs on rte are not finite: lower --learning-rate"):
        evaluate(TASKS["rte"], "validation", outputs, np.zeros(4, dtype=int))
