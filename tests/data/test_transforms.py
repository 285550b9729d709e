"""The evaluation transform of SLCA's data sets and its normalisation, against the reference's pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.transforms import MEAN_STD, RECIPES, Transform, as_tensor
from tests.conftest import reference


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("shape", [(32, 32), (40, 61)])
def test_every_recipe_gives_whole_pixels_of_the_asked_size(name, shape):
    image = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    out = Transform(name, 32)(image)
    assert out.shape == (3, 32, 32) and out.dtype == torch.uint8


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_recipe_says_whether_it_draws(name):
    image = np.random.RandomState(0).randint(0, 256, (48, 48, 3), dtype=np.uint8)
    transform = Transform(name, 32)
    torch.manual_seed(0)
    outputs = {transform(image).numpy().tobytes() for _ in range(8)}
    assert (len(outputs) > 1) == transform.random


def test_none_keeps_the_pixels():
    image = np.random.RandomState(0).randint(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    transform = Transform("none", 16)
    assert transform.is_identity_on(image) and not Transform("none", 8).is_identity_on(image)
    slow = torch.stack([transform(one) for one in image])
    assert torch.equal(slow, as_tensor(image, [0, 1, 2]))


def test_the_larger_size_before_a_centre_crop_is_256_for_224():
    image = Image.new("RGB", (500, 400))
    steps = RECIPES["resize_crop"].steps(224)
    assert steps[0](image).size == (320, 256)


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
