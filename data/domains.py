"""Data sets that come in domains: DomainNet, CORe50, CDDB."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import numpy as np

from data.checks import Findings, check_class_folders, check_classes, check_domains, found_in
from data.images import Paths, images_below, visible_folders
from data.layouts import LAYOUTS, Layout, Options, entry, note_ignored
from data.records import ImageData, Split
from data.splits import read_list, report_lines
from data.table import Row

Rows = list[tuple[Path, int, int]]  # (image, label, domain)
REAL_FAKE = ("0_real", "1_fake")


def domainnet(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """<domain>/<class>/<file> chosen by <domain>_{train,test}.txt, lines "<domain>/<class>/<file> <label>".

    What stands before the domain in a line ("data/domainnet/...") is ignored. A row called `.._dil` is a stream of
    domains; otherwise all domains are pooled.
    """
    if not _folder_split(options, findings):
        return None
    halves: dict[str, list[tuple[str, str, int]]] = {"train": [], "test": []}  # ("class/file" path, class, domain)
    for number, domain in enumerate(row.domains):
        _read_domain(place, domain, number, halves, findings)
    if findings.of("error"):
        return None
    classes = sorted({name for entries in halves.values() for _, name, _ in entries})
    if len(classes) != row.classes:
        findings.error("D05", f"expected {row.classes} classes in the lists, found {len(classes)}. Fetch them again")
        return None
    index = {name: label for label, name in enumerate(classes)}
    rows = {half: [(Path(p), index[name], d) for p, name, d in entries] for half, entries in halves.items()}
    data = replace(_stream(row, rows, classes, findings), variant="official lists")
    if row.key.endswith("_dil"):
        return data
    train, test = (Split(split.images, split.labels) for split in (data.train, data.test))
    return ImageData(row.key, train, test, data.class_names, variant=data.variant)


def _read_domain(
    place: Path, domain: str, number: int, halves: dict[str, list[tuple[str, str, int]]], findings: Findings
) -> None:
    """Add the listed images of one domain to `halves`."""
    folder = entry(place, domain)
    if folder is None:
        findings.error(
            "D02", f"'{domain}/' missing under '{place}'; found: {found_in(place)}. Unpack {domain}.zip there"
        )
        return
    present = {str(path.relative_to(folder)) for path in images_below(folder)[0]}
    for half, entries in halves.items():
        name = f"{domain}_{half}.txt"
        path = entry(place, name, f"splits/{name}", f"{domain}/{name}")
        if path is None:
            findings.error("D02", f"'{name}' missing under '{place}': put the official list beside the domain folders")
            continue
        faults = []
        for where, text in read_list(path, findings) or ():
            parts = PureWindowsPath(text).parts
            lowered = [part.lower() for part in parts]
            below = parts[lowered.index(domain) + 1 :] if domain in lowered else parts[-2:]
            inside = os.path.join(*below) if below else ""
            if inside in present and len(below) > 1:
                entries.append((str(folder / inside), below[0], number))
            else:
                faults.append(f"{where}: no such image '{text}'")
        report_lines(faults, f"list '{path}'", findings)


def core50(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """s1 .. s11, a folder per object in each; sessions 3, 7, 10 (or test_3_7_10/) are one test set for all tasks."""
    if not _folder_split(options, findings):
        return None
    together = entry(place, "test_3_7_10")
    tests = ["test_3_7_10"] if together is not None else ["s3", "s7", "s10"]
    found: dict[str, dict[str, list[Path]]] = {}
    for session in (*row.domains, *tests):
        folder = entry(place, session)
        if folder is None:
            findings.error("D02", f"'{session}/' missing under '{place}'; found: {found_in(place)}. Unpack it there")
            continue
        found[session] = {}
        for below in visible_folders(folder):
            found[session][below.name], ignored = images_below(below)
            note_ignored(ignored, below, findings)
    if findings.of("error"):
        return None
    merged = {"train": _merge(found[name] for name in row.domains), "test": _merge(found[name] for name in tests)}
    check_class_folders(row, merged, {"train": "the training sessions", "test": " + ".join(tests)}, (), findings)
    if findings.of("error"):
        return None
    classes = sorted(merged["train"])
    rows: dict[str, Rows] = {}
    for half, sessions in (("train", row.domains), ("test", tests)):
        rows[half] = [
            (path, label, domain)
            for domain, session in enumerate(sessions)
            for label, name in enumerate(classes)
            for path in found[session].get(name, ())
        ]
    data = _stream(row, rows, classes, findings)
    shared = Split(data.test.images, data.test.labels)  # the test sessions are no training domain: all tasks share them
    return replace(data, test=shared)


def _merge(sessions: Iterable[Mapping[str, list[Path]]]) -> dict[str, list[Path]]:
    merged: dict[str, list[Path]] = {}
    for classes in sessions:
        for name, paths in classes.items():
            merged.setdefault(name, []).extend(paths)
    return merged


def cddb(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """<generator>/{train,val}/.../{0_real,1_fake}/: at any depth, since some generators come class by class."""
    if not _folder_split(options, findings):
        return None
    rows: dict[str, Rows] = {"train": [], "test": []}
    for number, domain in enumerate(row.domains):
        folder = entry(place, domain)
        if folder is None:
            findings.error("D02", f"'{domain}/' missing under '{place}'; found: {found_in(place)}. Unpack it there")
            continue
        for half, name in (("train", "train"), ("test", "val")):
            below = entry(folder, name)
            if below is None:
                findings.error("D02", f"'{domain}/{name}/' missing under '{place}'; found: {found_in(folder)}")
                continue
            images, ignored = images_below(below)
            note_ignored(ignored, below, findings)
            rows[half] += [
                (path, label, number) for path in images if (label := _real_or_fake(path, below)) is not None
            ]
    if findings.of("error"):
        return None
    return _stream(row, rows, ["real", "fake"], findings)


def _real_or_fake(path: Path, above: Path) -> int | None:
    """0 real, 1 fake, by the folder on the way; None for an image outside both."""
    parts = path.relative_to(above).parts[:-1]
    return next((label for label, name in enumerate(REAL_FAKE) if name in parts), None)


def _stream(row: Row, rows: dict[str, Rows], classes: Sequence[str], findings: Findings) -> ImageData:
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


def _folder_split(options: Options, findings: Findings) -> bool:
    if options.split == "folder":
        return True
    findings.error("D03", f'its split is part of the archive: split must be "folder", is "{options.split}"')
    return False


def _fits_domains(row: Row, place: Path) -> bool:
    return any(entry(place, domain) is not None for domain in row.domains)


LAYOUTS["domainnet"] = Layout(domainnet, _fits_domains)
LAYOUTS["core50"] = Layout(core50, _fits_domains)
LAYOUTS["cddb"] = Layout(cddb, _fits_domains)
