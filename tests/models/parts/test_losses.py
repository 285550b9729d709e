"""Losses against the references: values and gradients."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.foster import balanced
from models.parts.losses import (
    distillation,
    margin_cross_entropy,
    share_weighted_loss,
    soft_cross_entropy,
    symmetric_cross_entropy,
)
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


CLASSIC = reference("classic/losses")


def distillations(kind: str) -> list[str]:
    """Names before "/loss": kind/spread/temperature."""
    return [key.removesuffix("/loss") for key in CLASSIC if key.startswith(f"{kind}/") and key.endswith("/loss")]


def inputs(case: str):
    _, spread, temperature = case.split("/")
    pred, soft = (torch.from_numpy(CLASSIC[f"kd/{spread}/{name}"]) for name in ("pred", "soft"))
    return pred.requires_grad_(), soft, float(temperature)


@pytest.mark.parity
@pytest.mark.parametrize("case", distillations("kd"))
def test_soft_cross_entropy(case):
    pred, soft, temperature = inputs(case)
    loss = soft_cross_entropy(pred, soft, temperature)
    (grad,) = torch.autograd.grad(loss, pred)
    np.testing.assert_allclose(loss.item(), CLASSIC[f"{case}/loss"], atol=1e-10)
    np.testing.assert_allclose(grad, CLASSIC[f"{case}/grad"], atol=1e-10)
    (other,) = torch.autograd.grad(distillation(pred, soft, temperature), pred)
    torch.testing.assert_close(other / temperature**2, grad, atol=1e-10, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("case", distillations("bkd"))
def test_balanced_targets(case):
    pred, soft, temperature = inputs(case)
    wanted = balanced(soft, torch.from_numpy(CLASSIC[f"{case}/class_weights"]), temperature)
    loss = F.cross_entropy(pred / temperature, wanted)
    (grad,) = torch.autograd.grad(loss, pred)
    np.testing.assert_allclose(loss.item(), CLASSIC[f"{case}/loss"], atol=1e-10)
    np.testing.assert_allclose(grad, CLASSIC[f"{case}/grad"], atol=1e-10)


def test_share_weighted_loss_by_hand():
    """One old class of three: a third of the distillation, two thirds of the cross-entropy."""
    logits, old, targets = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.3]]), torch.tensor([1])
    expected = 2 / 3 * F.cross_entropy(logits, targets)  # one class alone has nothing to distil
    torch.testing.assert_close(share_weighted_loss(logits, old, targets, temperature=2.0), expected)
