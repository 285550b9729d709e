"""The reservoir: every image equally likely to stay, the type of what is inserted kept, draws repeatable."""

import numpy as np
import torch
from scipy.stats import chi2

from models.parts.memory import ReservoirMemory


def numbered(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that hold their number."""
    labels = torch.arange(first, first + count)
    return labels.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8).contiguous(), labels


def test_every_item_stays_with_the_same_probability():
    counts, runs, items, capacity = np.zeros(30), 2000, 30, 6
    for seed in range(runs):
        memory = ReservoirMemory(capacity, seed)
        for first in range(0, items, 5):
            memory.insert(*numbered(first, 5))
        counts[memory.labels.numpy()] += 1
    expected = runs * capacity / items
    assert counts.sum() == runs * capacity
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, items - 1)


def test_draws_are_different_images_with_their_labels():
    memory = ReservoirMemory(8, 0)
    memory.insert(*numbered(0, 5))
    assert len(memory) == 5 and memory.images.dtype == torch.uint8
    images, labels = memory.sample(10)
    assert sorted(labels.tolist()) == [0, 1, 2, 3, 4]
    assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_a_restored_memory_goes_on_alike():
    one, other = ReservoirMemory(4, 0), ReservoirMemory(4, 9)
    one.insert(*numbered(0, 7))
    other.load_state_dict(one.state_dict())
    for memory in (one, other):
        memory.insert(*numbered(7, 20))
    assert torch.equal(one.images, other.images) and one.seen == other.seen == 27
    assert torch.equal(one.sample(3)[1], other.sample(3)[1])


def test_two_items_for_one_slot_leave_the_later_one():
    memory = ReservoirMemory(2, 0)
    memory.insert(*numbered(0, 2))
    memory.write([1, 1, -1], *numbered(10, 3))
    assert memory.labels.tolist() == [0, 11]
