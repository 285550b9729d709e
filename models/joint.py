"""Joint training: the upper bound. Each task trains on the images of all tasks so far.

    L = CE(z, y) over all classes seen

With one task of all classes ("init_cls": C) it is the single run that papers print as "joint". Over a stream it
starts again from the pre-trained weights at each task (T times the cost): an upper bound for every point of the curve.
"""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import HEADS
from convs.network import Network
from data.loading import View
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.optim import backbone_and_head
from utils.config import Rate, TrainConfig
from utils.keys import key


@LEARNERS.register("joint")
class Joint(Learner):
    """Keeps all training images, which no continual learner may."""

    class Config(TrainConfig):
        head: Literal["linear", "cosine"] = key("linear", "cosine has a learnable scale and no bias")
        backbone_lr_factor: Rate = key(1.0, "the backbone's learning rate over the head's; 0: linear probe")
        restart: bool = key(True, "begin each task from the pre-trained weights and a fresh head")

    streams = {"class", "domain"}

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = Network(make_backbone(), HEADS[config.head], config.normalize)
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
        return backbone_and_head(self.network, self.stage, self.config.backbone_lr_factor)

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(inputs), targets)
