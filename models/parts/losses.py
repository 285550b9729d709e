"""Losses that several learners share."""

import torch.nn.functional as F
from torch import Tensor


def slice_cross_entropy(logits: Tensor, targets: Tensor, classes: range) -> Tensor:
    """Cross-entropy over the columns of `classes` alone: CE(z[:, K:], y - K). logits (B, C), targets (B,) -> ()."""
    return F.cross_entropy(logits[:, classes.start : classes.stop], targets - classes.start)
