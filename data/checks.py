"""What is wrong with a data set, found all at once: codes D01 .. D20 and the sentences that go with them.

Readers add findings as they go; the functions here judge what was read. Every sentence names the data set, what
was expected, what was found, and a step that repairs it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.records import ImageData
from data.rows import Row, Variant
from utils.errors import DataError, printable

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """code: "D01" .. "D20".  note: nothing to do; warning: the numbers may not be comparable; error: unusable."""

    code: str
    level: Level
    text: str

    def __str__(self) -> str:
        return f"{self.code} {self.level}: {self.text}"


class Findings:
    """What was found about one data set. strict: doubts about counts and checksums are errors."""

    def __init__(self, name: str, strict: bool = False):
        self.name, self.strict = name, strict
        self.all: list[Finding] = []

    @property
    def again(self) -> str:
        """What to do where something is missing: a folder of one's own has no archive."""
        return "Complete the folder" if ":" in self.name else "Unpack the archive again"

    def error(self, code: str, text: str) -> None:
        self._add(code, "error", text)

    def warn(self, code: str, text: str) -> None:
        self._add(code, "warning", text)

    def doubt(self, code: str, text: str) -> None:
        """A warning, or an error with strict_data."""
        (self.error if self.strict else self.warn)(code, text)

    def note(self, code: str, text: str) -> None:
        self._add(code, "note", text)

    def _add(self, code: str, level: Level, text: str) -> None:
        self.all.append(Finding(code, level, printable(f"{self.name}: {text}")))

    def of(self, *levels: Level) -> list[Finding]:
        return [finding for finding in self.all if finding.level in levels]

    def raise_errors(self) -> None:
        """Raises DataError with every error, one a line."""
        if errors := self.of("error"):
            raise DataError("\n".join(str(finding) for finding in errors))


def some(names: Iterable[object], count: int = 5) -> str:
    """At most five names: "a, b, c" or "a, b, c, d, e and 7 more"."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


def found_in(place: Path) -> str:
    """The visible entries of a folder, for "found: ..."."""
    return some(sorted(path.name for path in place.iterdir() if not path.name.startswith(".")), 8) or "nothing"


def check_class_folders(
    row: Row, folders: Mapping[str, Mapping[str, Sequence[Path]]], names: Mapping[str, str], hidden: Sequence[str],
    findings: Findings,
) -> None:  # fmt: skip
    """D05, D06: number and names of the class folders.

    folders: half -> class name -> images.  names: half -> what its folder is called.  hidden: hidden folders.
    """
    import re

    known = {str(c) for c in range(row.classes)} if row.numeric else set().union(*folders.values())
    for half, classes in folders.items():
        if row.classes and len(classes) != row.classes:
            foreign = [name for name in classes if row.class_pattern and not re.fullmatch(row.class_pattern, name)]
            foreign += [name for name in classes if row.numeric and name not in known]
            extra = sorted({*foreign, *(hidden if len(classes) < row.classes else ())})
            missing = sorted(known - set(classes) - set(foreign))
            text = f"expected {row.classes} class folders in {names[half]}/, found {len(classes)}"
            text += f"; missing: {some(missing)}" if missing else ""
            text += f"; extra: {some(extra)}" if extra else ""
            findings.error("D05", f"{text}. {findings.again}, or remove what does not belong there")
    train, test = (set(folders[half]) for half in ("train", "test"))
    if train != test:
        sides = [
            f"only in {names[half]}: {some(sorted(only))}"
            for half, only in (("train", train - test), ("test", test - train))
            if only
        ]
        findings.error(
            "D06",
            f"class sets differ between {names['train']} and {names['test']}: {'; '.join(sides)}. Labels would "
            "disagree: give both halves the same class folders",
        )


def check_classes(train: np.ndarray, test: np.ndarray, names: Sequence[str], findings: Findings) -> None:
    """D08: classes without enough images. train, test (N,): labels of the halves."""
    for half, labels in (("train", train), ("test", test)):
        counts = np.bincount(labels, minlength=len(names))
        for count, what in ((0, "empty"), (1, "with fewer than 2 images (a covariance needs 2)")):
            poor = [f"{half}/{names[int(label)]}" for label in np.flatnonzero(counts == count)]
            if poor and (count == 0 or half == "train"):
                verb = f"{'is' if len(poor) == 1 else 'are'} {what} (no images)" if count == 0 else what
                findings.error(
                    "D08",
                    f"{len(poor)} {_plural('class', len(poor))} {verb}: {some(poor)}. "
                    f"{findings.again}, or remove the folders of these classes from both halves",
                )


def _plural(word: str, count: int) -> str:
    return word if count == 1 else word + "es"


def check_counts(row: Row, train: int, test: int, findings: Findings) -> Variant | None:
    """D07, D16: numbers of images against the known variants; the variant that they are of, or None."""
    expected = row.variants[0]
    variant = next((known for known in row.variants if known.matches(train, test)), None)
    found = f"{train:,}/{test:,}"
    if variant is expected:
        return variant
    if variant is not None:
        findings.warn(
            "D07",
            f"{found} = variant '{variant.name}', not '{expected.name}' ({expected.counts()}): numbers of the two are "
            f"not comparable; see {row.manual}",
        )
        return variant
    if row.key == "cars" and expected.matches(test, train):
        findings.doubt(
            "D16", f"halves look swapped ({found}; official {expected.counts()}). Swap the two folders, or the list"
        )
        return None
    sentence = f"expected {expected.counts()} training/test images, found {found}"
    if others := [f"{other.counts()} ({other.name})" for other in row.variants[1:]]:
        sentence += f"; also known: {', '.join(others)}"
    pairs = zip((expected.train, expected.test), (train, test), expected.sure, strict=True)
    unsure = all(sure == "?" for want, got, sure in pairs if want not in (None, got))
    if unsure:
        findings.warn("D07", f"{sentence}. The expected number is commonly quoted, not verified: count your archive")
    else:
        findings.doubt("D07", f"{sentence}. {findings.again}, or name the variant when you report numbers")
    return None


def check_whole(data: ImageData, findings: Findings) -> None:
    """D05, D08, D20: what every data set has to be, whoever made it: labels 0..C-1, one for each image, none of the
    domains without training or test images, no domain of the test half that training lacks."""
    for half, split in (("train", data.train), ("test", data.test)):
        labels = np.asarray(split.labels)
        if len(split.images) != len(labels):
            findings.error("D05", f"{half} holds {len(split.images):,} images and {len(labels):,} labels")
        elif len(labels) == 0:
            findings.error("D08", f"{half} holds no images")
        elif labels.min() < 0 or labels.max() >= data.num_classes:
            findings.error(
                "D05", f"{half} labels must be 0..{data.num_classes - 1}, go from {labels.min()} to {labels.max()}"
            )
        if data.domain_names and split.domains is not None:
            _check_domain_numbers(half, np.asarray(split.domains), data, findings)
    if data.domain_names and data.train.domains is None:
        findings.error("D20", "has domains, but its training images belong to none")


def _check_domain_numbers(half: str, domains: np.ndarray, data: ImageData, findings: Findings) -> None:
    names = data.domain_names
    strange = np.unique(domains[(domains < 0) | (domains >= len(names))])
    if len(strange):
        findings.error(
            "D20", f"{half} holds the domains {some(strange)}, which training lacks: it has 0..{len(names) - 1}"
        )
    if empty := [name for number, name in enumerate(names) if not (domains == number).any()]:
        what = "training" if half == "train" else "test"
        findings.error(
            "D20",
            f"{_number(len(empty), 'domain')} without {what} images: {some(empty)}. Each is a task: complete it",
        )


def _number(count: int, word: str) -> str:
    return f"{count} {word}" + "s" * (count != 1)


def check_domains(
    labels: np.ndarray, domains: np.ndarray, names: Sequence[str], classes: Sequence[str], findings: Findings
) -> None:
    """D20: a class that a domain lacks. labels, domains (N,) of the training half."""
    for domain, name in enumerate(names):
        present = np.bincount(labels[domains == domain], minlength=len(classes))
        if lacking := [classes[int(label)] for label in np.flatnonzero(present == 0)]:
            findings.warn("D20", f"domain {name} has no training images of {len(lacking)} classes: {some(lacking)}")
