"""Losses that several learners share."""

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Margin = Literal["cosface", "arcface", "sphereface"]


def slice_cross_entropy(logits: Tensor, targets: Tensor, classes: range) -> Tensor:
    """Cross-entropy over the columns of `classes` alone: CE(z[:, K:], y - K). logits (B, C), targets (B,) -> ()."""
    return F.cross_entropy(logits[:, classes.start : classes.stop], targets - classes.start)


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (Hinton et al., 2015).

    Logits (B, C), (B, C) -> ().
    """
    p, q = (student / temperature).log_softmax(dim=1), (teacher / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(p, q, log_target=True, reduction="batchmean")


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-mean_b sum_c q_bc log p_bc, q = softmax(teacher / T), p = softmax(student / T): the distillation of the classic
    learners. Its gradient is that of `distillation` / T^2. Logits (B, C), (B, C) -> ()."""
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))


def share_weighted_loss(logits: Tensor, old: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """(1 - l) CE(z, y) + l KD(z[:, :K], s; T), l = K / C the share of old classes: WA's and BiC's loss.

    logits z (B, C), the previous network's s (B, K), targets (B,) -> ().
    """
    known, total = old.shape[1], logits.shape[1]
    distilled = soft_cross_entropy(logits[:, :known], old, temperature)
    return (1 - known / total) * F.cross_entropy(logits, targets) + known / total * distilled


def symmetric_cross_entropy(logits: Tensor, targets: Tensor, ce: float, rce: float) -> Tensor:
    """ce * CE + rce * RCE (Wang et al., 2019, "Symmetric cross entropy"). logits (B, C), targets (B,) -> ().

    RCE = -mean sum_c p_c log q_c with the one-hot q clamped to 1e-4: log 1 = 0 leaves -log(1e-4) sum_{c != y} p_c.
    p is clamped to 1e-7, below which it has no gradient.
    """
    loss = ce * F.cross_entropy(logits, targets)
    if rce == 0:
        return loss
    wrong = logits.softmax(dim=1).clamp(min=1e-7).scatter(1, targets[:, None], 0.0)
    return loss - rce * math.log(1e-4) * wrong.sum(dim=1).mean()


def margin_cross_entropy(
    cosines: Tensor, targets: Tensor, scale: float, margin: float, kind: Margin = "cosface"
) -> Tensor:
    """CE(s z', y), where z' is z with the true class's cosine z_y = cos(theta) made smaller by a margin m.

    cosface     z_y - m              (Wang et al., 2018)
    arcface     cos(theta + m)       (Deng et al., 2019)
    sphereface  cos(m theta)         (Liu et al., 2017)

    cosines (B, C) in [-1, 1], targets (B,) -> (). Angles are taken of cosines clamped to 1 - 1e-7, where arccos still
    has a gradient.
    """
    if kind == "cosface":
        true = F.one_hot(targets, cosines.shape[1]).to(cosines.dtype)
        return F.cross_entropy(scale * (cosines - margin * true), targets)
    angle = cosines.gather(1, targets[:, None]).clamp(-1 + 1e-7, 1 - 1e-7).acos()
    moved = (angle + margin if kind == "arcface" else margin * angle).cos()
    return F.cross_entropy(scale * cosines.scatter(1, targets[:, None], moved), targets)
