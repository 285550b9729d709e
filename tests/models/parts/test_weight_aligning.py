"""Weight aligning against the references' functions."""

import numpy as np
import pytest
import torch

from models.parts.weight_aligning import align_new_rows
from tests.conftest import reference

ARRAYS = reference("classic/losses")


@pytest.mark.parity
@pytest.mark.parametrize("case", [key.removesuffix("/before") for key in ARRAYS if key.endswith("/before")])
def test_align_new_rows(case):
    weight, new = torch.from_numpy(ARRAYS[f"{case}/before"]), int(ARRAYS[f"{case}/increment"])
    known = len(weight) - new
    factor = float(ARRAYS["align/foster/value"]) ** (known / new) if "foster" in case else 1.0
    align_new_rows(weight, known, factor)
    np.testing.assert_allclose(weight, ARRAYS[f"{case}/after"], atol=1e-6)


def test_by_hand():
    weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]])
    assert align_new_rows(weight, 2) == 1.5  # (5 + 1) / 2 over 2
    assert weight.tolist() == [[3.0, 4.0], [0.0, 1.0], [3.0, 0.0]]
