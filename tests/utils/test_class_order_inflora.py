"""Class orders, label maps and task sizes of InfLoRA's reference."""

import re

import pytest

from tests.conftest import reference
from utils.data_manager import class_order, label_map, split_classes


@pytest.mark.parity
def test_orders_maps_and_sizes():  # README: exact
    arrays = reference("inflora/class_order")
    seen = set()
    for key, expected in arrays.items():
        kind, numbers = key.split("_n")[0], [int(n) for n in re.findall(r"\d+", key.split("_n")[1])]
        seen.add(kind)
        if kind == "increments":
            assert split_classes(*numbers) == expected.tolist()
        else:
            order = class_order(*numbers, shuffle=True)
            assert (order if kind == "order" else label_map(order)).tolist() == expected.tolist()
    assert seen == {"order", "mapped_targets", "increments"}
