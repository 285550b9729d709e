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


def made(labels, kind, images=None, image_kind=None):
    datasets = pytest.importorskip("datasets")
    images = images or [Image.fromarray(pixels(n % 3, n)) for n in range(len(labels))]
    features = datasets.Features({"image": image_kind or datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features)


def kinds():
    datasets = pytest.importorskip("datasets")
    return datasets.ClassLabel(names=["cat", "dog", "owl"]), datasets


def none_labels():
    named, datasets = kinds()
    for kind, some in ((named, [0, 1]), (datasets.Value("string"), ["a", "b"]), (datasets.Value("int64"), [4, 5])):
        yield made([*some, None] * 4, kind), made([*some, None] * 2, kind), "no class"
    yield made([0, 1, -1] * 4, named), made([0, 1, -1] * 2, named), "no class"


def other_halves():
    named, datasets = kinds()
    turned = datasets.ClassLabel(names=["owl", "cat", "dog"])
    good = made([0, 1, 2] * 4, named)
    yield good, made([0, 1, 2] * 2, turned), "number their classes differently"
    yield good, made(["cat", "dog", "owl"] * 2, datasets.Value("string")), "number their classes differently"
    yield good, good.remove_columns("label"), 'half "test"'
    yield good, good.remove_columns("image"), 'half "test"'
    words = datasets.Value("string")
    yield made(["a", "b"] * 4, words), made(["a", "b", "c"] * 2, words), "train/c"


def other_types():
    named, datasets = kinds()
    lists = datasets.Sequence(datasets.Value("int64"))
    yield made([[0], [1]] * 4, lists), made([[0], [1]] * 2, lists), "ClassLabel"
    good = made([0, 1, 2] * 2, named)
    for kind, content in ((datasets.Value("binary"), b"x"), (datasets.Value("string"), "a.png")):
        yield made([0, 1, 2] * 4, named, [content] * 12, kind), good, "datasets.Image"
    for content in (None, {"bytes": b"no image", "path": None}):
        pictures = [Image.fromarray(pixels(0, 0)), content] * 6
        yield made([0, 1, 2] * 4, named, pictures), good, 'image number 1 of half "train"'


@pytest.mark.parametrize("cases", [none_labels, other_halves, other_types])
def test_what_is_no_pair_of_image_and_class_is_told(cases, tmp_path):
    datasets = pytest.importorskip("datasets")
    for number, (train, test, sentence) in enumerate(cases()):
        name = f"set{number}"
        datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(tmp_path / name))
        with pytest.raises(DataError) as error:
            load(f"hf:{name}", str(tmp_path), OFFLINE)
        assert sentence in str(error.value)


@pytest.mark.parametrize("query", ["?label=", "?label", "?label=label&label=label", "?=label"])
def test_options_without_a_value_or_twice_are_refused(query, tmp_path):
    saved(tmp_path / "cats")
    _, findings = read(f"hf:cats{query}", str(tmp_path), OFFLINE)
    assert [finding.code for finding in findings.of("error")] == ["D03"]


@pytest.mark.parametrize("query", ["?label=fine label&image=a b%2Bc", "?label=fine%20label&image=a%20b+c"])
def test_columns_may_hold_blanks(query, tmp_path):
    saved(tmp_path / "cats", label="fine label", image="a b+c")
    assert load(f"hf:cats{query}", str(tmp_path), OFFLINE).num_classes == 3


@pytest.mark.parametrize("name", ["hf:", "hf: ", "hf:?label=label"])
def test_no_name_is_not_the_whole_root(name, tmp_path):
    pytest.importorskip("datasets")
    saved(tmp_path)
    _, findings = read(name, str(tmp_path), OFFLINE)
    assert "no data set is named" in findings.of("error")[0].text


def test_a_damaged_folder_is_named_and_not_the_hub(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "dataset_dict.json").write_text("{}")
    _, findings = read("hf:cats", str(tmp_path), OFFLINE)
    assert f"'{tmp_path / 'cats'}' cannot be read" in findings.of("error")[0].text


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    datasets = pytest.importorskip("datasets")
    named, _ = kinds()
    dark = Image.fromarray(np.full((28, 28), 30000, dtype=np.uint16))
    halves = {"train": made([0, 1, 2] * 4, named, [dark] * 12), "test": made([0, 1, 2] * 2, named)}
    datasets.DatasetDict(halves).save_to_disk(str(tmp_path / "cats"))
    assert load("hf:cats", str(tmp_path), OFFLINE).train.images.max() == 30000 >> 8


@pytest.mark.parametrize("download, asked", [(False, [True]), (True, [True, False])])
def test_the_cache_is_asked_before_the_hub(download, asked, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    seen = []

    def fail(*_, **__):
        seen.append(datasets.config.HF_HUB_OFFLINE and constants.HF_HUB_OFFLINE)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError):
        load("hf:cats", str(tmp_path), Options(download=download))
    assert seen == asked and not constants.HF_HUB_OFFLINE
