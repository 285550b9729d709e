"""Splits drawn by a seed or read from a list; nothing is moved, and a split is the same wherever it is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.layouts import Options
from data.sources import load, read
from data.splits import split_hash
from tests.data import trees
from utils.errors import DataError


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """ImageNet-R as it is published: class folders of different sizes, no halves."""
    root = tmp_path_factory.mktemp("root")
    for n, name in enumerate(trees.wnids(200)):
        trees.write_images(root / "imagenet-r" / name, [f"art_{i}.jpg" for i in range(3 + n % 11)])
    return root


def names(split):
    return [f"{path.parent.name}/{path.name}" for path in split.images]


def test_seeded_is_stratified_exact_and_stored(archive, tmp_path):
    options = Options(split="seeded", cache=tmp_path / "cache")
    data, findings = read("imagenetr", str(archive), options)
    total = len(data.train) + len(data.test)
    assert total == sum(3 + n % 11 for n in range(200))
    assert len(data.test) == pytest.approx(0.2 * total, abs=1)
    counts = np.array([3 + n % 11 for n in range(200)])
    test = np.bincount(data.test.labels)
    assert np.all(test >= 1) and np.all(np.abs(test - 0.2 * counts) < 1)
    (stored,) = (tmp_path / "cache" / "splits").glob("imagenetr-seeded0-*.json")
    values = json.loads(stored.read_text())
    assert values["hash"] == split_hash({half: values[half] for half in ("train", "test")})
    assert sorted(values["test"]) == sorted(names(data.test))
    assert f"seeded:0, split {values['hash'][:12]}" in data.variant
    assert any(str(stored) in finding.text for finding in findings.all)


def test_a_stored_split_is_kept_and_a_damaged_one_drawn_again(archive, tmp_path):
    options = Options(split="seeded:7", cache=tmp_path)
    first = load("imagenetr", str(archive), options)
    (stored,) = (tmp_path / "splits").iterdir()
    values = json.loads(stored.read_text())
    values["train"], values["test"] = values["train"][1:] + values["test"][:1], values["test"][1:] + values["train"][:1]
    values["hash"] = split_hash({half: values[half] for half in ("train", "test")})
    stored.write_text(json.dumps(values))
    assert load("imagenetr", str(archive), options).variant != first.variant  # the stored one counts
    stored.write_text(stored.read_text()[:500])
    assert load("imagenetr", str(archive), options).variant == first.variant


def test_the_split_depends_on_the_seed_alone(archive, tmp_path):
    np.random.seed(5)
    one = load("imagenetr", str(archive), Options(split="seeded:1", cache=tmp_path / "a"))
    np.random.seed(6)
    again = load("imagenetr", str(archive), Options(split="seeded:1", cache=tmp_path / "b"))
    other = load("imagenetr", str(archive), Options(split="seeded:2", cache=tmp_path / "b"))
    assert names(one.train) == names(again.train) and one.variant == again.variant
    assert names(one.train) != names(other.train) and one.variant != other.variant


def test_without_a_writable_cache_the_split_is_drawn_each_time(archive, tmp_path):
    (tmp_path / "file").touch()
    data, findings = read("imagenetr", str(archive), Options(split="seeded", cache=tmp_path / "file"))
    assert any("not stored" in finding.text for finding in findings.all)
    assert data.variant == load("imagenetr", str(archive), Options(split="seeded", cache=tmp_path / "ok")).variant


def test_the_same_split_as_folders_and_as_list_has_one_hash(archive, tmp_path):
    seeded = load("imagenetr", str(archive), Options(split="seeded", cache=tmp_path))
    (stored,) = (tmp_path / "splits").iterdir()
    listed = load("imagenetr", str(archive), Options(split=f"list:{stored}"))
    assert listed.variant.rpartition(" ")[2] == seeded.variant.rpartition(" ")[2]
    for half, split in (("train", seeded.train), ("val", seeded.test)):
        for path in split.images:
            target = tmp_path / "copy" / "imagenet-r" / half / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    folders = load("imagenetr", str(tmp_path / "copy"))
    assert folders.variant.rpartition(" ")[2] == seeded.variant.rpartition(" ")[2]
    assert names(folders.train) == names(listed.train)


@pytest.mark.parametrize("style", ["yaml", "txt", "windows"])
def test_lists_in_text_and_yaml(archive, tmp_path, style):
    pools = {"train": [], "test": []}
    for n, name in enumerate(trees.wnids(200)):
        for i in range(3 + n % 11):
            pools["test" if i == 0 else "train"].append(f"data/imagenet-r/{name}/art_{i}.jpg")
    for half, entries in pools.items():
        path = tmp_path / f"imagenet-r_{half}.{'yaml' if style == 'yaml' else 'txt'}"
        if style == "yaml":
            targets = "".join("- 3\n" for _ in entries)
            path.write_text("data:\n" + "".join(f"- {entry}\n" for entry in entries) + "targets:\n" + targets)
        elif style == "windows":
            path.write_text("\ufeff" + "".join("{} 3\r\n".format(e.replace("/", "\\")) for e in entries))
        else:
            path.write_text("".join(f"{entry} 3\n" for entry in entries))
    first = next(tmp_path.glob("imagenet-r_train*"))
    data = load("imagenetr", str(archive), Options(split=f"list:{first}"))
    assert len(data.test) == 200 and len(data.train) == len(pools["train"])
    assert all(path.name == "art_0.jpg" for path in data.test.images)
    assert f"list:{first.name}" in data.variant


def test_faulty_lists_say_what_and_where(archive, tmp_path):
    def fault(content: str | None, name: str = "train.txt", partner: str = "n01000000/art_2.jpg\n") -> str:
        (tmp_path / "test.txt").write_text(partner)
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError) as caught:
            load("imagenetr", str(archive), Options(split=f"list:{tmp_path / name}"))
        return str(caught.value)

    good = "n01000000/art_0.jpg\nn01000000/art_1.jpg\n"
    assert "train.txt line 3: unknown class 'n77/art_0.jpg'" in fault(good + "n77/art_0.jpg\n")
    assert "train.txt line 3: no such image 'n01000000/art_99.jpg'" in fault(good + "n01000000/art_99.jpg\n")
    assert "train.txt line 3: 'n01000000/art_0.jpg' stands twice (first train.txt line 1)" in fault(
        good + "n01000000/art_0.jpg\n"
    )
    assert "train.txt line 1: not understood: 'nothing'" in fault("nothing\n")
    assert "names no images" in fault("# nothing\n\n")
    assert "its name must hold 'train'" in fault(good, name="list.txt")
    assert 'is not {"train": [paths], "test": [paths]}' in fault('{"train": []}', name="list.json")
    assert "cannot be read (No such file or directory)" in fault(None, name="train_missing.txt")


def test_a_folder_of_ones_own_can_be_split(tmp_path):
    trees.unsplit(tmp_path / "mine", ["b", "a"], count=10)
    data = load(f"folder:{tmp_path / 'mine'}", None, Options(split="seeded", cache=tmp_path))
    assert (len(data.train), len(data.test), data.class_names) == (16, 4, ("a", "b"))


def test_images_that_both_halves_hold_cannot_be_split_anew(tmp_path):
    for half in ("train", "test"):
        trees.unsplit(tmp_path / "mine" / half, ["a", "b"])
    with pytest.raises(DataError, match="train/ and test/ both hold cannot be split anew: a/a_0.jpg"):
        load(f"folder:{tmp_path / 'mine'}", None, Options(split="seeded", cache=tmp_path))
