"""Grouped and top-k accuracy as SLCA's reference prints them."""

import numpy as np
import pytest

from tests.conftest import reference
from utils.metrics import grouped_accuracy, top_k_accuracy

ROUNDED = 0.005 + 1e-9  # the reference rounds to two decimals


@pytest.mark.parity
def test_numbers_of_the_reference():
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
