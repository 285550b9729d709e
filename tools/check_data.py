"""Everything that can be known of a data set without training on it."""

import argparse
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.checks import Findings, some
from data.images import to_rgb, unreadable
from data.layouts import Options
from data.records import ImageData
from data.rows import ROWS
from data.sources import read
from data.splits import cache_root
from utils.runtime import available_cpus

COMMAND = "check-data"
HELP = "look through a data set and report all that is wrong"

Decoded = tuple[str, str | None, bytes]  # colour mode, reason why it cannot be read, digest of the pixels
Progress = Callable[[Iterable[Decoded], int], Iterable[Decoded]]  # watches what passes, of so many


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="data set, as the key dataset takes it")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parser.add_argument("--split", default="folder", help="as the key split")
    parser.add_argument("--cache-root", metavar="DIR", help="where derived files lie")
    parser.add_argument("--strict", action="store_true", help="doubts about counts are errors")


def main(options: argparse.Namespace) -> int:
    choices = Options(options.split, options.strict, download=False, cache=cache_root(options.cache_root))
    bar = {"desc": options.name, "unit": "img", "disable": None}
    found = inspect(options.name, options.data_root, choices, lambda images, total: tqdm(images, total=total, **bar))
    print(found.text)
    return 0 if found.usable else 2


@dataclass(frozen=True)
class Inspection:
    """text: for people. usable: no error was found."""

    text: str
    usable: bool
    findings: Findings = field(repr=False)


def inspect(name: str, data_root: str | None, options: Options, progress: Progress) -> Inspection:
    """Read a data set, decode every image, and report counts, variant and all findings.

    Raises UserError for an unknown name.
    """
    data, findings = read(name, data_root, options)
    lines = [f"{name}: {ROWS[name].title}" if name in ROWS else name]
    if data is not None:
        lines += _counts(data)
        modes, digests = _decode_all(data, findings, progress)
        _check_repeated(data, digests, findings)
        if other := {mode: count for mode, count in modes.items() if mode != "RGB"}:
            kinds = ", ".join(f"{count} {mode}" for mode, count in sorted(other.items()))
            findings.note("D17", f"{sum(other.values())} images are not RGB ({kinds}): converted when read")
    if name in ROWS:
        row = ROWS[name]
        lines += [f"  source    {row.source}", *([f"  mind      {row.note}"] if row.note else [])]
    lines += [f"  {finding}" for finding in findings.of("error", "warning", "note")]
    errors, warnings = len(findings.of("error")), len(findings.of("warning"))
    verdict = "not usable" if errors else "usable"
    lines.append(f"{name} is {verdict}: {_plural(errors, 'error')}, {_plural(warnings, 'warning')}")
    return Inspection("\n".join(lines), not errors, findings)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def _counts(data: ImageData) -> list[str]:
    train, test = (np.bincount(split.labels, minlength=data.num_classes) for split in (data.train, data.test))
    shares = 100 * test / np.maximum(train + test, 1)
    lines = [
        f"  classes   {data.num_classes}: {some(data.class_names, 3)}",
        f"  train     {len(data.train):,} images, {train.min()}..{train.max()} a class",
        f"  test      {len(data.test):,} images, {test.min()}..{test.max()} a class "
        f"({shares.min():.0f}..{shares.max():.0f} % of it)",
        f"  variant   {data.variant}",
    ]
    if data.domain_names and data.train.domains is not None:
        counts = np.bincount(data.train.domains, minlength=len(data.domain_names))
        pairs = zip(data.domain_names, counts, strict=True)
        lines.append(f"  domains   {', '.join(f'{domain} {count:,}' for domain, count in pairs)} (training images)")
    return lines


def _check_repeated(data: ImageData, digests: list[bytes], findings: Findings) -> None:
    """D21: pictures, pixel by pixel the same, that stand in both halves, or under two classes. digests: of the training
    images, then of the test images; empty where one cannot be read."""
    labels = np.concatenate([data.train.labels, data.test.labels])
    places: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        if digest:
            places.setdefault(digest, []).append(row)
    groups = [rows for rows in places.values() if len(rows) > 1]
    first_test = len(data.train)
    both = [rows for rows in groups if rows[0] < first_test <= rows[-1]]
    classes = [rows for rows in groups if len({int(labels[row]) for row in rows}) > 1]
    for found, where in ((both, "in train and in test"), (classes, "under more than one class")):
        if found:
            examples = some([" = ".join(_place(data, row) for row in rows[:2]) for rows in found], 3)
            stand = "stands" if len(found) == 1 else "stand"
            findings.warn("D21", f"{_plural(len(found), 'picture')} {stand} {where}: {examples}")


def _place(data: ImageData, row: int) -> str:
    half, split = ("train", data.train) if row < len(data.train) else ("test", data.test)
    row -= 0 if half == "train" else len(data.train)
    image = split.images[row]
    name = image.name if isinstance(image, Path) else f"number {row}"
    return f"{half}/{data.class_names[split.labels[row]]}/{name}"


def _decode_all(data: ImageData, findings: Findings, progress: Progress) -> tuple[Counter[str], list[bytes]]:
    """Decode every file, several at once; D09 for each that cannot be. (Number of images by colour mode, digests of the
    pixels of all images)."""
    digests = []
    images = [image for split in (data.train, data.test) for image in split.images]
    modes: Counter[str] = Counter()
    with ThreadPoolExecutor(available_cpus()) as pool:
        for mode, fault, digest in progress(pool.map(_decode, images), len(images)):
            digests.append(digest)
            if fault is None:
                modes[mode] += 1
            else:
                findings.error("D09", fault)
    return modes, digests


def _decode(path: Path | np.ndarray) -> Decoded:
    """Arrays were decoded by what read them; in which mode, nobody knows any more."""
    if isinstance(path, np.ndarray):
        return "RGB", None, _digest(path)
    try:
        image, mode = to_rgb(path)
        return mode, None, _digest(np.asarray(image))
    except Exception as error:  # noqa: BLE001 - decoders raise many types for damaged files
        return "", unreadable(path, error), b""


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes(), digest_size=16).digest()
