"""Fashion-MNIST in the layout in which it is published: four IDX files, packed by gzip or not.

big-endian  0, 0, 8 (uint8), number of dimensions;  each dimension as int32;  the bytes
"""

import gzip
import struct
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from data.checks import Findings, check_classes
from data.downloads import leaving_no_empty_folders
from data.layouts import Options
from data.records import ImageData, Split

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FOLDERS = ("fashion-mnist", "fashionmnist", "FashionMNIST/raw", ".")  # below data_root
PACKAGE = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def load_fashion_mnist(root: Path, options: Options, findings: Findings) -> ImageData | None:
    """From `root`, or from where Debian's package puts it; D01 where neither holds a file of it."""
    if options.split != "folder":
        findings.error("D03", f'its halves are fixed: split must be "folder", is "{options.split}"')
        return None
    places = [*(root / folder for folder in FOLDERS), PACKAGE]
    if (place := _found(places)) is None and options.download:
        from torchvision.datasets import FashionMNIST

        with (
            leaving_no_empty_folders(root),
            suppress(Exception),
        ):  # url, archive and checksum faults come as many types; the sentence below says it
            root.mkdir(parents=True, exist_ok=True)
            FashionMNIST(str(root), download=True)
        place = _found(places)
    if place is None:
        findings.error(
            "D01",
            f"Fashion-MNIST is neither in '{root / FOLDERS[0]}' (nor {', '.join(FOLDERS[1:-1])}, nor '{root}') nor in "
            f"'{PACKAGE}'. Expected: {', '.join(name + '.gz' for half in FILES.values() for name in half)}. Install "
            "Debian's package dataset-fashion-mnist, set data_root or PALIMPSEST_DATA, or run `python main.py fetch "
            "CONFIG` where there is a network",
        )
        return None
    return read_idx("fashionmnist", place, NAMES, findings)


def read_idx(key: str, place: Path, names: tuple[str, ...], findings: Findings) -> ImageData | None:
    """Both halves of a folder; D11 for each file that is missing or damaged."""
    halves = {}
    for half, files in FILES.items():
        images, labels = (_read(place, name, dims, findings) for name, dims in zip(files, (3, 1), strict=True))
        if images is None or labels is None:
            continue
        if len(images) != len(labels):
            findings.error("D11", f"{half}: {len(images):,} images and {len(labels):,} labels in '{place}'")
        elif len(labels) and labels.max() >= len(names):
            findings.error("D11", f"'{place / files[1]}' holds label {labels.max()}, expected 0..{len(names) - 1}")
        else:
            halves[half] = Split(np.repeat(images[..., None], 3, axis=-1), labels.astype(np.int64))
    if len(halves) < 2:
        return None
    check_classes(halves["train"].labels, halves["test"].labels, names, findings)
    return ImageData(key, halves["train"], halves["test"], names, variant="folder", place=str(place))


def _found(places: Sequence[Path]) -> Path | None:
    """The first folder with one of the files."""
    return next(
        (place for place in places if any(_file(place, name) for half in FILES.values() for name in half)), None
    )


def _file(place: Path, name: str) -> Path | None:
    return next((path for path in (place / f"{name}.gz", place / name) if path.is_file()), None)


def _read(place: Path, name: str, dimensions: int, findings: Findings) -> np.ndarray | None:
    """uint8, of so many dimensions."""
    if (path := _file(place, name)) is None:
        findings.error("D11", f"'{place / name}.gz' is missing beside the other files; get it again")
        return None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        findings.error("D11", f"'{path}' is damaged ({error}); get it again")
        return None
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        findings.error("D11", f"'{path}' is no IDX file of bytes in {dimensions} dimensions; get it again")
        return None
    shape = struct.unpack(f">{dimensions}i", content[4:head])
    if min(shape) < 1 or len(content) - head != int(np.prod(shape, dtype=np.int64)):
        findings.error("D11", f"'{path}' holds {len(content) - head:,} bytes, its head says {shape}; get it again")
        return None
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)
