"""Optimal transport between old and new classes: COIL's two classifiers made of each other.

A class's prototype is the mean of its normalised features, normalised. With Q the distances of prototypes (p-norm) and
P the entropic transport plan between the classes, each of equal mass on its side:

    forward      V = n P^T normalize(W)           rows of the m new classes, out of those of the n old ones
    backward     U = n P^T normalize(W_new) c     rows of the n old classes, out of those of the m new ones

The reference gives one side 1/n a class whatever the number of classes, so that the masses of the sides differ unless
n = m and its iteration cannot converge: it runs for all of its rounds, and beyond n/m of about 2 its scaling vectors
leave float64. The last update fixes the first side, so a constant on the second one cancels: with equal masses the plan
is the same, and found in a few dozen rounds.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.errors import UserError

PRECISION = 1e-12  # of the plan's sums, where the iteration stops
ROUNDS = 100_000


def prototypes(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N, D), (N,) -> (C, D) float64."""
    vectors = F.normalize(features.double(), dim=1)
    sums = vectors.new_zeros(classes, vectors.shape[1]).index_add_(0, labels, vectors)
    return F.normalize(sums, dim=1)


def forward_rows(
    old: Tensor, new: Tensor, weight: Tensor, regulariser: float, norm: float
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Prototypes (n, D), (m, D), rows of the old classes (n, D) -> (gamma V (m, D), gamma, plan (n, m)).

    gamma = mean |W_c| / mean |V_j| gives the new rows the old ones' length.
    """
    transport = plan(torch.cdist(old, new, p=norm), len(old), regulariser)
    rows = len(old) * _moved(transport, weight)
    gamma = weight.norm(dim=1).mean() / rows.norm(dim=1).mean()
    return gamma * rows, gamma, transport


def backward_rows(
    old: Tensor, new: Tensor, weight: Tensor, regulariser: float, norm: float
) -> tuple[Tensor, np.ndarray]:
    """Prototypes (n, D), (m, D), rows of the new classes (m, D) -> (U (n, D), plan (m, n))."""
    transport = plan(torch.cdist(new, old, p=norm) + 1e-8, len(old), regulariser)
    return len(old) * _moved(transport, weight), transport


def plan(cost: Tensor, old: int, regulariser: float) -> np.ndarray:
    """cost (r, c) -> plan (r, c), each row of mass 1 / old, the columns equal."""
    try:
        import ot
    except ImportError:
        raise UserError("COIL needs the package POT for its transport: pip install POT") from None
    rows, columns = cost.shape
    here, there = np.full(rows, 1 / old), np.full(columns, rows / (old * columns))
    return ot.sinkhorn(here, there, cost.cpu().numpy(), regulariser, stopThr=PRECISION, numItermax=ROUNDS)


def _moved(transport: np.ndarray, weight: Tensor) -> Tensor:
    """plan (r, c), rows (r, D) -> (c, D)."""
    return torch.from_numpy(transport.T).to(weight) @ F.normalize(weight, dim=1)
