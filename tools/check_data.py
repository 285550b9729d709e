"""Everything that can be known of a data set without training on it."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.checks import Findings, some
from data.images import to_rgb
from data.layouts import Options
from data.records import ImageData, Split
from data.rows import ROWS
from data.sources import read
from data.splits import cache_root
from utils.runtime import available_cpus

COMMAND = "check-data"
HELP = "look through a data set and report all that is wrong"

Decoded = tuple[str, str | None]  # colour mode, reason why it cannot be read
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
        modes = _decode_all(data, findings, progress)
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


def _decode_all(data: ImageData, findings: Findings, progress: Progress) -> Counter[str]:
    """Decode every file, several at once; D09 for each that cannot be. Number of images by colour mode."""
    paths = [path for split in (data.train, data.test) for path in _files(split)]
    modes: Counter[str] = Counter()
    with ThreadPoolExecutor(available_cpus()) as pool:
        for path, (mode, fault) in zip(paths, progress(pool.map(_decode, paths), len(paths)), strict=True):
            if fault is None:
                modes[mode] += 1
            else:
                findings.error("D09", f"image '{path}' cannot be read ({fault}). Replace or remove it")
    return modes


def _files(split: Split) -> Iterator[Path]:
    if not isinstance(split.images, np.ndarray):
        yield from (image for image in split.images if isinstance(image, Path))


def _decode(path: Path) -> Decoded:
    try:
        return to_rgb(path)[1], None
    except Exception as error:  # noqa: BLE001 - decoders raise many types for damaged files
        return "", str(error) or type(error).__name__
