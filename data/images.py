"""Image files: which files are images, in which order they stand, how they are decoded."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from utils.errors import DataError, reason
from utils.files import likely_cause, special

IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".avif",
        ".jp2", ".j2k",
    }
)  # fmt: skip
# Kinds of images that are not decoded here: left out like other files, but said as a doubt.
OTHER_IMAGES = frozenset(
    {".heic", ".heif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw", ".psd", ".exr", ".tga", ".dcm"}
)
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class Paths(Sequence[Path]):
    """Many paths in two arrays. A list of a million Path objects takes half a gigabyte, and reading its reference
    counts in loader processes would copy it into each of them."""

    def __init__(self, paths: Iterable[str | Path]):
        encoded = [os.fsencode(path) for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"path {index} of {len(self)}")
        index %= len(self)
        first = int(self._ends[index - 1]) if index else 0
        return Path(os.fsdecode(self._bytes[first : int(self._ends[index])].tobytes()))


def visible_folders(place: Path) -> list[Path]:
    """Folders in `place`, sorted as strings (parity: torchvision's ImageFolder); hidden ones and those that cannot
    be followed (symbolic links to themselves) left out."""
    with os.scandir(place) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    return [place / name for name in names]


def images_below(folder: Path) -> tuple[list[Path], list[str]]:
    """(images, names of files and hidden folders that are ignored) below a folder, sorted, links followed.

    A link that leads back to a folder above it, be it outside `folder`, is not followed.
    """
    images: list[Path] = []
    ignored: list[str] = []

    def descend(place: Path, above: frozenset[tuple[int, int]]) -> None:
        identity = _identity(place)
        if identity in above:
            return
        with os.scandir(place) as entries:
            found = sorted((entry.name, _is_folder(entry)) for entry in entries)
        for name, is_folder in found:
            if name.startswith(".") or (not is_folder and os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES):
                ignored.append(name)
            elif not is_folder:
                images.append(place / name)
        for name, is_folder in found:
            if is_folder and not name.startswith("."):
                descend(place / name, above | {identity})

    descend(folder, frozenset(_identity(parent) for parent in folder.absolute().parents))
    return images, ignored


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def read_image(path: Path) -> Image.Image:
    """Decode to RGB, as stored: like torchvision's ImageFolder, a camera's orientation tag turns nothing. Grey of 16
    bits keeps its upper 8; of an animation the first picture is taken.

    Raises DataError with the path when the file is not a readable image; an image of more than 179 million pixels
    counts as unreadable, since decoding it could exhaust the memory.
    """
    try:
        return to_rgb(path)[0]
    except Exception as error:  # noqa: BLE001 - decoders raise many types for damaged files
        raise DataError(unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    """The sentence for an image that a decoder refuses, with the likely cause where the file tells it."""
    cause = None
    with suppress(OSError, ValueError):
        if not special(path.stat().st_mode):
            cause = likely_cause(path, images=False)
    # Pillow says "cannot identify image file '/the/whole/path'", and the path is said already.
    why = reason(error).split(f" {str(path)!r}")[0]
    suffix = path.suffix.lower()
    if isinstance(error, UnidentifiedImageError) and (need := _DECODERS.get(suffix)) and not features.check(need):
        cause = f"this Pillow cannot decode {suffix}: install one that can, or convert the images"
    return f"image '{path}' cannot be read ({why}{f'; {cause}' if cause else ''}). Replace or remove it"


_DECODERS = {".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000", ".webp": "webp"}  # suffix -> Pillow's feature


def stored_size(path: Path) -> tuple[int, int]:
    """(width, height), from the head of the file. Raises DataError as `read_image`."""
    try:
        with _opened(path) as image:
            return image.size
    except Exception as error:  # noqa: BLE001 - decoders raise many types for damaged files
        raise DataError(unreadable(path, error)) from None


def _opened(path: Path) -> Image.Image:
    """A pipe or a device is not opened: it would be waited for."""
    if kind := special(path.stat().st_mode):
        raise OSError(f"it is {kind}")
    return Image.open(path)


def to_rgb(path: Path) -> tuple[Image.Image, str]:
    """(image in RGB, mode in the file: "RGB", "L", "CMYK", "P", "RGBA", ...). Raises whatever the decoder raises."""
    with _opened(path) as image:
        mode = image.mode
        image.load()
        return as_rgb(image), mode  # no copy: the pixels outlive the file


def as_rgb(image: Image.Image) -> Image.Image:
    """Grey of 16 bits keeps its upper 8: Pillow's own conversion cuts every value above 255 to white."""
    if image.mode in SIXTEEN_BITS:
        upper = (np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(upper).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
