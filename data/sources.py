"""Data sets by name. A source is a function from `data_root` to `ImageData`; registering it is all it takes."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.glyphs import DOMAINS, pretraining_split, stream_split
from utils.errors import DataError
from utils.registry import Registry

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"})


@dataclass(frozen=True)
class Split:
    """Half of a data set. images: uint8 (N, H, W, 3), or N paths that are decoded when read.

    labels (N,): original labels, 0..C-1. domains (N,): which domain each image belongs to, or None.
    """

    images: np.ndarray | Sequence[Path]
    labels: np.ndarray
    domains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """A whole data set. domain_names is empty unless the data set is a domain-incremental stream."""

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...] = ()
    variant: str = ""
    digest: str = field(default="", compare=False)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


Source = Callable[[Path], ImageData]
SOURCES: Registry[Source] = Registry("data set")


def default_root(data_root: str | None) -> Path:
    """Where data sets lie: the key, then $PALIMPSEST_DATA, then ~/.cache/palimpsest/data."""
    return Path(data_root or os.environ.get("PALIMPSEST_DATA") or "~/.cache/palimpsest/data").expanduser()


def load(name: str, data_root: str | None) -> ImageData:
    """The data set called `name`, `npz:FILE` or `folder:DIR`.

    Raises UserError for an unknown name, DataError when the data are missing or damaged.
    """
    kind, colon, place = name.partition(":")
    if colon and kind == "npz":
        data = load_npz(Path(place).expanduser())
    elif colon and kind == "folder":
        data = load_folder(Path(place).expanduser())
    else:
        data = SOURCES[name](default_root(data_root))
    return replace(data, name=name, digest=_digest(data))


def load_npz(path: Path) -> ImageData:
    """x_train, x_test uint8 (N, H, W, 3); y_train, y_test whole numbers 0..C-1; optionally d_train, d_test
    (domain of each image, 0..D-1), which make a domain-incremental stream."""
    arrays = _read_npz(path)
    faults = [fault for half in ("train", "test") for fault in _npz_faults(arrays, half)]
    if not faults:
        faults = _label_faults(arrays["y_train"], arrays["y_test"])
    if not faults and ("d_train" in arrays) != ("d_test" in arrays):
        faults = ["d_train and d_test: give both or neither"]
    if faults:
        raise DataError("\n".join([f"{path} is not usable as a data set:", *(f"  - {fault}" for fault in faults)]))
    train, test = (
        Split(arrays[f"x_{half}"], arrays[f"y_{half}"].astype(np.int64), arrays.get(f"d_{half}"))
        for half in ("train", "test")
    )
    classes = int(arrays["y_train"].max()) + 1
    domains = int(arrays["d_train"].max()) + 1 if "d_train" in arrays else 0
    names = tuple(str(c) for c in range(classes))
    return ImageData(str(path), train, test, names, tuple(f"domain {d}" for d in range(domains)))


def load_folder(root: Path) -> ImageData:
    """train/<class>/*.jpg and test/<class>/*.jpg; classes in the order of their sorted folder names."""
    if not root.is_dir():
        raise DataError(f"folder '{root}' not found. Expected: train/<class>/ and test/<class>/ below it")
    halves = {}
    for half in ("train", "test"):
        if not (root / half).is_dir():
            found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
            raise DataError(f"'{half}/' missing under '{root}'; found: {found}. Expected train/ and test/")
        halves[half] = {p.name: _images_in(p) for p in sorted((root / half).iterdir()) if p.is_dir()}
    only = {half: sorted(set(halves[half]) - set(halves[other])) for half, other in _PAIRS}
    differing = [f"only in {half}: {', '.join(names[:5])}" for half, names in only.items() if names]
    if differing:
        raise DataError(f"class sets differ between train and test in '{root}': {'; '.join(differing)}")
    empty = [f"{half}/{name}" for half in halves for name, paths in halves[half].items() if not paths]
    if empty or not halves["train"]:
        what = f"class folders without images: {', '.join(empty[:5])}" if empty else "no class folders in train/"
        raise DataError(f"{what} in '{root}'. Add images ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folders")
    names = tuple(halves["train"])
    return ImageData(str(root), _path_split(halves["train"], names), _path_split(halves["test"], names), names)


_PAIRS = (("train", "test"), ("test", "train"))


def _path_split(folders: dict[str, list[Path]], names: tuple[str, ...]) -> Split:
    paths = [path for name in names for path in folders[name]]
    labels = np.repeat(np.arange(len(names)), [len(folders[name]) for name in names])
    return Split(paths, labels.astype(np.int64))


def _images_in(folder: Path) -> list[Path]:
    """Sorted image files below a folder; hidden files and other kinds are left out."""
    files = (p for p in sorted(folder.rglob("*")) if not p.name.startswith("."))
    return [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise DataError(f"no such file: {path}. Expected an npz with x_train, y_train, x_test, y_test") from None
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and numpy raise many types for a damaged archive
        raise DataError(f"{path} cannot be read as npz ({type(error).__name__}: {error})") from None


def _npz_faults(arrays: dict[str, np.ndarray], half: str) -> list[str]:
    x, y, d = (arrays.get(f"{letter}_{half}") for letter in "xyd")
    if x is None or y is None:
        return [f"missing array {letter}_{half}" for letter, array in (("x", x), ("y", y)) if array is None]
    faults = []
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        faults.append(f"x_{half} must be uint8 [N, H, W, 3], is {x.dtype} {list(x.shape)}")
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        faults.append(f"y_{half} must be whole numbers [N], is {y.dtype} {list(y.shape)}")
    if len(x) != len(y):
        faults.append(f"x_{half} holds {len(x)} images but y_{half} {len(y)} labels")
    if len(x) == 0:
        faults.append(f"x_{half} holds no images")
    if d is not None and (not np.issubdtype(d.dtype, np.integer) or d.shape != y.shape or d.min(initial=0) < 0):
        faults.append(f"d_{half} must be whole numbers >= 0 [{len(y)}], is {d.dtype} {list(d.shape)}")
    return faults


def _label_faults(y_train: np.ndarray, y_test: np.ndarray) -> list[str]:
    """Labels must be 0..C-1, each present in both halves."""
    train, test = np.unique(y_train), np.unique(y_test)
    if not np.array_equal(train, np.arange(len(train))):
        return [f"y_train must hold every label 0..C-1, holds {_shorten(train)}"]
    if not np.array_equal(train, test):
        return [f"y_test holds the labels {_shorten(test)}, y_train {_shorten(train)}: they must be the same"]
    return []


def _shorten(labels: np.ndarray) -> str:
    shown = ", ".join(str(label) for label in labels[:6])
    return f"{shown}, ... ({len(labels)} in all)" if len(labels) > 6 else shown


def _digest(data: ImageData) -> str:
    """SHA-256 over labels and images: of arrays the pixels, of files the class and file names and sizes."""
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        digest.update(np.ascontiguousarray(split.labels).tobytes())
        if isinstance(split.images, np.ndarray):
            digest.update(np.ascontiguousarray(split.images).tobytes())
        else:
            for path in split.images:
                digest.update(f"{path.parent.name}/{path.name}:{path.stat().st_size}\n".encode())
    return digest.hexdigest()


@SOURCES.register("digits")
def digits(_: Path) -> ImageData:
    """scikit-learn's bundled 1,797 handwritten digits, 8x8 grey, enlarged to 32x32 RGB.

    The first 70 % of each class train, the rest test: the file is in the order of its writers, so the test
    digits come largely from other hands.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    train = np.zeros(len(images), dtype=bool)
    for label in range(10):
        rows = np.flatnonzero(bunch.target == label)
        train[rows[: int(0.7 * len(rows))]] = True
    labels = bunch.target.astype(np.int64)
    halves = Split(images[train], labels[train]), Split(images[~train], labels[~train])
    return ImageData("digits", *halves, tuple("0123456789"))


@SOURCES.register("glyphs")
def glyphs(_: Path) -> ImageData:
    """100 classes of rendered characters in twelve faces, either polarity: a class-incremental stream."""
    (train, y_train, _d), (test, y_test, _e), names = stream_split(domains=None)
    return ImageData("glyphs", Split(train, y_train), Split(test, y_test), names)


@SOURCES.register("glyphs_domains")
def glyphs_domains(_: Path) -> ImageData:
    """The first 40 classes of `glyphs` in six domains (sans, serif, mono, bold, oblique, inverted)."""
    (train, y_train, d_train), (test, y_test, d_test), names = stream_split(domains=DOMAINS)
    halves = (Split(train, y_train, d_train), Split(test, y_test, d_test))
    return ImageData("glyphs_domains", *halves, names, tuple(DOMAINS))


@SOURCES.register("glyphs_pretrain")
def glyphs_pretrain(_: Path) -> ImageData:
    """Characters that no stream uses: what the bundled small ViT was trained on."""
    (train, y_train), (test, y_test), names = pretraining_split()
    return ImageData("glyphs_pretrain", Split(train, y_train), Split(test, y_test), names)


def _cifar(classes: int) -> Source:
    def source(data_root: Path) -> ImageData:
        from torchvision.datasets import CIFAR10, CIFAR100

        cls = CIFAR10 if classes == 10 else CIFAR100
        train, test = (_open_cifar(cls, data_root, half) for half in (True, False))
        splits = _cifar_split(train), _cifar_split(test)
        return ImageData(cls.__name__, *splits, tuple(train.classes))

    return source


def _cifar_split(half: Any) -> Split:
    return Split(half.data, np.asarray(half.targets, dtype=np.int64))


def _open_cifar(cls: Any, data_root: Path, train: bool) -> Any:
    """torchvision's data set, downloaded when it is not there; a sentence when neither works."""
    folder, archive = cls.base_folder, data_root / cls.filename
    try:
        return cls(str(data_root), train=train, download=not (data_root / folder).is_dir())
    except Exception as error:  # noqa: BLE001 - url, tar, pickle and checksum faults come as many types
        if (data_root / folder).is_dir():
            what = f"'{data_root / folder}' is incomplete or damaged ({error}); delete it and run again"
        elif archive.is_file():
            what = f"'{archive}' is damaged ({error}); delete it and run again"
        else:
            what = f"'{data_root / folder}' not found and the download failed ({error})"
        raise DataError(
            f"{cls.__name__}: {what}. Without a network, place the unpacked folder '{folder}' under '{data_root}', "
            "or point data_root (key, --set data_root=DIR, or $PALIMPSEST_DATA) at the folder that holds it"
        ) from None


SOURCES.register("cifar10")(_cifar(10))
SOURCES.register("cifar100")(_cifar(100))
SOURCES.register("cifar224")(_cifar(100))
