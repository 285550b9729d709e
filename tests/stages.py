"""Stored stages of a reference implementation, fed to the real learner through the real loop: its images in their
order, its random numbers, its starting weights."""

import numpy as np
import torch

import data.loading
from data.loading import Batch
from data.stream import Task
from utils.runtime import Runtime


class Given:
    """Stands for one half of a task's images: given tensors, not pixels, the same under either transform.

    images (N, 3 or 6, s, s) or with further leading dimensions, which are flattened; labels likewise.
    """

    cheap, on_device, image_bytes = True, False, 0  # what the loader asks of a view

    def __init__(self, images, labels):
        images = images if isinstance(images, torch.Tensor) else torch.from_numpy(images.astype(np.float64))
        self.images = images.flatten(0, -4)
        self.labels = np.asarray(labels).reshape(-1).astype(np.int64)
        self.rows = np.arange(len(self.labels))
        self.split = self  # what stored frozen values are kept by

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, batch: Batch):
        return self.images[batch.rows], torch.from_numpy(self.labels[batch.rows])

    def view(self, mode: str, beside: str | None = None) -> "Given":
        return self


class ExactRuntime(Runtime):
    """Hands images through in the type in which they are given."""

    def to_device(self, images, targets):
        return images, targets


def stored_task(index: int, sizes, train, test=None) -> Task:
    """Task `index` of a class-incremental stream of tasks of these sizes, over given images."""
    known, total = sum(sizes[:index]), sum(sizes[: index + 1])
    return Task(
        index=index, num_tasks=len(sizes), num_classes=sum(sizes), sizes=tuple(sizes), known_classes=known,
        total_classes=total, classes=range(known, total), train=train, test=train if test is None else test,
    )  # fmt: skip


def in_stored_order(monkeypatch) -> None:
    """Every epoch goes over the images in their order."""

    def batches(count, batch_size, seed, epoch, rank=0, world=1, start=0, drop_last=False, joined=False):
        first = range(start * batch_size, count, batch_size)
        return [Batch(np.arange(begin, min(begin + batch_size, count))) for begin in first]

    monkeypatch.setattr(data.loading, "training_batches", batches)
