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
