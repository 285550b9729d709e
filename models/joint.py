"""Joint training: the upper bound. Each task trains on the images of all tasks so far.

    L = CE(z, y) over all classes seen

With one task of all classes ("init_cls": C) it is the single run that papers print as "joint". Over a stream it
starts again from the pre-trained weights at each task (T times the cost): an upper bound for every point of the curve.
"""

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from convs.heads import HEADS
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.optim import backbone_and_head
from utils.config import Rate, RunConfig
from utils.data_manager import Task, View
from utils.runtime import Runtime


class JointConfig(RunConfig):
    head: Literal["linear", "cosine"] = Field("linear", description="cosine has a learnable scale and no bias")
    backbone_lr_factor: Rate = Field(1.0, description="the backbone's learning rate over the head's; 0: linear probe")
    restart: bool = Field(True, description="begin each task from the pre-trained weights and a fresh head")


@LEARNERS.register("joint")
class Joint(Learner):
    """Keeps all training images, which no continual learner may."""

    Config = JointConfig
    config: JointConfig

    def __init__(self, config: JointConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self.network = self.build_network(make_backbone, HEADS[config.head])
        if config.backbone_lr_factor == 0:
            self.network.backbone.requires_grad_(False)
        state = self.network.backbone.state_dict()
        self._start = {name: value.cpu().clone() for name, value in state.items()} if config.restart else None

    def before_task(self, task: Task) -> None:
        if self._start is not None and task.index > 0:
            self.network.backbone.load_state_dict(self._start)
            self.network.head = HEADS[self.config.head](self.network.feature_dim).to(self.runtime.device)
        self.network.head.grow(task.total_classes)

    def train_data(self, task: Task) -> View:
        return task.train_so_far.view("train")

    def param_groups(self) -> list[dict[str, Any]]:
        return backbone_and_head(self.network, self.lrate, self.weight_decay, self.config.backbone_lr_factor)

    def loss(self, net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(images), targets)
