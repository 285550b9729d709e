"""The evaluation transform of SLCA's data sets and its normalisation, against the reference's pixels."""

import numpy as np
import pytest
import torch

from data.transforms import MEAN_STD, Transform
from tests.conftest import reference

NORMALIZE = {"cifar100_224": "cifar"}  # the others: ImageNet's


@pytest.mark.parity
def test_pixels_of_the_reference():
    arrays = reference("slca/eval_transforms")
    names = sorted({key.split("/")[0] for key in arrays if "/" in key})
    assert names
    for name in names:
        image = arrays["small"] if name.startswith("cifar") else arrays["big"]
        channels, height, _ = arrays[f"{name}/shape"].tolist()
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in MEAN_STD[NORMALIZE.get(name, "imagenet")])
        pixels = (Transform("resize_crop_bicubic", height)(image).float().div(255) - mean) / std
        assert list(pixels.shape) == arrays[f"{name}/shape"].tolist() and channels == 3
        np.testing.assert_allclose(pixels[:, ::8, ::8], arrays[f"{name}/out_every8"], atol=1e-5, rtol=0)
        assert float(pixels.double().sum()) == pytest.approx(float(arrays[f"{name}/sum"]), abs=1e-2)
