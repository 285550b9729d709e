"""COIL's transport against the reference's plans; equal masses; its answers."""

import builtins
import warnings

import numpy as np
import pytest
import torch

from models.coil.transport import backward_rows, forward_rows, plan, prototypes
from tests.conftest import reference
from utils.errors import UserError

ARRAYS = reference("gem_coil/coil_transport")
CASES = sorted({key.split("/")[0] for key in ARRAYS if key.endswith("/prototypes")})


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_both_directions(case):
    """Costs and plans 1e-9, rows 3e-6; the reference's masses are unequal where n > m."""
    given = {key.removeprefix(f"{case}/"): torch.from_numpy(v) for key, v in ARRAYS.items() if key.startswith(case)}
    regulariser, norm = float(ARRAYS["reg"]), float(ARRAYS["norm"])
    before, current = given["weight_before"], given["weight_current"]
    old, new = given["prototypes"][: len(before)], given["prototypes"][len(before) :]
    rows, gamma, found = forward_rows(old, new, before, regulariser, norm)
    np.testing.assert_allclose(torch.cdist(old, new, p=norm), given["forward/cost"], atol=1e-12)
    np.testing.assert_allclose(found, given["forward/plan"], atol=1e-9)
    np.testing.assert_allclose(rows, given["forward/new_weight"], atol=3e-6)
    np.testing.assert_allclose(gamma, given["forward/calibration"], atol=3e-6)
    rows, found = backward_rows(old, new, current[len(before) :], regulariser, norm)
    np.testing.assert_allclose(found, given["backward/plan"], atol=1e-9)
    np.testing.assert_allclose(gamma * rows, given["backward/old_weight"], atol=3e-6)


@pytest.mark.parametrize(("old", "new"), [(20, 2), (2, 20), (95, 5)])
def test_masses_are_equal_whatever_the_numbers(old, new):
    """Far beyond n/m = 2, where the published form breaks down, the plan meets both of its sums without a warning."""
    rng = np.random.RandomState(0)
    cost = torch.from_numpy(rng.uniform(0.5, 1.5, (old, new)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = plan(cost, old, 0.464)
    np.testing.assert_allclose(found.sum(axis=1), 1 / old, atol=1e-10)
    np.testing.assert_allclose(found.sum(axis=0), 1 / new, atol=1e-10)


def test_prototypes_by_hand():
    features = torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, 2.0]])
    found = prototypes(features, torch.tensor([1, 1, 0]), 2)
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [0.5**0.5, 0.5**0.5]], dtype=torch.float64))


def test_missing_package_is_named(monkeypatch):
    importing = builtins.__import__

    def without(name, *args, **keys):
        if name == "ot":
            raise ImportError(name)
        return importing(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install POT"):
        plan(torch.ones(2, 2), 2, 0.5)
