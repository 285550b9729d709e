"""LwF (Li & Hoiem, 2016, "Learning without forgetting"): no images are kept, the previous network s answers for them.

L = CE(z[:, K:], y - K) + lamda KD(z[:, :K], s; T)         (first task: CE)

KD(z, s; T) = -mean_b sum_c softmax(s / T) log softmax(z / T)
"""

from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.losses import slice_cross_entropy, soft_cross_entropy
from models.parts.teacher import Teacher
from models.parts.varied import Varied, over_seen_classes
from utils.config import Positive, Rate, TrainConfig
from utils.keys import key

Inputs = tuple[Tensor, Tensor | None]


@LEARNERS.register("lwf")
class LwF(Learner):
    """Fine-tuning of the new slice with distillation of the old one."""

    class Config(TrainConfig):
        temperature: Positive = key(2.0, "T of the distillation")
        lamda: Rate = key(3.0, "weight of the distillation")

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), LinearHead, self.config.normalize)
        self.teacher = Teacher(lambda: self.network)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Inputs, Tensor]:
        """The teacher is asked once a batch."""
        with self.runtime.autocast():
            return (images, self.teacher(images) if self.teacher else None), targets

    def loss(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        images, old = inputs
        logits = net(images)
        loss = slice_cross_entropy(logits, targets, self.task.classes)
        if old is None:
            return loss
        known = logits[:, : old.shape[1]]
        return loss + self.config.lamda * soft_cross_entropy(known, old, self.config.temperature)

    def after_task(self, task: Task) -> None:
        self.eval()
        self.teacher.update()

    def landscape(self) -> Varied:
        return over_seen_classes(self)
