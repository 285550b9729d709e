"""Semantic shift compensation: old class means follow what a task has done to the features (SSIAT, CVPR 2024, RAA).

    w_ci = exp(-||e_i - mu_c||^2 / (2 sigma^2)) + 1e-5        mu_c += sum_i w_ci (e'_i - e_i) / sum_i w_ci

e_i, e'_i: features of the task's image i under the network before and after the task (SSIAT, arXiv 2403.19979, section
3.4; after Yu et al., 2020, "Semantic drift compensation"). C means, N images, D width.
"""

import torch
from torch import Tensor

from convs.growing import Growing

FLOOR = 1e-5  # of a weight: means far from every image drift with the mean of the images
ROWS = 1024  # images that are in float64 at a time


def mean_shift(means: Tensor, before: Tensor, after: Tensor, sigma: float) -> Tensor:
    """(C, D): how far each of means (C, D) moves, by the features (N, D) of the same images before and after the task.

    In the type of the means, float64, block by block of images: products of the distances and of the weights with the
    differences, in memory that does not grow with N; the form that subtracts every pair takes C N D.
    """
    moved, total = torch.zeros_like(means), means.new_zeros(len(means), 1)
    for old, new in zip(before.split(ROWS), after.split(ROWS), strict=True):
        old = old.to(means.dtype)
        squared = means.square().sum(dim=1, keepdim=True) + old.square().sum(dim=1) - 2 * means @ old.T  # (C, rows)
        weights = squared.div_(-2 * sigma**2).clamp_(max=0).exp_().add_(FLOOR)
        moved += weights @ (new.to(means.dtype) - old)
        total += weights.sum(dim=1, keepdim=True)
    return moved / total


class FeaturesBefore(Growing):
    """The features of the task's images before the task, from `before_task` to `after_task`, checkpoints between them
    included."""

    rows: Tensor  # (N, D)

    def __init__(self, feature_dim: int):
        super().__init__()
        self.declare("rows", feature_dim)

    def keep(self, features: Tensor) -> None:
        self.rows = features.to(self.rows)

    def forget(self) -> None:
        self.rows = self.rows[:0].clone()

    def __len__(self) -> int:
        return len(self.rows)
