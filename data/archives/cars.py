"""Stanford Cars: the official .mat files, or class folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings, found_in, some
from data.layouts import (
    HALVES,
    LAYOUTS,
    Layout,
    Options,
    class_folders,
    entry,
    has_halves,
    image_data,
)
from data.records import ImageData
from data.rows import Row, Variant, add_row
from data.splits import Chosen, report_lines

SPLIT_FOLDERS = "train/<class>/ and test/<class>/"


def cars(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """cars_annos.mat with car_ims/ (field `test`: 1 = test), or cars_train/, cars_test/ with devkit/*.mat; or class
    folders. Classes in the order of their official numbers. Kaggle's copies double the folders
    (cars_train/cars_train/)."""
    whole, halves = _car_lists(place)
    if whole is not None and entry(place, "car_ims") is None and entry(place, "cars_train") is not None:
        whole = None  # it numbers the pictures of another archive
    if whole is None and not any(halves.values()):
        if entry(place, "cars_train", "cars_test") is None:
            return class_folders(row, place, options, findings)
        findings.error(
            "D02",
            f"'{place}' holds pictures and no labels, as a copy of Kaggle's does: put devkit/ (car_devkit.tgz) with "
            f"cars_train_annos.mat, cars_meta.mat and cars_test_annos_withlabels.mat beside cars_train/ and cars_test/"
            f"; found: {found_in(place)}",
        )
        return None
    if options.split != "folder":
        findings.error("D03", f'the official .mat files hold the split: split must be "folder", is "{options.split}"')
        return None
    if whole is not None:
        records = _read_mat(whole, "annotations", findings)
        found = [(place / _text(r["relative_im_path"]), int(r["class"]), int(r["test"]) == 1) for r in records]
        names = [_text(name) for name in _read_mat(whole, "class_names", findings)]
    else:
        found, names = _read_devkit(place, halves, findings)
        if any(path.parent.name == path.parent.parent.name for path, *_ in found):
            findings.note("D04", "the pictures lie one level deeper (cars_train/cars_train/): using them")
    wrong = [f"{path.name}: class {label}" for path, label, _ in found if not 1 <= label <= len(names)]
    missing = sorted({path.parent for path, *_ in found if not path.parent.is_dir()})
    if missing:
        findings.error("D02", f"image folders missing: {some(missing)}. Unpack the image archives there")
    elif absent := _absent([path for path, *_ in found]):
        report_lines([f"no such image '{path}'" for path in absent], f"annotations in '{place}'", findings)
    report_lines(wrong, f"annotations in '{place}'", findings)
    if row.classes != len(names) and names:
        findings.error("D05", f"expected {row.classes} classes in the .mat files, found {len(names)}")
    if findings.of("error"):
        return None
    chosen: Chosen = {half: {f"{n:03d} {name}": [] for n, name in enumerate(names, 1)} for half in HALVES}
    keys = list(chosen["train"])
    for path, label, is_test in found:
        chosen["test" if is_test else "train"][keys[label - 1]].append(path)
    return image_data(row, chosen, "official .mat", findings)


def _car_lists(place: Path) -> tuple[Path | None, dict[str, Path | None]]:
    """(cars_annos.mat, {"train": .., "test": ..} annotation files of the devkit)."""
    halves = {
        "train": _devkit(place, "cars_train_annos.mat"),
        "test": _devkit(
            place, "cars_test_annos_withlabels.mat", "cars_test_annos_withlabels (1).mat", "cars_test_annos.mat"
        ),
    }
    return entry(place, "cars_annos.mat"), halves


def _devkit(place: Path, *names: str) -> Path | None:
    """The first of these files, in the folders where copies keep it."""
    folders = ("devkit/", "", "car_devkit/devkit/", "car_devkit/")
    return entry(place, *(folder + name for name in names for folder in folders))


def _pictures(place: Path, half: str) -> Path:
    folder = entry(place, f"cars_{half}") or place / f"cars_{half}"
    return entry(folder, f"cars_{half}") or folder


def _read_devkit(
    place: Path, halves: Mapping[str, Path | None], findings: Findings
) -> tuple[list[tuple[Path, int, bool]], list[str]]:
    meta = _devkit(place, "cars_meta.mat")
    found: list[tuple[Path, int, bool]] = []
    names = [_text(name) for name in _read_mat(meta, "class_names", findings)] if meta is not None else []
    for name, path in (("cars_meta", meta), ("cars_train_annos", halves["train"]), ("cars_test_annos", halves["test"])):
        if path is None:
            findings.error("D02", f"devkit/{name}*.mat missing under '{place}'. Unpack car_devkit.tgz there")
    for half, path in halves.items():
        records = _read_mat(path, "annotations", findings) if path is not None else []
        if len(records) and "class" not in (records[0].dtype.names or ()):
            findings.error(
                "D02",
                f"'{path}' holds no labels: put cars_{half}_annos_withlabels.mat beside it (the test labels were "
                "published as a file of their own)",
            )
            continue
        folder = _pictures(place, half)
        found += [(folder / _text(r["fname"]), int(r["class"]), half == "test") for r in records]
    return found, names


def _read_mat(path: Path, key: str, findings: Findings) -> Any:
    """A flat array from a MATLAB file; empty, with a finding, when it cannot be read."""
    from scipy.io import loadmat

    try:
        return loadmat(str(path), squeeze_me=True, variable_names=[key])[key].reshape(-1)
    except Exception as error:  # noqa: BLE001 - scipy raises many types for damaged files
        findings.error("D15", f"'{path}' cannot be read as a MATLAB file with '{key}' ({error}). Fetch it again")
        return np.empty(0)


def _text(value: Any) -> str:
    return str(value.item() if isinstance(value, np.ndarray) else value)


def _absent(paths: list[Path]) -> list[Path]:
    present = {folder: {p.name for p in folder.iterdir()} for folder in {path.parent for path in paths}}
    return [path for path in paths if path.name not in present[path.parent]]


def _fits_cars(row: Row, place: Path) -> bool:
    whole, halves = _car_lists(place)
    pictures = entry(place, "cars_train", "cars_test") is not None
    return whole is not None or any(halves.values()) or pictures or has_halves(row, place)


LAYOUTS["cars"] = Layout(cars, _fits_cars, whole=True)
add_row(
    Row(
        key="cars",
        title="Stanford Cars",
        classes=196,
        layout="cars",
        folders=("cars", "cars196", "stanford_cars"),
        expects=SPLIT_FOLDERS + ", or cars_train/ cars_test/ devkit/*.mat, or car_ims/ and cars_annos.mat",
        source="Stanford (the site is gone; copies exist)",
        variants=(Variant("official", 8_144, 8_041),),
    )
)
