"""Tiny-ImageNet: folders with val_annotations.txt, or processed arrays."""

from pathlib import Path

import numpy as np

from data.checks import Findings
from data.images import images_below
from data.layouts import (
    LAYOUTS,
    Layout,
    Options,
    class_folders,
    entry,
    has_halves,
    image_data,
    note_ignored,
    read_classes_of,
)
from data.records import ImageData, Split
from data.rows import Row, Variant, add_row
from data.splits import Chosen, report_lines

WNID = r"n\d{8}"


def tiny_imagenet(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """train/<wnid>/images/ and val/images/ with val_annotations.txt (file, wnid, box); val/<wnid>/ as well; or the
    arrays that mammoth and HCL make, processed/{x,y}_{train,val}_01..20.npy."""
    if options.split != "folder":
        findings.error("D03", f'train and val are the split: split must be "folder", is "{options.split}"')
        return None
    if (processed := _processed(place)) is not None:
        return _tiny_arrays(row, processed, findings)
    annotations = entry(place, "val/val_annotations.txt")
    images, train = entry(place, "val/images"), entry(place, "train")
    if annotations is None or images is None or train is None:
        return class_folders(row, place, options, findings)
    folders: Chosen = {"train": read_classes_of(train, None, findings)}
    if len(folders["train"]) != row.classes:
        findings.error("D05", f"expected {row.classes} class folders in train/, found {len(folders['train'])}")
    folders["test"] = {name: [] for name in folders["train"]}
    found, ignored = images_below(images)
    note_ignored(ignored, images, findings)
    paths, faults = {path.name: path for path in found}, []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if len(words) < 2 or words[0] not in paths:
            faults.append(f"line {number}: no such image '{line[:60]}'")
        elif words[1] not in folders["test"]:
            faults.append(f"line {number}: unknown class '{words[1]}'")
        else:
            folders["test"][words[1]].append(paths[words[0]])
    report_lines(faults, f"'{annotations}'", findings)
    return None if findings.of("error") else image_data(row, folders, "val_annotations.txt", findings)


def _processed(place: Path) -> Path | None:
    folder = entry(place, "processed") or place
    return folder if entry(folder, "x_train_01.npy") is not None else None


def _tiny_arrays(row: Row, folder: Path, findings: Findings) -> ImageData | None:
    splits = {}
    for half, name in (("train", "train"), ("test", "val")):
        parts: dict[str, list[np.ndarray]] = {"x": [], "y": []}
        for letter, arrays in parts.items():
            for number in range(1, 21):
                path = folder / f"{letter}_{name}_{number:02d}.npy"
                try:
                    if not path.is_file():
                        raise FileNotFoundError("no such file")
                    arrays.append(
                        _pixels(np.load(path)) if letter == "x" else np.load(path).astype(np.int64).reshape(-1)
                    )
                except (OSError, ValueError, EOFError, MemoryError) as error:
                    findings.error("D15", f"'{path}' is missing or damaged ({error}). Make the 20 parts again")
        if not findings.of("error"):
            splits[half] = Split(np.concatenate(parts["x"]), np.concatenate(parts["y"]))
            if len(splits[half].images) != len(splits[half].labels):
                findings.error("D15", f"x_{name} and y_{name} hold different numbers of images. Make the parts again")
    if findings.of("error"):
        return None
    classes = 1 + max(int(split.labels.max()) for split in splits.values())
    if classes != row.classes:
        findings.error("D05", f"expected labels 0..{row.classes - 1} in '{folder}', found up to {classes - 1}")
        return None
    names = tuple(str(label) for label in range(classes))
    return ImageData(row.key, splits["train"], splits["test"], names, variant="processed arrays")


def _pixels(array: np.ndarray) -> np.ndarray:
    """float 0..1 or uint8 (N, 64, 64, 3) -> uint8."""
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"shape {list(array.shape)}, expected [N, H, W, 3]")
    return array if array.dtype == np.uint8 else np.round(array * 255).clip(0, 255).astype(np.uint8)


def _fits_tiny(row: Row, place: Path) -> bool:
    return _processed(place) is not None or has_halves(row, place)


LAYOUTS["tinyimagenet"] = Layout(tiny_imagenet, _fits_tiny)
add_row(
    Row(
        key="tinyimagenet",
        title="Tiny-ImageNet, 64 px",
        classes=200,
        layout="tinyimagenet",
        folders=("tiny-imagenet-200", "TINYIMG"),
        expects="train/<wnid>/images/ and val/images/ with val/val_annotations.txt, or processed/x_train_01.npy ..",
        source="Stanford CS231n",
        variants=(Variant("official train and val", 100_000, 10_000),),
        test_names=("val",),
        class_pattern=WNID,
    )
)
