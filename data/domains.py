"""What the readers of data sets that come in domains share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.checks import Findings, check_classes, check_domains
from data.images import Paths
from data.layouts import Options, entry
from data.records import ImageData, Split
from data.rows import Row

Rows = list[tuple[Path, int, int]]  # (image, label, domain)


def stream_of(row: Row, rows: dict[str, Rows], classes: Sequence[str], findings: Findings) -> ImageData:
    """A domain-incremental stream from (image, label, domain) rows, with D08 and D20."""
    splits = {}
    for half, entries in rows.items():
        labels = np.array([label for _, label, _ in entries], dtype=np.int64)
        domains = np.array([domain for *_, domain in entries], dtype=np.int64)
        splits[half] = Split(Paths(path for path, *_ in entries), labels, domains)
    train, test = splits["train"], splits["test"]
    check_classes(train.labels, test.labels, classes, findings)
    assert train.domains is not None
    check_domains(train.labels, train.domains, row.domains, classes, findings)
    return ImageData(row.key, train, test, tuple(classes), row.domains, "folder")


def folder_split(options: Options, findings: Findings) -> bool:
    if options.split == "folder":
        return True
    findings.error("D03", f'its split is part of the archive: split must be "folder", is "{options.split}"')
    return False


def fits_domains(row: Row, place: Path) -> bool:
    return any(entry(place, domain) is not None for domain in row.domains)
