"""Replay: fine-tuning on the new images and on the exemplars of the old classes, all of them alike.

    L = CE(z, y)     z (B, C): all classes seen; an exemplar is drawn as often as a new image

Exemplars are chosen by herding and predict by their class means too (models/parts/exemplars.py). Over a stream of
domains every class is kept in every domain.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.loading import View
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.exemplars import ExemplarSet, RehearsalConfig
from models.parts.varied import Varied, over_seen_classes


@LEARNERS.register("replay")
class Replay(Learner):
    """Trains everything; stores exemplars."""

    Config = RehearsalConfig
    streams = {"class", "domain"}
    example = {"exemplars": {"total": 12}}

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), LinearHead, self.config.normalize)
        groups = self.task.num_classes * (1 if self.task.domain is None else self.task.num_tasks)
        self.exemplars = ExemplarSet(self.config, self.network.backbone.info.image_size, groups)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def train_data(self, task: Task) -> View:
        return self.exemplars.join(task).view("train")

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(net(inputs), targets)

    def after_task(self, task: Task) -> None:
        self.eval()
        self.exemplars.update(task, self.network.features, self.runtime)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert images is not None
        features = self.network.features(images)
        return self.exemplars.beside(self.network.head(features), features, self.config.predict)

    def landscape(self) -> Varied:
        return over_seen_classes(self)
