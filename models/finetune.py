"""Sequential fine-tuning: the lower bound that every paper prints.

task 0:   L = CE(z, y)
task t:   L = CE(z[:, K:], y - K)   mask "new"  (K = known classes; LAMDA-PILOT's rule)
          L = CE(z, y)              mask "seen" (unmasked: old logits are pushed down)
"""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convs.heads import HEADS
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.losses import slice_cross_entropy
from models.parts.optim import backbone_and_head
from utils.config import Rate, RunConfig
from utils.data_manager import Task
from utils.runtime import Runtime


class FinetuneConfig(RunConfig):
    mask: Literal["new", "seen"] = Field("new", description="logits in the loss: of the task's classes, or of all seen")
    trainable: Literal["all", "head"] = Field("all", description='"head" keeps the backbone frozen')
    head: Literal["linear", "cosine"] = Field("linear", description="cosine has a learnable scale and no bias")
    backbone_lr_factor: Rate = Field(1.0, description="the backbone's learning rate over the head's")


@LEARNERS.register("finetune")
class Finetune(Learner):
    """Trains everything on each task in turn; stores nothing."""

    Config = FinetuneConfig
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self.network = self.build_network(make_backbone, HEADS[config.head])
        self.network.backbone.requires_grad_(config.trainable == "all")

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def param_groups(self) -> list[dict[str, Any]]:
        return backbone_and_head(self.network, self.lrate, self.weight_decay, self.config.backbone_lr_factor)

    def loss(self, net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        logits = net(images)  # (B, total_classes)
        if self.config.mask == "new":
            return slice_cross_entropy(logits, targets, self.task.classes)
        return F.cross_entropy(logits, targets)
