import os

import numpy as np
import pytest

from data.layouts import Options
from data.sources import SOURCES, load, read
from data.stream import DataManager
from data.torchvision_sets import SHORT
from models.factory import config_from
from tests.conftest import tiny_values
from tests.data.official import COUNTS, MAKERS, dtd, emnist, idx_files, mnist, picture
from utils.errors import DataError, UserError

OFFLINE = Options(download=False)


@pytest.fixture
def unchecked(monkeypatch):
    """Small files have other digests than the official ones."""
    for module in ("svhn", "flowers102", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, *_: os.path.isfile(path))


@pytest.mark.parametrize("name", MAKERS)
def test_official_layouts(name, tmp_path, unchecked):
    """Every set: halves, labels from 0, RGB, the right picture under the right label, one hash whoever reads it."""
    MAKERS[name](tmp_path)
    split = "seeded" if name in ("EuroSAT", "Caltech101", "SUN397") else "folder"
    options = Options(split=split, download=False, cache=tmp_path / "cache")
    data = load(f"torchvision:{name}", str(tmp_path), options)
    assert data.num_classes == 3 and len(set(data.class_names)) == 3
    train, test = (24, 6) if split == "seeded" else (3 * COUNTS["train"], 3 * COUNTS["test"])
    assert (len(data.train), len(data.test)) == (train, test)
    manager = DataManager(
        config_from(
            tiny_values(tmp_path, dataset=f"torchvision:{name}", data_root=str(tmp_path), split=split, shuffle=False,
                        cache_root=str(tmp_path / "cache"), increment=3),
            source="test",
        ),
        image_size=16,
    )  # fmt: skip
    for half in (manager[0].train, manager[0].test):
        for images, labels in _batches(half):
            assert images.shape[1] == 3
            found = np.round((255 * images.mean(axis=(1, 2, 3)) - 20) / 60).astype(int)
            assert (found == labels).all()
    assert load(f"torchvision:{name}", str(tmp_path), options).digest == data.digest


def _batches(half):
    from data.loading import pass_over
    from utils.runtime import Runtime

    for images, labels, _ in pass_over(half.view("test"), np.arange(len(half)), Runtime("cpu", "fp32", 0), 8):
        yield images.numpy(), labels.numpy()


@pytest.mark.parametrize("short", SHORT)
def test_short_names_and_any_case(short, tmp_path):
    assert short in SOURCES
    for name in (short, f"torchvision:{SHORT[short].lower()}"):
        _, findings = read(name, str(tmp_path / "none"), Options(split="seeded", download=False))
        (error,) = findings.of("error")
        assert error.code == "D03" or f"'{tmp_path / 'none'}" in error.text


def test_class_names_are_the_sets_own(tmp_path):
    mnist(tmp_path)
    assert load("mnist", str(tmp_path), OFFLINE).class_names == ("0 - zero", "1 - one", "2 - two")
    emnist(tmp_path)
    assert load("torchvision:EMNIST?split=letters", str(tmp_path), OFFLINE).class_names == ("a", "b", "c")


def test_images_are_in_one_order_whatever_the_disk_says(tmp_path):
    """SUN397's reader lists its files as the disk does."""
    MAKERS["SUN397"](tmp_path)
    options = Options(split="seeded", download=False, cache=tmp_path / "cache")
    data = load("torchvision:SUN397", str(tmp_path), options)
    assert data.class_names == ("abbey", "bar/indoor", "cabin")
    both = [*data.train.images]
    assert both == sorted(both, key=str)


def test_halves_can_be_named_and_joined(tmp_path):
    dtd(tmp_path)
    data = load("torchvision:DTD?train=train+val&test=test&partition=1", str(tmp_path), OFFLINE)
    assert (len(data.train), len(data.test)) == (3 * 7, 3 * 2)
    swapped, findings = read("torchvision:DTD?train=test&test=train", str(tmp_path), OFFLINE)
    assert len(swapped.train) < len(swapped.test)
    assert any("train=train+val" in finding.text for finding in findings.of("note"))


REFUSED = {
    "torchvision:EMNIST": "torchvision:EMNIST?split=byclass|bymerge",
    "torchvision:EMNIST?split=leters": "letters",
    "torchvision:DTD?partiton=1": 'did you mean "partition"',
    "torchvision:DTD?partition=one": "whole number",
    "torchvision:DTD?partition=99": "partition",
    "torchvision:DTD?train=trian": "trian",
    "torchvision:Food11": 'did you mean "Food101"',
    "torchvision:": "Known:",
    "torchvision:ImageFolder": "Known:",
    "torchvision:MNIST?download=true": 'unknown option "download"',
    "torchvision:EuroSAT": '"split": "seeded"',
    "torchvsion:MNIST": "torchvision:MNIST",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name, tmp_path):
    for make in (dtd, emnist, MAKERS["EuroSAT"]):
        make(tmp_path)
    with pytest.raises((UserError, DataError)) as error:
        load(name, str(tmp_path), OFFLINE)
    assert REFUSED[name] in str(error.value)
    assert str(error.value).count("error") <= 1


def test_a_fixed_split_is_not_drawn_anew(tmp_path):
    mnist(tmp_path)
    with pytest.raises(DataError, match='split must be "folder"'):
        load("mnist", str(tmp_path), Options(split="seeded", download=False))


WHERE = {
    "MNIST": "MNIST/raw", "Food101": "food-101", "OxfordIIITPet": "oxford-iiit-pet", "DTD": "dtd",
    "GTSRB": "gtsrb", "SVHN": "train_32x32.mat", "FGVCAircraft": "fgvc-aircraft-2013b", "STL10": "stl10_binary",
    "Flowers102": "flowers-102", "Country211": "country211", "KMNIST": "KMNIST/raw",
    "USPS": "usps.bz2", "Imagenette": "imagenette2",
}  # fmt: skip


@pytest.mark.parametrize("name", WHERE)
def test_without_a_network_the_exact_folder_is_named(name, tmp_path):
    with pytest.raises(DataError) as error:
        load(f"torchvision:{name}", str(tmp_path), OFFLINE)
    assert f"'{tmp_path / WHERE[name]}'" in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is written where nothing may be downloaded"


def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    with pytest.raises(DataError, match="the download failed") as error:
        load("mnist", str(tmp_path), Options())
    assert f"'{tmp_path / 'MNIST/raw'}'" in str(error.value)
    assert not list(tmp_path.iterdir()), "the folder that the reader made is gone again"


def test_a_half_without_a_class_is_told(tmp_path):
    MAKERS["Country211"](tmp_path)
    picture(tmp_path / "country211" / "train" / "ZZ" / "0.jpg", 0, 0)
    _, findings = read("torchvision:Country211", str(tmp_path), OFFLINE)
    assert findings.of("error")


def test_a_run_on_a_short_name(tmp_path):
    import json

    import main

    mnist(tmp_path)
    config = tmp_path / "run.json"
    values = tiny_values(tmp_path, "simplecil", dataset="mnist", data_root=str(tmp_path), increment=1)
    config.write_text(json.dumps(values))
    assert main.main(["--config", str(config), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "seed1993" / "result.json").read_text())
    assert result["data"]["name"] == "mnist" and sorted(result["class_names"])[0] == "0 - zero"


def test_idx_helper_writes_what_torchvision_reads(tmp_path):
    idx_files(tmp_path / "FashionMNIST" / "raw", packed=False)
    data = load("torchvision:FashionMNIST", str(tmp_path), OFFLINE)
    assert data.train.images.shape == (12, 28, 28, 3) and data.train.images.dtype == np.uint8


# What is written behind "?" -> what is said of it, whatever the set.
OPTIONS = {
    "torchvision:DTD?partition=1&partition=2": "given twice",
    "torchvision:DTD?train=train&partition=1&train=val": "given twice",
    "torchvision:DTD?train=": "no value",
    "torchvision:DTD?test": "no value",
    "torchvision:EMNIST?split=&split=letters": "no value",
    "torchvision:DTD?=1": "no name",
    "torchvision:DTD?&partition=1": "no name",
    "torchvision:DTD?partition=--1": "whole number",
    "torchvision:DTD?partition=²": "whole number",
    "torchvision:EuroSAT?train=all": 'unknown option "train"',
    "torchvision:DTD?train=train+test": "both halves",
    "torchvision:DTD?train=test": "both halves",
    "torchvision:DTD?train=train%2Btrain": "twice in one",
    "torchvision:DTD?test=val+train": "both halves",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_obeyed_or_refused(name, tmp_path):
    for make in (dtd, emnist, MAKERS["EuroSAT"]):
        make(tmp_path)
    split = "seeded" if "EuroSAT" in name else "folder"
    data, findings = read(name, str(tmp_path), Options(split=split, download=False, cache=tmp_path / "cache"))
    assert data is None and OPTIONS[name] in findings.of("error")[0].text


@pytest.mark.parametrize("split", ["seeded:x", "seeded:1:2", "list:x.json", "folder"])
def test_a_split_that_cannot_be_drawn_is_told_once(split, tmp_path):
    MAKERS["EuroSAT"](tmp_path)
    _, findings = read("eurosat", str(tmp_path), Options(split=split, download=False, cache=tmp_path / "cache"))
    (error,) = findings.of("error")
    assert '"split": "seeded"' in error.text


def test_one_half_under_two_names_is_no_pair(tmp_path, monkeypatch):
    """QMNIST's option `what` says which half is read, over `train`."""
    mnist(tmp_path)
    from torchvision import datasets

    class Same(datasets.MNIST):
        raw_folder = str(tmp_path / "MNIST" / "raw")

        def __init__(self, root, what="train", train=True, download=False):
            super().__init__(root, train=what == "train", download=download)

    monkeypatch.setattr(datasets, "QMNIST", Same)
    _, findings = read("torchvision:QMNIST?what=train", str(tmp_path), OFFLINE)
    assert "both halves" in findings.of("error")[0].text


def test_an_option_of_the_target_changes_the_labels(tmp_path):
    MAKERS["OxfordIIITPet"](tmp_path)
    for half in ("trainval", "test"):
        file = tmp_path / "oxford-iiit-pet" / "annotations" / f"{half}.txt"
        rows = [line.split() for line in file.read_text().splitlines()]
        file.write_text("".join(f"{name} {label} {2 if label == '3' else 1} 1\n" for name, label, *_ in rows))
    data = load("torchvision:OxfordIIITPet?target_types=binary-category", str(tmp_path), OFFLINE)
    assert data.num_classes == 2 and np.bincount(data.train.labels).tolist() == [8, 4]


def test_the_record_names_the_half_that_was_read(tmp_path):
    MAKERS["Imagenette"](tmp_path)
    assert "train/val" in load("torchvision:Imagenette", str(tmp_path), OFFLINE).variant


def _more(file, text):
    def write(root):
        with (root / file).open("ab") as opened:
            opened.write(text.encode())

    return write


def _bytes(file, content):
    return lambda root: (root / file).write_bytes(content)


def _renamed(folder, name):
    return lambda root: (root / folder).rename((root / folder).with_name(name))


AIRCRAFT = "fgvc-aircraft-2013b/data/images_variant_test.txt"
DAMAGED = {
    "a blank line of the test list": ("DTD", _more("dtd/dtd/labels/test1.txt", "\n")),
    "a blank line of the training list": ("DTD", _more("dtd/dtd/labels/train1.txt", "\n")),
    "a class that nobody lists": ("FGVCAircraft", _more(AIRCRAFT, "x 999-9\n")),
    "a line without a class": ("FGVCAircraft", _more(AIRCRAFT, "x\n")),
    "three words of four": ("OxfordIIITPet", _more("oxford-iiit-pet/annotations/test.txt", "a 1 1\n")),
    "JSON cut off": ("Food101", _bytes("food-101/meta/test.json", b"{")),
    "JSON of another kind": ("Food101", _bytes("food-101/meta/test.json", b"[]")),
    "no text": ("Food101", _bytes("food-101/meta/test.json", b"\xff\xfe")),
    "an empty mat": ("SVHN", _bytes("test_32x32.mat", b"")),
    "text for a mat": ("Flowers102", _bytes("flowers-102/setid.mat", b"hello " * 99)),
    "an empty IDX": ("MNIST", _bytes("MNIST/raw/train-images-idx3-ubyte", b"")),
    "a wrong magic": ("MNIST", _bytes("MNIST/raw/train-images-idx3-ubyte", b"\xff" * 40)),
    "fewer labels than images": ("STL10", _bytes("stl10_binary/train_y.bin", b"\1\2\3")),
    "an archive cut off": ("USPS", lambda root: (root / "usps.bz2").write_bytes((root / "usps.bz2").read_bytes()[:-9])),
    "a class of another set": ("Imagenette", _renamed("imagenette2/val/n02102040", "n09999999")),
    "another class in a half": ("Country211", _renamed("country211/test/AE", "AB")),
    "a folder of a class gone": ("Country211", _renamed("country211/test/AD", ".AD")),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_a_reader_makes_of_damage_is_one_sentence(case, tmp_path, unchecked):
    """Neither a traceback, nor another half in the place of the damaged one, nor labels that mean other classes."""
    name, damage = DAMAGED[case]
    MAKERS[name](tmp_path)
    if name == "FGVCAircraft":  # a half that would be taken for the test half: a part of the training half
        shown = tmp_path / AIRCRAFT
        (shown.with_name("images_variant_val.txt")).write_text(shown.read_text())
    damage(tmp_path)
    data, findings = read(f"torchvision:{name}", str(tmp_path), OFFLINE)
    (error,) = findings.of("error")
    assert data is None and error.code in ("D01", "D06")
    assert str(tmp_path) in error.text or "number their classes" in error.text


def test_labels_below_zero_are_no_class(tmp_path, unchecked):
    """Flowers numbers from 1: a 0 would be the class -1, and bear the last one's name."""
    from scipy.io import savemat

    MAKERS["Flowers102"](tmp_path)
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": [0] * 100})
    _, findings = read("flowers102", str(tmp_path), OFFLINE)
    assert {finding.code for finding in findings.of("error")} == {"D05"}


@pytest.mark.parametrize("name", ["PCAM", "USPS"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    from torchvision import datasets

    def lacking(self, root, split="train", download=False):
        try:
            import a_package_of_nobody  # noqa: F401
        except ImportError:
            if name == "PCAM":
                raise RuntimeError("it is not found") from None
            raise

    monkeypatch.setattr(getattr(datasets, name), "__init__", lacking)
    with pytest.raises(UserError, match="a_package_of_nobody"):
        load(f"torchvision:{name}", str(tmp_path), Options())


@pytest.mark.parametrize("name", ["DTD", "Food101", "FGVCAircraft", "OxfordIIITPet", "GTSRB"])
@pytest.mark.parametrize("what", [os.mkfifo, lambda path: None, lambda path: path.symlink_to(path)])
def test_the_first_image_is_no_file(name, what, tmp_path):
    """Named by its path; a pipe is not waited for."""
    MAKERS[name](tmp_path)
    data = load(f"torchvision:{name}", str(tmp_path), OFFLINE)
    for path in [path for split in (data.train, data.test) for path in split.images]:
        if path == min(data.test.images):
            path.unlink()
            what(path)
            with pytest.raises(DataError) as error:
                load(f"torchvision:{name}", str(tmp_path), OFFLINE)
            assert str(path) in str(error.value)
