import gzip

import numpy as np
import pytest

from data import idx
from data.layouts import Options
from data.sources import load, read
from tests.data.official import idx_files
from utils.errors import DataError

OFFLINE = Options(download=False)


@pytest.fixture(autouse=True)
def no_package(monkeypatch, tmp_path):
    monkeypatch.setattr(idx, "PACKAGE", tmp_path / "usr" / "share" / "datasets" / "fashion-mnist")


@pytest.mark.parametrize("folder", ["fashion-mnist", "fashionmnist", "FashionMNIST/raw", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_four_files_below_data_root(folder, packed, tmp_path):
    root = tmp_path / "data"
    idx_files(root / folder, packed=packed, classes=10)
    data = load("fashionmnist", str(root), OFFLINE)
    assert (len(data.train), len(data.test)) == (40, 20)
    assert data.class_names[9] == "Ankle boot" and data.train.labels.tolist()[:11] == [*range(10), 0]
    images = data.train.images
    assert images.shape == (40, 28, 28, 3) and images.dtype == np.uint8 and (images[..., 0] == images[..., 2]).all()


def test_the_installed_package_is_found(tmp_path):
    idx_files(idx.PACKAGE, classes=10)
    here = load("fashionmnist", str(tmp_path / "none"), OFFLINE)
    idx_files(tmp_path / "data" / "fashion-mnist", packed=False, classes=10)
    assert load("fashionmnist", str(tmp_path / "data"), OFFLINE).digest == here.digest


def test_one_sentence_without_either(tmp_path):
    with pytest.raises(DataError) as error:
        load("fashionmnist", str(tmp_path), OFFLINE)
    places = str(tmp_path / "fashion-mnist"), str(idx.PACKAGE)
    for part in ("dataset-fashion-mnist", "train-images-idx3-ubyte.gz", *places):
        assert part in str(error.value)


def test_a_failed_download_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fail)
    for root in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="dataset-fashion-mnist"):
            load("fashionmnist", str(root), Options())
    assert not list(tmp_path.iterdir())


def test_a_download_is_used(tmp_path, monkeypatch):
    def download(self):
        idx_files(tmp_path / "FashionMNIST" / "raw", packed=False, classes=10)

    monkeypatch.setattr("torchvision.datasets.MNIST.download", download)
    assert len(load("fashionmnist", str(tmp_path), Options()).train) == 40


def test_a_seeded_split_is_refused(tmp_path):
    with pytest.raises(DataError, match='split must be "folder"'):
        load("fashionmnist", str(tmp_path), Options(split="seeded", download=False))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def _other_kind(path):
    path.write_bytes(gzip.compress(b"\0\0\x0d\x03" + b"\0" * 40))


def _few_bytes(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def _none(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _other_kind, _few_bytes, _none, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_damage_is_named_by_file(damage, name, tmp_path):
    place = tmp_path / "fashion-mnist"
    idx_files(place, classes=10)
    damage(place / name)
    data, findings = read("fashionmnist", str(tmp_path), OFFLINE)
    assert data is None and [finding.code for finding in findings.of("error")] == ["D11"]
    assert str(place / name) in findings.of("error")[0].text


def test_halves_that_do_not_fit_are_told(tmp_path):
    place = tmp_path / "fashion-mnist"
    idx_files(place, classes=10)
    (place / "train-labels-idx1-ubyte.gz").write_bytes((place / "t10k-labels-idx1-ubyte.gz").read_bytes())
    data, findings = read("fashionmnist", str(tmp_path), OFFLINE)
    assert data is None and "40 images and 20 labels" in findings.of("error")[0].text
    idx_files(place, classes=11)
    assert "holds label 10" in read("fashionmnist", str(tmp_path), OFFLINE)[1].of("error")[0].text


@pytest.mark.parametrize("half", ["train", "t10k"])
@pytest.mark.parametrize("lost", [{9}, {0}, {3, 4}])
def test_a_class_missing_in_a_half_is_told(half, lost, tmp_path):
    place = tmp_path / "fashion-mnist"
    idx_files(place, classes=10)
    file = place / f"{half}-labels-idx1-ubyte.gz"
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[:8] + bytes(7 if label in lost else label for label in content[8:])))
    _, findings = read("fashionmnist", str(tmp_path), OFFLINE)
    (error,) = findings.of("error")
    assert error.code == "D08" and idx.NAMES[min(lost)] in error.text


@pytest.mark.parametrize("shape", [(40, 0, 28), (40, 28, 0), (-1, 28, 28)])
def test_images_without_pixels_are_damage(shape, tmp_path):
    place = tmp_path / "fashion-mnist"
    idx_files(place, classes=10)
    head = bytes((0, 0, 8, 3)) + b"".join(size.to_bytes(4, "big", signed=True) for size in shape)
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head))
    _, findings = read("fashionmnist", str(tmp_path), OFFLINE)
    assert [finding.code for finding in findings.of("error")] == ["D11"]
