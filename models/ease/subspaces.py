"""Prototypes in the subspaces of several adapters, and those that cannot be measured (EASE, arXiv 2403.12030).

Subspace j holds the features f_j behind the adapters of task j; with `plain` one more stands in front, that of the ViT
without adapters. W (C, J, D): row c, block j is the mean of f_j over class c. Classes of task i can be measured in the
blocks up to i and in the plain one; later blocks are written from classes that are known in both:

    s_ab = softmax_b cos(W[a, i], W[b, i]),   a in task i, b in tasks j .. t          W[a, j] = sum_b s_ab W[b, j]

Scores, c in task i:  z_c = sum_j m_j cos(f_j, W[c, j]),  m_i = 1, plain: beta, others: alpha / t, t the current task.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convs.growing import Growing
from models.parts.prototypes import cosines

Synthesis = Literal["all", "newest", "none"]


class SubspacePrototypes(Growing):
    """W (C, J, D), grown by a task's rows and a subspace at a time."""

    matrix: Tensor

    def __init__(self, feature_dim: int):
        super().__init__()
        self.register_buffer("matrix", torch.zeros(0, 0, feature_dim))

    def add(self, measured: Tensor, sizes: Sequence[int], plain: bool, which: Synthesis) -> None:
        """measured (c, J, D): a new task's classes in all subspaces; sizes: classes of every task, this one too."""
        old = F.pad(self.matrix, (0, 0, 0, measured.shape[1] - self.matrix.shape[1]))
        self.matrix = torch.cat([old, measured.to(old)])
        synthesise(self.matrix, sizes, plain, which)


def task_rows(sizes: Sequence[int]) -> list[slice]:
    """The rows of each task's classes."""
    return [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


def synthesise(matrix: Tensor, sizes: Sequence[int], plain: bool, which: Synthesis) -> None:
    """Write the blocks of W (C, J, D) that cannot be measured, in place. sizes: classes of every task so far.

    which: "all" writes every one of them anew, "newest" the last task's alone, from its classes alone.
    """
    if which == "none":
        return
    rows, last = task_rows(sizes), len(sizes) - 1
    for i, own in enumerate(rows):
        for j in range(i + 1 if which == "all" else last, last + 1):
            if j > i:
                later = slice(rows[j].start, rows[last].stop)
                similar = cosines(matrix[own, i + plain], matrix[later, i + plain]).softmax(dim=1)
                matrix[own, j + plain] = similar @ matrix[later, j + plain]


def subspace_scores(features: Tensor, matrix: Tensor, sizes: Sequence[int], alpha: float, beta: float | None) -> Tensor:
    """(B, C) of features (B, J, D) and W (C, J, D), never in the lower precision of autocast. beta: of the plain block;
    None where there is none."""
    plain, last = beta is not None, len(sizes) - 1
    weights = matrix.new_full((len(sizes), matrix.shape[1]), alpha / max(1, last))  # (T, J)
    weights[:, plain:].fill_diagonal_(1.0)
    if beta is not None:
        weights[:, 0] = beta
    counts = torch.tensor(sizes, device=matrix.device)
    weighted = F.normalize(matrix, dim=2) * weights.repeat_interleave(counts, dim=0, output_size=len(matrix))[..., None]
    with torch.autocast(matrix.device.type, enabled=False):
        return F.normalize(features, dim=2).flatten(1) @ weighted.flatten(1).mT


def concatenated_scores(features: Tensor, matrix: Tensor) -> Tensor:
    """One cosine over all blocks: features (B, J, D), W (C, J, D) -> (B, C)."""
    return cosines(features.flatten(1), matrix.flatten(1))
