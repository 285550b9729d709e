"""Class means of features, accumulated over a stream."""

from collections.abc import Callable

import torch
from torch import Tensor

from convs.growing import Growing
from data.loading import View, for_each_batch
from utils.runtime import Runtime


class ClassMeans(Growing):
    """Running sums (C, D) and counts (C,) in float64, so a class that comes back (another domain) goes on."""

    sums: Tensor
    counts: Tensor

    def __init__(self, feature_dim: int):
        super().__init__()
        self.declare("sums", feature_dim, dtype=torch.float64)
        self.declare("counts", dtype=torch.float64)

    def grow(self, total_classes: int) -> None:
        new = total_classes - len(self.counts)
        self.sums = torch.cat([self.sums, self.sums.new_zeros(new, self.sums.shape[1])])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(new)])

    def update(self, features: Callable[[Tensor], Tensor], view: View, runtime: Runtime, batch_size: int) -> None:
        """Add the images of a view: one pass, each image once."""
        sums, counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)

        def add(images: Tensor, targets: Tensor) -> None:
            sums.index_add_(0, targets, features(images).to(sums.dtype))
            counts.add_(torch.bincount(targets, minlength=len(counts)))

        with runtime.stopwatch("statistics"):
            for_each_batch(view, add, runtime, batch_size)
        self.sums += runtime.reduce_sum(sums)
        self.counts += runtime.reduce_sum(counts)

    @property
    def empty(self) -> Tensor:
        """(C,): classes of which no image has been seen."""
        return self.counts == 0

    @property
    def means(self) -> Tensor:
        """(C, D) float32; zero for a class without images."""
        return (self.sums / self.counts.clamp(min=1)[:, None]).float()
