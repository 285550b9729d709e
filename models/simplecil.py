"""SimpleCIL (Zhou et al., 2023, "Revisiting class-incremental learning with pre-trained models"): nothing is trained.

w_c = mean of f(x) over the training images of class c, test transform, features not normalised
z_c = cos(f(x), w_c)

The features of an image never change, so each test image passes the backbone once in a whole stream.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from convs.backbones import BackboneMaker
from convs.heads import CosineHead
from convs.network import Network
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.prototypes import ClassMeans
from models.parts.stages import Stage
from utils.config import RunConfig


@LEARNERS.register("simplecil")
class SimpleCIL(Learner):
    """A frozen backbone and one prototype per class; forgets nothing by construction."""

    class Config(RunConfig):
        pass

    streams = {"class", "domain"}
    frozen_names = ("features",)
    needs_images = False

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), lambda dim: CosineHead(dim, init="zeros"), self.config.normalize)
        self.network.requires_grad_(False)
        self.class_means = ClassMeans(self.network.feature_dim)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)
        self.network.head.requires_grad_(False)
        self.class_means.grow(task.total_classes)

    def stages(self, task: Task) -> Sequence[Stage]:
        return ()

    def after_task(self, task: Task) -> None:
        self.eval()
        view, size = task.train.view("test"), self.config.test_batch_size
        self.class_means.update(self.network.features, view, self.runtime, size)
        self.network.head.set_stacked(self.class_means.means)

    def frozen(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return {"features": self.network.features(images)}

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        return self.network.head(frozen["features"]).masked_fill(self.class_means.empty, -torch.inf)
