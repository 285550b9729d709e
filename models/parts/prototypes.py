"""Class means of features, accumulated over a stream."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from convs.growing import Growing
from data.loading import View, for_each_batch
from models.parts.drift import StoredMeans
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
        share = ClassMeans(self.sums.shape[1]).to(self.sums.device)
        share.grow(len(self.counts))
        with runtime.stopwatch("statistics"):
            for_each_batch(view, lambda images, targets: share.add(features(images), targets), runtime, batch_size)
        self.sums += runtime.reduce_sum(share.sums)
        self.counts += runtime.reduce_sum(share.counts)

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add rows (n, D) of classes that there is room for, labels (n,)."""
        self.sums.index_add_(0, labels, features.to(self.sums.dtype))
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def stored_means(self, names: tuple[str, ...]) -> StoredMeans:
        labels = torch.arange(len(self.counts), device=self.counts.device)
        return StoredMeans(self.exact_means, labels, known=~self.empty, names=names)

    @property
    def empty(self) -> Tensor:
        """(C,): classes of which no image has been seen."""
        return self.counts == 0

    @property
    def exact_means(self) -> Tensor:
        """(C, D) float64; zero for a class without images."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    @property
    def means(self) -> Tensor:
        """(C, D) float32; zero for a class without images."""
        return self.exact_means.float()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m)."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT
