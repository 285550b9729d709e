"""Random crops of a whole batch as two matrix products, on whatever device holds the images.

Cropping and resizing are linear in the pixels of each axis: out = Y x X^T with one small matrix per image and axis. The
matrices hold the antialiased filters of Pillow, and each pass is rounded to whole numbers as Pillow does it, so that an
image comes out as the host's recipe makes it from the same box, up to rounding (which axis Pillow takes first depends
on its version and on the box). What differs are the random numbers: a counter per image, not torch's generator.

Letters: B images, H and W their height and width, s the output size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.colour import COLOUR_DRAWS, distort
from utils.errors import DataError

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10  # of a random box before the largest one in the middle is taken (parity: torchvision)
DRAWS = 4 * ATTEMPTS + 2  # per image: boxes, flip, brightness


@dataclass(frozen=True)
class Axis:
    """What happens along one axis, per image (B,) or for all (1,): pixels low .. high are resized to `grid` pixels, of
    which s from `offset` on are kept. Pixels outside the image are black."""

    low: np.ndarray
    high: np.ndarray
    grid: np.ndarray
    offset: np.ndarray


# (output size, height, width, uniform numbers (B, DRAWS)) -> (vertical, horizontal)
Geometry = Callable[[int, int, int, np.ndarray], tuple[Axis, Axis]]


@dataclass(frozen=True)
class Batched:
    """A recipe as this file computes it. brightness: half-width of the factor's range around 1. colour: jitter, grey
    and blur of data/colour.py after it."""

    geometry: Geometry
    bicubic: bool = False
    flip: bool = False
    brightness: float = 0.0
    colour: bool = False


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """(B,) uint64 -> (B, count) in [0, 1): the splitmix64 sequence that starts at each seed."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = seeds.astype(np.uint64)[:, None] + steps[None]
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_boxes(
    height: int, width: int, smallest: float, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """torchvision's RandomResizedCrop for B images at once: (top, left, box height, box width), each (B,).

    draws (B, 4 * ATTEMPTS) uniform. Each attempt draws an area (uniform share in [smallest, 1]) and a ratio (uniform
    logarithm in RATIO); the first box that fits counts.
    """
    area, ratio, top, left = draws.reshape(len(draws), 4, ATTEMPTS).transpose(1, 0, 2)
    pixels = height * width * (smallest + (1 - smallest) * area)
    low, high = np.log(RATIO)
    aspect = np.exp(low + (high - low) * ratio)
    w, h = np.round(np.sqrt(pixels * aspect)), np.round(np.sqrt(pixels / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)[:, None]
    w, h, top, left, found = (np.take_along_axis(a, first, axis=1)[:, 0] for a in (w, h, top, left, fits))
    top, left = np.floor(top * (height - h + 1)), np.floor(left * (width - w + 1))
    if not found.all():
        tall, wide = width / height < RATIO[0], width / height > RATIO[1]
        full_w = round(height * RATIO[1]) if wide else width
        full_h = round(width / RATIO[0]) if tall else height
        w, h = np.where(found, w, full_w), np.where(found, h, full_h)
        top, left = np.where(found, top, (height - full_h) // 2), np.where(found, left, (width - full_w) // 2)
    return top, left, h, w


def random_resized_crop(smallest: float) -> Geometry:
    def geometry(size: int, height: int, width: int, draws: np.ndarray) -> tuple[Axis, Axis]:
        top, left, h, w = random_boxes(height, width, smallest, draws[:, : 4 * ATTEMPTS])
        grid, zero = np.array([size]), np.array([0])
        return Axis(top, top + h, grid, zero), Axis(left, left + w, grid, zero)

    return geometry


def resize_and_crop(short_side: Callable[[int], int], square: bool = False, random: bool = False) -> Geometry:
    """Resize the short side (square: both sides), then cut s x s out of the middle, or at random."""

    def geometry(size: int, height: int, width: int, draws: np.ndarray) -> tuple[Axis, Axis]:
        axes = []
        for number, length in enumerate((height, width)):
            grid = short_side(size) if square else short_side(size) * length // min(height, width)
            offset = np.floor(draws[:, number] * (grid - size + 1)) if random else np.array([round((grid - size) / 2)])
            axes.append(Axis(np.array([0]), np.array([length]), np.array([grid]), offset))
        return axes[0], axes[1]

    return geometry


def pad_and_crop(padding: Callable[[int], int]) -> Geometry:
    def geometry(size: int, height: int, width: int, draws: np.ndarray) -> tuple[Axis, Axis]:
        pad, axes = padding(size), []
        for number, length in enumerate((height, width)):
            grid = length + 2 * pad
            offset = np.floor(draws[:, number] * (grid - size + 1))
            axes.append(Axis(np.array([-pad]), np.array([length + pad]), np.array([grid]), offset))
        return axes[0], axes[1]

    return geometry


def apply(images: Tensor, recipe: Batched, size: int, seeds: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> uint8 (B, 3, s, s) on the same device. seeds (B,): one per image."""
    height, width = images.shape[1:3]
    draws = uniforms(seeds, DRAWS)
    vertical, horizontal = recipe.geometry(size, height, width, draws)
    flip = draws[:, -2] < 0.5 if recipe.flip else None
    with torch.autocast(images.device.type, enabled=False):
        x = images.permute(0, 3, 1, 2).float()
        x = _whole(x @ _filters(horizontal, width, size, recipe.bicubic, flip, images.device).mT)
        x = _whole(_filters(vertical, height, size, recipe.bicubic, None, images.device) @ x)
        if recipe.brightness:
            factor = 1 + recipe.brightness * (2 * draws[:, -1] - 1)
            factors = torch.from_numpy(factor).to(images.device, torch.float32, non_blocking=True)
            x = x.mul_(factors[:, None, None, None]).clamp_(0, 255).floor_()
        if recipe.colour:
            x = distort(x, uniforms(seeds, DRAWS + COLOUR_DRAWS)[:, DRAWS:])
        return x.to(torch.uint8)


def _whole(x: Tensor) -> Tensor:
    return x.add_(0.5).floor_().clamp_(0, 255)


def _filters(
    axis: Axis, length: int, size: int, bicubic: bool, flip: np.ndarray | None, device: torch.device
) -> Tensor:
    """(B or 1, 1, s, length): row i holds the weights of the input pixels in output pixel i.

    Pillow's filter: centre c = low + (i + offset + 0.5) scale, weights k((j + 0.5 - c) / max(scale, 1)), where
    scale = (high - low) / grid, over the pixels j of the box, divided by their sum.
    """
    batch = max(len(axis.low), len(axis.offset), 1 if flip is None else len(flip))
    packed = np.zeros((5, batch))
    packed[:4] = [np.broadcast_to(value, batch) for value in (axis.low, axis.high, axis.grid, axis.offset)]
    packed[4] = 0 if flip is None else flip
    low, high, grid, offset, mirrored = torch.from_numpy(packed).to(device, torch.float32, non_blocking=True)[..., None]
    i = torch.arange(size, device=device, dtype=torch.float32)
    i = torch.where(mirrored > 0, size - 1 - i, i)  # (B, s)
    scale = (high - low) / grid  # (B, 1)
    centre = (low + (i + offset + 0.5) * scale)[..., None]  # (B, s, 1)
    j = torch.arange(length, device=device, dtype=torch.float32)
    distance = ((j + 0.5 - centre) / scale.clamp(min=1)[..., None]).abs_()  # (B, s, length)
    weights = _cubic(distance) if bicubic else (1 - distance).clamp_(min=0)
    inside = (j >= low) & (j < high)  # (B, length)
    weights = weights * inside[:, None]
    return (weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6))[:, None]


def _cubic(d: Tensor) -> Tensor:
    """Keys' cubic with a = -0.5, on |d|."""
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))


def _larger(size: int) -> int:
    return round(size * 256 / 224)


def _jittered(recipe: Batched) -> Batched:
    return replace(recipe, brightness=63 / 255)


_CROP_BICUBIC = Batched(random_resized_crop(0.08), bicubic=True, flip=True)
_PAD_FLIP = Batched(pad_and_crop(lambda s: s // 8), flip=True)

# The recipes of data/transforms.py, by the same names.
BATCHED: dict[str, Batched] = {
    "none": Batched(resize_and_crop(lambda s: s, square=True)),
    "resize": Batched(resize_and_crop(lambda s: s)),
    "resize_bicubic": Batched(resize_and_crop(lambda s: s), bicubic=True),
    "resize_crop": Batched(resize_and_crop(_larger)),
    "resize_crop_bicubic": Batched(resize_and_crop(_larger), bicubic=True),
    "crop_flip_scale05": Batched(random_resized_crop(0.05), flip=True),
    "crop_flip": Batched(random_resized_crop(0.08), flip=True),
    "crop_flip_bicubic": _CROP_BICUBIC,
    "crop_flip_bicubic_jitter": _jittered(_CROP_BICUBIC),
    "resize300_crop_flip": Batched(
        resize_and_crop(lambda s: round(s * 300 / 224), square=True, random=True), bicubic=True, flip=True
    ),
    "pad_crop_flip": _PAD_FLIP,
    "pad_crop_flip_jitter": _jittered(_PAD_FLIP),
    "pad_crop": Batched(pad_and_crop(lambda s: s // 8)),
    "pad4_crop_flip": Batched(pad_and_crop(lambda s: 4), flip=True),
    "pad4_crop_flip_colour": Batched(pad_and_crop(lambda s: 4), flip=True, colour=True),
}


ROOM = 0.25  # share of a card's memory that a data set may take unasked


def has_room(halves: Sequence[np.ndarray], device: torch.device) -> bool:
    """Whether a card has room for a data set beside a network. By the whole memory, not by what is free: every process
    of a run, and a run that goes on, find the same."""
    return sum(images.nbytes for images in halves) <= ROOM * torch.cuda.get_device_properties(device).total_memory


class Resident:
    """A whole array uint8 (N, H, W, 3) that is put on the device once, at the first batch, and stays there."""

    def __init__(self, images: np.ndarray):
        self._images = images
        self._placed: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self._images.nbytes

    def on(self, device: torch.device) -> Tensor:
        """Raises DataError when the array does not fit on the device (D19)."""
        if self._placed is None or self._placed.device != device:
            if device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(device)
                if self._images.nbytes > 0.5 * free:
                    raise DataError(
                        f'D19 error: "augment_on": "device" needs {self._images.nbytes / 2**30:.1f} GiB for images, '
                        f'{free / 2**30:.1f} GiB are free on {device} and half of it is for the network. Choose "host"'
                    )
            self._placed = torch.from_numpy(np.ascontiguousarray(self._images)).to(device)
        return self._placed
