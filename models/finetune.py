"""Sequential fine-tuning: the lower bound that every paper prints.

task 0:   L = CE(z, y)
task t:   L = CE(z[:, K:], y - K)   mask "new"  (K = known classes; LAMDA-PILOT's rule)
          L = CE(z, y)              mask "seen" (unmasked: old logits are pushed down)
"""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import HEADS
from convs.network import Network
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.losses import slice_cross_entropy
from models.parts.optim import backbone_and_head
from utils.config import Rate, TrainConfig
from utils.keys import key


@LEARNERS.register("finetune")
class Finetune(Learner):
    """Trains everything on each task in turn; stores nothing."""

    class Config(TrainConfig):
        mask: Literal["new", "seen"] = key("new", "logits in the loss: of the task's classes, or of all seen")
        trainable: Literal["all", "head"] = key("all", '"head" keeps the backbone frozen')
        head: Literal["linear", "cosine"] = key("linear", "cosine has a learnable scale and no bias")
        backbone_lr_factor: Rate = key(1.0, "the backbone's learning rate over the head's", only={"trainable": "all"})

    streams = {"class", "domain"}

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), HEADS[self.config.head], self.config.normalize)
        self.network.backbone.requires_grad_(self.config.trainable == "all")

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def param_groups(self) -> list[dict[str, Any]]:
        return backbone_and_head(self.network, self.stage, self.config.backbone_lr_factor)

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = net(inputs)  # (B, total_classes)
        if self.config.mask == "new":
            return slice_cross_entropy(logits, targets, self.task.classes)
        return F.cross_entropy(logits, targets)
