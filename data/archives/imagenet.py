"""ImageNet and what is made of it: ImageNet-R, ImageNet-A, ImageNet-100, ImageNet-1000."""

from data.rows import Row, Variant, add_row

SPLIT_FOLDERS = "train/<class>/ and test/<class>/"
WNID = r"n\d{8}"

add_row(
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
    )
)
add_row(
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
    )
)
add_row(
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
    )
)
add_row(
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
    )
)
