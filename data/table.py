"""The data sets of the literature, one row each: what they hold, where they lie, how sure we are of the counts.

A row plus a reader of its layout (`data/layouts.py`) is a whole data set; nothing else knows its name. Counts are
marked by what stands behind them: L, the number of test images that every published accuracy is a fraction of;
F, counted in a file or stated by the data set's own documentation; "?", commonly quoted and never verified here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Sure = Literal["L", "F", "?"]


@dataclass(frozen=True)
class Variant:
    """One known split of a data set. train, test: images, None when the number depends on a list.

    sure: marks of (train, test). A count marked "?" is never a reason to stop.
    """

    name: str
    train: int | None
    test: int | None
    sure: tuple[Sure, Sure] = ("F", "F")

    def matches(self, train: int, test: int) -> bool:
        return self.train in (None, train) and self.test in (None, test)

    def counts(self) -> str:
        """ "24,000/6,000"; any number: "*"."""
        return "/".join("*" if count is None else f"{count:,}" for count in (self.train, self.test))


@dataclass(frozen=True)
class Row:
    """One data set.

    layout: key of `data.layouts.LAYOUTS`.  folders: below data_root, the default first, then accepted aliases.
    expects: the layout in words.  source: official name of where to get it.  variants: the expected split first.
    test_names: folder names of the test half, the usual one first.  class_pattern: what class folders are called.
    domains: names in stream order, of a domain-incremental data set.  numeric: class folders are 0..C-1.
    natural_order: published numbers use the unshuffled class order.  seeded: whether an own 80/20 split is accepted.
    note: what a user has to know before comparing numbers.
    """

    key: str
    title: str
    classes: int
    layout: str
    folders: tuple[str, ...]
    expects: str
    source: str
    variants: tuple[Variant, ...]
    test_names: tuple[str, ...] = ("test", "val")
    class_pattern: str = ""
    domains: tuple[str, ...] = ()
    numeric: bool = False
    natural_order: bool = False
    seeded: bool = True
    note: str = ""

    @property
    def manual(self) -> str:
        """Where the user reads about it; a folder of one's own has no section."""
        return "docs/datasets.md" if ":" in self.key else f"docs/datasets.md#{self.key}"


SPLIT_FOLDERS = "train/<class>/ and test/<class>/"
WNID = r"n\d{8}"
CIFAR100 = {
    "classes": 100,
    "layout": "cifar",
    "folders": ("cifar-100-python", "cifar100/cifar-100-python", "cifar/cifar-100-python"),
    "expects": "cifar-100-python/ with train, test and meta, as torchvision unpacks it",
    "source": "University of Toronto, through torchvision",
    "variants": (Variant("official", 50_000, 10_000),),
}
DOMAINNET = {
    "classes": 345,
    "layout": "domainnet",
    "folders": ("domainnet", "DomainNet"),
    "expects": "<domain>/<class>/*.jpg with <domain>_train.txt and <domain>_test.txt",
    "source": 'Boston University, "cleaned" version',
    "variants": (Variant("official lists", 409_832, 176_743, ("?", "?")),),
    "domains": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    "note": 'the "cleaned" and the original lists differ',
}

_ROWS = (
    Row(
        key="cifar10",
        title="CIFAR-10",
        classes=10,
        layout="cifar",
        folders=("cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar/cifar-10-batches-py"),
        expects="cifar-10-batches-py/ with data_batch_1..5, test_batch and batches.meta, as torchvision unpacks it",
        source="University of Toronto, through torchvision",
        variants=(Variant("official", 50_000, 10_000),),
    ),
    Row(key="cifar100", title="CIFAR-100, 32 px", **CIFAR100),  # type: ignore[arg-type]
    Row(key="cifar224", title="CIFAR-100, enlarged by the transforms", **CIFAR100),  # type: ignore[arg-type]
    Row(
        key="imagenetr",
        title="ImageNet-R",
        classes=200,
        layout="folders",
        folders=("imagenet-r",),
        expects=SPLIT_FOLDERS,
        source="Hendrycks et al., Berkeley (un-split); RevisitingCIL's authors (imagenet-r.zip, split)",
        variants=(Variant("80/20", 24_000, 6_000, ("F", "L")),),
        class_pattern=WNID,
        note="four splits in use have these counts and differ in their images: compare the split hash",
    ),
    Row(
        key="imageneta",
        title="ImageNet-A",
        classes=200,
        layout="folders",
        folders=("imagenet-a",),
        expects=SPLIT_FOLDERS,
        source="Hendrycks et al., Berkeley (un-split); RevisitingCIL's authors (ina.zip, split)",
        variants=(Variant("APER archive", 5_981, 1_519, ("F", "L")),),
        class_pattern=WNID,
        seeded=False,
        note="no official split: published numbers use the one in RevisitingCIL's ina.zip",
    ),
    Row(
        key="cub",
        title="CUB-200-2011, APER archive",
        classes=200,
        layout="cub",
        folders=("cub", "cub_200", "CUB_200_2011"),
        expects=SPLIT_FOLDERS + ", or the official CUB_200_2011/ with images/ and train_test_split.txt",
        source="RevisitingCIL's authors (cub.zip)",
        variants=(Variant("APER archive", 9_430, 2_358), Variant("cub_official", 5_994, 5_794)),
        class_pattern=r"\d{3}\..+",
        note="57 % more training images than the official split: numbers are not comparable",
    ),
    Row(
        key="cub_official",
        title="CUB-200-2011, official split",
        classes=200,
        layout="cub",
        folders=("CUB_200_2011", "cub_official", "cub_200", "cub"),
        expects="CUB_200_2011/ with images/, images.txt, image_class_labels.txt and train_test_split.txt",
        source="Caltech",
        variants=(Variant("cub_official", 5_994, 5_794), Variant("APER archive", 9_430, 2_358)),
        class_pattern=r"\d{3}\..+",
    ),
    Row(
        key="cars",
        title="Stanford Cars",
        classes=196,
        layout="cars",
        folders=("cars", "cars196", "stanford_cars"),
        expects=SPLIT_FOLDERS + ", or cars_train/ cars_test/ devkit/*.mat, or car_ims/ and cars_annos.mat",
        source="Stanford (the site is gone; copies exist)",
        variants=(Variant("official", 8_144, 8_041),),
    ),
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
    ),
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
    ),
    Row(
        key="omnibenchmark",
        title="OmniBenchmark",
        classes=300,
        layout="folders",
        folders=("omnibenchmark",),
        expects=SPLIT_FOLDERS,
        source="its authors; RevisitingCIL's authors (omnibenchmark.zip, split)",
        variants=(Variant("APER archive", 89_697, 5_985, ("F", "L")),),
    ),
    Row(
        key="imagenet100",
        title="ImageNet-100",
        classes=100,
        layout="subset",
        folders=("imagenet100", "imagenet-100", "imagenet"),
        expects="train/<wnid>/ and val/<wnid>/ of 100 classes, or of all 1000 to choose from",
        source="image-net.org (licence form)",
        variants=(Variant("100 classes of ImageNet", None, 5_000),),
        test_names=("val", "test"),
        class_pattern=WNID,
        note="lists of 100 classes differ between papers: compare the class hash",
    ),
    Row(
        key="imagenet1000",
        title="ImageNet-1000 (ILSVRC 2012)",
        classes=1000,
        layout="folders",
        folders=("imagenet", "imagenet1000", "ILSVRC2012"),
        expects="train/<wnid>/ and val/<wnid>/",
        source="image-net.org (licence form)",
        variants=(Variant("official", 1_281_167, 50_000),),
        test_names=("val",),
        class_pattern=WNID,
    ),
    Row(
        key="domainnet",
        title="DomainNet, six domains pooled, class-incremental",
        **(DOMAINNET),  # type: ignore[arg-type]
    ),
    Row(key="domainnet_dil", title="DomainNet, a task per domain", **DOMAINNET),  # type: ignore[arg-type]
    Row(
        key="tinyimagenet",
        title="Tiny-ImageNet, 64 px",
        classes=200,
        layout="tinyimagenet",
        folders=("tiny-imagenet-200", "TINYIMG"),
        expects="train/<wnid>/images/ and val/images/ with val/val_annotations.txt, or processed/x_train_01.npy ..",
        source="Stanford CS231n",
        variants=(Variant("official train and val", 100_000, 10_000),),
        test_names=("val",),
        class_pattern=WNID,
    ),
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
    ),
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
    ),
)

ROWS: Mapping[str, Row] = {row.key: row for row in _ROWS}
