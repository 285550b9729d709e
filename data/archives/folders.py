"""Data sets that are class folders and nothing else: VTAB, ObjectNet, OmniBenchmark."""

from data.rows import Row, Variant, add_row

SPLIT_FOLDERS = "train/<class>/ and test/<class>/"

add_row(
    Row(
        key="vtab",
        title="VTAB, 5 sets of 10 classes",
        classes=50,
        layout="folders",
        folders=("vtab", "vtab-cil/vtab", "vtab-cil"),
        expects="train/0 .. train/49 and test/0 .. test/49",
        source="RevisitingCIL's authors (vtab.zip); parts: RESISC45, DTD, Pets, EuroSAT, Flowers",
        variants=(Variant("APER archive", 1_796, 8_619, ("?", "L")),),
        numeric=True,
        natural_order=True,
    )
)
add_row(
    Row(
        key="objectnet",
        title="ObjectNet",
        classes=200,
        layout="folders",
        folders=("objectnet",),
        expects=SPLIT_FOLDERS,
        source="objectnet.dev; RevisitingCIL's authors (objnet.tgz, split)",
        variants=(Variant("APER archive", 26_509, 6_628, ("?", "L")),),
        note="its licence forbids training on it, which this benchmark does",
    )
)
add_row(
    Row(
        key="omnibenchmark",
        title="OmniBenchmark",
        classes=300,
        layout="folders",
        folders=("omnibenchmark",),
        expects=SPLIT_FOLDERS,
        source="its authors; RevisitingCIL's authors (omnibenchmark.zip, split)",
        variants=(Variant("APER archive", 89_697, 5_985, ("F", "L")),),
    )
)
