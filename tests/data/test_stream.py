"""Class order, label map and task sizes of the reference implementations, exactly."""

import re

import numpy as np
import pytest
import torch

from data.loading import Batch, loss_weight, training_batches
from data.stream import DataManager, class_order, label_map, split_classes
from models.factory import config_from
from tests.conftest import build_tiny, reference, tiny_values, write_stream
from utils.errors import ConfigError


def manager(tmp_path, **keys) -> DataManager:
    return DataManager(config_from(tiny_values(tmp_path, **keys), "test"), image_size=16)


def test_natural_order_is_the_identity():
    assert class_order(5, seed=3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_label_map_is_the_position_in_the_order():
    order = np.array([2, 0, 1])
    assert label_map(order).tolist() == [order.tolist().index(c) for c in range(3)]


def test_the_last_task_takes_the_rest():
    assert split_classes(10, 4, 4) == [4, 4, 2]
    assert split_classes(10, 5, 5) == [5, 5]
    assert split_classes(10, 10, 3) == [10]


def test_tasks_partition_the_images_and_own_contiguous_labels(tmp_path):
    tasks = manager(tmp_path, task_sizes=[3, 1, 2], increment=None)
    assert [(t.known_classes, t.total_classes, t.classes) for t in tasks] == [
        (0, 3, range(3)), (3, 4, range(3, 4)), (4, 6, range(4, 6)),
    ]  # fmt: skip
    rows = np.concatenate([task.train.rows for task in tasks])
    assert sorted(rows) == list(range(len(tasks.data.train)))
    for task in tasks:
        assert set(task.train.labels) == set(task.test.labels) == set(task.classes)
    assert len(tasks[1].train_so_far) == len(tasks[0].train) + len(tasks[1].train)


def test_images_keep_their_class_through_the_remapping(tmp_path):
    tasks = manager(tmp_path, seed=5)
    for task in tasks:
        original = tasks.data.train.labels[task.train.rows]
        assert (tasks.class_order[task.train.labels] == original).all()


def test_domain_incremental_tasks_hold_all_classes(tmp_path):
    dataset = write_stream(tmp_path / "d.npz", classes=3, domains=2)
    tasks = manager(tmp_path, dataset=dataset, increment=None, shuffle=False)
    assert [(t.known_classes, t.total_classes, t.classes, t.domain) for t in tasks] == [
        (0, 3, range(3), "domain 0"), (3, 3, range(3), "domain 1"),
    ]  # fmt: skip
    assert not set(tasks[0].train.rows) & set(tasks[1].train.rows)
    assert len(tasks[1].train_so_far) == len(tasks.data.train)


def test_domains_come_in_the_order_of_the_config(tmp_path):
    keys = {"dataset": write_stream(tmp_path / "d.npz", domains=3), "increment": None, "shuffle": False}
    own = manager(tmp_path, **keys)
    order = ["domain 2", "domain 0", "domain 1"]
    ours = manager(tmp_path, **keys, domain_order=order)
    assert [task.domain for task in ours] == order
    for task, theirs in zip(ours, (own[2], own[0], own[1]), strict=True):
        assert task.train.rows.tolist() == theirs.train.rows.tolist()
        assert task.test.rows.tolist() == theirs.test.rows.tolist()


def test_all_domains_are_evaluated_when_asked(tmp_path):
    keys = {"dataset": write_stream(tmp_path / "d.npz", domains=3), "increment": None, "shuffle": False}
    for rule, expected in (("seen", [1, 2, 3]), ("all", [3, 3, 3])):
        tasks = manager(tmp_path, **keys, dil_eval=rule)
        assert [len(tasks.tested_after(task)) for task in tasks] == expected


def test_protocol_faults_are_reported_together(tmp_path):
    dataset = write_stream(tmp_path / "d.npz", domains=2)
    with pytest.raises(ConfigError) as error:
        manager(tmp_path, dataset=dataset, shuffle=True)
    assert len(error.value.faults) == 2


def test_batches_cover_an_epoch_once_in_an_order_of_their_own():
    epochs = [np.concatenate([b.rows for b in training_batches(10, 4, seed=1, epoch=e)]) for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0].tolist() != epochs[1].tolist()


def test_resumed_batches_are_the_rest_of_the_epoch():
    whole, rest = (training_batches(10, 4, seed=1, epoch=0, start=s) for s in (0, 2))
    assert [b.rows.tolist() for b in whole[2:]] == [b.rows.tolist() for b in rest]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one_process(world):
    """Shares add up to the batch, and weighted local means to the global mean, in the ragged last batch too."""
    count, size = 9, 4
    shares = [training_batches(count, size, seed=1, epoch=0, rank=r, world=world) for r in range(world)]
    values = np.random.RandomState(0).randn(count)
    for step, batch in enumerate(training_batches(count, size, seed=1, epoch=0)):
        weights = [loss_weight(len(batch.rows), r, world) for r in range(world)]
        local = [weights[r] * values[shares[r][step].rows].mean() for r in range(world)]
        assert np.mean(local) == pytest.approx(values[batch.rows].mean())
        counted = [row for r in range(world) if weights[r] > 0 for row in shares[r][step].rows]
        assert counted == batch.rows.tolist()


@pytest.mark.parametrize(("count", "size", "sizes"), [(9, 4, [4, 5]), (8, 4, [4, 4]), (1, 4, [1]), (10, 4, [4, 4, 2])])
def test_a_last_batch_of_one_joins_the_one_before_it(count, size, sizes):
    batches = training_batches(count, size, seed=1, epoch=0, joined=True)
    assert [len(batch.rows) for batch in batches] == sizes
    rows = np.concatenate([batch.rows for batch in batches])
    assert rows.tolist() == np.concatenate([b.rows for b in training_batches(count, size, seed=1, epoch=0)]).tolist()
    rest = training_batches(count, size, seed=1, epoch=0, joined=True, start=len(sizes) - 1)
    assert rest[0].rows.tolist() == batches[-1].rows.tolist()


def test_augmentation_depends_on_seed_and_image_alone(tmp_path):
    view = manager(tmp_path, train_transform="pad_crop")[0].train.view("train")
    together, _ = view.__getitems__(Batch(np.arange(6), seed=3))
    alone = torch.stack([view.__getitems__(Batch(np.array([i]), seed=3))[0][0] for i in range(6)])
    other, _ = view.__getitems__(Batch(np.arange(6), seed=4))
    assert torch.equal(together, alone) and not torch.equal(together, other)


def test_augmentation_leaves_the_run_s_own_random_stream_alone(tmp_path):
    view = manager(tmp_path, train_transform="pad_crop")[0].train.view("train")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    view.__getitems__(Batch(np.arange(6), seed=3))
    assert torch.equal(torch.rand(3), expected)


def test_plain_views_copy_what_the_transform_would_give(tmp_path):
    view = manager(tmp_path)[0].train.view("train")
    images, labels = view.__getitems__(Batch(np.array([2, 0])))
    assert view.cheap and images.dtype == torch.uint8 and images.shape == (2, 3, 16, 16)
    slow = torch.stack([view._transform(view._read(view._rows[i])) for i in (2, 0)])
    assert torch.equal(images, slow) and labels.tolist() == view.labels[[2, 0]].tolist()


def numbers(pattern: str, keys):
    """[(key, numbers in it), ...] of the keys that match."""
    found = [(key, re.fullmatch(pattern, key)) for key in keys]
    matched = [(key, tuple(map(int, match.groups()))) for key, match in found if match]
    assert matched, f"no key like {pattern}"
    return matched


@pytest.mark.parity
def test_slca():
    arrays = reference("slca/class_order")
    for seed, classes in arrays["pairs"]:
        order = class_order(int(classes), int(seed), shuffle=True)
        np.testing.assert_array_equal(order, arrays[f"order/{seed}/{classes}"])
        np.testing.assert_array_equal(label_map(order), arrays[f"mapped/{seed}/{classes}"])
    for key, sizes in numbers(r"increments/(\d+)/(\d+)/(\d+)", arrays):
        assert split_classes(*sizes) == arrays[key].tolist()


@pytest.mark.parity
def test_raa():
    arrays = reference("raa/class_order")
    for key, (classes, seed) in numbers(r"order_n(\d+)_s(\d+)", arrays):
        order = class_order(classes, seed, shuffle=True)
        np.testing.assert_array_equal(order, arrays[key])
        if f"mapped_test_n{classes}_s{seed}" in arrays:
            np.testing.assert_array_equal(label_map(order), arrays[f"mapped_test_n{classes}_s{seed}"])
    for classes, init_cls, increment, *sizes in arrays["splits"]:
        assert split_classes(classes, init_cls, increment) == [size for size in sizes if size >= 0]


@pytest.mark.parity
def test_inflora():
    arrays = reference("inflora/class_order")
    for key, (classes, seed) in numbers(r"order_n(\d+)_seed(\d+)", arrays):
        order = class_order(classes, seed, shuffle=True)
        np.testing.assert_array_equal(order, arrays[key])
        np.testing.assert_array_equal(label_map(order), arrays[f"mapped_targets_n{classes}_seed{seed}"])
    for key, sizes in numbers(r"increments_n(\d+)_(\d+)_(\d+)", arrays):
        assert split_classes(*sizes) == arrays[key].tolist()


@pytest.mark.parametrize(("name", "keys"), [("hcl", {}), ("finetune", {"validation": 0.3})])
def test_a_class_that_keeps_no_image_apart_is_an_error_before_the_run(name, keys, tmp_path):
    write_stream(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    rows = np.flatnonzero(arrays["y_train"] == 2)[1:]
    arrays |= {key: np.delete(arrays[key], rows, axis=0) for key in ("x_train", "y_train")}
    np.savez(tmp_path / "one.npz", **arrays)
    with pytest.raises(ConfigError, match="1 classes have one training image each, none to keep apart \\(2\\)"):
        build_tiny(tmp_path, name, dataset=f"npz:{tmp_path / 'one.npz'}", **keys)


@pytest.mark.parametrize(("half", "recipe"), [("train", "train_transform"), ("test", "test_transform")])
def test_a_recipe_is_tried_on_the_smallest_image(half, recipe, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for c in range(2):
            folder = tmp_path / "images" / part / f"class{c}"
            folder.mkdir(parents=True)
            for i, size in enumerate(((40, 40), (40, 9 if part == half and c else 40))):
                Image.new("RGB", size, (90 * c, 0, 0)).save(folder / f"{i}.png")
    keys = {"dataset": f"folder:{tmp_path / 'images'}", "increment": 1, recipe: "pad_crop"}
    with pytest.raises(ConfigError, match=f"{recipe}.*from the 40 x 9 of"):
        build_tiny(tmp_path, "finetune", **keys, image_size=32)
