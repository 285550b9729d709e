"""Official archives whose layout is not folders per class: CUB, Stanford Cars, CIFAR, Tiny-ImageNet."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data.checks import Findings, some
from data.images import images_below
from data.layouts import (
    HALVES,
    LAYOUTS,
    Layout,
    Options,
    class_folders,
    entry,
    has_halves,
    image_data,
    note_ignored,
    read_classes_of,
    split_pool,
)
from data.records import ImageData, Split
from data.splits import Chosen, report_lines
from data.table import Row

CUB_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def cub(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """images/<class>/ with images.txt (id path) and train_test_split.txt (id flag, 1 = train); or class folders."""
    lists = [entry(place, name) for name in CUB_LISTS]
    images = entry(place, "images")
    if images is None or not any(lists):
        return class_folders(row, place, options, findings)
    classes = read_classes_of(images, None, findings)
    if options.split != "folder":
        return split_pool(row, classes, options, findings)
    if missing := [name for name, path in zip(CUB_LISTS, lists, strict=True) if path is None]:
        findings.error("D02", f"{', '.join(missing)} missing under '{place}'. Unpack CUB_200_2011.tgz again")
        return None
    if row.classes != len(classes):
        findings.error("D05", f"expected {row.classes} class folders in images/, found {len(classes)}. Unpack again")
    names, flags = ({n: v for n, v in _pairs(path)} for path in (lists[0], lists[2]) if path is not None)
    by_entry = {f"{name}/{path.name}": (name, path) for name, paths in classes.items() for path in paths}
    chosen: Chosen = {half: {name: [] for name in classes} for half in HALVES}
    faults = []
    for line, (number, text) in enumerate(names.items(), 1):
        if text not in by_entry:
            faults.append(f"images.txt line {line}: no such image '{text}'")
        elif flags.get(number) not in ("0", "1"):
            faults.append(f"train_test_split.txt: no flag 0 or 1 for image {number}")
        else:
            name, path = by_entry[text]
            chosen["train" if flags[number] == "1" else "test"][name].append(path)
    report_lines(faults, f"lists in '{place}'", findings)
    return None if findings.of("error") else image_data(row, chosen, "official list", findings)


def _pairs(path: Path) -> list[tuple[str, str]]:
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return [(words[0], words[1].strip()) for words in lines if len(words) == 2]


def cars(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """cars_annos.mat with car_ims/ (field `test`: 1 = test), or cars_train/, cars_test/ with devkit/*.mat; or class
    folders. Classes in the order of their official numbers."""
    whole, halves = _car_lists(place)
    if whole is None and not any(halves.values()):
        return class_folders(row, place, options, findings)
    if options.split != "folder":
        findings.error("D03", f'the official .mat files hold the split: split must be "folder", is "{options.split}"')
        return None
    if whole is not None:
        records = _read_mat(whole, "annotations", findings)
        found = [(place / _text(r["relative_im_path"]), int(r["class"]), int(r["test"]) == 1) for r in records]
        names = [_text(name) for name in _read_mat(whole, "class_names", findings)]
    else:
        found, names = _read_devkit(place, halves, findings)
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
    test = ("devkit/cars_test_annos_withlabels.mat", "cars_test_annos_withlabels.mat")
    halves = {
        "train": entry(place, "devkit/cars_train_annos.mat", "cars_train_annos.mat"),
        "test": entry(place, *test, "devkit/cars_test_annos.mat", "cars_test_annos.mat"),
    }
    return entry(place, "cars_annos.mat"), halves


def _read_devkit(
    place: Path, halves: Mapping[str, Path | None], findings: Findings
) -> tuple[list[tuple[Path, int, bool]], list[str]]:
    meta = entry(place, "devkit/cars_meta.mat", "cars_meta.mat")
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
        found += [(place / f"cars_{half}" / _text(r["fname"]), int(r["class"]), half == "test") for r in records]
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


class _ArraysOnly(pickle.Unpickler):
    """CIFAR is published as pickles; numbers, texts and arrays are all that they hold, and all that is loaded."""

    ALLOWED = {("_reconstruct",), ("ndarray",), ("dtype",), ("encode",)}

    def find_class(self, module: str, name: str) -> Any:
        if (name,) not in self.ALLOWED or module.partition(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def cifar(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """The batches as torchvision unpacks them: pickled dicts with data uint8 (N, 3072), channel by channel."""
    from torchvision.datasets import CIFAR10, CIFAR100

    official: Any = CIFAR10 if row.classes == 10 else CIFAR100
    label_key = "labels" if row.classes == 10 else "fine_labels"
    if options.split != "folder":
        findings.error("D03", f'its halves are fixed: split must be "folder", is "{options.split}"')
        return None
    meta = _read_batch(place, official.meta["filename"], official.meta["md5"], findings)
    splits = {}
    for half, files in (("train", official.train_list), ("test", official.test_list)):
        batches = [_read_batch(place, name, md5, findings) for name, md5 in files]
        images = [np.asarray(b.get("data", ())) for b in batches]
        labels = [np.asarray(b.get(label_key, ()), dtype=np.int64) for b in batches]
        for (name, _), x, y in zip(files, images, labels, strict=True):
            if x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != 3072 or len(x) != len(y):
                findings.error("D11", f"'{place / name}' is incomplete or damaged; delete '{place}' and run again")
        if not findings.of("error"):
            pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            splits[half] = Split(np.ascontiguousarray(pixels), np.concatenate(labels))
    if findings.of("error"):
        return None
    return ImageData(row.key, splits["train"], splits["test"], tuple(meta[official.meta["key"]]), variant="folder")


def _read_batch(place: Path, name: str, md5: str, findings: Findings) -> dict[str, Any]:
    path = place / name
    if not path.is_file():
        findings.error("D11", f"'{path}' is missing; delete '{place}' and run again, or unpack the archive again")
        return {}
    content = path.read_bytes()
    try:
        values = _load_arrays(content)
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises many types
        findings.error("D11", f"'{path}' is damaged ({error}); delete '{place}' and run again, or unpack it again")
        return {}
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        findings.doubt("D11", f"'{path}' differs from the official file (md5 {found}, not {md5}); unpack it again")
    return values


def _load_arrays(content: bytes) -> dict[str, Any]:
    import io

    values = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    if not isinstance(values, dict):
        raise ValueError(f"holds a {type(values).__name__}, expected a dict")
    return values


def fetch_cifar(row: Row, root: Path) -> str | None:
    """Download and unpack CIFAR below data_root, or unpack the archive that lies there; a sentence when neither works
    (D11)."""
    from torchvision.datasets import CIFAR10, CIFAR100

    official: Any = CIFAR10 if row.classes == 10 else CIFAR100
    archive = root / official.filename
    had_archive = archive.is_file()
    if had_archive:
        md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        if md5 != official.tgz_md5:
            return f"'{archive}' is damaged (md5 {md5}, not {official.tgz_md5}); delete it and run again"
    try:
        official(str(root), download=True)
    except Exception as error:  # noqa: BLE001 - url, tar, pickle and checksum faults come as many types
        what = f"'{archive}' cannot be unpacked" if had_archive else "not found, and the download failed"
        return (
            f"{what} ({error}). Without a network, place the unpacked folder {official.base_folder} under '{root}', "
            "or point data_root (key, --data-root DIR, or PALIMPSEST_DATA) at the folder that holds it"
        )
    return None


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
                    arrays.append(
                        _pixels(np.load(path)) if letter == "x" else np.load(path).astype(np.int64).reshape(-1)
                    )
                except (OSError, ValueError, EOFError) as error:
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


def _fits_cub(row: Row, place: Path) -> bool:
    return any(entry(place, name) for name in CUB_LISTS) or has_halves(row, place)


def _fits_cars(row: Row, place: Path) -> bool:
    whole, halves = _car_lists(place)
    return whole is not None or any(halves.values()) or has_halves(row, place)


def _fits_cifar(row: Row, place: Path) -> bool:
    return (place / ("batches.meta" if row.classes == 10 else "meta")).is_file()


def _fits_tiny(row: Row, place: Path) -> bool:
    return _processed(place) is not None or has_halves(row, place)


LAYOUTS["cub"] = Layout(cub, _fits_cub, whole=True)
LAYOUTS["cars"] = Layout(cars, _fits_cars, whole=True)
LAYOUTS["cifar"] = Layout(cifar, _fits_cifar)
LAYOUTS["tinyimagenet"] = Layout(tiny_imagenet, _fits_tiny)
