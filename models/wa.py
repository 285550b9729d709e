"""WA (Zhao et al., 2020, "Maintaining discrimination and fairness in class incremental learning").

Distillation weighted by the share of old classes, then the head's new rows get the old ones' length
(models/parts/weight_aligning.py), which few exemplars against many new images had left too short.

    L = (1 - l) CE(z, y) + l KD(z[:, :K], s; T),   l = K / C         (first task: CE)
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
from models.parts.losses import share_weighted_loss
from models.parts.teacher import Teacher
from models.parts.varied import Varied, over_seen_classes
from models.parts.weight_aligning import align_new_rows
from utils.config import Positive
from utils.keys import key

Inputs = tuple[Tensor, Tensor | None]


@LEARNERS.register("wa")
class WA(Learner):
    """Replay with distillation and an aligned head."""

    class Config(RehearsalConfig):
        temperature: Positive = key(2.0, "T of the distillation")
        align: bool = key(True, "align the head after each task but the first")

    example = {"exemplars": {"total": 12}}

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), LinearHead, self.config.normalize)
        self.teacher = Teacher(lambda: self.network)
        self.exemplars = ExemplarSet(self.config, self.network.backbone.info.image_size, self.task.num_classes)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def train_data(self, task: Task) -> View:
        return self.exemplars.join(task).view("train")

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Inputs, Tensor]:
        """The teacher is asked once a batch."""
        with self.runtime.autocast():
            return (images, self.teacher(images) if self.teacher else None), targets

    def loss(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        images, old = inputs
        logits = net(images)
        if old is None:
            return F.cross_entropy(logits, targets)
        return share_weighted_loss(logits, old, targets, self.config.temperature)

    def after_stage(self, task: Task) -> None:
        if self.config.align and task.index > 0:
            align_new_rows(self.network.head.weight, task.known_classes)

    def after_task(self, task: Task) -> None:
        self.eval()
        self.exemplars.update(task, self.network.features, self.runtime)
        self.teacher.update()

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert images is not None
        features = self.network.features(images)
        return self.exemplars.beside(self.network.head(features), features, self.config.predict)

    def landscape(self) -> Varied:
        return over_seen_classes(self)
