"""CDDB hard track: a task per generator, real or fake."""

from pathlib import Path

from data.checks import Findings, found_in
from data.domains import Rows, fits_domains, folder_split, stream_of
from data.images import images_below
from data.layouts import LAYOUTS, Layout, Options, entry, note_ignored
from data.records import ImageData
from data.rows import Row, Variant, add_row

REAL_FAKE = ("0_real", "1_fake")


def cddb(row: Row, place: Path, options: Options, findings: Findings) -> ImageData | None:
    """<generator>/{train,val}/.../{0_real,1_fake}/: at any depth, since some generators come class by class."""
    if not folder_split(options, findings):
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
    return stream_of(row, rows, ["real", "fake"], findings)


def _real_or_fake(path: Path, above: Path) -> int | None:
    """0 real, 1 fake, by the folder on the way; None for an image outside both."""
    parts = path.relative_to(above).parts[:-1]
    return next((label for label, name in enumerate(REAL_FAKE) if name in parts), None)


LAYOUTS["cddb"] = Layout(cddb, fits_domains)
add_row(
    Row(
        key="cddb",
        title="CDDB hard track, a task per generator",
        classes=2,
        layout="cddb",
        folders=("CDDB",),
        expects="<generator>/train/ and <generator>/val/ holding 0_real/ and 1_fake/, or these one level deeper",
        source="its project page",
        variants=(Variant("hard", 16_068, 5_353, ("?", "?")),),
        domains=("gaugan", "biggan", "wild", "whichfaceisreal", "san"),
        seeded=False,
    )
)
