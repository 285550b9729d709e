"""Class means: a class that comes back goes on with its sum and count."""

import pytest
import torch

from models.parts.prototypes import ClassMeans, cosines
from tests.conftest import reference
from tests.convs.vits import close, numbers


@pytest.mark.parity
def test_domains():
    """APER's prototypes over two domains, by hand."""
    arrays = reference("aper/domains")
    means = ClassMeans(arrays["test_features"].shape[1])
    for domain in numbers(arrays, r"features/(\d+)"):
        means.grow(len(arrays[f"prototypes/{domain}"]))
        means.add(*(torch.from_numpy(arrays[f"{name}/{domain}"]) for name in ("features", "labels")))
        close(means.exact_means, arrays[f"prototypes/{domain}"], 1e-9)
        scores = cosines(torch.from_numpy(arrays["test_features"]), means.exact_means)
        close(scores, arrays[f"logits/{domain}"], 1e-9)
