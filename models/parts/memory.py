"""Stores of images of past tasks. Images keep the type in which they come: bytes stay bytes, a quarter of floats."""

from typing import Any

import torch
from torch import Tensor


class ImageMemory:
    """At most `capacity` images with their labels; a subclass decides which, by what it writes to which slot.

    Random numbers come from a generator of its own, which is part of the state, so that every process that is shown
    the same images keeps the same ones, and a resumed run goes on with the same draws.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity = capacity
        self.images = torch.empty(0)  # (n, 3, s, s)
        self.labels = torch.empty(0, dtype=torch.int64)  # (n,)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """min(count, n) different images, all equally likely, and their labels."""
        chosen = self._choice(min(count, len(self))).to(self.labels.device, non_blocking=True)
        return self.images[chosen], self.labels[chosen]

    def write(self, slots: list[int], images: Tensor, labels: Tensor) -> None:
        """Image i (B, 3, s, s) to slots[i], a slot of at most n + B; the last of equals stays, -1 drops it."""
        self.images, self.labels = written(self.images, slots, images), written(self.labels, slots, labels)

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "labels": self.labels, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images, self.labels = state["images"], state["labels"]
        self.generator.set_state(state["generator"])

    def _choice(self, count: int) -> Tensor:
        """(count,) different positions."""
        return torch.randperm(len(self), generator=self.generator)[:count]


def written(store: Tensor, slots: list[int], values: Tensor) -> Tensor:
    """The store (n, ...) with value i of (B, ...) in slots[i], longer where a slot lies behind its end."""
    if not len(store):
        store = values.new_empty(0, *values.shape[1:])
    store = store.to(values.device)
    if (missing := max(slots) + 1 - len(store)) > 0:
        store = torch.cat([store, store.new_empty(missing, *values.shape[1:])])
    last = {slot: row for row, slot in enumerate(slots) if slot >= 0}
    if last:
        places = torch.tensor([list(last.keys()), list(last.values())])
        at, rows = places.to(values.device, non_blocking=True)
        store[at] = values[rows]
    return store


class ReservoirMemory(ImageMemory):
    """A uniform sample of everything ever inserted (Vitter, 1985, algorithm R).

    Item number n, counted from 0 over the whole run: slot n while there is room; else j uniform in 0..n, and slot j if
    j < capacity.
    """

    def __init__(self, capacity: int, seed: int):
        super().__init__(capacity, seed)
        self.seen = 0

    def insert(self, images: Tensor, labels: Tensor) -> None:
        """(B, 3, s, s), (B,): one after another, in this order."""
        self.write([self._slot() for _ in range(len(labels))], images, labels)

    def _slot(self) -> int:
        number, self.seen = self.seen, self.seen + 1
        slot = number if number < self.capacity else self._draw(number)
        return slot if slot < self.capacity else -1

    def _draw(self, number: int) -> int:
        """Uniform in 0..number."""
        return int(torch.randint(number + 1, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.seen = state["seen"]
