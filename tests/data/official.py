"""Small data sets of torchvision in their official layouts: three classes, few pictures."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"train": 4, "test": 2}  # of each class


def pixels(label: int, number: int, size: int = 28) -> np.ndarray:
    """Grey, told apart by its mean."""
    return np.full((size, size), (20 + 60 * label + number) % 250, dtype=np.uint8)


def picture(path: Path, label: int, number: int, grey: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels(label, number, 12 + number))
    (image if grey else image.convert("RGB")).save(path)


def lines(path: Path, text: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in text))


def idx(path: Path, values: np.ndarray, packed: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if packed else content)


def idx_files(folder: Path, prefix: str = "", first: int = 0, packed: bool = True, classes: int = 3) -> None:
    for half, (name, count) in {"train": ("train", COUNTS["train"]), "test": ("t10k", COUNTS["test"])}.items():
        name = f"{prefix}{half}" if prefix else name
        pairs = [(label, number) for number in range(count) for label in range(classes)]
        suffix = ".gz" if packed else ""
        images = np.stack([pixels(*pair) for pair in pairs])
        idx(folder / f"{name}-images-idx3-ubyte{suffix}", images, packed)
        labels = np.array([first + label for label, _ in pairs], np.uint8)
        idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels, packed)


def mnist(root: Path) -> None:
    idx_files(root / "MNIST" / "raw", packed=False)


def kmnist(root: Path) -> None:
    idx_files(root / "KMNIST" / "raw", packed=False)


def emnist(root: Path) -> None:
    """Letters: labels begin at 1."""
    idx_files(root / "EMNIST" / "raw", "emnist-letters-", first=1, packed=False)


def food101(root: Path) -> None:
    base, halves = root / "food-101", {"train": {}, "test": {}}
    for label, name in enumerate(("apple_pie", "beets", "cake")):
        for half, count in COUNTS.items():
            halves[half][name] = [f"{name}/{half}{number}" for number in range(count)]
            for number, entry in enumerate(halves[half][name]):
                picture(base / "images" / f"{entry}.jpg", label, number)
    for half, entries in halves.items():
        (base / "meta").mkdir(exist_ok=True)
        (base / "meta" / f"{half}.json").write_text(json.dumps(entries))


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True, exist_ok=True)
    for half, count in {"trainval": COUNTS["train"], "test": COUNTS["test"]}.items():
        rows = []
        for label, name in enumerate(("Abyssinian", "beagle", "Birman")):
            for number in range(count):
                picture(base / "images" / f"{name}_{half}{number}.jpg", label, number)
                rows.append(f"{name}_{half}{number} {label + 1} 1 1")
        lines(base / "annotations" / f"{half}.txt", rows)


def dtd(root: Path) -> None:
    base = root / "dtd" / "dtd"
    for half, count in {**COUNTS, "val": 3}.items():
        rows = []
        for label, name in enumerate(("banded", "dotted", "woven")):
            for number in range(count):
                rows.append(f"{name}/{name}_{half}{number}.jpg")
                picture(base / "images" / rows[-1], label, number)
        lines(base / "labels" / f"{half}1.txt", rows)


def eurosat(root: Path) -> None:
    for label, name in enumerate(("AnnualCrop", "Forest", "River")):
        for number in range(10):
            picture(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", label, number)


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for label in range(3):
        for number in range(COUNTS["train"]):
            picture(base / "GTSRB" / "Training" / f"{label:05d}" / f"{number}.ppm", label, number)
        for number in range(COUNTS["test"]):
            name = f"{label}{number}.ppm"
            picture(base / "GTSRB" / "Final_Test" / "Images" / name, label, number)
            rows.append(f"{name};9;9;0;0;9;9;{label}")
    lines(base / "GT-final_test.csv", rows)


def country211(root: Path) -> None:
    for half, count in {**COUNTS, "valid": 2}.items():
        for label, name in enumerate(("AD", "AE", "AF")):
            for number in range(count):
                picture(root / "country211" / half / name / f"{number}.jpg", label, number, grey=True)


def aircraft(root: Path) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    names = ("707-320", "727-200", "737-200")
    lines(base / "variants.txt", list(names))
    for half, count in {"trainval": COUNTS["train"], "test": COUNTS["test"]}.items():
        rows = []
        for label, name in enumerate(names):
            for number in range(count):
                picture(base / "images" / f"{half}{label}{number}.jpg", label, number)
                rows.append(f"{half}{label}{number} {name}")
        lines(base / f"images_variant_{half}.txt", rows)


def svhn(root: Path) -> None:
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for half, count in COUNTS.items():
        pairs = [(label, number) for label in range(3) for number in range(count)]
        images = np.stack([np.stack([pixels(*pair, 32)] * 3, axis=-1) for pair in pairs], axis=-1)
        labels = np.array([[label or 10] for label, _ in pairs])  # SVHN calls the zero 10
        savemat(root / f"{half}_32x32.mat", {"X": images, "y": labels})


def imagenette(root: Path) -> None:
    for half, count in {"train": COUNTS["train"], "val": COUNTS["test"]}.items():
        for label, name in enumerate(("n01440764", "n02102040", "n02979186")):
            for number in range(count):
                picture(root / "imagenette2" / half / name / f"{number}.JPEG", label, number)


def caltech101(root: Path) -> None:
    """The folder of what is no class stands beside the others."""
    for label, name in enumerate(("accordion", "ant", "brain", "BACKGROUND_Google")):
        for number in range(10):
            path = root / "caltech101" / "101_ObjectCategories" / name / f"image_{number + 1:04d}.jpg"
            picture(path, label, number, grey=number % 2 == 0)
    (root / "caltech101" / "Annotations").mkdir()


def sun397(root: Path) -> None:
    names = ("/a/abbey", "/b/bar/indoor", "/c/cabin")
    lines(root / "SUN397" / "ClassName.txt", list(names))
    for label, name in enumerate(names):
        for number in range(9, -1, -1):
            picture(root / "SUN397" / name[1:] / f"sun_{number}.jpg", label, number)


def flowers102(root: Path) -> None:
    from scipy.io import savemat

    base, ids, labels = root / "flowers-102", {"trnid": [], "valid": [], "tstid": []}, []
    for half, count in {"trnid": COUNTS["train"], "valid": 1, "tstid": COUNTS["test"]}.items():
        for label in range(3):
            for number in range(count):
                labels.append(label + 1)
                ids[half].append(len(labels))
                picture(base / "jpg" / f"image_{len(labels):05d}.jpg", label, number)
    savemat(base / "setid.mat", ids)
    savemat(base / "imagelabels.mat", {"labels": labels})


def stl10(root: Path) -> None:
    base = root / "stl10_binary"
    base.mkdir(parents=True)
    lines(base / "class_names.txt", ["airplane", "bird", "car"])
    (base / "unlabeled_X.bin").touch()
    for half, count in COUNTS.items():
        pairs = [(label, number) for label in range(3) for number in range(count)]
        np.stack([np.stack([pixels(*pair, 96)] * 3) for pair in pairs]).tofile(base / f"{half}_X.bin")
        np.array([label + 1 for label, _ in pairs], np.uint8).tofile(base / f"{half}_y.bin")


def usps(root: Path) -> None:
    import bz2

    root.mkdir(parents=True, exist_ok=True)
    for suffix, count in (("", COUNTS["train"]), (".t", COUNTS["test"])):
        pairs = [(label, number) for label in range(3) for number in range(count)]
        values = [
            " ".join(f"{i + 1}:{2 * (int(pixels(*pair)[0, 0]) + 0.5) / 255 - 1:.6f}" for i in range(256))
            for pair in pairs
        ]
        text = "".join(f"{label + 1} {row}\n" for (label, _), row in zip(pairs, values, strict=True))
        (root / f"usps{suffix}.bz2").write_bytes(bz2.compress(text.encode()))


MAKERS = {
    "MNIST": mnist, "KMNIST": kmnist, "EMNIST?split=letters": emnist, "Food101": food101, "OxfordIIITPet": pets,
    "DTD": dtd, "EuroSAT": eurosat, "GTSRB": gtsrb, "Country211": country211, "FGVCAircraft": aircraft, "SVHN": svhn,
    "Imagenette": imagenette, "Caltech101": caltech101, "SUN397": sun397, "Flowers102": flowers102, "STL10": stl10,
    "USPS": usps,
}  # fmt: skip
