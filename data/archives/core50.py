"""CORe50: a task per training session."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from data.checks import Findings, check_class_folders, found_in
from data.domains import Rows, fits_domains, folder_split, stream_of
from data.images import images_below, visible_folders
from data.layouts import LAYOUTS, Layout, Options, entry, note_ignored
from data.records import ImageData, Split
from data.rows import Row, Variant, add_row


def core50(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """s1 .. s11, a folder per object in each; sessions 3, 7, 10 (or test_3_7_10/) are one test set for all tasks."""
    if not folder_split(options, findings):
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
    data = stream_of(row, rows, classes, findings)
    shared = Split(data.test.images, data.test.labels)  # the test sessions are no training domain: all tasks share them
    return replace(data, test=shared)


def _merge(sessions: Iterable[Mapping[str, list[Path]]]) -> dict[str, list[Path]]:
    merged: dict[str, list[Path]] = {}
    for classes in sessions:
        for name, paths in classes.items():
            merged.setdefault(name, []).extend(paths)
    return merged


LAYOUTS["core50"] = Layout(core50, fits_domains)
add_row(
    Row(
        key="core50",
        title="CORe50, a task per training session",
        classes=50,
        layout="core50",
        folders=("core50_imgs", "core50_128x128", "core50"),
        expects="s1 .. s11 with a folder per object (test sessions 3, 7, 10, or test_3_7_10/)",
        source="University of Bologna",
        variants=(Variant("sessions", 119_894, 44_972, ("?", "?")),),
        domains=("s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"),
        seeded=False,
    )
)
