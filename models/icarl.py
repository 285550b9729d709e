"""iCaRL (Rebuffi et al., 2017, "Incremental classifier and representation learning").

Exemplars hold the old classes' images, the previous network s their answers; classes are told by the nearest mean of
exemplars. z (B, C), K known classes, T a temperature:

    "ce"    L = CE(z, y) + KD(z[:, :K], s; T)
    "bce"   L = mean_b sum_c BCE(sigmoid(z_bc), q_bc), q = sigmoid(s) for c < K and one-hot beyond: the paper's, instead

    KD(z, s; T) = -mean_b sum_c softmax(s / T) log softmax(z / T)
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.loading import View
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.exemplars import ExemplarSet, RehearsalConfig
from models.parts.losses import soft_cross_entropy
from models.parts.teacher import Teacher
from models.parts.varied import Varied, over_seen_classes
from utils.config import Positive
from utils.keys import key, redefault

Inputs = tuple[Tensor, Tensor | None]


@LEARNERS.register("icarl")
class ICaRL(Learner):
    """Replay with distillation; predicts by the nearest class mean."""

    class Config(RehearsalConfig):
        loss: Literal["ce", "bce"] = key("ce", "CE + KD, or the binary form of the paper")
        temperature: Positive = key(2.0, "T of the distillation", only={"loss": "ce"})
        predict: Literal["logits", "nme"] = redefault(RehearsalConfig, "predict", "nme")

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
        if self.config.loss == "bce":
            return binary_loss(logits, old, targets)
        loss = F.cross_entropy(logits, targets)
        if old is None:
            return loss
        return loss + soft_cross_entropy(logits[:, : old.shape[1]], old, self.config.temperature)

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


def binary_loss(logits: Tensor, old: Tensor | None, targets: Tensor) -> Tensor:
    """logits (B, C), teacher's logits (B, K) or none, targets (B,) -> (): summed over outputs, mean over images."""
    wanted = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
    if old is not None:
        wanted = torch.cat([old.sigmoid().to(logits.dtype), wanted[:, old.shape[1] :]], dim=1)
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(logits)
