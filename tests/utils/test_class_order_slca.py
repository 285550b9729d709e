"""Class orders, label maps and task sizes of SLCA's reference."""

import pytest

from tests.conftest import reference
from utils.data_manager import class_order, label_map, split_classes


@pytest.mark.parity
def test_orders_and_maps():
    arrays = reference("slca/class_order")
    for seed, count in arrays["pairs"].tolist():
        order = class_order(count, seed, shuffle=True)
        assert order.tolist() == arrays[f"order/{seed}/{count}"].tolist()
        assert label_map(order).tolist() == arrays[f"mapped/{seed}/{count}"].tolist()


@pytest.mark.parity
def test_task_sizes():
    arrays = reference("slca/class_order")
    protocols = [key for key in arrays if key.startswith("increments/")]
    assert protocols
    for key in protocols:
        count, first, increment = map(int, key.split("/")[1:])
        assert split_classes(count, first, increment) == arrays[key].tolist()
