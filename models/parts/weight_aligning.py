"""Weight aligning (Zhao et al., 2020, "Maintaining discrimination and fairness in class incremental learning").

A head trained on many new images and few old ones has longer rows for the new classes; they get the old ones' length:

    w_c <- gamma w_c for c >= K,    gamma = mean_{c < K} |w_c| / mean_{c >= K} |w_c|
"""

import torch
from torch import Tensor


@torch.no_grad()
def align_new_rows(weight: Tensor, known_classes: int, factor: float = 1.0) -> Tensor:
    """Multiply the rows of weight (C, D) from `known_classes` on by gamma * factor, in place; returns that number."""
    lengths = weight.norm(dim=1)
    gamma = factor * lengths[:known_classes].mean() / lengths[known_classes:].mean()
    weight[known_classes:] *= gamma
    return gamma
