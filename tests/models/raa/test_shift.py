"""Semantic shift: the reference's numbers, and by hand."""

import re

import numpy as np
import pytest
import torch

from models.raa import shift
from models.raa.shift import FeaturesBefore, mean_shift
from tests.conftest import reference


@pytest.mark.parity
def test_numbers_of_the_reference():
    arrays = reference("raa/mean_shift")
    cases = [(key, re.fullmatch(r"(\w+)_gap_sigma([\d.]+)", key)) for key in arrays]
    cases = [(key, match) for key, match in cases if match]
    assert cases
    for key, match in cases:
        means, before, after = (torch.from_numpy(arrays[f"{match[1]}_{name}"]) for name in ("means", "y1", "y2"))
        found = mean_shift(means, before, after, float(match[2]))
        np.testing.assert_allclose(found.numpy(), arrays[key], atol=1e-13, rtol=0, err_msg=key)


def test_a_mean_goes_with_the_images_around_it_and_a_far_one_with_all():
    before = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    after = before + torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    means = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 999.0]], dtype=torch.float64)
    found = mean_shift(means, before, after, sigma=1.0)
    assert torch.allclose(found, torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 1.0]]).double(), atol=1e-4)
    assert torch.equal(means[0], torch.zeros(2).double())


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_blocks_of_images_change_nothing(rows, monkeypatch):
    torch.manual_seed(0)
    means, before = torch.randn(4, 5, dtype=torch.float64), torch.randn(7, 5)
    after = before + torch.randn(7, 5)
    whole = mean_shift(means, before, after, 1.0)
    monkeypatch.setattr(shift, "ROWS", rows)
    torch.testing.assert_close(mean_shift(means, before, after, 1.0), whole, rtol=1e-12, atol=1e-12)


def test_kept_features_survive_a_checkpoint():
    kept, other = FeaturesBefore(3), FeaturesBefore(3)
    kept.keep(torch.ones(4, 3))
    other.load_state_dict(kept.state_dict())
    assert torch.equal(other.rows, torch.ones(4, 3))
    kept.forget()
    other.load_state_dict(kept.state_dict())
    assert len(other) == len(kept) == 0
