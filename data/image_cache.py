"""Decode once: every image of a data set as pixels in memory, or in a memory map on disk.

With no size limit the pixels are those that decoding gives, so no number of a run changes. With a limit, images are
reduced (bicubic) to that short side first, as evaluation does anyway; then training crops see the reduced image.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.images import read_image, stored_size
from data.records import ImageData
from utils.errors import DataError
from utils.runtime import available_cpus, available_memory

FORMAT = 2
KEEP_FREE = 0.1  # share of memory or disk that a cache leaves alone


class CachedImages(Sequence[np.ndarray]):
    """N decoded images uint8 (H, W, 3) of any sizes in one block. file: where the block is mapped from, or None.

    Loader processes that are started afresh open the file again instead of receiving its content.
    """

    def __init__(self, pixels: np.ndarray, starts: np.ndarray, shapes: np.ndarray, file: Path | None):
        self._pixels, self._starts, self._shapes, self._file = pixels, starts, shapes, file

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        height, width = self._shapes[index].tolist()
        first = int(self._starts[index])
        return self._pixels[first : first + 3 * height * width].reshape(height, width, 3)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._file is not None:
            state["_pixels"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._file is not None:
            self._pixels = np.memmap(self._file, dtype=np.uint8, mode="r")


def cached(data: ImageData, kind: Literal["none", "ram", "disk"], size: int | None, folder: Path) -> ImageData:
    """The data set with its files decoded; arrays are left as they are.

    Raises DataError when the images do not fit (D19), or one of them cannot be read (D09).
    """
    if kind == "none" or not (data.train.in_files or data.test.in_files):
        return data
    halves = {"train": data.train, "test": data.test}
    for half, split in [(half, split) for half, split in halves.items() if split.in_files]:
        paths = [path for path in split.images if isinstance(path, Path)]
        images = _in_memory(data.name, paths, size) if kind == "ram" else _on_disk(data.name, paths, size, folder)
        halves[half] = replace(split, images=images)
    return replace(data, train=halves["train"], test=halves["test"])


def _in_memory(name: str, paths: Sequence[Path], size: int | None) -> CachedImages:
    shapes = _shapes(name, paths, size)
    total = _total(shapes)
    if (free := available_memory()) is not None and total > (1 - KEEP_FREE) * free:
        raise DataError(_too_large(name, "ram", total, free, 'Choose "disk" or "none", or set cache_size'))
    pixels = np.empty(total, dtype=np.uint8)
    starts = _starts(shapes)
    _decode_into(name, pixels, starts, shapes, paths, size)
    return CachedImages(pixels, starts, shapes, None)


def _on_disk(name: str, paths: Sequence[Path], size: int | None, folder: Path) -> CachedImages:
    """The memory map of these files, made once; a damaged or half-written one is made again."""
    key = _identity(paths, size)
    file = folder / "images" / f"{key[:20]}.bin"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.with_suffix(".lock")):
            shapes = _stored_shapes(file, key)
            if shapes is None:
                shapes = _write_map(name, file, key, paths, size)
    except OSError as error:
        raise DataError(
            f"{name}: the cache folder '{file.parent}' cannot be written ({error.strerror}). Set cache_root or "
            'PALIMPSEST_CACHE to a folder of your own, or choose "cache": "none"'
        ) from None
    return CachedImages(np.memmap(file, dtype=np.uint8, mode="r"), _starts(shapes), shapes, file)


def _write_map(name: str, file: Path, key: str, paths: Sequence[Path], size: int | None) -> np.ndarray:
    shapes = _shapes(name, paths, size)
    total, free = _total(shapes), shutil.disk_usage(file.parent).free
    if total > (1 - KEEP_FREE) * free:
        raise DataError(_too_large(name, "disk", total, free, "Set cache_root to a larger disk, or set cache_size"))
    temporary = file.with_suffix(".part")
    try:
        pixels = np.memmap(temporary, dtype=np.uint8, mode="w+", shape=(total,))
        _decode_into(name, pixels, _starts(shapes), shapes, paths, size)
        pixels.flush()
        index = file.with_suffix(".json.part")
        index.write_text(json.dumps({"key": key, "total": total, "shapes": shapes.tolist()}))
        os.replace(temporary, file)
        os.replace(index, file.with_suffix(".json"))
    finally:
        temporary.unlink(missing_ok=True)
    return shapes


def _stored_shapes(file: Path, key: str) -> np.ndarray | None:
    try:
        index = json.loads(file.with_suffix(".json").read_text())
        shapes = np.array(index["shapes"], dtype=np.int64).reshape(-1, 2)
        whole = index["key"] == key and file.stat().st_size == index["total"] == _total(shapes)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shapes if whole else None


def _identity(paths: Sequence[Path], size: int | None) -> str:
    """Hash of what the decoded pixels depend on: the files, their sizes and times of change, the limit."""
    digest = hashlib.sha256(f"{FORMAT} {size}\n".encode())
    for path in paths:
        info = path.stat()
        digest.update(f"{path}:{info.st_size}:{info.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _shapes(name: str, paths: Sequence[Path], size: int | None) -> np.ndarray:
    """(N, 2): height and width of each cached image, read from the files' headers."""

    def shape(path: Path) -> tuple[int, int]:
        width, height = stored_size(path)
        return _reduced(height, width, size)

    with ThreadPoolExecutor(available_cpus()) as pool:
        found = list(tqdm(pool.map(shape, paths), total=len(paths), desc=f"{name}: sizes", leave=False, disable=None))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _reduced(height: int, width: int, size: int | None) -> tuple[int, int]:
    """Shape with the short side at most `size`, in proportion (rounded down, as torchvision's Resize does)."""
    if size is None or min(height, width) <= size:
        return height, width
    return (size, size * width // height) if height <= width else (size * height // width, size)


def _total(shapes: np.ndarray) -> int:
    return int(3 * shapes.prod(axis=1).sum())


def _starts(shapes: np.ndarray) -> np.ndarray:
    """(N,): where each image begins in the block."""
    ends = np.cumsum(3 * shapes.prod(axis=1))
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)


def _decode_into(
    name: str, pixels: np.ndarray, starts: np.ndarray, shapes: np.ndarray, paths: Sequence[Path], size: int | None
) -> None:
    def decode(row: int) -> None:
        image = read_image(paths[row])
        height, width = shapes[row].tolist()
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        first = int(starts[row])
        pixels[first : first + 3 * height * width] = np.asarray(image).reshape(-1)

    rows = range(len(paths))
    with ThreadPoolExecutor(available_cpus()) as pool:
        for _ in tqdm(pool.map(decode, rows), total=len(paths), desc=f"{name}: decoding", leave=False, disable=None):
            pass


def _too_large(name: str, kind: str, need: int, free: int, way: str) -> str:
    return (
        f'D19 error: {name}: "cache": "{kind}" needs {need / 2**30:.1f} GiB for the decoded images, '
        f"{free / 2**30:.1f} GiB are free. {way}"
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time: the others wait, and find the work done. No lock where there is no
    fcntl (Windows): then two processes may do the work twice."""
    with path.open("w") as file:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
