"""Ridge regression on random features, accumulated over a stream (RanPAC, arXiv 2307.02251).

f (n, D) features, Y (n, C) one-hot labels, W (D, M) random and fixed, all sums and solves in float64:

    h = relu(f W)         G += h^T h  (M, M)         Q += h^T Y  (M, C)         W_o = (G + lambda I)^-1 Q

lambda = 10^k is chosen on the rows of the current task: fitted on the first 80 % of a permutation, the mean squared
error on the rest decides. All candidates come from one thin SVD of the fitted rows A (m, M), U S V^T = A:

    predictions of rows B = (B V) diag(s / (s^2 + lambda)) U^T Y

A QR of the longer side comes first, so that the SVD is of a square matrix of the shorter: tens of times faster than a
solve per candidate where n is below M. The kernel A A^T would be faster still and loses four digits at small lambda.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convs.growing import Growing
from data.stream import Task

FITTED = 0.8  # share of the rows that the candidates are fitted on
BLOCK = 1024  # rows that are expanded at a time while sums are taken


class RandomRidge(Growing):
    """W, G, Q and W_o. W is empty until `draw`; without it h = f. Q and W_o are kept as (C, M), one row a class."""

    projection: Tensor  # (D, M) float32: the numbers that were drawn
    gram: Tensor  # (M, M)
    sums: Tensor  # (C, M)
    counts: Tensor  # (C,)
    weight: Tensor  # (C, M)
    chosen: Tensor  # (T,): lambda of every `solve`

    def __init__(self, feature_dim: int, width: int = 0):
        """width: M, for what is said beforehand; `draw` decides."""
        super().__init__()
        self.planned = width or feature_dim
        self.register_buffer("projection", torch.empty(feature_dim, 0))
        for name, shape in {"gram": (0, 0), "sums": (0, 0), "weight": (0, 0), "counts": (0,), "chosen": (0,)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    def draw(self, width: int, generator: torch.Generator) -> None:
        """W (D, width) ~ N(0, 1); width 0: no projection. G and Q begin at 0."""
        like = self.projection
        self.projection = torch.randn(like.shape[0], width, generator=generator).to(like)
        size = width or like.shape[0]
        self.gram, self.sums = self.gram.new_zeros(size, size), self.sums.new_zeros(0, size)

    def expand(self, features: Tensor) -> Tensor:
        """h: (n, D) -> (n, M) float64."""
        features = features.double()
        return F.relu(features @ self.projection.double()) if self.projection.shape[1] else features

    def grow(self, total_classes: int) -> None:
        if (new := total_classes - len(self.counts)) > 0:
            self.append(sums=self.sums.new_zeros(new, self.sums.shape[1]), counts=self.counts.new_zeros(new))

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add rows (n, D) with labels (n,), of new classes or again of old ones."""
        for rows, classes in zip(features.split(BLOCK), labels.split(BLOCK), strict=True):
            h = self.expand(rows)
            self.gram.addmm_(h.mT, h)
            self.sums.index_add_(0, classes, h)
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def expected_bytes(self, tasks: Sequence[Task]) -> int:
        depth, classes = self.projection.shape[0], tasks[-1].total_classes
        drawn = 4 * depth * self.planned * (self.planned != depth)
        return drawn + 8 * self.planned**2 + 16 * classes * self.planned

    def passing_bytes(self, tasks: Sequence[Task]) -> dict[str, int]:
        """The features of a task, as they come and joined; then the larger of what the choice of lambda reads (h of the
        task in its order, the fitted rows, Q, U, V) and what a solve does (system and factor)."""
        rows, width = max(len(task.train) for task in tasks), self.planned
        fitted, short = int(FITTED * rows), min(int(FITTED * rows), width)
        choice = 8 * (rows * width + 2 * fitted * width + 3 * short**2)
        return {"statistics": 8 * rows * self.projection.shape[0] + max(choice, 16 * width**2)}

    @property
    def rounding(self) -> float:
        """What a lambda must exceed to be more than the rounding of G: eps of float64 times the trace, which bounds the
        largest eigenvalue. Where G is singular a smaller one leaves W_o to chance."""
        return torch.finfo(torch.float64).eps * self.gram.trace().item()

    def solve(self, ridge: float) -> None:
        """W_o with this lambda."""
        system = self.gram.clone()
        system.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:  # a tiny lambda that rounding of G has made negative
            self.weight = torch.linalg.solve(system, self.sums.mT).mT
        else:
            self.weight = torch.cholesky_solve(self.sums.mT, factor).mT
        self.append(chosen=self.chosen.new_tensor([ridge]))


def ridge_losses(h: Tensor, labels: Tensor, ridges: Sequence[float]) -> Tensor:
    """Held-out loss of every candidate, (R,): h (n, M) float64 in the order of the split, labels (n,).

    A mean over rows and over the columns of the classes that occur; columns of other classes are zero on both sides.
    """
    classes, columns = labels.unique(return_inverse=True)
    targets = F.one_hot(columns, len(classes)).to(h.dtype)  # (n, K)
    fitted = int(FITTED * len(h))
    predictions = ridge_predictions(h[:fitted], targets[:fitted], h[fitted:], ridges)  # (R, n - m, K)
    return (predictions - targets[fitted:]).square().mean(dim=(1, 2))


def ridge_predictions(fitted: Tensor, targets: Tensor, rows: Tensor, ridges: Sequence[float]) -> Tensor:
    """Regression of targets (m, K) on fitted (m, M) with every ridge, for rows (r, M) -> (R, r, K)."""
    wide = fitted.shape[0] < fitted.shape[1]
    q, r = torch.linalg.qr(fitted.mT if wide else fitted)
    u, s, vh = torch.linalg.svd(r.mT if wide else r)
    along, known = ((rows @ q) @ vh.mT, u.mT @ targets) if wide else (rows @ vh.mT, u.mT @ (q.mT @ targets))
    damped = s / (s.square() + s.new_tensor(ridges)[:, None])  # (R, k)
    return along @ (damped[..., None] * known)


def choose_ridge(losses: Tensor, ridges: Sequence[float], slack: float = 0.0) -> float:
    """The ridge of the smallest loss, the first of equals; with slack the largest whose loss is within 1 + slack."""
    if slack == 0:
        return ridges[int(losses.argmin())]
    return max(
        ridge for ridge, near in zip(ridges, (losses <= (1 + slack) * losses.min()).tolist(), strict=True) if near
    )
