"""Each fault of a data set has a code and a sentence: what is wrong, where, and what mends it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

import data.sources as sources
from data.checks import Findings, check_classes, check_counts, check_domains
from data.layouts import Options
from data.rows import ROWS
from data.sources import load, read
from data.stream import DataManager
from models.factory import config_from
from tests.conftest import tiny_values
from tests.data import trees
from tools.check_data import inspect
from utils.errors import ConfigError, DataError


def codes(name, root, **options):
    """code -> sentences of everything found."""
    _, findings = read(name, str(root), Options(**{"download": False, **options}))
    found: dict[str, list[str]] = {}
    for finding in findings.all:
        found.setdefault(finding.code, []).append(f"{finding.level}: {finding.text}")
    return found


@pytest.fixture
def vtab(tmp_path):
    """A complete small data set: the smallest of the table that is made of folders."""
    trees.split_folders(tmp_path / "vtab", trees.class_names("vtab"))
    return tmp_path


def test_d01_missing_folder(tmp_path):
    (text,) = codes("imagenetr", tmp_path)["D01"]
    assert text == (
        f"error: imagenetr: folder '{tmp_path / 'imagenet-r'}' not found. Set data_root or PALIMPSEST_DATA, or pass "
        "--data-root. Expected: train/<class>/ and test/<class>/. See docs/datasets.md#imagenetr"
    )
    assert "nor cub_200, CUB_200_2011" in codes("cub", tmp_path / "nowhere")["D01"][0]


def test_d02_alias_is_noted_and_a_missing_half_named(vtab):
    (vtab / "vtab" / "test").rename(vtab / "vtab" / "val")
    assert codes("vtab", vtab)["D02"] == ["note: vtab: found 'val/' instead of 'test/': using it"]
    shutil.rmtree(vtab / "vtab" / "val")
    (vtab / "vtab" / "images.tar").touch()
    (text,) = codes("vtab", vtab)["D02"]
    assert "'test/' missing under" in text and "found: images.tar, train" in text


def test_d02_parts_of_official_archives(tmp_path):
    trees.cub_official(tmp_path / "CUB_200_2011")
    (tmp_path / "CUB_200_2011" / "train_test_split.txt").unlink()
    assert "train_test_split.txt missing" in codes("cub_official", tmp_path)["D02"][0]
    trees.cars_devkit(tmp_path / "cars")
    (tmp_path / "cars" / "devkit" / "cars_meta.mat").unlink()
    assert "devkit/cars_meta*.mat missing" in codes("cars", tmp_path)["D02"][0]
    trees.cddb(tmp_path / "CDDB")
    shutil.rmtree(tmp_path / "CDDB" / "san" / "val")
    shutil.rmtree(tmp_path / "CDDB" / "wild")
    assert len(codes("cddb", tmp_path)["D02"]) == 2  # all at once


def test_d02_cars_without_test_labels(tmp_path):
    from scipy.io import savemat

    trees.cars_devkit(tmp_path / "cars")
    devkit = tmp_path / "cars" / "devkit"
    (devkit / "cars_test_annos_withlabels.mat").unlink()
    records = trees._records([("1.jpg",), ("2.jpg",)], [("fname", object)])
    savemat(devkit / "cars_test_annos.mat", {"annotations": records})
    assert "holds no labels: put cars_test_annos_withlabels.mat beside it" in codes("cars", tmp_path)["D02"][0]


def test_d03_unsplit_archive(tmp_path):
    trees.unsplit(tmp_path / "imagenet-r", trees.wnids(200))
    (text,) = codes("imagenetr", tmp_path)["D03"]
    assert "200 class folders in" in text and "but no train/ test/" in text
    assert '"list:<file>" or "seeded" (80/20 per class' in text
    trees.unsplit(tmp_path / "imagenet-a", trees.wnids(200))
    (text,) = codes("imageneta", tmp_path)["D03"]
    assert "seeded" not in text and "no official split" in text
    assert "numbers that compare with nothing" in codes("imageneta", tmp_path, split="seeded")["D03"][0]


@pytest.mark.parametrize("name", ["core50", "cddb", "domainnet", "tinyimagenet", "cifar100"])
def test_d03_a_split_that_is_part_of_the_archive(name, tmp_path):
    trees.LAYOUTS[name][1](tmp_path)
    assert 'split must be "folder", is "seeded"' in codes(name, tmp_path, split="seeded")["D03"][0]


def test_d03_sources_without_files(tmp_path):
    assert "its split is fixed" in codes("digits", tmp_path, split="seeded")["D03"][0]


def test_d04_one_level_deeper(vtab):
    (vtab / "vtab").rename(vtab / "inner")
    (vtab / "vtab").mkdir()
    (vtab / "inner").rename(vtab / "vtab" / "vtab-10")
    found = codes("vtab", vtab)
    assert found["D04"] == [f"note: vtab: the data lie one level deeper: using '{vtab / 'vtab' / 'vtab-10'}'"]
    shutil.copytree(vtab / "vtab" / "vtab-10", vtab / "vtab" / "other")  # ambiguous: nothing is guessed
    found = codes("vtab", vtab)
    assert "D04" not in found and "D03" in found


def test_d05_number_of_class_folders(vtab):
    shutil.rmtree(vtab / "vtab" / "train" / "34")
    (vtab / "vtab" / "train" / ".ipynb_checkpoints").mkdir()
    (text,) = codes("vtab", vtab)["D05"]
    assert "expected 50 class folders in train/, found 49; missing: 34; extra: .ipynb_checkpoints" in text


def test_d05_foreign_folder(tmp_path):
    trees.split_folders(tmp_path / "cub", [*trees.CUB_NAMES, "__MACOSX"])
    texts = codes("cub", tmp_path)["D05"]
    assert len(texts) == 2 and all("found 201; extra: __MACOSX" in text for text in texts)


def test_d05_own_folder_without_classes(tmp_path):
    for half in ("train", "test"):
        (tmp_path / half).mkdir()
    with pytest.raises(DataError, match="D05 error: folder:.*: no class folders in '.*train'. Expected: train/<class>"):
        load(f"folder:{tmp_path}", None)


def test_d06_class_sets_differ(vtab):
    (vtab / "vtab" / "test" / "7").rename(vtab / "vtab" / "test" / "seven")
    (text,) = codes("vtab", vtab)["D06"]
    assert "class sets differ between train and test: only in train: 7; only in test: seven" in text


def test_d07_known_variant_is_named_and_an_unknown_one_doubted():
    cub = ROWS["cub"]
    findings = Findings("cub")
    assert check_counts(cub, 9430, 2358, findings) is cub.variants[0] and not findings.all
    assert check_counts(cub, 5994, 5794, findings) is cub.variants[1]
    assert "5,994/5,794 = variant 'cub_official', not 'APER archive' (9,430/2,358)" in findings.all[0].text
    for strict, level in ((False, "warning"), (True, "error")):
        findings = Findings("cub", strict)
        assert check_counts(cub, 9429, 2358, findings) is None
        assert findings.all[0].level == level
        assert "expected 9,430/2,358 training/test images, found 9,429/2,358" in findings.all[0].text


def test_d07_an_unverified_count_never_stops():
    findings = Findings("vtab", strict=True)
    check_counts(ROWS["vtab"], 1800, 8619, findings)  # the training count is only quoted
    assert findings.all[0].level == "warning" and "not verified" in findings.all[0].text
    findings = Findings("vtab", strict=True)
    check_counts(ROWS["vtab"], 1796, 8618, findings)  # the test count is not
    assert findings.all[0].level == "error"


def test_d07_counts_of_table_1():
    expected = {
        "cifar10": (50000, 10000), "cifar100": (50000, 10000), "cifar224": (50000, 10000), "imagenetr": (24000, 6000),
        "imageneta": (5981, 1519), "cub": (9430, 2358), "cub_official": (5994, 5794), "cars": (8144, 8041),
        "vtab": (1796, 8619), "objectnet": (26509, 6628), "omnibenchmark": (89697, 5985),
        "imagenet1000": (1281167, 50000), "imagenet100": (None, 5000), "domainnet": (409832, 176743),
        "domainnet_dil": (409832, 176743), "tinyimagenet": (100000, 10000), "core50": (119894, 44972),
        "cddb": (16068, 5353),
    }  # fmt: skip
    assert {key: (row.variants[0].train, row.variants[0].test) for key, row in ROWS.items()} == expected


def test_d08_too_few_images(vtab):
    folder = vtab / "vtab" / "train" / "12"
    for path in list(folder.iterdir())[1:]:
        path.unlink()
    for path in (vtab / "vtab" / "test" / "9").iterdir():
        path.unlink()
    train, test = codes("vtab", vtab)["D08"]
    assert "1 class with fewer than 2 images (a covariance needs 2): train/12" in train
    assert "1 class is empty (no images): test/9" in test
    findings = Findings("x")
    check_classes(np.array([0, 0, 1, 1]), np.array([0, 1]), ["a", "b"], findings)
    assert not findings.all


def test_d09_all_unreadable_images_are_listed(vtab):
    (vtab / "vtab" / "train" / "3" / "3_0.JPEG").write_bytes(b"")
    (vtab / "vtab" / "test" / "4" / "4_3.JPEG").write_bytes(trees.jpeg()[:100])
    found = inspect("vtab", str(vtab), Options(), lambda images, total: images)
    texts = [finding.text for finding in found.findings.of("error")]
    assert len(texts) == 2 and all("cannot be read (" in text for text in texts)
    assert not found.usable and "vtab is not usable: 2 errors" in found.text


def test_d10_other_files_are_counted(vtab):
    for name in (".DS_Store", "Thumbs.db", "._1.jpg", "read me.txt"):
        (vtab / "vtab" / "train" / "3" / name).write_text("x")
    found = codes("vtab", vtab)
    assert "ignored 4 files in" in found["D10"][0] and "Thumbs.db" in found["D10"][0]
    assert len(load("vtab", str(vtab)).train) == 150


def test_d11_damaged_cifar(tmp_path):
    trees.cifar(tmp_path, 100)
    folder = tmp_path / "cifar-100-python"
    found = codes("cifar100", tmp_path)
    assert len(found["D11"]) == 3 and "warning: " in found["D11"][0]  # small files have other checksums
    assert "differs from the official file (md5 " in found["D11"][0]
    assert all(text.startswith("error: ") for text in codes("cifar100", tmp_path, strict=True)["D11"])
    (folder / "train").write_bytes((folder / "train").read_bytes()[:5000])
    (folder / "test").unlink()
    errors = [text for text in codes("cifar100", tmp_path)["D11"] if text.startswith("error")]
    assert any("is damaged" in text and "delete" in text for text in errors)
    assert any("is missing" in text for text in errors)


def test_d11_a_batch_that_would_run_code_is_refused(tmp_path):
    import os
    import pickle

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    trees.cifar(tmp_path, 10)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Malicious()))
    assert any("is damaged (it asks for " in text for text in codes("cifar10", tmp_path)["D11"])
    assert not (tmp_path / "harm").exists()


def test_d11_damaged_archive_and_no_network(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    def unreachable(self):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(CIFAR100, "download", unreachable)
    with pytest.raises(DataError, match="place the unpacked folder cifar-100-python under"):
        load("cifar100", str(tmp_path))
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"cifar-100-python.tar.gz' is damaged \(md5 .*; delete it and run again"):
        load("cifar100", str(tmp_path))


def test_d12_flat_validation_folder(tmp_path):
    trees.split_folders(tmp_path / "imagenet", trees.wnids(1000)[:3], test="val")
    shutil.rmtree(tmp_path / "imagenet" / "val")
    trees.write_images(tmp_path / "imagenet" / "val", [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(12)])
    (text,) = codes("imagenet1000", tmp_path)["D12"]
    assert "val/ holds 12 files and no class folders: move them into one folder per class" in text


def test_d13_protocol_does_not_fit(vtab, tmp_path):
    values = tiny_values(tmp_path, dataset="vtab", data_root=str(vtab), init_cls=60, increment=10, shuffle=False)
    with pytest.raises(ConfigError, match='"init_cls" is 60, but vtab has only 50 classes'):
        DataManager(config_from(values, source="test"), image_size=16)


def test_d14_shuffled_vtab_warns_and_a_shuffled_domain_stream_is_refused(vtab, tmp_path, caplog):
    values = tiny_values(tmp_path, dataset="vtab", data_root=str(vtab), increment=10)
    DataManager(config_from(values, source="test"), image_size=16)
    assert "vtab: published protocol uses natural order" in caplog.text
    trees.cddb(tmp_path / "CDDB")
    values = tiny_values(tmp_path, dataset="cddb", data_root=str(tmp_path), increment=None)
    with pytest.raises(ConfigError, match='"shuffle" must be false for cddb'):
        DataManager(config_from(values, source="test"), image_size=16)


def test_d15_first_five_faulty_lines(tmp_path):
    trees.split_folders(tmp_path / "imagenet", trees.wnids(120), test="val")
    lines = [*trees.wnids(4), "n99999999", trees.wnids(1)[0], *[f"n8888888{i}" for i in range(6)]]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    (text,) = codes("imagenet100", tmp_path, split=f"list:{tmp_path / 'classes.txt'}")["D15"]
    assert "8 faulty lines" in text and "line 5: unknown class 'n99999999'" in text
    assert f"line 6: '{trees.wnids(1)[0]}' stands twice (first line 1)" in text
    assert text.count("\n    line ") == 5 and "and 3 more" in text


def test_d15_listed_images_that_are_not_there(tmp_path):
    trees.domainnet(tmp_path / "domainnet")
    (tmp_path / "domainnet" / "sketch" / "class_007" / "b.jpg").unlink()
    (text,) = codes("domainnet", tmp_path)["D15"]
    assert "sketch_test.txt line 8: no such image 'sketch/class_007/b.jpg'" in text
    trees.tiny_official(tmp_path / "tiny-imagenet-200")
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_3.JPEG").unlink()
    assert "line 4: no such image 'val_3.JPEG" in codes("tinyimagenet", tmp_path)["D15"][0]
    trees.tiny_arrays(tmp_path / "arrays" / "TINYIMG")
    (tmp_path / "arrays" / "TINYIMG" / "processed" / "x_val_11.npy").unlink()
    assert "x_val_11.npy' is missing or damaged" in codes("tinyimagenet", tmp_path / "arrays")["D15"][0]


def test_d16_swapped_halves_of_cars():
    for strict, level in ((False, "warning"), (True, "error")):
        findings = Findings("cars", strict)
        check_counts(ROWS["cars"], 8041, 8144, findings)
        (finding,) = findings.all
        assert (finding.code, finding.level) == ("D16", level)
        assert "halves look swapped (8,041/8,144; official 8,144/8,041)" in finding.text


def test_d17_colour_modes_are_counted(vtab):
    from PIL import Image

    folder = vtab / "vtab" / "train" / "5"
    Image.new("L", (8, 8)).save(folder / "5_0.JPEG", "JPEG")
    Image.new("CMYK", (8, 8)).save(folder / "5_1.JPEG", "JPEG")
    Image.new("RGBA", (8, 8)).save(folder / "5_2.JPEG", "PNG")
    found = inspect("vtab", str(vtab), Options(), lambda images, total: images)
    (note,) = [finding for finding in found.findings.all if finding.code == "D17"]
    assert "3 images are not RGB (1 CMYK, 1 L, 1 RGBA): converted when read" in note.text
    assert found.usable


def test_d18_links_that_lead_back_and_foreign_names(vtab):
    folder = vtab / "vtab" / "train" / "5"
    (folder / "loop").symlink_to(folder.parent, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    trees.write_images(folder / "größer, 大", ["ein Bild .jpg", "画像.PNG"])
    found = load("vtab", str(vtab))
    assert sum(path.parent.name == "größer, 大" for path in found.train.images) == 2
    assert len(found.train) == 150 + 2


def test_d19_cache_larger_than_memory(vtab, tmp_path, monkeypatch):
    from data import image_cache

    monkeypatch.setattr(image_cache, "available_memory", lambda: 20_000)
    values = tiny_values(tmp_path, dataset="vtab", data_root=str(vtab), cache="ram", shuffle=False)
    with pytest.raises(DataError, match=r'D19.*"cache": "ram" needs 0.0 GiB .* are free. Choose "disk" or "none"'):
        DataManager(config_from(values, source="test"), image_size=16)


def test_d20_class_missing_in_a_domain():
    findings = Findings("core50")
    labels, domains = np.array([0, 1, 2, 0, 2]), np.array([0, 0, 0, 1, 1])
    check_domains(labels, domains, ("s1", "s2"), ("ball", "cup", "pen"), findings)
    (finding,) = findings.all
    assert (finding.code, finding.level) == ("D20", "warning")
    assert "domain s2 has no training images of 1 classes: cup" in finding.text


def test_d20_from_the_disk(tmp_path):
    trees.core50(tmp_path / "core50_imgs")
    shutil.rmtree(tmp_path / "core50_imgs" / "s4" / "o17")
    assert "domain s4 has no training images of 1 classes: o17" in codes("core50", tmp_path)["D20"][0]


def test_all_faults_are_reported_at_once(vtab):
    shutil.rmtree(vtab / "vtab" / "train" / "34")
    shutil.rmtree(vtab / "vtab" / "test" / "2")
    for path in (vtab / "vtab" / "test" / "9").iterdir():
        path.unlink()
    with pytest.raises(DataError) as caught:
        load("vtab", str(vtab))
    text = str(caught.value)
    assert text.count("D05 error") == 2 and "D06 error" in text and "D08 error" in text


def test_the_recognised_split_stands_in_the_variant(vtab, monkeypatch):
    row = ROWS["vtab"]
    small = replace(row, variants=(replace(row.variants[0], train=150, test=100),))
    monkeypatch.setattr(sources, "ROWS", {"vtab": small})
    first = load("vtab", str(vtab)).variant
    assert first.startswith("APER archive, folder, split ")
    image = vtab / "vtab" / "train" / "3" / "3_0.JPEG"
    image.rename(image.with_name("renamed.JPEG"))
    assert load("vtab", str(vtab)).variant != first


def test_command_line(vtab, capsys):
    import main

    assert main.main(["check-data", "vtab", "--data-root", str(vtab)]) == 0
    out = capsys.readouterr().out
    assert "train     150 images, 3..3 a class" in out and "vtab is usable: 0 errors" in out
    assert main.main(["check-data", "vtab", "--data-root", str(vtab), "--strict"]) == 2
    assert main.main(["check-data", "vtub"]) == 2
    assert 'did you mean "vtab"' in capsys.readouterr().err
