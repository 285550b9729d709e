"""RAA's cosine head against the reference implementation."""

import pytest
import torch

from convs.heads import CosineHead
from tests.conftest import reference

pytestmark = pytest.mark.parity


def test_cosine_head():
    arrays = {key: torch.from_numpy(value) for key, value in reference("raa/cosine_head").items()}
    head = CosineHead(arrays["weight"].shape[1]).double()
    for total in arrays["sizes"].cumsum(0).tolist():
        head.grow(total)
    head.set_weight(arrays["weight"])
    x = arrays["x"].requires_grad_()
    logits = head(x)
    torch.testing.assert_close(logits, arrays["logits"], atol=1e-12, rtol=0)
    logits.backward(arrays["grad_out"])
    torch.testing.assert_close(x.grad, arrays["grad_x"], atol=1e-12, rtol=0)
    grad = torch.cat([block.grad for block in head.blocks])
    torch.testing.assert_close(grad, arrays["grad_weight"], atol=1e-12, rtol=0)
