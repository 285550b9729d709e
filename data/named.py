"""Data sets of libraries by name and options: "torchvision:EMNIST?split=letters", "hf:NAME?label=fine_label"."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from data.checks import Findings, check_classes, some
from data.images import Paths, as_rgb
from data.layouts import Options
from data.records import ImageData, Split
from data.splits import seeded_split
from utils.errors import did_you_mean, reason

Images = Sequence[Path] | Sequence[np.ndarray]
Half = tuple[Images, np.ndarray]  # images, and the labels that the library gives them


def parsed(place: str, findings: Findings) -> tuple[str, dict[str, str]]:
    """ "EMNIST?split=letters" -> ("EMNIST", {"split": "letters"}); D03 for an option without a value, or given twice.

    "%20" and the like stand for their letters, "+" for itself.
    """
    name, _, query = place.partition("?")
    found: dict[str, str] = {}
    for entry in query.split("&") if query else ():
        key, _, value = (unquote(part).strip() for part in entry.partition("="))
        if key in found:
            findings.error("D03", f'option "{key}" is given twice: once is enough')
        elif not key or not value:
            findings.error("D03", f'option "{entry}" has no {"value" if key else "name"}: write ?NAME=VALUE&NAME=VALUE')
        else:
            found[key] = value
    return name.strip(), found


def unknown_option(name: str, key: str, known: Sequence[str], findings: Findings) -> None:
    findings.error("D03", f'unknown option "{key}"{did_you_mean(key, known) or "."} {name} takes: {", ".join(known)}')


def rgb(image: Any) -> np.ndarray:
    """A picture or an array, grey or not -> uint8 (H, W, 3)."""
    from PIL import Image

    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    return np.asarray(as_rgb(picture))


def whole(images: Images) -> Any:
    """Images of one size as one array, paths as what decodes them when they are read."""
    if len(images) and isinstance(images[0], Path):
        return Paths([image for image in images if isinstance(image, Path)])
    arrays = [image for image in images if isinstance(image, np.ndarray)]
    return np.stack(arrays) if len({image.shape for image in arrays}) == 1 else arrays


def image_data(
    key: str, train: Half, test: Half, name_of: Callable[[int], str], how: str, findings: Findings
) -> ImageData | None:
    """Both halves. Labels that occur nowhere (EMNIST's letters begin at 1) leave no gap; None, with D05, where images
    have no class, and with D03 where the halves share images."""
    if _without_class(train, test, findings) or _shared(train, test, findings):
        return None
    known = np.unique(np.concatenate([train[1], test[1]])).astype(np.int64)
    names = tuple(name_of(int(label)) for label in known)
    splits = [Split(whole(images), np.searchsorted(known, labels).astype(np.int64)) for images, labels in (train, test)]
    if not len(splits[0]) or not len(splits[1]):
        findings.error("D06", f"{len(splits[0])} training and {len(splits[1])} test images: both halves need some")
        return None
    check_classes(splits[0].labels, splits[1].labels, names, findings)
    if len(splits[0]) < len(splits[1]):
        findings.note(
            "D07",
            f"the training half has {len(splits[0]):,} images, the test half {len(splits[1]):,}: as published; "
            f'"{key}" takes train=NAME+NAME, for example ?train=train+val, and test=NAME',
        )
    return ImageData(key, splits[0], splits[1], names, variant=how)


def _without_class(train: Half, test: Half, findings: Findings) -> bool:
    for half, (_, labels) in (("train", train), ("test", test)):
        if count := int((labels < 0).sum()):
            findings.error("D05", f"{count:,} {half} images have no class (label {labels.min()}): leave them out")
    return bool((train[1] < 0).any() or (test[1] < 0).any())


def _shared(train: Half, test: Half, findings: Findings) -> bool:
    """Whether an image stands in both halves, or twice in one: halves that overlap were chosen."""
    (images, labels), (others, other_labels) = train, test
    if len(images) and isinstance(images[0], Path):
        files = [str(path) for path in (*images, *others)]
        count = len(files) - len(set(files))
    else:
        pairs: Any = zip(images, others, strict=False)
        equal = len(images) == len(others) and np.array_equal(labels, other_labels)
        equal = equal and all(np.array_equal(one, other) for one, other in pairs)
        count = len(images) if equal else 0
    if count:
        findings.error(
            "D03", f"{count:,} images stand in both halves, or twice in one: choose halves without a common part"
        )
    return bool(count)


def same_classes(train: Sequence[str], test: Sequence[str], findings: Findings) -> bool:
    """Whether both halves number the same classes in one order; else D06: a label would mean two classes."""
    if list(train) == list(test):
        return True
    sides = {"train": sorted(set(train) - set(test)), "test": sorted(set(test) - set(train))}
    only = "; ".join(f"only in {half}: {some(names)}" for half, names in sides.items() if names)
    findings.error(
        "D06", f"its halves number their classes differently ({only or 'another order'}). Labels would disagree: "
        "complete the half that lacks some, or get the data set again"
    )  # fmt: skip
    return False


def drawn(
    key: str, half: Half, name_of: Callable[[int], str], options: Options, findings: Findings
) -> tuple[Half, Half] | None:
    """Two halves of a set without a split ("split": "seeded"); None, with D03, where none was asked for."""
    kind, _, seed = options.split.partition(":")
    if kind != "seeded" or not (seed or "0").isdecimal():
        findings.error(
            "D03", f'{key} has no test half: draw one with "split": "seeded" (80/20 of each class), or "seeded:N"'
        )
        return None
    images, labels = half
    pool: dict[str, list[Path]] = {}
    for row, label in enumerate(labels):
        pool.setdefault(name_of(int(label)), []).append(Path(str(row)))  # the row stands for the image
    chosen = seeded_split(key, pool, int(seed or 0), options.cache / "splits", findings)
    halves = []
    for name in ("train", "test"):
        rows = np.sort([int(image.name) for of_class in chosen[name].values() for image in of_class])
        halves.append((_taken(images, rows), labels[rows]))
    return halves[0], halves[1]


def _taken(images: Images, rows: np.ndarray) -> Images:
    return [images[row] for row in rows]  # type: ignore[return-value]


def fixed_split(key: str, options: Options, findings: Findings) -> bool:
    """Whether a set with halves of its own was asked for as it is; else D03."""
    if options.split != "folder":
        findings.error("D03", f'{key} has its own halves: split must be "folder", is "{options.split}"')
    return options.split == "folder"


def typed(error: BaseException) -> str:
    """What an exception of a reader says, with its type: many say a key or a number alone."""
    return reason(error) if not str(error) or isinstance(error, OSError) else f"{type(error).__name__}: {reason(error)}"


def converted(options: Mapping[str, str], defaults: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """Options as the types of their defaults."""
    found: dict[str, Any] = {}
    for key, text in options.items():
        like = defaults.get(key)
        if isinstance(like, bool):
            if text.lower() not in ("true", "false"):
                findings.error("D03", f'option "{key}" must be true or false, is "{text}"')
            found[key] = text.lower() == "true"
        elif isinstance(like, int) or (like is None and text.isdecimal()):
            if not re.fullmatch(r"[-+]?\d+", text):
                findings.error("D03", f'option "{key}" must be a whole number, is "{text}"')
                continue
            found[key] = int(text)
        else:
            found[key] = text
    return found
