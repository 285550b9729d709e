"""hf:NAME on folders that the library itself wrote; no network."""

import builtins

import numpy as np
import pytest
from PIL import Image

from data.layouts import Options
from data.sources import load, read
from tests.data.official import COUNTS, pixels
from utils.errors import DataError, UserError

OFFLINE = Options(download=False)


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *arguments, **keys):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *arguments, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install datasets"):
        load("hf:cats", str(tmp_path), OFFLINE)


@pytest.mark.parametrize("name", ["hf:cats?imge=img", "hf:cats?split=train"])
def test_an_unknown_option_is_told(name, tmp_path):
    with pytest.raises(DataError, match="unknown option"):
        load(name, str(tmp_path), OFFLINE)


def table(count, label="label", image="image", named=True, first=0):
    datasets = pytest.importorskip("datasets")
    pairs = [(c, n) for n in range(count) for c in range(3)]
    names = ["cat", "dog", "owl"]
    values = {
        image: [Image.fromarray(pixels(*pair)) for pair in pairs],
        label: [first + c if named is not None else names[c] for c, _ in pairs],
    }
    kind = datasets.ClassLabel(names=names) if named else datasets.Value("int64" if named is not None else "string")
    return datasets.Dataset.from_dict(values, datasets.Features({image: datasets.Image(), label: kind}))


def saved(path, **keys):
    datasets = pytest.importorskip("datasets")
    halves = {half: table(count, **keys) for half, count in COUNTS.items()}
    datasets.DatasetDict(halves).save_to_disk(str(path))


@pytest.mark.parametrize(
    "query, keys",
    [
        ("", {}),
        ("?image=img&label=fine_label", {"image": "img", "label": "fine_label"}),
        ("", {"image": "img", "label": "fine"}),
        ("", {"named": False, "first": 5}),
        ("", {"named": None}),
    ],
)
def test_columns_are_found_or_named(query, keys, tmp_path):
    saved(tmp_path / "cats", **keys)
    data = load(f"hf:cats{query}", str(tmp_path), OFFLINE)
    assert (len(data.train), len(data.test), data.num_classes) == (12, 6, 3)
    assert data.class_names == (("5", "6", "7") if keys.get("named") is False else ("cat", "dog", "owl"))
    assert data.train.images.shape == (12, 28, 28, 3)
    assert (np.round((data.train.images.mean(axis=(1, 2, 3)) - 20) / 60) == data.train.labels).all()
    assert load(f"hf:{tmp_path / 'cats'}{query}", None, OFFLINE).digest == data.digest


def test_one_half_alone_is_drawn(tmp_path):
    table(10).save_to_disk(str(tmp_path / "cats"))
    with pytest.raises(DataError, match='"split": "seeded"'):
        load("hf:cats", str(tmp_path), OFFLINE)
    options = Options(split="seeded", download=False, cache=tmp_path / "cache")
    data = load("hf:cats", str(tmp_path), options)
    assert (len(data.train), len(data.test)) == (24, 6)


def test_what_is_not_there_is_told(tmp_path):
    saved(tmp_path / "cats")
    for query, sentence in {"?label=fine": 'no column "fine"', "?test=dev": 'no half "dev"'}.items():
        _, findings = read(f"hf:cats{query}", str(tmp_path), OFFLINE)
        assert sentence in findings.of("error")[0].text


def test_without_a_network_the_folder_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=f"'{tmp_path / 'cats'}'"):
        load("hf:cats", str(tmp_path), OFFLINE)
