"""Angular margins: the reference's numbers, and CosFace by hand."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.parts.losses import margin_cross_entropy
from tests.conftest import reference


@pytest.mark.parity
def test_numbers_of_the_reference():
    arrays = reference("raa/angular_loss")
    cases = sorted(key.removesuffix("_s") for key in arrays if key.endswith("_s") and not key.startswith("total"))
    assert {"arcface", "sphereface"} < set(cases)
    for case in cases:
        kind = "cosface" if re.fullmatch(r"c\d+", case) else case
        cosines = torch.from_numpy(arrays[f"{case}_logits"]).requires_grad_()
        labels = torch.from_numpy(arrays[f"{case}_labels"])
        loss = margin_cross_entropy(cosines, labels, float(arrays[f"{case}_s"]), float(arrays[f"{case}_m"]), kind)
        loss.backward()
        np.testing.assert_allclose(loss.item(), arrays[f"{case}_loss"], atol=1e-12, rtol=0, err_msg=case)
        np.testing.assert_allclose(cosines.grad.numpy(), arrays[f"{case}_grad"], atol=1e-12, rtol=0, err_msg=case)


def test_cosface_is_cross_entropy_with_the_margin_taken_off():
    cosines = torch.tensor([[0.5, 0.1], [0.2, 0.4]])
    expected = F.cross_entropy(20 * torch.tensor([[0.2, 0.1], [0.2, 0.1]]), torch.tensor([0, 1]))
    assert torch.allclose(margin_cross_entropy(cosines, torch.tensor([0, 1]), 20.0, 0.3), expected)


@pytest.mark.parametrize("kind", ["arcface", "sphereface"])
def test_angles_have_a_gradient_at_the_poles(kind):
    cosines = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], requires_grad=True)
    margin_cross_entropy(cosines, torch.tensor([0, 0]), 64.0, 0.5, kind).backward()
    assert torch.isfinite(cosines.grad).all()
