"""MOS (arXiv 2412.09441): which task's adapter an image needs, found by the predictions themselves; the regulariser.

    first = cos(f_0, w)         over the prototypes, in the subspace of the first task's adapter
    i = task of argmax(first);  then up to 4 times:  z = head(f_i),  i' = task of argmax(z);  stop at i' = i
    score = z,  or with an ensemble  softmax(z) + softmax((t + 1) first)

All images take their steps together; an image that has settled repeats its answer, so none waits for another.

    R = CE(M M^T / 0.8, (0, 1, 2, ...)),   M = [class means of old classes ; features of the batch]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PREDICTIONS = 4  # made at most for an image
TEMPERATURE = 0.8  # of the regulariser; a constant in the reference


def refined(features: Tensor, first: Tensor, weight: Tensor, bias: Tensor, owner: Tensor) -> Tensor:
    """Logits (B, C) of the prediction at which each image settles.

    features (B, T, D) of all adapters, first (B, C) scores of the prototypes, head weight (C, D) and bias (C,), owner
    (C,): the task of a class.
    """
    rows, current = torch.arange(len(features), device=features.device), owner[first.argmax(dim=1)]  # (B,)
    for _ in range(PREDICTIONS):  # the last one counts wherever it leads to; a settled image repeats its answer
        logits = F.linear(features[rows, current], weight, bias)
        current = owner[logits.argmax(dim=1)]
    return logits


def ensemble(logits: Tensor, first: Tensor, tasks: int) -> Tensor:
    """softmax(logits) + softmax(tasks * first), (B, C) each."""
    return logits.softmax(dim=1) + (tasks * first).softmax(dim=1)


def self_match(features: Tensor, means: Tensor) -> Tensor:
    """R of features (B, D) and old class means (C, D), which get no gradient -> ()."""
    rows = torch.cat([means.to(features.dtype), features])
    return F.cross_entropy(rows @ rows.mT / TEMPERATURE, torch.arange(len(rows), device=rows.device))
