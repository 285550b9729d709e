"""Data sets by name. A source is a function from `data_root` to `ImageData`; registering it is all it takes."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import data.archives  # noqa: F401 - registers the data sets of the literature
from data.archives.cifar import fetch_cifar
from data.checks import Findings, check_counts, check_whole
from data.glyphs import DOMAINS, pretraining_split, stream_split
from data.hf import load_hf
from data.idx import load_fashion_mnist
from data.images import IMAGE_SUFFIXES
from data.layouts import LAYOUTS, Options, class_folders, find_place
from data.npz import load_npz
from data.records import ImageData, Split
from data.rows import ROWS, Row, Variant
from data.splits import split_hash
from data.torchvision_sets import SHORT, load_torchvision
from utils.errors import DataError, UserError, did_you_mean, reason
from utils.files import special
from utils.registry import Registry, imported
from utils.storage import expanded

log = logging.getLogger(__name__)

Source = Callable[[Path], ImageData]
SOURCES: Registry[Source] = Registry("data set", also=("folder:DIR", "npz:FILE", "torchvision:NAME", "hf:NAME"))
KINDS = ("npz", "folder", "torchvision", "hf")  # what may stand before a colon; anything else is a module


def default_root(data_root: str | None) -> Path:
    """Where data sets lie: the key, then $PALIMPSEST_DATA, then ~/.cache/palimpsest/data.

    A blank at either end, easily pasted along, is dropped unless the folder is really called so.
    """
    text = data_root or os.environ.get("PALIMPSEST_DATA") or "~/.cache/palimpsest/data"
    path = expanded(text)
    return path if path.exists() else expanded(text.strip())


def load(name: str, data_root: str | None, options: Options | None = None) -> ImageData:
    """The data set called `name`, `npz:FILE` or `folder:DIR`; its doubts are logged.

    Raises UserError for an unknown name, DataError with every fault when the data are missing or damaged.
    """
    data, findings = read(name, data_root, options or Options())
    findings.raise_errors()
    for finding in findings.of("warning"):
        log.warning("%s", finding.text)
    for finding in findings.of("note"):
        if finding.code == "D10":  # what is left out of a folder or an archive
            log.info("%s", finding.text)
    if data is None:
        raise DataError(f"{name}: nothing could be read")  # a reader that gives nothing says why; this is our mistake
    return replace(data, name=name, digest=_digest(data))


def _outside(name: str) -> Source:
    """A data set from the Python path, "package.module:function". Raises UserError where there is none."""
    kind, _, place = name.partition(":")
    if near := did_you_mean(kind, KINDS):
        raise UserError(f'unknown data set "{name}"{near.replace(chr(34) + "?", ":" + place + chr(34) + "?")}')
    found = imported(name, "data set")
    if not callable(found):
        raise UserError(f'data set "{name}" is no function from data_root to data.records.ImageData')
    return found


def load_folder(root: Path) -> ImageData:
    """train/<class>/*.jpg and test/<class>/*.jpg; classes in the order of their sorted folder names."""
    return load(f"folder:{root}", None)


def read(name: str, data_root: str | None, options: Options) -> tuple[ImageData | None, Findings]:
    """(data set or None, everything found about it), raising nothing that a finding can say."""
    findings = Findings(name, options.strict)
    kind, colon, _ = name.partition(":")
    if colon and kind not in KINDS:  # a function of the user's own: what it raises is its own
        data = _own_function(name, data_root, options, findings)
    else:
        data = _told(name, data_root, options, findings)
    if data is not None:
        check_whole(data, findings)
    return data, findings


def _told(name: str, data_root: str | None, options: Options, findings: Findings) -> ImageData | None:
    """`_read`; what the system says of a path (a name too long, no permission, a home of nobody) is a finding."""
    try:
        return _read(name, data_root, options, findings)
    except OSError as error:
        place = f"'{error.filename}'" if error.filename else "a file"
        findings.error("D09", f"{place} cannot be read ({reason(error)}). Check its name and its permissions")
    except (ValueError, RuntimeError, MemoryError) as error:
        findings.error("D09", f"cannot be read ({reason(error)}). Check the name, and what lies there")
    return None


def _own_function(name: str, data_root: str | None, options: Options, findings: Findings) -> ImageData | None:
    if _fixed_split(options, findings):
        return None
    data = _outside(name)(default_root(data_root))
    if not isinstance(data, ImageData):
        raise UserError(f'data set "{name}" gave a {type(data).__name__}, expected data.records.ImageData')
    return data


def _fixed_split(options: Options, findings: Findings) -> bool:
    if options.split != "folder":
        findings.error("D03", f'its split is fixed: split must be "folder", is "{options.split}"')
    return options.split != "folder"


def _read(name: str, data_root: str | None, options: Options, findings: Findings) -> ImageData | None:
    kind, colon, place = name.partition(":")
    if name in ROWS:
        return read_row(ROWS[name], default_root(data_root), options, findings)
    if colon and kind == "folder":
        row = replace(_OWN_FOLDER, key=name)
        path = expanded(place)
        if path.is_dir():
            return _finished(class_folders(row, path, options, findings), row.variants[0])
        findings.error("D01", f"folder '{path}' not found. Expected: {row.expects} below it")
        return None
    root = default_root(data_root)
    if colon and kind in ("torchvision", "hf"):
        load = load_torchvision if kind == "torchvision" else load_hf
        return _finished(load(place, root, options, findings))
    if name == "fashionmnist":
        return load_fashion_mnist(root, options, findings)
    if name in SHORT:
        return _finished(load_torchvision(SHORT[name], root, options, findings))
    if _fixed_split(options, findings):
        return None
    if colon and kind == "npz":
        return load_npz(expanded(place), findings)
    return SOURCES[name](default_root(data_root))


def read_row(row: Row, root: Path, options: Options, findings: Findings) -> ImageData | None:
    """A data set of the table, from its folder below `root`."""
    missing = Findings(row.key, options.strict)
    place = find_place(row, root, missing)
    if place is None and row.layout == "cifar" and options.download:
        if (sentence := fetch_cifar(row, root)) is not None:
            findings.error("D11", sentence)
            return None
        place = find_place(row, root, missing := Findings(row.key, options.strict))
    findings.all += missing.all
    if place is None:
        return None
    data = LAYOUTS[row.layout].read(row, place, options, findings)
    if data is None or not len(data.train) or not len(data.test):
        return None
    variant = check_counts(row, len(data.train), len(data.test), findings)
    return _finished(replace(data, natural_order=row.natural_order), variant)


def _finished(data: ImageData | None, variant: Variant | None = None) -> ImageData | None:
    """With everything that tells one split from another in `variant`; of arrays, the digest does that."""
    if data is None:
        return None
    parts = [variant.name if variant is not None else "unknown counts", data.variant]
    if data.train.in_files and data.test.in_files:
        halves = {"train": _entries(data, data.train), "test": _entries(data, data.test)}
        parts.append(f"split {split_hash(halves)[:12]}")
    return replace(data, variant=", ".join(parts))


def _entries(data: ImageData, split: Split) -> Iterator[str]:
    for label, path in zip(split.labels, split.images, strict=True):
        assert isinstance(path, Path)
        yield f"{data.class_names[label]}/{path.name}"


def _digest(data: ImageData) -> str:
    """SHA-256 over labels and images: of arrays the pixels, of files the class and file names and sizes."""
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        digest.update(np.ascontiguousarray(split.labels).tobytes())
        if isinstance(split.images, np.ndarray):
            digest.update(np.ascontiguousarray(split.images).tobytes())
            continue
        for path in split.images:
            if isinstance(path, np.ndarray):
                digest.update(f"{path.shape}\n".encode() + np.ascontiguousarray(path).tobytes())
                continue
            digest.update(f"{path.parent.name}/{path.name}:{_size(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"image '{path}' cannot be read ({reason(error)}). Replace or remove it") from None
    if kind := special(info.st_mode):
        raise DataError(f"image '{path}' is {kind}. Replace or remove it")
    return info.st_size


_OWN_FOLDER = Row(
    key="folder",
    title="a folder of your own",
    classes=0,
    layout="folders",
    folders=(),
    expects=f"train/<class>/ and test/<class>/ with images ({', '.join(sorted(IMAGE_SUFFIXES))})",
    source="",
    variants=(Variant("own", None, None),),
)


class _TableSource:
    """A row of the table as a source with the default options; `list` shows its docstring."""

    def __init__(self, row: Row):
        self._key = row.key
        self.__doc__ = f"{row.title}: {row.classes} classes; {row.folders[0]}/"

    def __call__(self, data_root: Path) -> ImageData:
        return load(self._key, str(data_root))


for _row in ROWS.values():
    SOURCES.register(_row.key)(_TableSource(_row))


class _LibrarySource:
    """A set of a library under a short name."""

    def __init__(self, name: str, text: str):
        self._name, self.__doc__ = name, text

    def __call__(self, data_root: Path) -> ImageData:
        return load(self._name, str(data_root))


for _name, _official in {"fashionmnist": "FashionMNIST", **SHORT}.items():
    _also = ", or from Debian's package dataset-fashion-mnist" if _name == "fashionmnist" else ""
    SOURCES.register(_name)(_LibrarySource(_name, f"torchvision's {_official}{_also}"))


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
