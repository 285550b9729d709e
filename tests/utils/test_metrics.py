"""Numbers worked out by hand."""

import numpy as np
import pytest

from utils.metrics import backward_transfer, forgetting, pooled_curve, summarise, task_mean_curve

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
