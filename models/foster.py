"""FOSTER (Wang et al., 2022, "Feature boosting and compression for class-incremental learning").

After the first task, two stages. f_0: the old network, frozen, with its head W_0; f_1: a copy of it that trains.

    boost       CE(W [f_0, f_1] / w, y) + CE(W_1 f_1, y) + lambda_okd KD(W [f_0, f_1][:, :K], W_0 f_0; T)
    compress    -mean_b sum_c q'_bc log softmax(z / T)_bc      z: a student of one backbone, a copy of the old one
                q' = w softmax(W [f_0, f_1] / T), each row scaled to sum 1

    w_c = (1 - beta) / (1 - beta^n_c), scaled to sum C; n_c images of class c; beta1 in boost, beta2 in compress
    KD(z, s; T) = -mean_b sum_c softmax(s / T) log softmax(z / T)

The next task begins from the student. Published numbers are those of the two networks ("teacher"), one more than it
keeps. The published counts n_c of new classes are 500 on CIFAR-100 and elsewhere sums of file positions: "upstream".
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.expanding import Branches, TwoNetworks
from convs.heads import LinearHead
from convs.network import Network
from data.stream import Task
from models.base import LEARNERS
from models.parts.exemplars import MemoryConfig
from models.parts.losses import soft_cross_entropy
from models.parts.stages import Stage, stage_of
from models.parts.weight_aligning import align_new_rows
from models.rehearsal import Rehearsal
from utils.config import Count, Positive, Rate, Share
from utils.keys import key

UPSTREAM_COUNT = {"cifar100": 500}  # images a class that the reference knows; it adds up positions elsewhere


@LEARNERS.register("foster")
class Foster(Rehearsal):
    """Two networks in training and evaluation, one of them kept; stores exemplars."""

    class Config(MemoryConfig):
        compression_epochs: Count | None = key(None, "epochs of the second stage; default: epochs")
        temperature: Positive = key(2.0, "T of both distillations")
        lambda_okd: Rate = key(1.0, "weight of the old network's answers in the first stage")
        beta1: Share = key(0.96, "how far few images of a class weigh more, in the first stage; 0: all alike", lt=1)
        beta2: Share = key(0.97, "the same, in the second stage", lt=1)
        oofc: Literal["ft", "az"] = key("ft", 'what new classes read of the old features: trained, or "az": nothing')
        align_teacher: bool = key(False, "align the head of the two networks")
        align_student: bool = key(False, "align the student's head")
        wa_value: Positive = key(1.0, "aligned rows are scaled by wa_value^(old / new classes)")
        predict: Literal["teacher", "student", "nme"] = key(
            "teacher", "what is reported first: the two networks, the student, or the nearest mean; others beside it"
        )

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.names("wa_value") and not (self.align_teacher or self.align_student):
                yield "wa_value", 'has no effect unless "align_teacher" or "align_student" is true: drop the key'

    example = {"exemplars": {"total": 12}}
    transient = {"_weights"}
    network: TwoNetworks

    def build(self, make_backbone: BackboneMaker) -> None:
        backbone, normalize = make_backbone(), self.config.normalize
        self.network = TwoNetworks(Branches(nn.Identity(), backbone.model), backbone.info, normalize)
        self.student = Network(copy.deepcopy(backbone), LinearHead, normalize)
        self._remember()
        self._weights: dict[float, Tensor] | None = None  # of the classes, by beta

    def before_task(self, task: Task) -> None:
        if task.index > 0:
            self.network.restart(self.student)
        self.network.head.grow(task.total_classes)
        self.network.renew_aux_head(task.total_classes if task.index > 0 else 0)
        if task.index > 0 and self.config.oofc == "az":
            self.network.head.weight.data[task.known_classes :, : self.network.branch_dim] = 0

    def stages(self, task: Task) -> Sequence[Stage]:
        train = stage_of(self.config, task)
        if task.index == 0:
            return [train]
        epochs = self.config.compression_epochs or train.epochs
        compress = replace(train, name="compress", module="student", epochs=epochs, weight_decay=0.0)
        return [replace(train, name="boost"), compress]

    def train(self, mode: bool = True) -> "Foster":
        """The student learns from two networks that stand still."""
        super().train(mode)
        if self._stage == "compress":
            self.network.eval()
        return self

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Any, Tensor]:
        """The two networks answer once a batch for the student."""
        if self._stage != "compress":
            return images, targets
        with self.runtime.autocast(), torch.no_grad():
            wanted = balanced(self.network(images), self._class_weights(self.config.beta2), self.config.temperature)
        return (images, wanted), targets

    def loss(self, net: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        config = self.config
        if self._stage == "compress":
            images, wanted = inputs
            return F.cross_entropy(net(images) / config.temperature, wanted)
        if self.task.index == 0:
            return F.cross_entropy(net(inputs), targets)
        logits, alone, old = net(inputs, boosting=True)
        loss = F.cross_entropy(logits / self._class_weights(config.beta1), targets) + F.cross_entropy(alone, targets)
        return loss + config.lambda_okd * soft_cross_entropy(logits[:, : old.shape[1]], old, config.temperature)

    def after_backward(self) -> None:
        """Zeros stay zero: weight decay of zero is zero too."""
        grad = self.network.head.weight.grad
        if self._stage == "boost" and self.config.oofc == "az" and grad is not None:
            grad[self.task.known_classes :, : self.network.branch_dim] = 0

    def after_stage(self, task: Task) -> None:
        factor = self.config.wa_value ** (task.known_classes / len(task.classes))
        if self._stage == "compress":
            if self.config.align_student:
                align_new_rows(self.student.head.weight, task.known_classes, factor)
            return
        if self._stage == "boost" and self.config.align_teacher:
            align_new_rows(self.network.head.weight, task.known_classes, factor)
        self._make_student(task)

    def after_task(self, task: Task) -> None:
        self.eval()
        self.exemplars.update(task, self.network.features, self.runtime)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert images is not None
        features = self.network.features(images)
        logits = self.network.head(features)
        student = self.student(images) if self.student.head.num_classes == logits.shape[1] else logits
        nearest = self.exemplars.scores(features, logits.shape[1])
        scores = {"teacher": logits, "student": student, "nme": nearest}
        return {self.config.predict: scores[self.config.predict], **scores}

    @property
    def _stage(self) -> str | None:
        return None if self.stage is None else self.stage.name

    def _class_weights(self, beta: float) -> Tensor:
        """(C,): w of the task at hand, on the device."""
        if self._weights is None:
            counts = self._upstream_counts() if self.config.upstream else self._counts()
            like = self.network.head.weight
            self._weights = {b: effective_weights(counts, b).to(like) for b in (self.config.beta1, self.config.beta2)}
        return self._weights[beta]

    def _counts(self) -> np.ndarray:
        assert self.data is not None
        return np.bincount(self.exemplars.join(self.data).labels, minlength=self.task.total_classes)

    def _upstream_counts(self) -> np.ndarray:
        assert self.data is not None
        known, train = self.task.known_classes, self.data.train
        positions = np.bincount(train.labels, weights=train.rows, minlength=self.task.total_classes)[known:]
        if self.config.dataset in UPSTREAM_COUNT:
            positions = np.full_like(positions, UPSTREAM_COUNT[self.config.dataset])
        return np.concatenate([np.full(known, self.config.exemplars.of_group(known)), positions])

    def _make_student(self, task: Task) -> None:
        """The old network and its head, with fresh rows for the new classes; after the first task, the network."""
        network, student = self.network, self.student
        student.backbone.model.load_state_dict(network.branches.branches[0].state_dict())
        head = network.head if task.index == 0 else network.old_head
        student.head.load_state_dict(head.state_dict())
        student.head.grow(task.total_classes)


def effective_weights(counts: np.ndarray, beta: float) -> Tensor:
    """n_c (C,) -> (1 - beta) / (1 - beta^n_c) (C,), scaled to sum C."""
    weights = (1 - beta) / (1 - np.power(float(beta), counts))
    return torch.from_numpy(weights / weights.sum() * len(counts))


def balanced(logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """(B, C), (C,) -> (B, C): softmax(z / T), weighted by class, each row of sum 1."""
    wanted = weights * (logits / temperature).softmax(dim=1)
    return wanted / wanted.sum(dim=1, keepdim=True)
