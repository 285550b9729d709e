"""CUB-200-2011: the official lists, or class folders (APER archive)."""

from pathlib import Path

from data.checks import Findings
from data.layouts import (
    HALVES,
    LAYOUTS,
    Layout,
    Options,
    class_folders,
    entry,
    has_halves,
    image_data,
    read_classes_of,
    split_pool,
)
from data.records import ImageData
from data.rows import Row, Variant, add_row
from data.splits import Chosen, report_lines

CUB_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
SPLIT_FOLDERS = "train/<class>/ and test/<class>/"


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
    faults: list[str] = []
    names, flags = (_pairs(path, faults) for path in (lists[0], lists[2]) if path is not None)
    by_entry = {f"{name}/{path.name}": (name, path) for name, paths in classes.items() for path in paths}
    chosen: Chosen = {half: {name: [] for name in classes} for half in HALVES}
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


def _pairs(path: Path, faults: list[str]) -> dict[str, str]:
    """Number -> what stands behind it; lines that are no such pair, and numbers that stand twice, are faults."""
    found: dict[str, str] = {}
    for line, text in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        words = text.split(maxsplit=1)
        if len(words) == 2 and words[0].isdecimal() and words[0] not in found:
            found[words[0]] = words[1].strip()
        elif words:
            why = "stands twice" if len(words) == 2 and words[0] in found else "not understood"
            faults.append(f"{path.name} line {line}: '{text[:60]}' {why}")
    return found


def _fits_cub(row: Row, place: Path) -> bool:
    return any(entry(place, name) for name in CUB_LISTS) or has_halves(row, place)


LAYOUTS["cub"] = Layout(cub, _fits_cub, whole=True)
add_row(
    Row(
        key="cub",
        title="CUB-200-2011, APER archive",
        classes=200,
        layout="cub",
        folders=("cub", "cub_200", "CUB_200_2011"),
        expects=SPLIT_FOLDERS + ", or the official CUB_200_2011/ with images/ and train_test_split.txt",
        source="RevisitingCIL's authors (cub.zip)",
        variants=(Variant("APER archive", 9_430, 2_358), Variant("cub_official", 5_994, 5_794)),
        class_pattern=r"\d{3}\..+",
        note="57 % more training images than the official split: numbers are not comparable",
    )
)
add_row(
    Row(
        key="cub_official",
        title="CUB-200-2011, official split",
        classes=200,
        layout="cub",
        folders=("CUB_200_2011", "cub_official", "cub_200", "cub"),
        expects="CUB_200_2011/ with images/, images.txt, image_class_labels.txt and train_test_split.txt",
        source="Caltech",
        variants=(Variant("cub_official", 5_994, 5_794), Variant("APER archive", 9_430, 2_358)),
        class_pattern=r"\d{3}\..+",
    )
)
