"""APER (Zhou et al., IJCV 2024, arXiv 2303.07338; once called ADAM): adapt once, keep what was there, and average.

task 0    something of the ViT is tuned under a cosine head, which is not used again             (first_session.py)
for ever  f(x) = [plain features, tuned features] in R^2D,    w_c = mean of f over class c,    z_c = cos(f(x), w_c)

One cosine over both halves: the half with the larger norm weighs more. Nothing is forgotten by construction; a class
that comes back in another domain goes on with its sum and count.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from convs.backbones import BackboneMaker
from convs.heads import CosineHead
from data.stream import Task
from models.base import LEARNERS
from models.first_session import FirstSession
from models.parts.prototypes import ClassMeans
from utils.keys import key


@LEARNERS.register("aper")
class APER(FirstSession):
    """A ViT tuned in the first task beside the ViT as it was, and one prototype per class in both."""

    class Config(FirstSession.Config):
        petl: Literal["adapter", "ssf", "vpt_deep", "vpt_shallow", "finetune"] = key(
            "adapter", "what the first session tunes"
        )
        upstream: bool = key(False, "reproduce the reference: prompt_init zeros, unless the config names it")

    streams = {"class", "domain"}
    example = {"bottleneck": 4}
    _reads_plain_features = True

    def build(self, make_backbone: BackboneMaker) -> None:
        super().build(make_backbone)
        width = 2 * self.network.feature_dim
        self.prototypes = CosineHead(width, init="zeros")
        self.class_means = ClassMeans(width)

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        self.prototypes.grow(task.total_classes)
        self.prototypes.requires_grad_(False)
        self.class_means.grow(task.total_classes)

    def _measure(self, task: Task) -> None:
        self.class_means.update(self.features, task.train.view("test"), self.runtime, self.config.test_batch_size)
        self.prototypes.set_stacked(self.class_means.exact_means)

    def features(self, images: Tensor) -> Tensor:
        """[plain, tuned], (B, 2D)."""
        return self.network.both(images)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        scores = self.prototypes(self._features(images, frozen))
        return scores.masked_fill(self.class_means.empty, -torch.inf)
