"""Numbers worked out by hand."""

import numpy as np
import pytest
import torch

from tests.conftest import reference
from utils.metrics import (
    backward_transfer,
    forgetting,
    forward_transfer,
    grouped_accuracy,
    pooled_curve,
    summarise,
    task_mean_curve,
    top_k_accuracy,
)

nan = np.nan


# task 0: 90 -> 80 -> 60, task 1: 70 -> 75, task 2: 50
ACC = np.array([[90, nan, nan], [80, 70, nan], [60, 75, 50]])


def test_forgetting_by_hand():
    # the best before the last row: 90 and 70; (90 - 60 + 70 - 75) / 2
    assert forgetting(ACC) == 12.5


def test_forgetting_is_clipped_when_the_last_row_counts():
    # task 1 is best in the last row, so it contributes 0: (30 + 0) / 2
    assert forgetting(ACC, include_last=True) == 15


def test_forgetting_may_be_negative():
    assert forgetting(np.array([[50, nan], [60, 70]])) == -10


def test_backward_transfer_by_hand():
    assert backward_transfer(ACC) == ((60 - 90) + (75 - 70)) / 2


def test_one_task_has_neither():
    assert forgetting(np.array([[50.0]])) is None and backward_transfer(np.array([[50.0]])) is None


def test_pooled_and_task_mean_differ_for_unequal_test_sets():
    correct, count = np.array([[9, nan], [6, 1]]), np.array([10, 2])
    acc = 100 * correct / count
    np.testing.assert_allclose(pooled_curve(correct, count), [90, 100 * 7 / 12])
    np.testing.assert_allclose(task_mean_curve(acc), [90, (60 + 50) / 2])


def test_summary_by_hand():
    correct = np.array([[9, nan], [6, 1]])
    known = np.array([[10, nan], [8, 2]])
    summary = summarise(correct, known, np.array([10.0, 2.0]))
    assert summary["last_acc"] == pytest.approx(100 * 7 / 12)
    assert summary["avg_acc"] == pytest.approx((90 + 100 * 7 / 12) / 2)
    assert summary["last_acc_task_il"] == pytest.approx(100 * 10 / 12)
    assert summary["avg_acc_task_mean"] == pytest.approx((90 + 55) / 2)
    assert summary["forgetting"] == 30 and summary["bwt"] == -30
    assert summary["acc"] == [[90, None], [60, 50]]


def test_what_was_evaluated_beforehand_counts_in_the_curve_but_is_not_forgotten():
    correct = np.array([[9, 2], [6, 1]])  # all domains each time; the second was better before it was learned
    summary = summarise(correct, correct, np.array([10.0, 2.0]))
    assert summary["curve"] == pytest.approx([100 * 11 / 12, 100 * 7 / 12])
    assert summary["forgetting"] == 30 and summary["forgetting_clipped"] == 30
    assert summary["acc"] == [[90, 100], [60, 50]]
    first = summarise(correct[:1], correct[:1], np.array([10.0, 2.0]))  # after the first task of two
    assert first["curve"] == pytest.approx([100 * 11 / 12]) and first["forgetting"] is None


@pytest.mark.parity
def test_forgetting_and_backward_transfer():
    """HCL counts missing entries as 0 and lets the maximum run over the last row."""
    arrays = reference("hcl/metrics")
    for key in [key for key in arrays if key.startswith("matrix_")]:
        index = key.removeprefix("matrix_")
        matrix = arrays[key]
        acc = np.where(np.tril(np.ones_like(matrix)) > 0, matrix, np.nan)
        assert backward_transfer(acc) == pytest.approx(float(arrays[f"bwt_plain_{index}"]), abs=1e-12)
        assert forgetting(acc, include_last=True) == pytest.approx(
            float(arrays[f"forgetting_plain_{index}"]), abs=1e-12
        )


@pytest.mark.parity
def test_metrics_with_forward_entries():
    """A row holds the next task too: the accuracy on it before it is learnt."""
    arrays = reference("hcl/metrics")
    for key in [key for key in arrays if key.startswith("matrix_")]:
        index = key.removeprefix("matrix_")
        matrix = arrays[key]
        acc = np.where(np.tril(np.ones_like(matrix), k=1) > 0, matrix, np.nan)
        ours = (
            backward_transfer(acc),
            forgetting(acc, include_last=True),
            forward_transfer(acc, arrays[f"random_{index}"]),
        )
        for value, name in zip(ours, ("bwt_fwd", "forgetting_fwd", "fwt"), strict=True):
            assert value == pytest.approx(float(arrays[f"{name}_{index}"]), abs=1e-12)


@pytest.mark.parity
def test_class_and_task_incremental_accuracy():
    from models.parts.evaluation import right_predictions

    arrays = reference("hcl/accuracy")
    size = int(arrays["classes_per_task"])
    for task, (logits, labels) in enumerate(zip(arrays["logits"], arrays["labels"], strict=True)):
        scores, targets = torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(labels).flatten()
        foreign = torch.ones_like(scores, dtype=torch.bool)
        foreign[:, task * size : (task + 1) * size] = False
        class_il, task_il, _ = (right.sum() for right in right_predictions(scores, targets, foreign))
        assert 100 * class_il / len(targets) == pytest.approx(arrays["class_il"][task])
        assert 100 * task_il / len(targets) == pytest.approx(arrays["task_il"][task])


@pytest.mark.parity
def test_evaluation_of_the_reference():  # README: exact, two decimals
    arrays = reference("inflora/evaluation")
    logits, labels, width = arrays["logits"], arrays["targets"], int(arrays["per_task"])
    predicted = logits.argmax(axis=1)
    by_task = logits.reshape(len(logits), -1, width)
    within = by_task[np.arange(len(labels)), labels // width].argmax(axis=1) + labels // width * width
    for name, given in (("grouped", predicted), ("task_known", within)):
        grouped = grouped_accuracy(given, labels, int(arrays["old_classes"]), width)
        assert list(grouped) == arrays[f"{name}_names"].tolist()
        assert [round(value, 2) for value in grouped.values()] == arrays[name].tolist()
    task_right = grouped_accuracy(predicted // width, labels // width, known_classes=0)["total"]
    assert task_right == pytest.approx(100 * float(arrays["task_id_accuracy"]), abs=1e-12)


ROUNDED = 0.005 + 1e-9  # the reference rounds to two decimals


@pytest.mark.parity
def test_numbers_of_the_reference():
    """Some stored rows name a class twice, which no prediction does, and the reference counts both."""
    arrays = reference("raa/metrics")
    best, y = arrays["top5"], arrays["y_true"]
    grouped = grouped_accuracy(best[:, 0], y, known_classes=int(arrays["known"]))
    assert list(grouped) == arrays["grouped_keys"].tolist()
    np.testing.assert_allclose(list(grouped.values()), arrays["grouped_values"], atol=ROUNDED, rtol=0)
    assert grouped["total"] == pytest.approx(float(arrays["top1"]), abs=ROUNDED)
    assert 100 * (best == y[:, None]).sum() / len(y) == pytest.approx(float(arrays["top5_acc"]), abs=ROUNDED)


@pytest.mark.parity
def test_numbers_of_the_reference_of_slca():
    arrays = reference("slca/metrics")
    cases = sorted({key.split("/")[0] for key in arrays})
    assert cases
    for i in cases:
        best, y = arrays[f"{i}/pred"], arrays[f"{i}/y"]
        grouped = grouped_accuracy(best[:, 0], y, known_classes=int(arrays[f"{i}/old"]))
        assert list(grouped) == arrays[f"{i}/keys"].tolist()
        np.testing.assert_allclose(list(grouped.values()), arrays[f"{i}/values"], atol=ROUNDED, rtol=0)
        assert grouped["total"] == pytest.approx(float(arrays[f"{i}/top1"]), abs=ROUNDED)
        top = top_k_accuracy(best, y, int(arrays[f"{i}/topk"]))
        assert top == pytest.approx(float(arrays[f"{i}/top5"]), abs=ROUNDED)


def test_groups_by_hand():
    y = np.array([0, 1, 11, 12, 20])  # 20 is the last class and a multiple of ten: it has no group
    grouped = grouped_accuracy(np.array([0, 2, 11, 11, 20]), y, known_classes=11)
    assert grouped == {"total": 60.0, "00-09": 50.0, "10-19": 50.0, "old": 50.0, "new": pytest.approx(200 / 3)}


def test_no_old_classes_count_as_zero():
    assert grouped_accuracy(np.array([1]), np.array([1]), known_classes=0)["old"] == 0.0
