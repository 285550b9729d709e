"""BiC (Wu et al., 2019, "Large scale incremental learning"): the bias towards new classes is measured and taken out.

Each task's outputs have two numbers of their own, z_k <- alpha_k z_k + beta_k, 1 and 0 at birth. A task has two stages:

    train      L = (1 - l) CE(z, y) + l KD(z[:, :K], s; T), l = K / C; all alpha, beta fixed       (first task: CE)
    correct    L = CE(z, y) on images kept apart, as many of an old class as of a new one; only alpha_t, beta_t move

n_val = floor(split_ratio memory / K) images of each class are kept apart, at least 1 and fewer than a class has.
The published code has CE(softmax(z), y) in the second stage, so that alpha stays near 1, draws it to 0 by weight decay
and lets BatchNorm go on learning there: "upstream".
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.growing import Growing, GrowingList
from convs.heads import LinearHead
from convs.network import Network
from data.loading import View
from data.stream import Task, TaskData
from models.base import LEARNERS
from models.parts.exemplars import RehearsalConfig, draw
from models.parts.losses import share_weighted_loss
from models.parts.optim import group
from models.parts.stages import Stage, stage_of
from models.parts.teacher import Teacher
from models.rehearsal import TaughtRehearsal
from utils.config import Count, Positive, Share
from utils.keys import key
from utils.seed import mix

Inputs = tuple[Tensor, Tensor | None]


class BiasLayer(nn.Module):
    """alpha and beta of one task's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))


class BiasLayers(Growing):
    """z (B, C) -> alpha_k z_k + beta_k, k the task of each output."""

    owner: Tensor  # (C,): the layer of an output

    def __init__(self) -> None:
        super().__init__()
        self.layers = GrowingList(lambda index: BiasLayer().to(self.owner.device))
        self.declare("owner", dtype=torch.int64)

    def grow(self, total_classes: int) -> None:
        """A layer for the outputs still missing."""
        if (new := total_classes - len(self.owner)) > 0:
            self.append(owner=torch.full((new,), len(self.layers)))
            self.layers.grow()

    def forward(self, logits: Tensor) -> Tensor:
        alphas, betas = (torch.cat([getattr(layer, name) for layer in self.layers]) for name in ("alpha", "beta"))
        return logits * alphas[self.owner] + betas[self.owner]


class CorrectedHead(LinearHead):
    """A linear head with its bias layers behind it."""

    def __init__(self, feature_dim: int):
        super().__init__(feature_dim)
        self.correction = BiasLayers()

    def grow(self, total_classes: int) -> None:
        super().grow(total_classes)
        self.correction.grow(total_classes)

    def plain(self, features: Tensor) -> Tensor:
        """Logits as they were before any correction."""
        return super().forward(features)

    def forward(self, features: Tensor) -> Tensor:
        return self.correction(self.plain(features))


@LEARNERS.register("bic")
class BiC(TaughtRehearsal):
    """Replay with distillation; a second stage corrects the outputs of the new classes."""

    class Config(RehearsalConfig):
        temperature: Positive = key(2.0, "T of the distillation")
        split_ratio: Share = key(0.1, "share of the memory that is kept apart for the correction")
        split_memory: Count | None = key(
            None, "images that split_ratio is a share of; default: the budget, times the old classes where per class"
        )

    example = {"exemplars": {"total": 24}, "split_ratio": 0.3}

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), CorrectedHead, self.config.normalize)
        self.teacher = Teacher(lambda: self.network)
        self._remember()

    def stages(self, task: Task) -> Sequence[Stage]:
        train = stage_of(self.config, task)
        if task.index == 0:
            return [train]
        decay = train.weight_decay if self.config.upstream else 0.0
        return [train, replace(train, name="correct", module="_correction", weight_decay=decay)]

    @property
    def _correction(self) -> BiasLayers:
        return self.network.head.correction

    def train(self, mode: bool = True) -> "BiC":
        """The network behind the correction stands still; upstream, BatchNorm goes on learning."""
        super().train(mode)
        if self._correcting and not self.config.upstream:
            self.network.eval()
        return self

    def train_data(self, task: Task) -> View:
        joined = self.exemplars.join(task)
        if task.index == 0:
            return joined.view("train")
        apart = self._apart(task, joined)
        chosen = apart if self._correcting else np.setdiff1d(np.arange(len(joined)), apart)
        return joined.take(chosen).view("train")

    def param_groups(self) -> list[dict[str, Any]]:
        layers, stage = self._correction, self.stage
        assert stage is not None
        if self._correcting:
            moved = list(layers.layers[-1].parameters())
        else:
            fixed = {id(p) for p in layers.parameters()}
            moved = [p for p in self.network.parameters() if id(p) not in fixed]
        return [group(moved, stage.lrate, stage.weight_decay)]

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        """The teacher is asked once a batch; the correction reads logits that do not train."""
        with self.runtime.autocast(), torch.no_grad():
            if self._correcting:
                return self.network.head.plain(self.network.features(images)), targets
            return (images, self.teacher(images) if self.teacher else None), targets

    def loss(self, net: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        if self._correcting:
            logits = net(inputs)
            return F.cross_entropy(logits.softmax(dim=1) if self.config.upstream else logits, targets)
        images, old = inputs
        logits = net(images)
        if old is None:
            return F.cross_entropy(logits, targets)
        return share_weighted_loss(logits, old, targets, self.config.temperature)

    @property
    def _correcting(self) -> bool:
        return self.stage is not None and self.stage.name == "correct"

    def _apart(self, task: Task, joined: TaskData) -> np.ndarray:
        """Positions in the joined set that only the correction reads."""
        budget, known = self.config.exemplars, task.known_classes
        memory = self.config.split_memory or budget.total or budget.of_group(known) * known
        smallest = int(np.unique(joined.labels, return_counts=True)[1].min())
        most = smallest if self.config.upstream else smallest - 1
        count = max(1, min(int(self.config.split_ratio * memory / known), most))
        return np.sort(draw(joined.labels, count, mix(self.config.seeds[0], task.index)))
