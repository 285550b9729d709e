"""A data set in one npz file: a user's own arrays, and the streams that tests make."""

from pathlib import Path

import numpy as np

from data.records import ImageData, Split
from utils.errors import DataError


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
