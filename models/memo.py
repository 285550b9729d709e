"""MEMO (Zhou et al., 2023, "A model or 603 exemplars: towards memory-efficient class-incremental learning").

Early layers change little from task to task, late ones a lot: all tasks share the network g up to its last block, and
each has a last block h_i of its own, a copy of the one before. f = [h_0(g(x)), ..., h_t(g(x))], one head over all.

    L = CE(z, y) + alpha_aux CE(z_aux, y_aux)         (first task: CE(z, y))

z_aux: an auxiliary head on h_t alone, y_aux = 0 for an old class, y - K + 1 for a new one. A ViT is cut before its last
block, a ResNet-32 before its last stage. LAMDA-PILOT's last block starts random, since its loader does not know it:
"last_block": "random".
"""

from typing import Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from convs.expanding import Branches, split_backbone
from models.base import LEARNERS
from models.der import DER
from utils.config import Count, Rate
from utils.keys import key


@LEARNERS.register("memo")
class MEMO(DER):
    """DER whose tasks share all but the last block."""

    class Config(DER.Config):
        alpha_aux: Rate = key(1.0, "weight of the auxiliary loss")
        train_base: bool = key(False, "the shared layers train in every task, not in the first alone")
        last_block: Literal["checkpoint", "random"] = key("checkpoint", "where the first task's last block comes from")
        t_max: Count | None = key(
            None, "epochs over which the cosine of later tasks falls; default: theirs", only={"scheduler": "cosine"}
        )

    def _branches(self, model: nn.Module) -> Branches:
        shared, tail = split_backbone(model, self.config.last_block)
        return Branches(shared, tail, freeze_shared=not self.config.train_base)

    @property
    def _auxiliary_weight(self) -> float:
        return self.config.alpha_aux

    def make_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        optimizer, scheduler = super().make_optimizer()
        if self.config.t_max is not None and self.task.index > 0:
            scheduler = CosineAnnealingLR(optimizer, self.config.t_max, self.config.min_lr)
        return optimizer, scheduler
