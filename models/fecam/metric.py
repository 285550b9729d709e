"""A Mahalanobis distance of its own for each class (FeCAM, arXiv 2309.14062).

S: covariance of a class's features (D, D), v: mean of its diagonal, w: mean of its other entries that are not 0.

    S' = S + a1 v I + a2 w (1 1^T - I)        R_ij = S'_ij / sqrt(S'_ii S'_jj)        d(u) = (u - mu)^T R^+ (u - mu)

PILOT's form takes another R, the correlation between the rows of S' = S + 100 I, whose rank is at most D - 1.

A class is stored as V with V^T V = R^+: the inverse of R's Cholesky factor, or roots of the pseudo-inverse. Distances
of a batch to many classes are then one product, d = ||V u - V mu||^2; nothing is inverted in an evaluation, and no
matrix between pairs of images is made.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from convs.growing import Growing
from data.stream import Task
from models.parts.gaussians import by_label
from models.parts.peaks import largest
from utils.errors import UserError

logger = logging.getLogger(__name__)

Correlation = Literal["variance", "rows"]
ROOM = 1 << 24  # numbers of the product of a batch with some classes


class ClassMetrics(Growing):
    """Whitening V (D, D) and centre V mu (D,) of each class, in the order in which they were added."""

    whitenings: Tensor  # (C, D, D)
    centres: Tensor  # (C, D)

    def __init__(self, feature_dim: int):
        super().__init__()
        self.declare("whitenings", feature_dim, feature_dim)
        self.declare("centres", feature_dim)

    def __len__(self) -> int:
        return len(self.centres)

    def add(self, correlations: Iterable[Tensor], means: Tensor, full_rank: bool) -> None:
        """Classes by their R (D, D), positive definite if full_rank, read one at a time, and mu (c, D); computed in
        float64, of which one class is held."""
        roots, whitenings, centres = whitening if full_rank else pseudo_whitening, [], []
        for correlation, mean in zip(correlations, means.double(), strict=True):
            found = roots(correlation.double())
            whitenings.append(found.to(self.whitenings.dtype))
            centres.append((found[None] @ mean[None, :, None])[0, :, 0])
        self.append(whitenings=torch.stack(whitenings), centres=torch.stack(centres))

    def distances(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C), never in the lower precision of autocast: small differences of large numbers."""
        features = features.to(self.centres.dtype)
        some = max(1, ROOM // features.numel())
        pairs = zip(self.whitenings.split(some), self.centres.split(some), strict=True)
        with torch.autocast(features.device.type, enabled=False):
            return torch.cat([_squared(features, *pair) for pair in pairs], dim=1)

    def expected_bytes(self, tasks: Sequence[Task]) -> int:
        return self.planned_bytes(sum(len(np.unique(task.train.labels)) for task in tasks))

    def passing_bytes(self, tasks: Sequence[Task]) -> dict[str, int]:
        """The features of a task, as they come and joined; its covariances in float64; the metrics that are there
        already and those of the task, before they are one tensor."""
        width, (images, of_class) = self.centres.shape[1], largest(tasks)
        classes = max(len(np.unique(task.train.labels)) for task in tasks)
        each = 8 * (classes + 3) * width**2 + 8 * (images + 2 * of_class) * width
        return {"statistics": each + self.expected_bytes(tasks)}

    def planned_bytes(self, classes: int) -> int:
        width = self.centres.shape[1]
        return 4 * classes * width * (width + 1)


def _squared(features: Tensor, whitenings: Tensor, centres: Tensor) -> Tensor:
    """(B, D), (c, D, D), (c, D) -> (B, c)."""
    moved = torch.addmm(centres.flatten(), features, whitenings.flatten(0, 1).mT, beta=-1)
    return moved.unflatten(1, centres.shape).square().sum(dim=2)


def moments(features: Tensor, labels: Tensor) -> tuple[list[int], Tensor, Tensor]:
    """(classes that occur, means (c, D), covariances (c, D, D)) in float64; a class with one image has covariance 0."""
    classes, means, covs = [], [], []
    for label, rows in by_label(features, labels):
        rows = rows.double()
        centred = rows - rows.mean(dim=0)
        if len(rows) == 1:
            logger.warning("class %d has one image: its distance is that of the nearest mean", label)
        classes.append(label)
        means.append(rows.mean(dim=0))
        covs.append(centred.mT @ centred / max(1, len(rows) - 1))
    return classes, torch.stack(means), torch.stack(covs)


def shrunk(cov: Tensor, diagonal: float, rest: float) -> Tensor:
    """S' of (D, D): a1 = diagonal, a2 = rest."""
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    off = cov * (1 - eye)
    w = off.sum() / (off != 0).sum().clamp(min=1)
    return cov + diagonal * cov.diagonal().mean() * eye + rest * w * (1 - eye)


def by_variance(cov: Tensor) -> Tensor:
    """R of (D, D): entries over the roots of both variances; a channel without variance stands alone."""
    deviations = cov.diagonal().sqrt()
    fixed = deviations == 0
    unit = cov / torch.outer(deviations, deviations).masked_fill(fixed[:, None] | fixed, 1.0)
    return unit + torch.diag(fixed.to(cov.dtype))


def whitening(correlation: Tensor) -> Tensor:
    """K^-1 for R = K K^T, (D, D) lower triangular.

    Raises UserError when R is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if failed:
        raise UserError(
            "FeCAM: the correlation matrix of a class is not positive definite: set shrink to [a1, a2] with a2 <= a1"
        )
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


def pseudo_whitening(correlation: Tensor) -> Tensor:
    """diag(r^-1/2) E^T for R = E diag(r) E^T, without the directions in which R is 0 up to rounding: (D, D)."""
    values, vectors = torch.linalg.eigh(correlation)
    cut = values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(values > cut, values.clamp(min=cut).rsqrt(), torch.zeros_like(values))
    return roots[:, None] * vectors.mT
