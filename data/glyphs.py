"""Rendered characters: real shapes at no download, from the DejaVu fonts that matplotlib ships.

`characters.json` lists the shapes, chosen once so that any two classes are well apart (see `select`): the stream's
classes and, disjoint from them, those that the bundled ViT is pre-trained on.

Rendering: each character once per face at 64 px, then, image by image and all from one seed, rotation, shear,
scale and shift (one batched affine warp to 32 px), foreground and background colours, a background gradient, noise.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 32
ATLAS = 64
SANS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique")
SERIF = ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic")
MONO = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique")
FACES = SANS + SERIF + MONO

# domain -> (faces, polarity: +1 dark on light, -1 light on dark)
DOMAINS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "sans": (SANS[:1], 1),
    "serif": (SERIF[:1], 1),
    "mono": (MONO[:1], 1),
    "bold": (SANS[1:2], 1),
    "oblique": (SANS[2:3], 1),
    "inverted": (SANS[:1], -1),
}

STREAM_TRAIN, STREAM_TEST = 60, 20  # images a class
DOMAIN_CLASSES, DOMAIN_TRAIN, DOMAIN_TEST = 40, 20, 10  # images a class and domain
PRETRAIN_TRAIN, PRETRAIN_TEST = 160, 10

LISTS = Path(__file__).with_name("characters.json")

Arrays = tuple[np.ndarray, np.ndarray]


def stream_split(domains: Mapping[str, tuple[tuple[str, ...], int]] | None):
    """((x, y, d), (x, y, d), class names) of train and test; without domains d is all zero."""
    stream = json.loads(LISTS.read_text())["stream"]
    if domains is None:
        halves = (_render(stream, FACES, 0, n, seed) for n, seed in ((STREAM_TRAIN, 101), (STREAM_TEST, 102)))
        train, test = ((x, y, np.zeros_like(y)) for x, y in halves)
        return train, test, _names(stream)
    characters = stream[:DOMAIN_CLASSES]
    train, test = (
        _concatenate(
            (*_render(characters, faces, polarity, n, seed + d), d)
            for d, (faces, polarity) in enumerate(domains.values())
        )
        for n, seed in ((DOMAIN_TRAIN, 201), (DOMAIN_TEST, 301))
    )
    return train, test, _names(characters)


def pretraining_split() -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """((x, y), (x, y), class names) of the characters that no stream uses."""
    characters = json.loads(LISTS.read_text())["pretraining"]
    halves = (_render(characters, FACES, 0, n, seed) for n, seed in ((PRETRAIN_TRAIN, 1), (PRETRAIN_TEST, 2)))
    train, test = halves
    return train, test, _names(characters)


def _names(characters: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"U+{code:04X}" for code in characters)


def _concatenate(parts: Iterable[tuple[np.ndarray, np.ndarray, int]]):
    parts = list(parts)
    domains = [np.full(len(y), d, dtype=np.int64) for _, y, d in parts]
    return (
        np.concatenate([x for x, _, _ in parts]),
        np.concatenate([y for _, y, _ in parts]),
        np.concatenate(domains),
    )


def _render(characters: list[int], faces: tuple[str, ...], polarity: int, per_class: int, seed: int) -> Arrays:
    """`per_class` images of each character: uint8 (N, 32, 32, 3) and labels (N,), class by class.

    polarity +1 dark on light, -1 light on dark, 0 either at random.
    """
    rng = np.random.RandomState(seed)
    count = len(characters) * per_class
    labels = np.repeat(np.arange(len(characters)), per_class)
    face = rng.randint(len(faces), size=count)
    ink = _warp(atlas(tuple(characters), faces)[labels, face], rng)  # (N, 32, 32) coverage in [0, 1]
    return _paint(ink, polarity, rng), labels.astype(np.int64)


def _warp(glyph: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """(N, 64, 64) -> (N, 32, 32): rotation +-15 degrees, shear +-0.2, scale 0.8-1.1, shift +-3 px."""
    count = len(glyph)
    angle, shear = np.deg2rad(rng.uniform(-15, 15, count)), rng.uniform(-0.2, 0.2, count)
    scale, shift = rng.uniform(0.8, 1.1, count), rng.uniform(-3, 3, (count, 2)) * 2 / SIZE
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    theta = np.stack([cos, -sin + shear * cos, shift[:, 0], sin, cos + shear * sin, shift[:, 1]], axis=1)
    grid = F.affine_grid(torch.from_numpy(theta.reshape(count, 2, 3)).float(), [count, 1, SIZE, SIZE], False)
    source = torch.from_numpy(glyph).float().div_(255)[:, None]
    smooth = F.avg_pool2d(source, 3, stride=1, padding=1)  # halving the size aliases without it
    return F.grid_sample(smooth, grid, align_corners=False).squeeze(1).numpy()


def _paint(ink: np.ndarray, polarity: int, rng: np.random.RandomState) -> np.ndarray:
    """Coverage (N, 32, 32) -> uint8 RGB (N, 32, 32, 3) with random colours, a background gradient and noise."""
    count = len(ink)

    def uniform(low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        return rng.uniform(low, high, shape).astype(np.float32)

    dark, light = uniform(0, 0.35, (count, 3)), uniform(0.6, 1, (count, 3))
    inverted = rng.rand(count) < 0.5 if polarity == 0 else np.full(count, polarity < 0)
    ink_colour = np.where(inverted[:, None], light, dark)[:, None, None]  # (N, 1, 1, 3)
    paper = np.where(inverted[:, None], dark, light)[:, None, None]
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    slope = uniform(-0.1, 0.1, (count, 2))
    gradient = slope[:, :1, None] * ramp[None, :, None] + slope[:, 1:, None] * ramp[None, None]  # (N, 32, 32)
    noise = rng.standard_normal((count, SIZE, SIZE, 1)).astype(np.float32) * uniform(0.01, 0.06, (count, 1, 1, 1))
    image = paper + gradient[..., None] + ink[..., None] * (ink_colour - paper) + noise
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


@cache
def atlas(characters: tuple[int, ...], faces: tuple[str, ...]) -> np.ndarray:
    """uint8 (characters, faces, 64, 64): ink coverage of each character, centred, in each face."""
    sheet = np.zeros((len(characters), len(faces), ATLAS, ATLAS), dtype=np.uint8)
    for column, face in enumerate(faces):
        font = _font(face)
        for row, code in enumerate(characters):
            sheet[row, column] = _centred(font, chr(code))
    return sheet


def font_folder() -> Path:
    """Of the fonts that matplotlib ships. It is not imported, which fails where MPLBACKEND names no backend."""
    found = find_spec("matplotlib")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


def _font(face: str):
    from PIL import ImageFont

    return ImageFont.truetype(str(font_folder() / f"{face}.ttf"), 44, layout_engine=ImageFont.Layout.BASIC)


def _centred(font, character: str) -> np.ndarray:
    """The character's ink in the middle of a 64 px square, made smaller when it does not fit in 52 px."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    width, height = max(1, int(right - left)), max(1, int(bottom - top))
    ink = Image.new("L", (width, height))
    ImageDraw.Draw(ink).text((-left, -top), character, fill=255, font=font)
    ratio = min(1.0, 52 / max(width, height))
    if ratio < 1:
        ink = ink.resize((max(1, round(width * ratio)), max(1, round(height * ratio))), Image.Resampling.BILINEAR)
    square = Image.new("L", (ATLAS, ATLAS))
    square.paste(ink, ((ATLAS - ink.width) // 2, (ATLAS - ink.height) // 2))
    return np.asarray(square)


def select(distance: float = 0.57, stream: int = 100) -> dict[str, list[int]]:
    """Choose the shapes: how `characters.json` was made.

    Goes through the characters that all twelve faces draw, in code order, and keeps one when its ink in the regular
    face, moved by up to 4 px, differs from that of every character kept: ||a - b|| >= distance * max(||a||, ||b||).
    0-9 come first and are then left out, so nothing that resembles a digit is in either list: they are `digits`.
    Every k-th character kept belongs to the stream, the others to pre-training.
    """
    digits = [ord(digit) for digit in "0123456789"]
    codes = digits + [code for code in _common_characters() if code not in digits]
    ink = torch.from_numpy(atlas(tuple(codes), FACES[:1])[:, 0]).float().div_(255)
    ink = F.avg_pool2d(ink[:, None], 4)[:, 0]  # (M, 16, 16)
    norms = ink.flatten(1).norm(dim=1)
    padded = F.pad(ink, (1, 1, 1, 1))
    moved = torch.stack([padded[:, r : r + 16, c : c + 16] for r in range(3) for c in range(3)], dim=1)
    moved = moved.flatten(2)  # (M, 9, 256)
    kept: list[int] = []
    for i in range(len(codes)):
        if norms[i] < 1.5:  # a dot or a thin stroke: little but position tells such shapes apart
            continue
        gap = (moved[kept] - ink[i].flatten()).norm(dim=2).amin(dim=1)  # (kept,)
        if bool((gap >= distance * torch.maximum(norms[i], norms[kept])).all()):
            kept.append(i)
    chosen = sorted(codes[i] for i in kept if codes[i] not in digits)
    for_stream = {round(k * (len(chosen) - 1) / (stream - 1)) for k in range(stream)}
    return {
        "stream": [code for k, code in enumerate(chosen) if k in for_stream],
        "pretraining": [code for k, code in enumerate(chosen) if k not in for_stream],
    }


def _common_characters() -> list[int]:
    from fontTools.ttLib import TTFont

    folder = font_folder()
    common = set.intersection(*(set(TTFont(folder / f"{face}.ttf").getBestCmap()) for face in FACES))
    return sorted(code for code in common if chr(code).isprintable() and not chr(code).isspace())


if __name__ == "__main__":
    LISTS.write_text(json.dumps(select()) + "\n")
