"""Readers of the layouts in which data sets are published. Nothing is moved, renamed or written beside the data.

A reader takes (row, place, options, findings) and returns the data set, or None when `findings` says why not.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.checks import Findings, check_class_folders, check_classes, found_in, some
from data.images import IMAGE_SUFFIXES, OTHER_IMAGES, Paths, images_below, visible_folders
from data.records import ImageData, Split
from data.rows import Row
from data.splits import Chosen, Pool, cache_root, class_hash, listed_split, own_path, read_classes, seeded_split

HALVES = ("train", "test")


@dataclass(frozen=True)
class Options:
    """split: "folder", "list:FILE", "seeded" or "seeded:N".  strict: doubts are errors.  download: fetch what can be.

    cache: folder for derived files (drawn splits, decoded images).
    """

    split: str = "folder"
    strict: bool = False
    download: bool = True
    cache: Path = field(default_factory=lambda: cache_root(None))


Read = Callable[[Row, Path, Options, Findings], ImageData | None]


@dataclass(frozen=True)
class Layout:
    """fits: whether a folder looks like this layout.  whole: whether an un-split archive can be split here."""

    read: Read
    fits: Callable[[Row, Path], bool]
    whole: bool = False


LAYOUTS: dict[str, Layout] = {}


def entry(place: Path, *names: str) -> Path | None:
    """The first file or folder of these names in `place`, whatever its case; "a/b" goes two levels down. Pipes and
    devices are nothing to read."""
    for name in names:
        found: Path | None = place
        for part in Path(name).parts:
            found = _child(found, part) if found is not None else None
        if found is not None and (found.is_dir() or found.is_file()):
            return found
    return None


def _child(place: Path, name: str) -> Path | None:
    if (place / name).exists():
        return place / name
    if not place.is_dir():
        return None
    same = [path for path in place.iterdir() if path.name.strip().lower() == name.lower()]
    return same[0] if len(same) == 1 else None


def find_place(row: Row, root: Path, findings: Findings) -> Path | None:
    """The folder of a data set below data_root: by its names, then data_root itself, one level deeper when that is
    the only possibility (D01, D04)."""
    layout = LAYOUTS[row.layout]

    def fits(place: Path) -> bool:
        return layout.fits(row, place) or (layout.whole and len(_class_folders(place)) > 1)

    candidates = [place for name in row.folders if root.is_dir() and (place := entry(root, name)) is not None]
    candidates = [place for place in candidates if place.is_dir()]
    for place in candidates:
        if fits(place):
            return place
        inner = [folder for folder in visible_folders(place) if fits(folder)]
        if len(inner) == 1:
            findings.note("D04", f"the data lie one level deeper: using '{inner[0]}'")
            return inner[0]
    if candidates:
        return candidates[0]
    whole = layout.whole and root.is_dir() and len(_class_folders(root)) == row.classes
    if root.is_dir() and (whole or layout.fits(row, root)):
        return root
    also = f" (nor {', '.join(row.folders[1:])})" if len(row.folders) > 1 else ""
    findings.error(
        "D01",
        f"folder '{root / row.folders[0]}' not found{also}. Set data_root or PALIMPSEST_DATA, or pass --data-root. "
        f"Expected: {row.expects}. See {row.manual}",
    )
    return None


def _class_folders(place: Path) -> list[Path]:
    """Class folders of an un-split archive: visible folders, unless there are halves among them."""
    folders = visible_folders(place)
    return [] if {"train", "test", "val"} & {folder.name.lower() for folder in folders} else folders


def has_halves(row: Row, place: Path) -> bool:
    return any((found := entry(place, name)) is not None and found.is_dir() for name in ("train", *row.test_names))


# Other names that people give to halves: they are to be renamed, since they could be classes.
MISNAMED = {
    "train": ("training", "trainset", "train_set", "training_set", "train_images", "images_train", "trn"),
    "test": (
        "testing", "testset", "test_set", "test_images", "images_test", "validation", "valid", "validation_set", "eval",
    ),
}  # fmt: skip


def misnamed(place: Path, half: str) -> Path | None:
    """A folder that holds class folders and is called like a half in other words."""
    found = entry(place, *MISNAMED[half])
    return found if found is not None and found.is_dir() and visible_folders(found) else None


def find_halves(row: Row, place: Path, findings: Findings) -> dict[str, Path] | None:
    """{"train": folder, "test": folder}; an alias is noted, a missing half is an error (D02, D03, D12)."""
    train, test = entry(place, "train"), entry(place, *row.test_names)
    called = {"train": misnamed(place, "train"), "test": misnamed(place, "test")}
    if train is None and test is None and not any(called.values()) and (classes := _class_folders(place)):
        ways = f'{row.split_first}, or choose split: "list:<file>"'
        if row.seeded:
            ways += ' or "seeded" (80/20 per class, stored in the cache folder)'
        text = f"{len(classes)} class folders in '{place}' but no train/ {row.test_names[0]}/"
        findings.error("D03", f"{text}. To go on: {ways}. {row.note}".rstrip())
        return None
    for half, found, names in (("train", train, ("train",)), ("test", test, row.test_names)):
        if found is None:
            other = called[half]
            way = f"Rename '{other.name}/' to '{names[0]}/'" if other is not None else row.put_there
            findings.error(
                "D02",
                f"'{names[0]}/' missing under '{place}'; found: {found_in(place)}. Expected: {row.expects}. {way}",
            )
        elif half == "test" and found.name.lower() != names[0]:
            findings.note("D02", f"found '{found.name}/' instead of '{names[0]}/': using it")
    if train is None or test is None:
        return None
    if not visible_folders(test) and (files := sum(1 for path in test.iterdir() if path.is_file())):
        findings.error(
            "D12",
            f"{test.name}/ holds {files:,} files and no class folders: move them into one folder per class, named as "
            f"in train/ (how: {row.manual})",
        )
        return None
    if beside := [folder.name for folder in visible_folders(place) if folder not in (train, test)]:
        findings.note("D10", f"left out beside {train.name}/ and {test.name}/: {some(f'{name}/' for name in beside)}")
    return {"train": train, "test": test}


def read_classes_of(half: Path, only: Sequence[str] | None, findings: Findings) -> dict[str, list[Path]]:
    """Class name -> images, of one half. Ignored files are noted (D10)."""
    classes, ignored = {}, [path.name for path in half.iterdir() if not path.is_dir()]
    loose = [name for name in ignored if name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if loose:
        findings.warn(
            "D10", f"left out {len(loose)} images that lie in '{half}' itself, in no class folder: {some(loose)}"
        )
    ignored = [name for name in ignored if name not in loose]
    for folder in visible_folders(half):
        if only is None or folder.name in only:
            classes[folder.name], foreign = images_below(folder)
            ignored += foreign
    note_ignored(ignored, half, findings)
    return classes


def note_ignored(ignored: Sequence[str], place: Path, findings: Findings) -> None:
    if others := [name for name in ignored if Path(name).suffix.lower() in OTHER_IMAGES]:
        kinds = sorted({Path(name).suffix.lower() for name in others})
        findings.warn(
            "D10",
            f"left out {len(others)} images in '{place}' of kinds that are not read ({some(kinds)}): convert them",
        )
    if ignored:
        kinds = sorted(set(ignored))
        findings.note("D10", f"ignored {len(ignored)} files in '{place}' that are no images: {some(kinds)}")


def image_data(
    row: Row, folders: Mapping[str, Mapping[str, Sequence[Path]]], how: str, findings: Findings
) -> ImageData:
    """Both halves with one class order: names sorted as strings, which for vtab's numeric folders ("0", "1", "10", ..)
    is the published order as well, since the authors read them with torchvision."""
    names = tuple(sorted(folders["train"]))
    splits = {}
    for half in HALVES:
        paths = [path for name in names for path in folders[half].get(name, ())]
        counts = [len(folders[half].get(name, ())) for name in names]
        splits[half] = Split(Paths(paths), np.repeat(np.arange(len(names)), counts).astype(np.int64))
    check_classes(splits["train"].labels, splits["test"].labels, names, findings)
    return ImageData(row.key, splits["train"], splits["test"], names, variant=how)


def class_folders(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """train/<class>/ and test/<class>/, or the same images split by a list or a seed."""
    if options.split != "folder":
        return split_pool(row, read_pool(row, place, findings), options, findings)
    halves = find_halves(row, place, findings)
    return None if halves is None else read_halves(row, halves, None, "folder", findings)


def read_halves(
    row: Row, halves: Mapping[str, Path], only: Sequence[str] | None, how: str, findings: Findings
) -> ImageData | None:
    """Both halves of class folders, checked; None when their classes do not agree."""
    folders = {half: read_classes_of(path, only, findings) for half, path in halves.items()}
    hidden = sorted(
        {p.name for path in halves.values() for p in path.iterdir() if p.name.startswith(".") and p.is_dir()}
    )
    before = len(findings.of("error"))
    check_class_folders(row, folders, {half: path.name for half, path in halves.items()}, hidden, findings)
    if not folders["train"] and not row.classes:
        findings.error("D05", f"no class folders in '{halves['train']}'. Expected: {row.expects}")
    data = image_data(row, folders, how, findings) if folders["train"] else None
    return data if len(findings.of("error")) == before else None


def read_pool(row: Row, place: Path, findings: Findings) -> dict[str, list[Path]]:
    """Every image by class, whether the archive is split into halves or not."""
    halves = [half for name in ("train", *row.test_names) if (half := entry(place, name)) is not None]
    for name in () if halves else HALVES:
        if (other := misnamed(place, name)) is not None:
            findings.error("D02", f"'{other}' looks like a half, not like a class. Rename it to '{name}/'")
    pool: dict[str, list[Path]] = {}
    for half in halves or [place]:
        for name, images in read_classes_of(half, None, findings).items():
            pool.setdefault(name, []).extend(images)
    return {name: sorted(pool[name], key=lambda path: path.name) for name in sorted(pool)}


def split_pool(row: Row, pool: Pool, options: Options, findings: Findings) -> ImageData | None:
    """Un-split images by a list or a seed (D15; D05 for their classes)."""
    kind, _, argument = options.split.partition(":")
    if findings.of("error"):
        return None
    if row.classes and len(pool) != row.classes:
        findings.error(
            "D05", f"expected {row.classes} class folders, found {len(pool)}: {some(pool)}. {findings.again}"
        )
        return None
    doubled = [f"{name}/{n}" for name in pool for n, c in Counter(p.name for p in pool[name]).items() if c > 1]
    if doubled:
        findings.error("D15", f"images that train/ and test/ both hold cannot be split anew: {some(doubled)}")
        return None
    chosen: Chosen | None
    if kind == "list":
        chosen = listed_split(argument, pool, findings)
        how = f"list:{Path(argument).name}"
    elif row.seeded:
        chosen = seeded_split(row.key, pool, int(argument or 0), options.cache / "splits", findings)
        how = f"seeded:{argument or 0}"
    else:
        findings.error("D03", f'split "seeded" would give numbers that compare with nothing. {row.note}')
        return None
    return None if chosen is None else image_data(row, chosen, how, findings)


def subset(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """`row.classes` classes of a larger tree: by a class list ("list:FILE"), or the field's default choice, the first
    hundred of RandomState(1993).permutation over the thousand sorted names. A tree of that size is taken as it is."""
    halves = find_halves(row, place, findings)
    if halves is None:
        return None
    known = [folder.name for folder in visible_folders(halves["train"])]
    kind, _, argument = options.split.partition(":")
    chosen: list[str] | None
    if kind == "seeded":
        findings.error("D03", 'has its own train/ and val/: use split "folder", or "list:FILE" with a class list')
        return None
    if kind == "list":
        path = own_path(argument, findings)
        chosen = None if path is None else read_classes(path, known, findings)
        how = f"class list {Path(argument).name}"
        if chosen is not None and len(chosen) != row.classes:
            findings.error("D15", f"class list '{argument}' holds {len(chosen)} classes, expected {row.classes}")
            return None
    elif len(known) == SUBSET_OF:
        order = np.random.RandomState(1993).permutation(SUBSET_OF)[: row.classes]
        chosen, how = sorted(known[index] for index in order), "first 100 of seed 1993"
    else:
        chosen, how = known, "folder"
    if chosen is None:
        return None
    return read_halves(row, halves, chosen, f"{how}, classes {class_hash(chosen)}", findings)


SUBSET_OF = 1000

LAYOUTS["folders"] = Layout(class_folders, has_halves, whole=True)
LAYOUTS["subset"] = Layout(subset, has_halves)
