"""Symmetric cross-entropy on the current head: the reference's values and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.parts.losses import symmetric_cross_entropy
from tests.conftest import reference


@pytest.mark.parity
def test_values_and_gradients_of_the_reference():
    arrays = reference("slca/losses")
    known = int(arrays["known"])
    cases = [key.split("/")[1:3] for key in arrays if key.startswith("inputs/") and key.endswith("/logits")]
    assert cases
    for i, spread in cases:
        a, b = arrays[f"ab/{i}"].tolist()
        targets = torch.from_numpy(arrays[f"inputs/{i}/{spread}/targets"])
        for kind, weights in (("ce", (1.0, 0.0)), ("sce", (a, b))):
            logits = torch.from_numpy(arrays[f"inputs/{i}/{spread}/logits"]).requires_grad_()
            loss = symmetric_cross_entropy(logits[:, known:], targets - known, *weights)
            loss.backward()
            where = f"{kind}/{i}/{spread}"
            np.testing.assert_allclose(loss.item(), arrays[f"{where}/loss"], atol=2e-6, rtol=0, err_msg=where)
            np.testing.assert_allclose(logits.grad, arrays[f"{where}/grad"], atol=1e-7, rtol=0, err_msg=where)


def test_by_hand():  # p = (3/4, 1/4), y = 0: CE = log(4/3), RCE = 9.2103 / 4
    logits = torch.tensor([[np.log(3.0), 0.0]])
    loss = symmetric_cross_entropy(logits, torch.tensor([0]), 2.0, 0.5)
    assert loss.item() == pytest.approx(2 * np.log(4 / 3) + 0.5 * -np.log(1e-4) / 4, rel=1e-6)


def test_a_tiny_wrong_probability_has_no_reverse_gradient():
    logits = torch.tensor([[40.0, 0.0]], requires_grad=True)
    symmetric_cross_entropy(logits, torch.tensor([0]), 0.0, 1.0).backward()
    assert not logits.grad.any()


def test_without_the_reverse_part_it_is_cross_entropy():
    logits, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    assert torch.equal(symmetric_cross_entropy(logits, targets, 1.0, 0.0), F.cross_entropy(logits, targets))
