"""Grouped and top-5 accuracy as RAA's reference prints them."""

import numpy as np
import pytest

from tests.conftest import reference
from utils.metrics import grouped_accuracy

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
