"""What learners with exemplars share: the images of a task join those that were kept, both scores are given."""

from collections.abc import Mapping

from torch import Tensor

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.loading import View
from data.stream import Task
from models.base import Learner
from models.parts.exemplars import ExemplarSet
from models.parts.teacher import Teacher
from models.parts.varied import Varied, over_seen_classes

Inputs = tuple[Tensor, Tensor | None]  # images and the teacher's logits, if there is one


class Rehearsal(Learner):
    """Trains on new images and exemplars alike; predicts by the head and by the nearest mean of exemplars."""

    exemplars: ExemplarSet

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), LinearHead, self.config.normalize)
        self._remember()

    def _remember(self) -> None:
        """Room for exemplars, once `self.network` is there. Over a stream of domains every class counts in each."""
        groups = self.task.num_classes * (1 if self.task.domain is None else self.task.num_tasks)
        self.exemplars = ExemplarSet(self.config, self.network.backbone.info.image_size, groups)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def train_data(self, task: Task) -> View:
        return self.exemplars.join(task).view("train")

    def after_task(self, task: Task) -> None:
        self.exemplars.update(task, self.network.features, self.runtime)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert images is not None
        features = self.network.features(images)
        return self.exemplars.beside(self.network.head(features), features, self.config.predict)

    def landscape(self) -> Varied:
        return over_seen_classes(self)


class TaughtRehearsal(Rehearsal):
    """Beside them a teacher: the network as the task before left it."""

    teacher: Teacher

    def build(self, make_backbone: BackboneMaker) -> None:
        super().build(make_backbone)
        self.teacher = Teacher(lambda: self.network)

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Inputs, Tensor]:
        """The teacher is asked once a batch."""
        with self.runtime.autocast():
            return (images, self.teacher(images) if self.teacher else None), targets

    def after_task(self, task: Task) -> None:
        super().after_task(task)
        self.teacher.update()
