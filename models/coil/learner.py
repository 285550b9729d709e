"""COIL (Zhou et al., 2021, "Co-transport for class-incremental learning").

A cosine head z = sigma cos(f, w_c). Old and new classes tell each other about themselves by optimal transport between
their prototypes (models/coil/transport.py): when a task begins, its rows V are made of the old classes' (forward);
while it is learned, the old rows are made anew, U, of the new classes' (backward). l = K / C, s the previous network's
logits, c(V) the cosines of f and V, H(q, z) = -mean_b sum_c q log softmax(z):

    L = l H(softmax(s / T), z[:, :K] / T) + (1 - l) CE(z, y)                         (first task: CE)
        first epoch      + 0.001 H(softmax(c(V) / T), z[:, K:] / T)                  gradient through both
        epoch e >= 1     + reg_term (e / epochs)^2 H(softmax(s / T), c(U) / T)

The published code makes V at the end of the task before, from all images of all classes. Here the next task's images
are read when it begins, the old classes by their exemplars; "upstream": by all their images.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.growing import Growing
from convs.heads import CosineHead
from convs.network import Network
from data.loading import extract_features
from data.stream import Task, TaskData
from models.base import LEARNERS
from models.coil.transport import backward_rows, forward_rows, prototypes
from models.parts.exemplars import RehearsalConfig
from models.parts.losses import soft_cross_entropy
from models.parts.teacher import Teacher
from models.rehearsal import TaughtRehearsal
from utils.config import Count, Positive, Rate
from utils.keys import key

FORWARD_WEIGHT = 0.001  # constant in the paper's code


class CosineNetwork(Network):
    """Also gives the features that its logits were made of."""

    def forward(self, images: Tensor, with_features: bool = False) -> Any:
        features = self.features(images)
        logits = self.head(features)
        return (logits, features) if with_features else logits


class Rows(Growing):
    """What transport has made: gamma V (m, D), U (K, D)."""

    new: Tensor
    old: Tensor

    def __init__(self, feature_dim: int):
        super().__init__()
        self.declare("new", feature_dim)
        self.declare("old", feature_dim)


@LEARNERS.register("coil")
class COIL(TaughtRehearsal):
    """Replay with distillation and transported rows; stores exemplars."""

    class Config(RehearsalConfig):
        temperature: Positive = key(2.0, "T of the distillation and of the transported answers")
        sinkhorn: Positive = key(0.464, "entropic regulariser of the transport")
        norm_term: Positive = key(3.0, "p of the distance between prototypes")
        reg_term: Rate = key(1e-3, "weight of the backward term when the task ends")
        transport_interval: Count = key(30, "steps of an epoch between backward transports")

    example = {"exemplars": {"total": 12}}
    waits = dict.fromkeys(
        ("models/coil/transport.py", "models/parts/exemplars.py", "data/loading.py"),
        "prototypes are read and the plan between classes is found on the host, every transport_interval steps",
    )

    def build(self, make_backbone: BackboneMaker) -> None:
        head = partial(CosineHead, init="uniform", learn_scale=True)
        self.network = CosineNetwork(make_backbone(), head, self.config.normalize)
        self.teacher = Teacher(lambda: self.network)
        self._remember()
        self.rows = Rows(self.network.feature_dim)

    def before_task(self, task: Task) -> None:
        """Forward transport: the new classes' rows."""
        head = self.network.head
        if task.index == 0:
            head.grow(task.total_classes)
            return
        self.eval()
        weight = head.weight.detach()
        classes = self._prototypes(task, task.train_so_far if self.config.upstream else self.exemplars.data(task))
        self.rows.new, _, _ = forward_rows(*classes, weight, self.config.sinkhorn, self.config.norm_term)
        head.grow(task.total_classes)
        head.set_stacked(torch.cat([weight, self.rows.new]))

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor | None], Tensor]:
        """The teacher is asked once a batch; from the second epoch on, backward transport now and then."""
        epoch, step = self.progress.epoch, self.progress.step
        if self.teacher and epoch >= 1 and step % self.config.transport_interval == 0:
            self.rows.old = self._transport_back()
        return super().prepare(images, targets)

    def loss(self, net: nn.Module, inputs: tuple[Tensor, Tensor | None], targets: Tensor) -> Tensor:
        images, old = inputs
        logits, features = net(images, with_features=True)
        if old is None:
            return F.cross_entropy(logits, targets)
        config, epoch, stage = self.config, self.progress.epoch, self.stage
        assert stage is not None
        rows = self.rows.new if epoch == 0 else self.rows.old
        terms = loss_terms(logits, features, old, targets, rows, epoch == 0, config.temperature)
        share = old.shape[1] / logits.shape[1]
        transport = FORWARD_WEIGHT if epoch == 0 else config.reg_term * (epoch / stage.epochs) ** 2
        return (1 - share) * terms[0] + share * terms[1] + transport * terms[2]

    def _transport_back(self) -> Tensor:
        """U, by the weights before this step, in evaluation mode."""
        assert self.data is not None
        self.network.eval()
        prototypes = self._prototypes(self.data, self.exemplars.data(self.data))
        self.network.train()
        weight = self.network.head.weight.detach()[self.task.known_classes :]
        return backward_rows(*prototypes, weight, self.config.sinkhorn, self.config.norm_term)[0]

    def _prototypes(self, task: Task, old: TaskData) -> tuple[Tensor, Tensor]:
        """(K, D), (m, D): of the old classes by their images among these, of the task's by its own."""
        size, known = self.config.test_batch_size, task.known_classes
        old = old.take(np.flatnonzero(old.labels < known))
        found = []
        for data, first, count in ((old, 0, known), (task.train, known, len(task.classes))):
            features, labels = extract_features(self.network.features, data.view("test"), self.runtime, size)
            found.append(prototypes(features, labels - first, count))
        return found[0], found[1]


def loss_terms(
    logits: Tensor, features: Tensor, old: Tensor, targets: Tensor, rows: Tensor, forward: bool, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """CE, distillation and transport, each without its weight; rows V (m, D) where `forward`, else U (K, D)."""
    known, answer = old.shape[1], cosines(features, rows)
    distilled = soft_cross_entropy(logits[:, :known], old, temperature)
    if forward:
        transport = soft_cross_entropy(logits[:, -len(rows) :], answer, temperature)
    else:
        transport = soft_cross_entropy(answer, old[:, : len(rows)], temperature)
    return F.cross_entropy(logits, targets), distilled, transport


def cosines(features: Tensor, rows: Tensor) -> Tensor:
    """(B, D), (C, D) -> (B, C)."""
    return F.linear(F.normalize(features, dim=1), F.normalize(rows, dim=1))
