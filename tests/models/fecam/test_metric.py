"""FeCAM's metric: the reference's shrinkage, correlations and distances."""

import re

import pytest
import torch
import torch.nn.functional as F

from models.fecam.metric import ClassMetrics, by_variance, moments, shrunk, whitening
from tests.conftest import reference
from tests.convs.vits import numbers
from utils.errors import UserError


def near(ours: torch.Tensor, stored, tolerance: float = 1e-9) -> None:
    stored = torch.from_numpy(stored)
    assert (ours - stored).abs().max() <= tolerance * stored.abs().max()


@pytest.mark.parity
def test_authors_functions():
    arrays = reference("fecam/authors")
    labels = numbers(arrays, r"features/(\d+)")
    rows = [torch.from_numpy(arrays[f"features/{label}"]) for label in labels]
    owners = torch.tensor(labels).repeat_interleave(torch.tensor([len(r) for r in rows]))
    classes, means, covs = moments(F.normalize(torch.cat(rows), dim=1), owners)
    assert classes == labels
    variants = sorted({found[0] for key in arrays if (found := re.match(r"alpha_([\d.]+)_([\d.]+)/", key))})
    assert variants
    for prefix in variants:
        alphas = [float(part) for part in prefix.strip("/").split("_")[1:]]
        found = torch.stack([shrunk(cov, *alphas) for cov in covs])
        near(found, arrays[f"{prefix}shrunk"])
        correlations = torch.stack([by_variance(cov) for cov in found])
        near(correlations, arrays[f"{prefix}correlation"])
        metrics = ClassMetrics(means.shape[1]).double()
        metrics.add(correlations, means, full_rank=True)
        near(metrics.distances(F.normalize(torch.from_numpy(arrays["test"]), dim=1)), arrays[f"{prefix}distances"])


@pytest.mark.parity
def test_pilots_correlation_of_rows():
    """Also checks the means; the metric of all classes, task by task."""
    arrays = reference("fecam/run")
    order = torch.from_numpy(arrays["class_order"]).argsort()
    positions, metrics = order[torch.from_numpy(arrays["y_train"])], None
    for task in numbers(arrays, r"features/(\d+)"):
        features = torch.from_numpy(arrays[f"features/{task}"])
        classes, means, covs = moments(features, positions[torch.from_numpy(arrays[f"order/{task}"])])
        metrics = metrics or ClassMetrics(features.shape[1]).double()
        assert classes == list(range(len(metrics), len(metrics) + len(classes)))
        near(means, arrays[f"means/{task}"][classes])
        eye = torch.eye(features.shape[1], dtype=torch.float64)
        correlations = torch.stack([torch.corrcoef(cov + arrays["shrinkage"].item() * eye) for cov in covs])
        near(correlations, arrays["correlations"][classes])
        metrics.add(correlations, F.normalize(means, dim=1), full_rank=False)
        test = F.normalize(torch.from_numpy(arrays[f"test_features/{task}"]), dim=1)
        near(metrics.distances(test), arrays[f"distances/{task}"])


def test_one_image_and_dead_channels():
    features = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0], [0.5, 0.5, 0.5]])
    classes, means, covs = moments(features, torch.tensor([0, 0, 1]))
    assert classes == [0, 1] and not covs[1].any()
    assert torch.equal(by_variance(shrunk(covs[1], 1.0, 0.0)), torch.eye(3, dtype=torch.float64))
    assert torch.equal(by_variance(covs[0])[2], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    assert by_variance(covs[0]).isfinite().all()


def test_many_classes_go_in_pieces(monkeypatch):
    metrics, features = ClassMetrics(4).double(), torch.randn(3, 4, dtype=torch.float64)
    roots = torch.randn(5, 4, 9, dtype=torch.float64)
    metrics.add(roots @ roots.mT, torch.randn(5, 4), full_rank=True)
    whole = metrics.distances(features)
    monkeypatch.setattr("models.fecam.metric.ROOM", 24)
    assert torch.allclose(metrics.distances(features), whole, atol=1e-12)


def test_an_indefinite_matrix_is_answered():
    with pytest.raises(UserError, match="a2 <= a1"):
        whitening(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64))
