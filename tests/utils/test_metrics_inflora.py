"""Grouped accuracy, with and without the task known, as InfLoRA's reference prints it."""

import numpy as np
import pytest

from tests.conftest import reference
from utils.metrics import grouped_accuracy


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
