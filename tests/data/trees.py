"""Small copies of published data sets, in their exact layouts: what a user's disk looks like."""

import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from data.rows import ROWS

TRAIN, TEST = 3, 2  # images a class
CUB_NAMES = [f"{n:03d}.Bird_{n}" for n in range(1, 201)]


@cache
def jpeg(colour: tuple[int, int, int] = (200, 40, 40), size: int = 8, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, kind)
    return buffer.getvalue()


def wnids(count: int) -> list[str]:
    return [f"n{1000000 + 37 * n:08d}" for n in range(count)]


def class_names(key: str) -> list[str]:
    row = ROWS[key]
    if row.numeric:
        return [str(n) for n in range(row.classes)]
    if key.startswith("cub"):
        return CUB_NAMES
    return wnids(row.classes) if row.class_pattern else [f"class {n:03d}" for n in range(row.classes)]


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(jpeg())


def split_folders(place: Path, classes: list[str], train: str = "train", test: str = "test", inner: str = "") -> None:
    for half, count, first in ((train, TRAIN, 0), (test, TEST, TRAIN)):
        for name in classes:
            write_images(place / half / name / inner, [f"{name[:9]}_{first + i}.JPEG" for i in range(count)])


def unsplit(place: Path, classes: list[str], count: int = TRAIN + TEST) -> None:
    for name in classes:
        write_images(place / name, [f"{name[:9]}_{i}.jpg" for i in range(count)])


def cub_official(place: Path) -> None:
    lines: dict[str, list[str]] = {"images.txt": [], "image_class_labels.txt": [], "train_test_split.txt": []}
    number = 0
    for label, name in enumerate(CUB_NAMES, 1):
        files = [f"{name}_{i}.jpg" for i in range(TRAIN + TEST)]
        write_images(place / "images" / name, files)
        for i, file in enumerate(files):
            number += 1
            lines["images.txt"].append(f"{number} {name}/{file}")
            lines["image_class_labels.txt"].append(f"{number} {label}")
            lines["train_test_split.txt"].append(f"{number} {int(i >= TEST)}")  # the first TEST images are test
    for name, content in lines.items():
        (place / name).write_text("\n".join(content) + "\n")


CAR_NAMES = [f"Maker C/V Type {n} 2012" for n in range(196)]


def _records(rows: list[tuple], fields: list[tuple[str, type]]) -> np.ndarray:
    records = np.empty(len(rows), dtype=[(name, object) for name, _ in fields])
    for i, row in enumerate(rows):
        records[i] = row
    return records


BOX = [("bbox_x1", object), ("bbox_y1", object), ("bbox_x2", object), ("bbox_y2", object)]


def cars_devkit(place: Path) -> None:
    (place / "devkit").mkdir(parents=True)
    savemat(place / "devkit" / "cars_meta.mat", {"class_names": np.array(CAR_NAMES, dtype=object)})
    for half, count, file in (("train", TRAIN, "cars_train_annos"), ("test", TEST, "cars_test_annos_withlabels")):
        rows = []
        for label in range(1, 197):
            for _ in range(count):
                rows.append((1, 2, 3, 4, label, f"{len(rows) + 1:05d}.jpg"))
        write_images(place / f"cars_{half}", [row[-1] for row in rows])
        records = _records(rows, [*BOX, ("class", object), ("fname", object)])
        savemat(place / "devkit" / f"{file}.mat", {"annotations": records})


def cars_whole(place: Path) -> None:
    rows = []
    for label in range(1, 197):
        for i in range(TRAIN + TEST):
            rows.append((f"car_ims/{len(rows) + 1:06d}.jpg", 1, 2, 3, 4, label, int(i < TEST)))
    write_images(place / "car_ims", [Path(row[0]).name for row in rows])
    records = _records(rows, [("relative_im_path", object), *BOX, ("class", object), ("test", object)])
    values = {"annotations": records, "class_names": np.array(CAR_NAMES, dtype=object)}
    savemat(place / "cars_annos.mat", values)


def cifar(root: Path, classes: int, per_class: int = 2) -> None:
    rng = np.random.RandomState(0)
    files = (
        ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta")
        if classes == 10
        else ("cifar-100-python", ["train"], "test", "meta")
    )
    folder = root / files[0]
    folder.mkdir(parents=True)
    for name in (*files[1], files[2]):
        labels = np.tile(np.arange(classes), per_class).tolist()
        values = {"data": rng.randint(0, 256, (len(labels), 3072)).astype(np.uint8), "filenames": ["a.png"]}
        values |= {"labels": labels} if classes == 10 else {"fine_labels": labels, "coarse_labels": labels}
        (folder / name).write_bytes(pickle.dumps(values, protocol=2))
    names = [f"thing {c}" for c in range(classes)]
    meta = {"label_names": names} if classes == 10 else {"fine_label_names": names, "coarse_label_names": names}
    (folder / files[3]).write_bytes(pickle.dumps(meta, protocol=2))


def tiny_official(place: Path) -> None:
    classes = wnids(200)
    for name in classes:
        write_images(place / "train" / name / "images", [f"{name}_{i}.JPEG" for i in range(TRAIN)])
        (place / "train" / name / f"{name}_boxes.txt").write_text("x 0 0 63 63\n")
    files = [(f"val_{i}.JPEG", classes[i % 200]) for i in range(200 * TEST)]
    write_images(place / "val" / "images", [file for file, _ in files])
    lines = "".join(f"{file}\t{name}\t0\t32\t44\t62\n" for file, name in files)
    (place / "val" / "val_annotations.txt").write_text(lines)
    write_images(place / "test" / "images", ["test_0.JPEG"])


def tiny_arrays(place: Path) -> None:
    (place / "processed").mkdir(parents=True)
    for half in ("train", "val"):
        for number in range(1, 21):
            labels = np.repeat(np.arange(10 * (number - 1), 10 * number), TRAIN if half == "train" else TEST)
            images = np.full((len(labels), 4, 4, 3), number / 20.0)
            np.save(place / "processed" / f"x_{half}_{number:02d}.npy", images)
            np.save(place / "processed" / f"y_{half}_{number:02d}.npy", labels)


def domainnet(place: Path, prefix: str = "") -> None:
    for domain in ROWS["domainnet"].domains:
        halves: dict[str, list[str]] = {"train": [], "test": []}
        for label in range(345):
            name = f"class_{label:03d}"
            write_images(place / domain / name, ["a b.jpg", "b.jpg"])
            halves["train"].append(f"{prefix}{domain}/{name}/a b.jpg {label}")
            halves["test"].append(f"{prefix}{domain}/{name}/b.jpg {label}")
        for half, lines in halves.items():
            (place / f"{domain}_{half}.txt").write_text("\n".join(lines) + "\n")


def core50(place: Path, together: bool = False) -> None:
    for session in range(1, 12):
        if together and session in (3, 7, 10):
            continue
        for n in range(1, 51):
            write_images(place / f"s{session}" / f"o{n}", [f"C_{session:02d}_{n:02d}_000.png"])
    for n in range(1, 51) if together else ():
        write_images(place / "test_3_7_10" / f"o{n}", [f"C_{s:02d}_{n:02d}_000.png" for s in (3, 7, 10)])


def cddb(place: Path) -> None:
    for domain in (*ROWS["cddb"].domains, "stylegan"):  # stylegan: not part of the hard track
        deeper = ("dog", "cat") if domain == "biggan" else ("",)
        for half, count in (("train", TRAIN), ("val", TEST)):
            for below in deeper:
                for kind in ("0_real", "1_fake"):
                    write_images(place / domain / half / below / kind, [f"{i}.png" for i in range(count)])


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cifar10": ("cifar10", lambda root: cifar(root, 10)),
    "cifar100": ("cifar100", lambda root: cifar(root, 100)),
    "cifar224": ("cifar224", lambda root: cifar(root / "cifar100", 100)),
    "imagenetr": ("imagenetr", lambda root: split_folders(root / "imagenet-r", class_names("imagenetr"))),
    "imagenetr val": ("imagenetr", lambda root: split_folders(root / "imagenet-r", wnids(200), test="val")),
    "imageneta": ("imageneta", lambda root: split_folders(root / "imagenet-a", class_names("imageneta"))),
    "cub": ("cub", lambda root: split_folders(root / "cub", CUB_NAMES)),
    "cub slca": ("cub", lambda root: split_folders(root / "cub_200", CUB_NAMES, test="val")),
    "cub official": ("cub", lambda root: cub_official(root / "CUB_200_2011")),
    "cub_official": ("cub_official", lambda root: cub_official(root / "CUB_200_2011")),
    "cars": ("cars", lambda root: split_folders(root / "cars", class_names("cars"))),
    "cars slca": ("cars", lambda root: split_folders(root / "cars196", class_names("cars"), test="val")),
    "cars raa": ("cars", lambda root: split_folders(root / "stanford_cars", class_names("cars"))),
    "cars devkit": ("cars", lambda root: cars_devkit(root / "stanford_cars")),
    "cars whole": ("cars", lambda root: cars_whole(root / "cars")),
    "vtab": ("vtab", lambda root: split_folders(root / "vtab", class_names("vtab"))),
    "vtab pilot": ("vtab", lambda root: split_folders(root / "vtab-cil" / "vtab", class_names("vtab"))),
    "objectnet": ("objectnet", lambda root: split_folders(root / "objectnet", class_names("objectnet"))),
    "omnibenchmark": (
        "omnibenchmark",
        lambda root: split_folders(root / "omnibenchmark", class_names("omnibenchmark")),
    ),
    "imagenet100": ("imagenet100", lambda root: split_folders(root / "imagenet100", wnids(100), test="val")),
    "imagenet1000": ("imagenet1000", lambda root: split_folders(root / "imagenet", wnids(1000), test="val")),
    "domainnet": ("domainnet", lambda root: domainnet(root / "domainnet")),
    "domainnet_dil": ("domainnet_dil", lambda root: domainnet(root / "DomainNet", prefix="data/domainnet/")),
    "tinyimagenet": ("tinyimagenet", lambda root: tiny_official(root / "tiny-imagenet-200")),
    "tinyimagenet arrays": ("tinyimagenet", lambda root: tiny_arrays(root / "TINYIMG")),
    "core50": ("core50", lambda root: core50(root / "core50_128x128")),
    "core50 together": ("core50", lambda root: core50(root / "core50_imgs", together=True)),
    "cddb": ("cddb", lambda root: cddb(root / "CDDB")),
}

# (train, test) images of each, where they are not TRAIN and TEST a class
COUNTS: dict[str, tuple[int, int]] = {
    "cifar10": (100, 20),
    "cifar100": (200, 200),
    "cifar224": (200, 200),
    "domainnet": (6 * 345, 6 * 345),
    "domainnet_dil": (6 * 345, 6 * 345),
    "core50": (8 * 50, 3 * 50),
    "cddb": (6 * TRAIN * 2, 6 * TEST * 2),
}


def counts(key: str) -> tuple[int, int]:
    classes = ROWS[key].classes
    return COUNTS.get(key, (TRAIN * classes, TEST * classes))
