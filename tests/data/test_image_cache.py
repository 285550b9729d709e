"""Decoded once: the same pixels as from the files, in memory and on disk, and refused when they do not fit."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import image_cache
from data.image_cache import cached
from data.images import read_image
from data.loading import Batch
from data.sources import load
from data.stream import DataManager
from models.factory import config_from
from tests.conftest import tiny_values
from utils.errors import ConfigError, DataError


@pytest.fixture
def mine(tmp_path):
    """Two classes of images of many sizes, one of them with an orientation tag."""
    rng = np.random.RandomState(0)
    for half, count in (("train", 5), ("test", 3)):
        for c, name in enumerate("ab"):
            folder = tmp_path / "mine" / half / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (20 + 7 * i, 30 + 3 * c, 3)).astype(np.uint8)
                exif = Image.Exif()
                if i == 1:
                    exif[0x0112] = 6
                Image.fromarray(pixels).save(folder / f"{i}.jpg", exif=exif)
    return f"folder:{tmp_path / 'mine'}"


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_pixels_are_those_of_the_files(mine, tmp_path, kind):
    data = load(mine, None)
    held = cached(data, kind, None, tmp_path / "cache")
    for plain, quick in ((data.train, held.train), (data.test, held.test)):
        assert len(plain) == len(quick.images) == len(quick)
        for path, image in zip(plain.images, quick.images, strict=True):
            assert np.array_equal(np.asarray(read_image(path)), image)
    assert held.digest == data.digest and held.variant == data.variant


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_batches_are_the_same_with_and_without(mine, tmp_path, kind):
    batches = []
    for cache in ("none", kind):
        keys = {"dataset": mine, "train_transform": "crop_flip", "cache": cache, "cache_root": str(tmp_path / "c")}
        manager = DataManager(config_from(tiny_values(tmp_path, **keys), source="test"), image_size=16)
        batches.append(manager[0].train.view("train").__getitems__(Batch(np.arange(10), seed=3))[0])
    assert torch.equal(*batches)


def test_the_map_is_made_once_and_again_when_it_or_the_data_changed(mine, tmp_path, monkeypatch):
    data, made = load(mine, None), []
    write = image_cache._write_map
    monkeypatch.setattr(image_cache, "_write_map", lambda *given: made.append(given[0]) or write(*given))
    cached(data, "disk", None, tmp_path / "cache")
    assert len(made) == 2
    cached(data, "disk", None, tmp_path / "cache")
    assert len(made) == 2
    for file in (tmp_path / "cache" / "images").glob("*.bin"):
        file.write_bytes(file.read_bytes()[:-1])
    held = cached(data, "disk", None, tmp_path / "cache")
    assert len(made) == 4
    path = data.train.images[0]
    Image.new("RGB", (31, 20), (1, 2, 3)).save(path)
    held = cached(data, "disk", None, tmp_path / "cache")
    assert len(made) == 5
    assert np.array_equal(held.train.images[0], np.asarray(read_image(path)))
    assert not list((tmp_path / "cache" / "images").glob("*.part"))


def test_a_size_limit_reduces_the_short_side(mine, tmp_path):
    data = load(mine, None)
    held = cached(data, "ram", 24, tmp_path)
    for path, image in zip(data.train.images, held.train.images, strict=True):
        width, height = read_image(path).size
        if min(width, height) <= 24:
            assert image.shape[:2] == (height, width)
        else:
            assert min(image.shape[:2]) == 24
            assert image.shape[0] / image.shape[1] == pytest.approx(height / width, abs=0.05)


def test_loader_processes_open_the_map_again(mine, tmp_path):
    held = cached(load(mine, None), "disk", None, tmp_path / "cache").train.images
    content = pickle.dumps(held)
    assert len(content) < 3000
    assert np.array_equal(pickle.loads(content)[4], held[4])


def test_d19_disk(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r'D19 .*"cache": "disk" needs .* GiB are free. Set cache_root'):
        cached(load(mine, None), "disk", None, tmp_path / "cache")


def test_a_cache_folder_that_cannot_be_written(mine, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written .* Set cache_root"):
        cached(load(mine, None), "disk", None, tmp_path / "file")


def test_an_unreadable_image_is_named(mine, tmp_path):
    data = load(mine, None)
    path = data.train.images[3]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=f"image '{path}' cannot be read"):
        cached(data, "ram", None, tmp_path)


def test_arrays_are_left_as_they_are(tmp_path):
    data = load("digits", None)
    assert cached(data, "ram", None, tmp_path) is data


def test_a_limit_without_a_cache_is_a_contradiction(mine, tmp_path):
    with pytest.raises(ConfigError, match='"cache_size" has no effect unless "cache" is "ram"'):
        config_from(tiny_values(tmp_path, dataset=mine, cache_size=64), source="test")
