"""RAA's class statistics and alignment of a cosine head against the reference."""

import math

import numpy as np
import pytest
import torch

from models.parts.alignment import Alignment, Draws, align, mean_decay, upstream_tasks
from models.parts.gaussians import ClassGaussians
from tests.conftest import reference

pytestmark = pytest.mark.parity
RIDGE = 1e-3


def test_class_statistics_of_the_reference():
    """README: 1e-11, in float64 throughout."""
    arrays = reference("raa/class_stats")
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    gaussians = ClassGaussians(x.shape[1], ridge=RIDGE).double()
    seen = 0
    for task in range(sum(key.endswith("_means") for key in arrays)):
        total = len(arrays[f"t{task}_means"])
        chosen = (y >= seen) & (y < total)
        gaussians.add(x[chosen], y[chosen], task)
        np.testing.assert_allclose(gaussians.means.numpy(), arrays[f"t{task}_means"], atol=1e-11, rtol=0)
        covs = gaussians.dense_covariances()
        np.testing.assert_allclose(covs.numpy(), arrays[f"t{task}_covs"], atol=1e-11, rtol=0)
        if task == 0:
            traces = (covs.diagonal(dim1=1, dim2=2) - RIDGE + 1e-4).sum(dim=1)
            assert math.sqrt(traces.mean()) == pytest.approx(float(arrays["radius_times_sqrt768"]), abs=1e-11)
        seen = total


@pytest.mark.parametrize("prefix", ["", "norm_"])
def test_whole_stage_of_the_reference(prefix):
    """README: 1e-5, float32; "norm_" is the logit normalisation in place of the scale."""
    arrays = reference("raa/classifier_alignment")
    sizes = arrays["sizes"].tolist()
    labels = torch.arange(sum(sizes))
    gaussians = ClassGaussians(arrays["means"].shape[1])
    gaussians.add_moments(torch.from_numpy(arrays["means"]), torch.from_numpy(arrays["covs"]), labels, task=0)
    factor = mean_decay(upstream_tasks(labels, int(arrays["task_size"])), len(sizes) - 1)
    np.testing.assert_allclose(factor.numpy(), arrays["mean_factor"], atol=1e-12, rtol=0)
    settings = Alignment(
        epochs=int(arrays["epochs"]), lrate=float(arrays["lr"]), weight_decay=float(arrays["weight_decay"]),
        samples=int(arrays["per_class"]), tau=float(arrays["norm_temperature"]) if prefix else 0.0,
        cosine=True, scale=float(arrays["scale"]),
    )  # fmt: skip

    def draws(epoch: int) -> Draws:
        perm = torch.from_numpy(arrays["perm"][epoch]).long()
        return Draws(torch.from_numpy(arrays["eps"][epoch]), torch.empty(0), perm)

    weight = torch.from_numpy(arrays["w0"])
    aligned = align(weight, None, sizes, gaussians, settings, mean_factor=factor, draws=draws)
    np.testing.assert_allclose(aligned.losses.numpy(), arrays[f"{prefix}losses"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(aligned.weight.numpy(), arrays[f"{prefix}w_final"], atol=1e-5, rtol=0)
