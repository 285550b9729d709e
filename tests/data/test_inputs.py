"""Folders, lists, arrays and images as people have them: what is left out is counted, what is odd is named."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
from data import sources
from data.images import read_image
from data.layouts import Options
from data.sources import load, read
from data.stream import DataManager
from models.factory import config_from
from tests.conftest import tiny_values, write_stream
from tests.data import trees
from tools.check_data import inspect
from utils.errors import ConfigError, DataError, UserError


def folder(root: Path, names=("a", "b"), train="train", test="test") -> Path:
    for half, count in ((train, 3), (test, 2)):
        for label, name in enumerate(names):
            place = root / half / name
            place.mkdir(parents=True)
            for i in range(count):
                colour = (40 * label, 90 if half == train else 200, 50 * i)
                Image.new("RGB", (20, 18), colour).save(place / f"{i}.png")
    return root


def told(root: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(f"folder:{root}", None, Options(**options))
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "test"), [("training", "testing"), ("training", "test"), ("Train_Set", "validation")]
)
@pytest.mark.parametrize("split", ["folder", "seeded"])
def test_a_half_under_another_name_is_to_be_renamed(tmp_path, train, test, split):
    root = folder(tmp_path, train=train, test=test)
    if split == "seeded" and test == "test":
        pytest.skip("a half that is there is split anew")
    text = told(root, split=split, cache=tmp_path / "cache")
    assert "ename" in text and f"{train}" in text and "'train/'" in text
    assert "archive" not in text


def test_a_folder_of_ones_own_has_no_archive(tmp_path):
    root = folder(tmp_path / "mine")
    for path in (root / "test" / "b").iterdir():
        path.unlink()
    text = told(root)
    assert "1 class is empty (no images): test/b. Complete the folder" in text and "archive" not in text
    (root / "test" / "b").rmdir()
    assert "archive" not in told(root)
    (root / "train" / "c").mkdir()
    assert "archive" not in told(root)


def test_what_is_left_out_is_counted_in_check_and_log(tmp_path, capsys):
    root = folder(tmp_path / "mine", names=("a", "b", "c", "d"))
    (root / "train" / "a" / "notes.txt").write_text("x")
    (root / "train" / "readme.md").write_text("x")
    Image.new("RGB", (9, 9)).save(root / "test" / "loose.png")
    (root / "test" / "b" / "x.HEIC").write_bytes(b"x")
    (root / "val" / "a").mkdir(parents=True)
    config = tmp_path / "c.json"
    config.write_text(json.dumps(tiny_values(tmp_path, dataset=f"folder:{root}", test_transform="resize_crop_bicubic",
                                             train_transform="crop_flip")))  # fmt: skip
    assert main.main(["--config", str(config), "--check"]) == 0
    out = capsys.readouterr().out
    assert "ignored 2 files" in out and "notes.txt" in out and "readme.md" in out
    assert "left out 1 images that lie in" in out and "loose.png" in out
    assert "kinds that are not read (.heic)" in out
    assert "left out beside train/ and test/: val/" in out


@pytest.mark.parametrize("name", ["folders:/x", "folder", "npz", "Folder:/x", "nzp:/x"])
def test_forms_are_among_the_known_names(name):
    with pytest.raises(UserError) as caught:
        load(name, None)
    assert "did you mean" in str(caught.value) and ("folder:" in str(caught.value) or "npz:" in str(caught.value))
    with pytest.raises(UserError, match="folder:DIR, npz:FILE"):
        load("nothing like it", None)


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".jp2"])
def test_more_kinds_of_images_are_read(tmp_path, suffix):
    root = folder(tmp_path / "mine")
    kind = {".jfif": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000"}[suffix]
    Image.new("RGB", (20, 18), (250, 0, 0)).save(root / "train" / "a" / f"x{suffix}", kind)
    data = load(f"folder:{root}", None)
    (path,) = (path for path in data.train.images if path.suffix == suffix)
    assert read_image(path).size == (20, 18)


def heavy_text(path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    text = zlib.compress(b"a" * 200_000_000, 1)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20, 18, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"zTXt", b"x\0\0" + text) + chunk(b"IEND", b""))


BAD = {
    "pipe": (os.mkfifo, "is a named pipe"),
    "text chunk": (heavy_text, "cannot be read"),
    "pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "page": (lambda path: path.write_text("<html>"), "HTML page"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "nowhere": (lambda path: path.symlink_to(path.with_name("none")), "No such file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_odd_file_among_images_is_named_and_waited_for_by_nobody(tmp_path, kind):
    root = folder(tmp_path / "mine")
    path = root / "train" / "a" / "0.png"
    path.unlink()
    write, sentence = BAD[kind]
    write(path)
    with pytest.raises(DataError, match=sentence) as caught:
        load(f"folder:{root}", None)
        read_image(path)
    assert str(path) in str(caught.value)
    found = inspect(f"folder:{root}", None, Options(download=False), lambda images, _: images)
    assert not found.usable and "0.png" in found.text


def test_escape_codes_in_a_name_do_not_reach_the_terminal(tmp_path):
    root = folder(tmp_path / "mine")
    (root / "train" / "a" / "x\x1b[31m.png").write_bytes(b"no")
    found = inspect(f"folder:{root}", None, Options(download=False), lambda images, _: images)
    assert "\x1b" not in found.text and "x.png" in found.text


def test_bad_images_are_skipped_on_request_and_listed(tmp_path):
    root = folder(tmp_path / "mine")
    bad = root / "train" / "a" / "1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    keys = {"dataset": f"folder:{root}", "test_transform": "resize_crop_bicubic", "increment": 1}
    config = config_from(tiny_values(tmp_path, **keys, on_bad_image="skip"), source="test")
    manager = DataManager(config, 16)
    assert manager.unreadable == [str(bad)] and len(manager.data.train) == 5
    for i in (0, 2):
        (root / "train" / "a" / f"{i}.png").write_bytes(b"no")
    with pytest.raises(DataError, match="no image of a in train can be read"):
        DataManager(config, 16)


def test_arrays_have_no_image_files_to_skip(tmp_path):
    with pytest.raises(ConfigError, match='"on_bad_image" has no effect'):
        DataManager(config_from(tiny_values(tmp_path, on_bad_image="skip"), source="test"), 16)


def test_skipped_images_stand_in_the_result(tmp_path):
    root = folder(tmp_path / "mine", names=("a", "b", "c", "d", "e", "f"))
    bad = root / "test" / "a" / "1.png"
    bad.write_bytes(b"no")
    values = tiny_values(tmp_path, "simplecil", dataset=f"folder:{root}", test_transform="resize_crop_bicubic",
                         on_bad_image="skip", class_order=[5, 4, 3, 2, 1, 0])  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / "c.json"), "--output", str(tmp_path / "run")]) == 0
    result = json.loads(next((tmp_path / "run").rglob("result.json")).read_text())
    assert result["data"]["unreadable"] == {"count": 1, "files": [str(bad)]}
    assert result["class_order"] == [5, 4, 3, 2, 1, 0] and result["class_names"][0] == "f"
    assert 0 <= result["last_acc_top5"] <= 100
    assert result["weights"]["entry"] is None and result["weights"]["done"] == []


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"class_order": [0, 1, 2]}, r"must hold each class .*0..5, once: it lacks 3, 4, 5"),
        ({"class_order": [0, 1, 2, 3, 4, 4]}, "lacks 5; it holds twice 4"),
        ({"class_order": [0, 1, 2, 3, 4, 6]}, "lacks 5; it holds 6"),
        ({"class_order": [5, 4, 3, 2, 1, 0], "shuffle": True}, '"shuffle" contradicts "class_order"'),
        ({"class_order": [5, 4, 3, 2, 1, 0], "class_order_seed": 3}, '"class_order_seed" contradicts "class_order"'),
        ({"class_order": [0, "a"]}, "class_order"),
        ({"class_order": []}, "class_order"),
    ],
)
def test_a_wrong_class_order_is_refused(tmp_path, keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DataManager(config_from(tiny_values(tmp_path, **keys), source="test"), 16)


def test_top_five_is_reported_where_there_are_more_than_five(tmp_path):
    for classes in (4, 6):
        values = tiny_values(tmp_path, "simplecil", dataset=write_stream(tmp_path / "s.npz", classes=classes))
        (tmp_path / "c.json").write_text(json.dumps(values))
        output = tmp_path / str(classes)
        assert main.main(["--config", str(tmp_path / "c.json"), "--output", str(output)]) == 0
        result = json.loads(next(output.rglob("result.json")).read_text())
        assert ("last_acc_top5" in result) == ("avg_acc_top5" in result) == (classes > 5)


def test_pictures_that_stand_twice_are_counted(tmp_path):
    root = folder(tmp_path / "mine")
    picture = (root / "train" / "a" / "0.png").read_bytes()
    (root / "test" / "a" / "copy.png").write_bytes(picture)
    (root / "train" / "b" / "other.png").write_bytes((root / "train" / "a" / "1.png").read_bytes())
    text = inspect(f"folder:{root}", None, Options(download=False), lambda images, _: images).text
    assert "D21 warning" in text
    assert "1 picture stands in train and in test: train/a/0.png = test/a/copy.png" in text
    assert "1 picture stands under more than one class: train/a/1.png = train/b/other.png" in text


def test_pictures_of_arrays_that_stand_twice_are_counted(tmp_path):
    name = write_stream(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    arrays["x_test"][0] = arrays["x_train"][3]
    np.savez(tmp_path / "a.npz", **arrays)
    text = inspect(name, None, Options(download=False), lambda images, _: images).text
    assert "1 picture stands in train and in test: train/0/number 3 = test/0/number 0" in text


def medmnist(path: Path, grey=True, labels=1, **changes) -> str:
    rng = np.random.RandomState(0)
    arrays = {}
    for part, count in (("train", 12), ("val", 4), ("test", 6)):
        shape = (count, 28, 28) if grey else (count, 28, 28, 3)
        arrays[f"{part}_images"] = rng.randint(0, 255, shape).astype(np.uint8)
        arrays[f"{part}_labels"] = np.tile(np.arange(3, dtype=np.uint8), count)[:count, None].repeat(labels, 1)
    np.savez_compressed(path, **(arrays | changes))
    return f"npz:{path}"


@pytest.mark.parametrize("grey", [True, False])
def test_medmnist_s_arrays(tmp_path, grey):
    data, findings = read(medmnist(tmp_path / "m.npz", grey), None, Options())
    assert data.train.images.shape == (12, 28, 28, 3) and data.train.labels.shape == (12,)
    assert len(data.test) == 6 and data.num_classes == 3
    assert "2 arrays of" in str(findings.of("note")[0]) and "val_images [4, 28, 28" in str(findings.of("note")[0])


def test_medmnist_s_other_tasks_are_refused(tmp_path):
    with pytest.raises(DataError, match="several labels an image are not supported"):
        load(medmnist(tmp_path / "m.npz", labels=14), None)
    cubes = {"train_images": np.zeros((12, 8, 8, 8), np.uint8)}
    with pytest.raises(DataError, match=r"train_images must be uint8 \[N, H, W\] or"):
        load(medmnist(tmp_path / "n.npz", **cubes), None)


def test_arrays_are_judged_by_their_headers(tmp_path):
    """Terabytes by their headers; a wrong type is said before anything is unpacked."""

    def header(words: str) -> bytes:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + words.encode().ljust(117) + b"\n"

    for kind, sentence in (("<f8", "must be uint8"), ("|u1", "unpacks to .* GiB"), ("|O", "must be uint8")):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for half in ("train", "test"):
                shape = "(1000000000, 64, 64, 3)"
                archive.writestr(
                    f"x_{half}.npy", header(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}")
                )
                words = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000,), }"
                archive.writestr(f"y_{half}.npy", header(words))
        with pytest.raises(DataError, match=sentence):
            load(f"npz:{tmp_path / 'a.npz'}", None)


ODD_NPZ = {
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    "page": (lambda p: p.write_text("<!doctype html>"), "HTML page"),
    "pipe": (os.mkfifo, "named pipe"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "cut": (lambda p: (write_stream(p), p.write_bytes(p.read_bytes()[:500])), "cannot be read as npz"),
    "no zip": (lambda p: p.write_bytes(b"PK\x03\x04" + b"x" * 99), "cannot be read as npz"),
    "array": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), "single NumPy array"),
    "image": (lambda p: Image.new("RGB", (4, 4)).save(p, "PNG"), "PNG image"),
}


@pytest.mark.parametrize("kind", ODD_NPZ)
def test_an_odd_npz_is_named(tmp_path, kind):
    write, sentence = ODD_NPZ[kind]
    write(tmp_path / "a.npz")
    with pytest.raises(DataError, match=sentence):
        load(f"npz:{tmp_path / 'a.npz'}", None)


@pytest.mark.parametrize(
    "name", ["folder:~nobody_at_all/x", "npz:~nobody_at_all/x", "folder:" + "x" * 300, "npz:a\x00b"]
)
def test_odd_names_are_answered(name):
    with pytest.raises(UserError):
        load(name, None)


def change(path: Path, **arrays) -> str:
    write_stream(path, domains=3)
    with np.load(path) as archive:
        np.savez(path, **(dict(archive) | arrays))
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (lambda d, t: {"d_train": np.where(d == 1, 0, d)}, "1 domain without training images: domain 1"),
        (lambda d, t: {"d_test": np.where(t == 1, 0, t)}, "1 domain without test images: domain 1"),
        (lambda d, t: {"d_test": np.where(t == 1, 3, t)}, "test holds the domains 3, which training lacks"),
        (lambda d, t: {"d_train": np.where(d == 2, 1, d)}, "test holds the domains 2, which training lacks"),
        (lambda d, t: {"d_train": np.where(d == 2, 10**12, d)}, "must number the domains 0..D-1"),
        (lambda d, t: {"d_train": d - 1}, "must number the domains 0..D-1"),
        (lambda d, t: {"d_train": d.astype(float)}, "must be whole numbers"),
        (lambda d, t: {"d_train": d[:-1]}, "must be whole numbers"),
    ],
)
def test_domains_that_do_not_fit_end_before_the_run(tmp_path, changes, sentence):
    write_stream(tmp_path / "a.npz", domains=3)
    with np.load(tmp_path / "a.npz") as archive:
        changed = changes(archive["d_train"].astype(np.int64), archive["d_test"].astype(np.int64))
    with pytest.raises(DataError, match=sentence):
        load(change(tmp_path / "b.npz", **changed), None)


def test_a_domain_of_ones_own_function_is_checked_too(tmp_path, monkeypatch):
    (tmp_path / "mine_of_test.py").write_text(
        "import numpy as np\nfrom data.records import ImageData, Split\n"
        "def stream(_):\n    x, y = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 0, 1, 1])\n"
        "    half = Split(x, y, np.zeros(4, int))\n"
        "    return ImageData('m', half, half, ('a', 'b'), ('p', 'q'))\n"
        "def nothing(_):\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="1 domain without training images: q"):
        load("mine_of_test:stream", None)
    with pytest.raises(UserError, match="gave a int"):
        load("mine_of_test:nothing", None)


@pytest.mark.parametrize(
    ("line", "fine"),
    [
        ("a/0.png", True), ("- a/0.png", True), ("a/0.png 3", True), ("a/0.png,3", True), ('"a/0.png"', True),
        ("", True), ("# a remark", True), ("a/0.txt", False), ("a/0", False), ("label 3", False), ("3", False),
        ("a/0.png 3 x", False), ("data:", False), ("path,label", False),
    ],
)  # fmt: skip
def test_a_line_that_is_not_understood_is_an_error_with_its_number(tmp_path, line, fine):
    root = folder(tmp_path / "mine")
    (tmp_path / "train.txt").write_text(
        f"a/1.png\n{line}\nb/0.png\nb/1.png\n" + ("" if "0.png" in line else "a/0.png\n")
    )
    (tmp_path / "test.txt").write_text("a/2.png\nb/2.png\n")
    for half in ("train", "test"):  # one pool with different names
        for name in ("a", "b"):
            for path in (root / half / name).iterdir():
                target = tmp_path / "pool" / name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    options = Options(split=f"list:{tmp_path / 'train.txt'}", cache=tmp_path)
    if fine:
        assert len(load(f"folder:{tmp_path / 'pool'}", None, options).train) == 4
    else:
        with pytest.raises(DataError, match="train.txt line 2: not understood"):
            load(f"folder:{tmp_path / 'pool'}", None, options)


def kaggle(place: Path) -> None:
    trees.cars_devkit(place)
    for half in ("train", "test"):
        (place / f"cars_{half}").rename(place / "inner")
        (place / f"cars_{half}").mkdir()
        (place / "inner").rename(place / f"cars_{half}" / f"cars_{half}")


def test_kaggle_s_doubled_cars(tmp_path):
    kaggle(tmp_path / "stanford_cars")
    data, findings = read("cars", str(tmp_path), Options(download=False))
    assert data is not None and data.num_classes == 196
    assert any("one level deeper (cars_train/cars_train/)" in str(finding) for finding in findings.all)
    (tmp_path / "stanford_cars" / "devkit").rename(tmp_path / "stanford_cars" / "gone")
    _, findings = read("cars", str(tmp_path), Options(download=False))
    assert "as a copy of Kaggle's does" in str(findings.of("error")[0])
    assert sources.ROWS["cars"].title


def test_pipes_in_the_place_of_lists_are_missing(tmp_path):
    """Nothing waits for one."""
    trees.cub_official(tmp_path / "CUB_200_2011")
    path = tmp_path / "CUB_200_2011" / "images.txt"
    path.unlink()
    os.mkfifo(path)
    _, findings = read("cub_official", str(tmp_path), Options(download=False))
    assert "images.txt missing under" in str(findings.of("error")[0])
    os.mkfifo(tmp_path / "train.txt")
    (tmp_path / "test.txt").write_text("a/0.png")
    folder(tmp_path / "mine" / "x")
    assert "is a named pipe" in told(tmp_path / "mine" / "x" / "train", split=f"list:{tmp_path / 'train.txt'}")
