"""Image recipes by name, every number explicit: crop scale, ratio, interpolation, antialias, flip, jitter.

A recipe maps the image size s to a list of torchvision transforms on PIL images; pixels stay uint8, since resizing,
cropping and jittering a PIL image give whole numbers anyway. Dividing by 255 and normalising happen on the device,
the latter inside the network. Sources: the transform tables of the papers' repositories (docs/adding-data.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from utils.registry import Registry

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
RATIO = (3 / 4, 4 / 3)

MEAN_STD: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)),
    "tinyimagenet": ((0.4802, 0.4480, 0.3975), (0.2770, 0.2691, 0.2821)),
    "cifar": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


@dataclass(frozen=True)
class Recipe:
    """meaning: one line for `list`.  steps: image size -> torchvision transforms.  random: draws random numbers."""

    meaning: str
    steps: Callable[[int], list[Any]]
    random: bool = False


RECIPES: Registry[Recipe] = Registry("transform")


def _recipe(name: str, meaning: str, steps: Callable[[int], list[Any]], random: bool = False) -> None:
    RECIPES.register(name)(Recipe(meaning, steps, random))


def _larger(size: int) -> int:
    """The short side before a centre crop: 256 for 224, in the same proportion for other sizes."""
    return round(size * 256 / 224)


def _random_crop(size: int, smallest: float, interpolation: InterpolationMode) -> list[Any]:
    crop = v2.RandomResizedCrop(size, (smallest, 1.0), RATIO, interpolation=interpolation, antialias=True)
    return [crop, v2.RandomHorizontalFlip(0.5)]


_recipe("none", "the image as it is; resized (bilinear) only when it has another size", lambda s: [])
_recipe(
    "resize",
    "Resize(s, bilinear), CenterCrop(s)",
    lambda s: [v2.Resize(s, BILINEAR, antialias=True), v2.CenterCrop(s)],
)
_recipe(
    "resize_bicubic",
    "Resize(s, bicubic), CenterCrop(s)",
    lambda s: [v2.Resize(s, BICUBIC, antialias=True), v2.CenterCrop(s)],
)
_recipe(
    "resize_crop",
    "Resize(256/224 s, bilinear), CenterCrop(s)",
    lambda s: [v2.Resize(_larger(s), BILINEAR, antialias=True), v2.CenterCrop(s)],
)
_recipe(
    "resize_crop_bicubic",
    "Resize(256/224 s, bicubic), CenterCrop(s)",
    lambda s: [v2.Resize(_larger(s), BICUBIC, antialias=True), v2.CenterCrop(s)],
)
_recipe(
    "crop_flip_scale05",
    "RandomResizedCrop(s, scale (0.05, 1), bilinear), flip",
    lambda s: _random_crop(s, 0.05, BILINEAR),
    random=True,
)
_recipe(
    "crop_flip",
    "RandomResizedCrop(s, scale (0.08, 1), bilinear), flip",
    lambda s: _random_crop(s, 0.08, BILINEAR),
    random=True,
)
_recipe(
    "crop_flip_bicubic",
    "RandomResizedCrop(s, scale (0.08, 1), bicubic), flip",
    lambda s: _random_crop(s, 0.08, BICUBIC),
    random=True,
)
_recipe(
    "crop_flip_bicubic_jitter",
    "RandomResizedCrop(s, scale (0.08, 1), bicubic), flip, brightness jitter 63/255",
    lambda s: [*_random_crop(s, 0.08, BICUBIC), v2.ColorJitter(brightness=63 / 255)],
    random=True,
)
_recipe(
    "resize300_crop_flip",
    "Resize((300/224 s, 300/224 s), bicubic), RandomCrop(s), flip",
    lambda s: [
        v2.Resize((round(s * 300 / 224),) * 2, BICUBIC, antialias=True),
        v2.RandomCrop(s),
        v2.RandomHorizontalFlip(0.5),
    ],
    random=True,
)
_recipe(
    "pad_crop_flip",
    "RandomCrop(s, padding s/8), flip",
    lambda s: [v2.RandomCrop(s, padding=s // 8), v2.RandomHorizontalFlip(0.5)],
    random=True,
)
_recipe(
    "pad_crop_flip_jitter",
    "RandomCrop(s, padding s/8), flip, brightness jitter 63/255",
    lambda s: [
        v2.RandomCrop(s, padding=s // 8),
        v2.RandomHorizontalFlip(0.5),
        v2.ColorJitter(brightness=63 / 255),
    ],
    random=True,
)
_recipe(
    "pad_crop",
    "RandomCrop(s, padding s/8): for characters, which mean something else when mirrored",
    lambda s: [v2.RandomCrop(s, padding=s // 8)],
    random=True,
)
_recipe(
    "pad4_crop_flip",
    "RandomCrop(s, padding 4), flip",
    lambda s: [v2.RandomCrop(s, padding=4), v2.RandomHorizontalFlip(0.5)],
    random=True,
)
_recipe(
    "pad4_crop_flip_colour",
    "RandomCrop(s, padding 4), flip, with 0.8 colour jitter (0.4, 0.4, 0.4, 0.1), with 0.2 grey, above 32 px with 0.5 "
    "blur (kernel 7, sigma 0.1 to 2)",
    lambda s: [
        v2.RandomCrop(s, padding=4),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        *([v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))], 0.5)] if s > 32 else []),
    ],
    random=True,
)


class Transform:
    """A recipe at one image size: PIL or uint8 (H, W, 3) -> uint8 tensor (3, s, s)."""

    def __init__(self, name: str, size: int):
        recipe = RECIPES[name]
        self.random = recipe.random
        self.name, self.size = name, size
        self._steps = v2.Compose(steps) if (steps := recipe.steps(size)) else None

    def is_identity_on(self, images: np.ndarray) -> bool:
        """Whether (N, H, W, 3) images come out as they are."""
        return self._steps is None and images.shape[1:3] == (self.size, self.size)

    def __call__(self, image: Image.Image | np.ndarray) -> torch.Tensor:
        picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        if self._steps is not None:
            picture = self._steps(picture)
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def as_tensor(images: np.ndarray, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3), B rows -> uint8 (B, 3, H, W), contiguous: the whole batch in one copy."""
    return torch.from_numpy(np.ascontiguousarray(images[rows].transpose(0, 3, 1, 2)))
