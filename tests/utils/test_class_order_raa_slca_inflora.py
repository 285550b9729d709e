"""Class order, label map and task sizes of the reference implementations, exactly."""

import re

import numpy as np
import pytest

from tests.conftest import reference
from utils.data_manager import class_order, label_map, split_classes

pytestmark = pytest.mark.parity


def numbers(pattern: str, keys):
    """[(key, numbers in it), ...] of the keys that match."""
    found = [(key, re.fullmatch(pattern, key)) for key in keys]
    matched = [(key, tuple(map(int, match.groups()))) for key, match in found if match]
    assert matched, f"no key like {pattern}"
    return matched


def test_slca():
    arrays = reference("slca/class_order")
    for seed, classes in arrays["pairs"]:
        order = class_order(int(classes), int(seed), shuffle=True)
        np.testing.assert_array_equal(order, arrays[f"order/{seed}/{classes}"])
        np.testing.assert_array_equal(label_map(order), arrays[f"mapped/{seed}/{classes}"])
    for key, sizes in numbers(r"increments/(\d+)/(\d+)/(\d+)", arrays):
        assert split_classes(*sizes) == arrays[key].tolist()


def test_raa():
    arrays = reference("raa/class_order")
    for key, (classes, seed) in numbers(r"order_n(\d+)_s(\d+)", arrays):
        order = class_order(classes, seed, shuffle=True)
        np.testing.assert_array_equal(order, arrays[key])
        if f"mapped_test_n{classes}_s{seed}" in arrays:
            np.testing.assert_array_equal(label_map(order), arrays[f"mapped_test_n{classes}_s{seed}"])
    for classes, init_cls, increment, *sizes in arrays["splits"]:
        assert split_classes(classes, init_cls, increment) == [size for size in sizes if size >= 0]


def test_inflora():
    arrays = reference("inflora/class_order")
    for key, (classes, seed) in numbers(r"order_n(\d+)_seed(\d+)", arrays):
        order = class_order(classes, seed, shuffle=True)
        np.testing.assert_array_equal(order, arrays[key])
        np.testing.assert_array_equal(label_map(order), arrays[f"mapped_targets_n{classes}_seed{seed}"])
    for key, sizes in numbers(r"increments_n(\d+)_(\d+)_(\d+)", arrays):
        assert split_classes(*sizes) == arrays[key].tolist()
