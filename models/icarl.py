"""iCaRL (Rebuffi et al., 2017, "Incremental classifier and representation learning").

Exemplars hold the old classes' images, the previous network s their answers; classes are told by the nearest mean of
exemplars. z (B, C), K known classes, T a temperature:

    "ce"    L = CE(z, y) + KD(z[:, :K], s; T)
    "bce"   L = mean_b sum_c BCE(sigmoid(z_bc), q_bc), q = sigmoid(s) for c < K and one-hot beyond: the paper's, instead

    KD(z, s; T) = -mean_b sum_c softmax(s / T) log softmax(z / T)
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import LEARNERS
from models.parts.exemplars import RehearsalConfig
from models.parts.losses import soft_cross_entropy
from models.rehearsal import Inputs, TaughtRehearsal
from utils.config import Positive
from utils.keys import key, redefault


@LEARNERS.register("icarl")
class ICaRL(TaughtRehearsal):
    """Replay with distillation; predicts by the nearest class mean."""

    class Config(RehearsalConfig):
        loss: Literal["ce", "bce"] = key("ce", "CE + KD, or the binary form of the paper")
        temperature: Positive = key(2.0, "T of the distillation", only={"loss": "ce"})
        predict: Literal["logits", "nme"] = redefault(RehearsalConfig, "predict", "nme")

    example = {"exemplars": {"total": 12}}

    def loss(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        images, old = inputs
        logits = net(images)
        if self.config.loss == "bce":
            return binary_loss(logits, old, targets)
        loss = F.cross_entropy(logits, targets)
        if old is None:
            return loss
        return loss + soft_cross_entropy(logits[:, : old.shape[1]], old, self.config.temperature)


def binary_loss(logits: Tensor, old: Tensor | None, targets: Tensor) -> Tensor:
    """logits (B, C), teacher's logits (B, K) or none, targets (B,) -> (): summed over outputs, mean over images."""
    wanted = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    if old is not None:
        wanted = torch.cat([old.sigmoid().to(logits.dtype), wanted[:, old.shape[1] :]], dim=1)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(logits)
