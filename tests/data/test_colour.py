"""Jitter, grey and blur of a batch against Pillow and torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import functional as tv

from data import colour
from data.batched import BATCHED, apply
from data.transforms import Transform

N = 3000


def pictures(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_each_step_is_pillow_s():
    images = pictures(8, 40)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()

    def theirs(function, *arguments) -> torch.Tensor:
        made = [np.array(function(Image.fromarray(image), *arguments)) for image in images]
        return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()

    factor = torch.full((8, 1, 1, 1), 1.3)
    steps = (
        (colour._brightness, tv.adjust_brightness), (colour._contrast, tv.adjust_contrast),
        (colour._saturation, tv.adjust_saturation),
    )  # fmt: skip
    for ours, other in steps:
        difference = (ours(x.clone(), factor) - theirs(other, 1.3)).abs()
        assert difference.max() <= 1 and difference.mean() < 0.01, ours.__name__
    blurred = colour._blur(x, torch.full((8,), 1.2))
    assert (blurred - theirs(tv.gaussian_blur, 7, [1.2, 1.2])).abs().max() <= 1
    # Pillow turns the hue in 256 steps, which moves a channel by up to 6 * 255 / 256 / 2 and rounding.
    turned = colour._hue(x, torch.full((8, 1, 1, 1), 0.07))
    difference = turned - theirs(tv.adjust_hue, 0.07)
    assert difference.abs().mean() < 2.5 and difference.mean().abs() < 0.3


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """What the recipe changes, one number an image (N, s, s, 3)."""
    x = images.astype(float)
    return {
        "brightness": x.mean(axis=(1, 2, 3)),
        "contrast": x.std(axis=(1, 2, 3)),
        "colourfulness": np.ptp(x, axis=3).mean(axis=(1, 2)),
        "red over blue": (x[..., 0] - x[..., 2]).mean(axis=(1, 2)),
        "sharpness": np.abs(np.diff(x, axis=2)).mean(axis=(1, 2, 3)),
        "padding": (x.sum(axis=3) == 0).mean(axis=(1, 2)),
    }


@pytest.mark.slow
def test_the_recipe_is_distributed_as_the_host_s():
    for size in (32, 40):  # above 32 px it blurs
        ramp = np.linspace(40, 220, size)
        image = np.stack([ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, 130 + 0 * np.outer(ramp, ramp)], axis=2)
        image = np.clip(image + 12 * (np.indices((size, size)).sum(axis=0) % 2)[..., None], 0, 255).astype(np.uint8)
        batch = torch.from_numpy(image).expand(N, size, size, 3)
        ours = apply(batch, BATCHED["pad4_crop_flip_colour"], size, np.arange(N, dtype=np.uint64) * np.uint64(31))
        torch.manual_seed(0)
        transform = Transform("pad4_crop_flip_colour", size)
        theirs = np.stack([transform(image).permute(1, 2, 0).numpy() for _ in range(N)])
        other = statistics(theirs)
        for name, values in statistics(ours.permute(0, 2, 3, 1).numpy()).items():
            assert ks_2samp(values, other[name]).pvalue > 1e-4, (size, name)


def test_the_share_of_grey_images():
    x = torch.from_numpy(pictures(N, 4)).permute(0, 3, 1, 2).float()
    draws = np.random.RandomState(1).rand(N, colour.COLOUR_DRAWS)
    grey = (np.ptp(colour.distort(x, draws).numpy(), axis=1) == 0).all(axis=(1, 2))
    assert np.array_equal(grey, draws[:, 9] < 0.2)
    untouched = (draws[:, 0] >= 0.8) & ~grey
    assert torch.equal(colour.distort(x, draws)[untouched], x[untouched])
