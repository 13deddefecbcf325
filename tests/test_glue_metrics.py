"""GLUE's metrics against plain formulas in fp64, and by hand."""

import numpy as np
import pytest
from scipy import stats

from common.cli import RunFailed
from lora_glue_fl.glue_tasks import TASKS, evaluate, score


def test_by_hand():
    y, p = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 0, 1])  # tp 2, fn 1, tn 1, fp 1
    assert score("accuracy", p, y) == 3 / 5 and score("f1", p, y) == pytest.approx(2 / 3)
    assert score("matthews", p, y) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    assert score("pearson", [0, 1, 2, 3], [0, 0, 1, 1]) == pytest.approx(2 / np.sqrt(5))
    assert score("spearman", [1, 10, 100], [1, 3, 2]) == pytest.approx(0.5)


def test_constant_predictions_are_zero():
    y, zeros = np.array([0, 1, 1, 0]), np.zeros(4, dtype=int)
    for metric in ("pearson", "spearman"):
        with pytest.warns(stats.ConstantInputWarning):
            assert score(metric, zeros + 2, y) == 0.0
    assert score("f1", zeros, y) == score("matthews", zeros, y) == 0.0


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
