import json

import numpy as np
import pytest

from data import sources
from data.glyphs import DOMAIN_CLASSES, DOMAINS, LISTS, STREAM_TEST, STREAM_TRAIN, pretraining_split, select
from tests.conftest import write_stream
from utils.errors import DataError


@pytest.fixture(scope="module")
def bundled():
    return {name: sources.load(name, None) for name in ("digits", "glyphs", "glyphs_domains")}


def test_bundled_sets_hold_what_they_promise(bundled):
    assert (len(bundled["digits"].train), len(bundled["digits"].test)) == (1252, 545)
    assert (len(bundled["glyphs"].train), len(bundled["glyphs"].test)) == (100 * STREAM_TRAIN, 100 * STREAM_TEST)
    for data in bundled.values():
        for split in (data.train, data.test):
            assert split.images.dtype == np.uint8 and split.images.shape[1:] == (32, 32, 3)
            assert set(split.labels) == set(range(data.num_classes))
    assert bundled["glyphs_domains"].domain_names == tuple(DOMAINS)
    assert bundled["glyphs_domains"].num_classes == DOMAIN_CLASSES


def test_bundled_sets_are_the_same_every_time(bundled):
    again = sources.load("glyphs_domains", None)
    assert again.digest == bundled["glyphs_domains"].digest
    assert (again.train.images == bundled["glyphs_domains"].train.images).all()


def test_digits_split_no_image_twice(bundled):
    train, test = (half.images.reshape(len(half), -1) for half in (bundled["digits"].train, bundled["digits"].test))
    assert len(np.unique(np.concatenate([train, test]), axis=0)) > 1790


def test_inverted_glyphs_are_light_on_dark(bundled):
    train = bundled["glyphs_domains"].train
    border = train.images[:, 0].mean(axis=(1, 2))
    inverted = train.domains == list(DOMAINS).index("inverted")
    assert border[inverted].max() < border[~inverted].min()


def test_no_stream_shares_a_character_with_pretraining():
    lists = json.loads(LISTS.read_text())
    stream, pretraining = set(lists["stream"]), set(lists["pretraining"])
    assert len(stream) == 100 and not stream & pretraining
    assert not {ord(digit) for digit in "0123456789"} & (stream | pretraining)


@pytest.mark.slow
def test_the_lists_are_what_select_chooses():
    chosen, written = select(), json.loads(LISTS.read_text())
    same = [len(set(chosen[key]) & set(written[key])) / len(written[key]) for key in written]
    assert min(same) > 0.9, "another FreeType may move a borderline shape, not a tenth of them"


def test_pretraining_images_show_their_own_classes(monkeypatch):
    monkeypatch.setattr("data.glyphs.PRETRAIN_TRAIN", 2)
    monkeypatch.setattr("data.glyphs.PRETRAIN_TEST", 1)
    (x, y), (x_test, y_test), names = pretraining_split()
    assert len(x) == len(y) == 2 * len(names) and len(x_test) == len(names)
    assert y.tolist() == np.repeat(np.arange(len(names)), 2).tolist()


def test_npz_domains_make_a_domain_stream(tmp_path):
    data = sources.load(write_stream(tmp_path / "d.npz", domains=3), None)
    assert data.domain_names == ("domain 0", "domain 1", "domain 2")


def test_the_digest_follows_the_pixels(tmp_path):
    first, second, other = (
        sources.load(write_stream(tmp_path / f"{name}.npz", seed=seed), None).digest
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second != other


def test_cifar_without_files_or_network_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(DataError, match=r"network is unreachable.*place the unpacked folder cifar-100-python under"):
        sources.load("cifar224", str(tmp_path))


def test_data_root_is_key_then_environment_then_cache(monkeypatch):
    monkeypatch.setenv("PALIMPSEST_DATA", "/from/environment")
    assert str(sources.default_root("/from/key")) == "/from/key"
    assert str(sources.default_root(None)) == "/from/environment"
    monkeypatch.delenv("PALIMPSEST_DATA")
    assert str(sources.default_root(None)).endswith(".cache/palimpsest/data")
