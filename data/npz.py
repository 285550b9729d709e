"""A data set in one npz file: a user's own arrays, MedMNIST's, and the streams that tests make.

What the arrays are is read from their headers; nothing is unpacked that is not used.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data.checks import Findings, some
from data.records import ImageData, Split
from utils.errors import DataError
from utils.files import npz_headers, num_bytes, require_file, told
from utils.runtime import available_memory

EXPECTED = "Expected an npz with x_train, y_train, x_test, y_test"
Headers = dict[str, tuple[tuple[int, ...], np.dtype]]
# Our names -> MedMNIST's. Its images may be grey, its labels are [N, 1]; its validation part is left out.
MEDMNIST = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
OURS = ("x_train", "y_train", "d_train", "x_test", "y_test", "d_test")


def load_npz(path: Path, findings: Findings) -> ImageData:
    """x_train, x_test uint8 (N, H, W, 3); y_train, y_test whole numbers 0..C-1; optionally d_train, d_test
    (domain of each image, 0..D-1), which make a domain-incremental stream. Or MedMNIST's train_images (N, H, W) or
    (N, H, W, 3), train_labels (N, 1), test_images, test_labels.

    Raises DataError with every fault. Arrays that are not used are noted (D10).
    """
    require_file(path, "data set", DataError)
    with told("data set", path, DataError, "npz", EXPECTED):
        headers = npz_headers(path)
    medmnist = not {"x_train", "x_test"} & set(headers) and {"train_images", "test_images"} <= set(headers)
    names = MEDMNIST if medmnist else {name: name for name in OURS}
    known = {ours: headers[theirs] for ours, theirs in names.items() if theirs in headers}
    _raise(path, [fault for half in ("train", "test") for fault in _faults(known, names, half, medmnist)])
    _check_room(path, known.values())
    if left := sorted(set(headers) - set(names.values())):
        shown = [f"{name} {list(headers[name][0])}" for name in left]
        findings.note("D10", f"{len(left)} arrays of '{path}' are left out: {some(shown)}")
    with (
        told("data set", path, DataError, "npz", "fetch or make it again"),
        np.load(path, allow_pickle=False) as archive,
    ):
        arrays = {ours: archive[names[ours]] for ours in known}
    if medmnist:
        arrays = {name: _as_ours(name, array) for name, array in arrays.items()}
    _raise(path, _value_faults(arrays))
    train, test = (
        Split(arrays[f"x_{half}"], arrays[f"y_{half}"].astype(np.int64), arrays.get(f"d_{half}"))
        for half in ("train", "test")
    )
    classes = int(arrays["y_train"].max()) + 1
    domains = int(arrays["d_train"].max()) + 1 if "d_train" in arrays else 0
    return ImageData(
        str(path), train, test, tuple(map(str, range(classes))), tuple(f"domain {d}" for d in range(domains))
    )


def _raise(path: Path, faults: list[str]) -> None:
    if faults:
        raise DataError("\n".join([f"{path} is not usable as a data set:", *(f"  - {fault}" for fault in faults)]))


def _faults(headers: Headers, names: Mapping[str, str], half: str, medmnist: bool) -> list[str]:
    """What shapes and types alone tell."""
    x, y, d = (headers.get(f"{letter}_{half}") for letter in "xyd")
    x_name, y_name = names[f"x_{half}"], names[f"y_{half}"]
    if x is None or y is None:
        return [f"missing array {name}" for name, header in ((x_name, x), (y_name, y)) if header is None]
    faults = []
    grey = medmnist and len(x[0]) == 3
    if x[1] != np.uint8 or not (grey or (len(x[0]) == 4 and x[0][-1] == 3)):
        wanted = "uint8 [N, H, W] or [N, H, W, 3]" if medmnist else "uint8 [N, H, W, 3]"
        faults.append(f"{x_name} must be {wanted}, is {x[1]} {list(x[0])}")
    labels = y[0][:1] if medmnist and len(y[0]) == 2 and y[0][1] == 1 else y[0]
    if not np.issubdtype(y[1], np.integer) or len(labels) != 1:
        more = " (several labels an image are not supported)" if len(y[0]) == 2 else ""
        faults.append(f"{y_name} must be whole numbers [N], is {y[1]} {list(y[0])}{more}")
    if x[0][:1] != y[0][:1]:
        faults.append(f"{x_name} holds {_count(x)} images but {y_name} {_count(y)} labels")
    if 0 in x[0]:
        faults.append(f"{x_name} holds no images" + ("" if x[0][0] == 0 else f" with pixels: {list(x[0])}"))
    if d is not None and (not np.issubdtype(d[1], np.integer) or d[0] != y[0]):
        faults.append(f"d_{half} must be whole numbers >= 0 [{_count(y)}], is {d[1]} {list(d[0])}")
    if half == "train" and ("d_train" in headers) != ("d_test" in headers):
        faults.append("d_train and d_test: give both or neither")
    return faults


def _count(header: tuple[tuple[int, ...], np.dtype]) -> int:
    return header[0][0] if header[0] else 0


def _check_room(path: Path, headers) -> None:
    total = sum(num_bytes(*header) for header in headers)
    if (free := available_memory()) is not None and total > free:
        raise DataError(
            f"{path} unpacks to {total / 2**30:,.1f} GiB, {free / 2**30:,.1f} GiB of memory are free. Store the images "
            "as files: folder:DIR"
        )


def _as_ours(name: str, array: np.ndarray) -> np.ndarray:
    if name.startswith("y"):
        return array.reshape(len(array))
    return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 3 else array


def _value_faults(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Labels must be 0..C-1, each present in both halves; domains no more than there are images."""
    train, test = np.unique(arrays["y_train"]), np.unique(arrays["y_test"])
    if not np.array_equal(train, np.arange(len(train))):
        return [f"y_train must hold every label 0..C-1, holds {_shorten(train)}"]
    if not np.array_equal(train, test):
        return [f"y_test holds the labels {_shorten(test)}, y_train {_shorten(train)}: they must be the same"]
    faults = []
    for half in ("train", "test"):
        domains = arrays.get(f"d_{half}")
        if domains is not None and (domains.min() < 0 or domains.max() >= len(domains)):
            numbers = _shorten(np.unique(domains))
            faults.append(f"d_{half} must number the domains 0..D-1, holds {numbers}")
    return faults


def _shorten(labels: np.ndarray) -> str:
    shown = ", ".join(str(label) for label in labels[:6])
    return f"{shown}, ... ({len(labels)} in all)" if len(labels) > 6 else shown
