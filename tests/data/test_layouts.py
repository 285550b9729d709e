"""Every data set of the table, in every layout in which it is published."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from data.layouts import Options
from data.loading import Batch
from data.rows import ROWS
from data.sources import SOURCES, load, load_folder, read
from data.stream import DataManager
from models.factory import build_learner, config_from
from models.parts.evaluation import evaluate
from models.parts.loop import begin
from tests.conftest import tiny_values
from tests.data import trees
from utils.runtime import Runtime

OFFICIAL_ORDER = ("cifar10", "cifar100", "cifar224", "cddb", "tinyimagenet")  # not, or not always, by name


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Layout name -> data_root that holds it; each is written once."""
    roots: dict[str, Path] = {}

    def root(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp("data root")
            trees.LAYOUTS[name][1](roots[name])
        return roots[name]

    return root


def snapshot(root: Path) -> list[tuple]:
    entries = sorted(root.rglob("*"))
    return [(p, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else sorted(os.listdir(p))) for p in entries]


def test_every_row_has_a_tree_and_is_a_source():
    assert {key for key, _ in trees.LAYOUTS.values()} == set(ROWS)
    assert set(ROWS) <= set(SOURCES)


@pytest.mark.slow
@pytest.mark.parametrize("name", trees.LAYOUTS)
def test_a_published_layout_loads(name, disk):
    key = trees.LAYOUTS[name][0]
    data, findings = read(key, str(disk(name)), Options())
    assert not findings.of("error"), findings.all
    assert data is not None and (len(data.train), len(data.test)) == trees.counts(key)
    assert data.num_classes == ROWS[key].classes
    if key not in OFFICIAL_ORDER:
        assert list(data.class_names) == sorted(data.class_names)
    for split in (data.train, data.test):
        assert np.array_equal(np.unique(split.labels), np.arange(data.num_classes))
    # D07: a small tree has other counts than the archive
    assert any(finding.code == "D07" for finding in findings.all)


@pytest.mark.parametrize("name", [name for name, (key, _) in trees.LAYOUTS.items() if "cifar" not in key])
def test_labels_are_those_of_the_folders(name, disk):
    data = load(trees.LAYOUTS[name][0], str(disk(name)))
    if isinstance(data.train.images, np.ndarray):
        return
    for split in (data.train, data.test):
        for row in range(0, len(split), 97):
            path, label = str(split.images[row]), data.class_names[split.labels[row]]
            if name in ("cars devkit", "cars whole"):
                number = int(Path(path).stem) - 1
                per_class = {"cars_train": trees.TRAIN, "cars_test": trees.TEST, "car_ims": 5}[Path(path).parent.name]
                assert label == f"{number // per_class + 1:03d} {trees.CAR_NAMES[number // per_class]}"
            elif name == "tinyimagenet" and "val_" in path:
                assert label == trees.wnids(200)[int(Path(path).stem[4:]) % 200]
            else:
                assert f"/{label}/" in path or f"_{label}/" in path


def test_halves_do_not_overlap_and_follow_the_official_lists(disk):
    data = load("cub_official", str(disk("cub_official")))
    train, test = ({path.name for path in split.images} for split in (data.train, data.test))
    assert not train & test
    assert "001.Bird_1_0.jpg" in test and f"001.Bird_1_{trees.TEST}.jpg" in train
    cars = load("cars", str(disk("cars whole")))
    assert {int(path.stem) % 5 for path in cars.test.images} == {1, 2}  # the flag says test = 1


def test_cifar_pixels_are_read_channel_by_channel(disk):
    import pickle

    root = disk("cifar100")
    raw = pickle.loads((root / "cifar-100-python" / "train").read_bytes())
    data = load("cifar100", str(root))
    assert data.train.images.shape == (200, 32, 32, 3)
    assert np.array_equal(data.train.images[7].transpose(2, 0, 1).reshape(-1), raw["data"][7])
    assert data.train.labels.tolist() == raw["fine_labels"]
    assert data.class_names[3] == "thing 3"


def test_tiny_arrays_become_whole_numbers(disk):
    data = load("tinyimagenet", str(disk("tinyimagenet arrays")))
    assert data.train.images.dtype == np.uint8
    assert data.train.images[0].max() == round(255 / 20)


def test_vtab_keeps_the_string_order_of_its_folders(disk):
    data = load("vtab", str(disk("vtab")))
    assert data.class_names[:4] == ("0", "1", "10", "11")
    assert data.natural_order


def test_domain_streams_have_a_task_per_domain(disk, tmp_path):
    for name, domains in (("domainnet_dil", 6), ("cddb", 5), ("core50", 8)):
        values = tiny_values(tmp_path, dataset=name, data_root=str(disk(name)), increment=None, shuffle=False)
        manager = DataManager(config_from(values, source="test"), image_size=16)
        assert len(manager) == domains
        assert [task.domain for task in manager] == list(ROWS[name].domains)
        assert sum(len(task.train) for task in manager) == trees.counts(name)[0]
        images, labels = manager[1].train.view("train").__getitems__(Batch(np.array([0, 1])))
        assert images.shape == (2, 3, 16, 16) and len(labels) == 2


def test_core50_has_one_test_set_for_all_tasks(disk, tmp_path):
    values = tiny_values(tmp_path, dataset="core50", data_root=str(disk("core50")), increment=None, shuffle=False)
    manager = DataManager(config_from(values, source="test"), image_size=16)
    assert {len(task.test) for task in manager} == {150}
    passes: list[int] = []
    learner = build_learner(config_from(values, source="test"), Runtime("cpu", "fp32", 0), manager[0].info)
    begin(learner, manager[0])
    predicted = torch.zeros(150, 50)
    predicted[:, 4] = 1
    learner.predict = lambda images, frozen: passes.append(len(images)) or predicted[: len(images)]
    correct = evaluate(learner, manager[:8]).main
    assert sum(passes) == 150 and correct[:2].tolist() == [[3.0] * 8] * 2  # read once, counted for each task
    assert {path.parent.parent.name for path in manager.data.test.images} == {"s3", "s7", "s10"}


def test_domainnet_pools_its_domains_for_class_increments(disk, tmp_path):
    values = tiny_values(tmp_path, dataset="domainnet", data_root=str(disk("domainnet")), increment=69)
    manager = DataManager(config_from(values, source="test"), image_size=16)
    assert manager.task_sizes == [69] * 5
    assert len(manager[0].train) == 69 * 6


def test_other_generators_than_the_hard_track_are_left_out(disk):
    data = load("cddb", str(disk("cddb")))
    assert not any("stylegan" in str(path) for path in data.train.images)
    assert np.bincount(data.train.labels).tolist() == [6 * trees.TRAIN] * 2


@pytest.mark.parametrize("name", ["imagenetr", "cub official", "cars whole", "tinyimagenet", "domainnet"])
def test_a_read_only_folder_works_and_stays_as_it_is(name, disk, tmp_path):
    root = disk(name)
    before = snapshot(root)
    modes = {path: path.stat().st_mode for path in (root, *(p for p in root.rglob("*") if p.is_dir()))}
    for path in modes:
        path.chmod(0o555)
    try:
        options = Options(cache=tmp_path / "cache")
        load(trees.LAYOUTS[name][0], str(root), options)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert snapshot(root) == before


def test_data_root_may_be_the_folder_itself_in_any_case(tmp_path):
    trees.split_folders(tmp_path / "ImageNet-R", trees.wnids(200), train="Train", test="TEST")
    for root in (tmp_path, tmp_path / "ImageNet-R"):
        assert len(load("imagenetr", str(root)).train) == 600
    assert len(load("imagenetr", f" {tmp_path} ").train) == 600  # blanks pasted along


def test_imagenet100_chooses_from_the_whole_by_seed_or_by_list(disk, tmp_path):
    root = disk("imagenet1000")
    data = load("imagenet100", str(root))
    order = np.random.RandomState(1993).permutation(1000)[:100]
    assert list(data.class_names) == sorted(trees.wnids(1000)[i] for i in order)
    assert data.variant.count("first 100 of seed 1993, classes ") == 1
    chosen = trees.wnids(1000)[:100]
    (tmp_path / "imagenet100.txt").write_text("# a comment\n" + "\n".join(chosen[::-1]) + "\n")
    listed = load("imagenet100", str(root), Options(split=f"list:{tmp_path / 'imagenet100.txt'}"))
    assert list(listed.class_names) == chosen
    assert listed.variant != data.variant


def test_a_source_of_ones_own_reads_a_folder(tmp_path):
    trees.split_folders(tmp_path / "birds", ["b", "a"])
    data = load_folder(tmp_path / "birds")
    assert data.class_names == ("a", "b") and (len(data.train), len(data.test)) == (6, 4)
