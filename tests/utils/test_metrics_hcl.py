"""Accuracy, forgetting and backward transfer against HCL's reference implementation."""

import numpy as np
import pytest
import torch

from tests.conftest import reference
from utils.metrics import backward_transfer, forgetting, forward_transfer

pytestmark = pytest.mark.parity


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


def test_class_and_task_incremental_accuracy():
    from models.parts.loop import count_correct

    arrays = reference("hcl/accuracy")
    size = int(arrays["classes_per_task"])
    for task, (logits, labels) in enumerate(zip(arrays["logits"], arrays["labels"], strict=True)):
        scores, targets = torch.from_numpy(logits).flatten(0, 1), torch.from_numpy(labels).flatten()
        class_il, task_il = count_correct(scores, targets, range(task * size, (task + 1) * size))
        assert 100 * class_il / len(targets) == pytest.approx(arrays["class_il"][task])
        assert 100 * task_il / len(targets) == pytest.approx(arrays["task_il"][task])
