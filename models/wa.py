"""WA (Zhao et al., 2020, "Maintaining discrimination and fairness in class incremental learning").

Distillation weighted by the share of old classes, then the head's new rows get the old ones' length
(models/parts/weight_aligning.py), which few exemplars against many new images had left too short.

    L = (1 - l) CE(z, y) + l KD(z[:, :K], s; T),   l = K / C         (first task: CE)
"""

import torch.nn.functional as F
from torch import Tensor, nn

from data.stream import Task
from models.base import LEARNERS
from models.parts.exemplars import RehearsalConfig
from models.parts.losses import share_weighted_loss
from models.parts.weight_aligning import align_new_rows
from models.rehearsal import Inputs, TaughtRehearsal
from utils.config import Positive
from utils.keys import key


@LEARNERS.register("wa")
class WA(TaughtRehearsal):
    """Replay with distillation and an aligned head."""

    class Config(RehearsalConfig):
        temperature: Positive = key(2.0, "T of the distillation")
        align: bool = key(True, "align the head after each task but the first")

    example = {"exemplars": {"total": 12}}

    def loss(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        images, old = inputs
        logits = net(images)
        if old is None:
            return F.cross_entropy(logits, targets)
        return share_weighted_loss(logits, old, targets, self.config.temperature)

    def after_stage(self, task: Task) -> None:
        if self.config.align and task.index > 0:
            align_new_rows(self.network.head.weight, task.known_classes)
