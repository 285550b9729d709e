"""Colour jitter, greyscale and blur of a whole batch, distributed as torchvision's on PIL images, image by image.

The recipe is the one of contrastive learning (Chen et al., 2020, "SimCLR", for small images): with 0.8 brightness,
contrast, saturation (factors in 1 +- 0.4) and hue (shift in +- 0.1 of a turn) in random order; with 0.2 grey; above
32 px with 0.5 a Gaussian blur (kernel 7, sigma in 0.1 .. 2). Pillow rounds each step down to whole numbers, and so do
the steps here, hue apart, which Pillow shifts in 256 steps. Images (B, 3, s, s) float with values 0 .. 255.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

JITTER, GREY, BLUR = 0.8, 0.2, 0.5  # probabilities
STRENGTH, HUE, KERNEL, SIGMA = 0.4, 0.1, 7, (0.1, 2.0)
COLOUR_DRAWS = 12  # per image: jitter or not, order (4), factors (4), grey or not, blur or not, sigma


def distort(x: Tensor, draws: np.ndarray) -> Tensor:
    """x (B, 3, s, s), draws (B, COLOUR_DRAWS) uniform in [0, 1) -> (B, 3, s, s), whole numbers in 0 .. 255."""
    chosen = draws[:, 0] < JITTER
    order, factors = np.argsort(draws[:, 1:5], axis=1), 2 * draws[:, 5:9] - 1
    for place in range(4):
        for number, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            rows = np.flatnonzero(chosen & (order[:, place] == number))
            if len(rows):
                strength = HUE * factors[rows, 3] if change is _hue else 1 + STRENGTH * factors[rows, number]
                at = torch.from_numpy(rows).to(x.device, non_blocking=True)
                x[at] = change(x[at], _uploaded(strength, x)[:, None, None, None])
    x = _where(draws[:, 9] < GREY, _grey(x).expand_as(x), x)
    if x.shape[-1] > 32:
        sigma = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * draws[:, 11]
        x = _where(draws[:, 10] < BLUR, _blur(x, _uploaded(sigma, x)), x)
    return x


def _where(chosen: np.ndarray, changed: Tensor, x: Tensor) -> Tensor:
    there = torch.from_numpy(chosen).to(x.device, non_blocking=True)
    return torch.where(there[:, None, None, None], changed, x)


def _uploaded(values: np.ndarray, like: Tensor) -> Tensor:
    """On the device and in the type of `like`, without waiting for it."""
    return torch.from_numpy(values).to(like.device, like.dtype, non_blocking=True)


def _grey(x: Tensor) -> Tensor:
    """(B, 3, s, s) -> (B, 1, s, s), rounded as Pillow's mode L."""
    red, green, blue = x.split(1, dim=1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).add_(0.5).floor_()


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """other + factor (x - other), cut to 0 .. 255 and rounded down."""
    return torch.lerp(other.expand_as(x), x, factor).clamp_(0, 255).floor_()


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, torch.zeros_like(x), factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Against the mean grey of the image, a whole number."""
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_(), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the hue by `turn` (B, 1, 1, 1) at constant saturation and value.

    A colour of value v, chroma c and hue h (in turns) has the channels v - c clamp(min(k, 4 - k), 0, 1) with
    k = (n + 6 h) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    value, brightest = x.max(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    safe = chroma.clamp(min=1)
    sextants = torch.cat([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4], dim=1)
    hue = sextants.gather(1, brightest) + 6 * turn  # (B, 1, s, s)
    k = ((5 - 2 * torch.arange(3, device=x.device)).view(1, 3, 1, 1) + hue) % 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).add_(0.5).floor_().clamp_(0, 255)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian, sigma (B,), edges mirrored."""
    offsets = torch.arange(KERNEL, device=x.device, dtype=x.dtype) - KERNEL // 2
    weights = (-0.5 * (offsets / sigma[:, None]) ** 2).exp()
    weights = weights / weights.sum(dim=1, keepdim=True)  # (B, 7)
    padded = F.pad(x, (KERNEL // 2,) * 4, mode="reflect")
    rows = torch.einsum("bchwk,bk->bchw", padded.unfold(3, KERNEL, 1), weights)
    return torch.einsum("bchwk,bk->bchw", rows.unfold(2, KERNEL, 1), weights).add_(0.5).floor_().clamp_(0, 255)
