"""HCL: Heterogeneous Continual Learning (Madaan et al., CVPR 2023, arXiv 2306.08593).

The architecture changes over the stream, so weights cannot be handed on: each task's student S, fresh where the
architecture is new, learns old classes from the network G of the task before, its teacher.

    task 0       L = CE(S(x), y)                                                          CE: smoothed labels, N classes
    distil       L = CE(S(x), y) + alpha KD(S(x), G(x))                                   KD: T^2 KL(G || S)
    distilbuf    ... + w CE(S(x_b), y_b)                                                  x_b from a reservoir memory
    qdi          L = CE(S(x), y) + alpha [KD(S(x), G(x)) + KD(S(X~), G(X~))]

X~: up to `synthetic_size` images of old classes made from images of the new task, once a task (Quick Deep Inversion,
models/hcl/inversion.py); all of them are in every step. The head has all N outputs from the start. The network that a
task ends with is that of a chosen epoch (models/hcl/epoch_choice.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker, input_size
from convs.heads import LinearHead
from convs.network import Network
from data.batched import BATCHED, apply
from data.loading import View
from data.stream import Task
from models.base import LEARNERS, Learner, Report
from models.hcl.epoch_choice import EpochChoice
from models.hcl.inverted_set import InvertedSet
from models.hcl.keys import HCLConfig
from models.hcl.networks import NetworkEntry, copy_matching
from models.parts.evaluation import evaluate
from models.parts.losses import distillation
from models.parts.memory import ReservoirMemory
from models.parts.stages import Stage, stage_of
from models.parts.teacher import Teacher
from utils.errors import ConfigError
from utils.seed import mix


class Inputs(NamedTuple):
    """A batch with what is computed once on it: the teacher's logits (B, N), images and labels from the memory."""

    images: Tensor
    taught: Tensor | None = None
    replayed: Tensor | None = None
    replayed_labels: Tensor | None = None


@LEARNERS.register("hcl")
class HCL(Learner):
    """Distillation into stronger students, alone, with a replay buffer, or with Quick Deep Inversion."""

    Config = HCLConfig
    streams = {"class", "domain"}
    transient = {"_pictures"}

    def build(self, make_backbone: BackboneMaker) -> None:
        config, index = self.config, self.task.index
        self._make_backbone = make_backbone
        self._entries = [NetworkEntry.read(value) for value in config.networks or (None,)]
        self._task_of_network = self._task_of_teacher = index
        self._notes: dict[str, list[Any]] = {"forward_acc": [], "forward_acc_task_il": [], "selected_epoch": []}
        self._pictures: dict[str, Tensor] | None = None
        self.network = self._student(index)
        self.teacher = Teacher(lambda: self.network, self._blank_teacher, training=config.teacher_mode == "train")
        self.choice = EpochChoice(config.select, config.slack)
        buffer, qdi = config.variant == "distilbuf", config.variant == "qdi"
        self.memory = ReservoirMemory(config.memory_size, mix(config.seeds[0], 6)) if buffer else None
        made = config.inverted_set(), config.seeds[0], self.runtime, config.test_batch_size
        self.synthetic = InvertedSet(*made) if qdi else None

    def before_task(self, task: Task) -> None:
        """The network that stands becomes the teacher, images are made from it, the next student takes its place."""
        if task.index == 0:
            self.network.head.grow(task.num_classes)
        else:
            self.teacher.update()
            self._task_of_teacher = self._task_of_network
            self._refuse_random_paths()
            if self.synthetic is not None:
                self._pictures = self.synthetic.make(self.teacher, task, self._pretrained)
            self._next_student(task)
            self._note_forward_transfer(task)
        self.choice.restart()

    def stages(self, task: Task) -> Sequence[Stage]:
        """As the config says; what the entry of the task's network says wins."""
        stage = replace(stage_of(self.config, task), **self._entry(task.index).training)
        return (stage,) if stage.epochs else ()

    def train_data(self, task: Task) -> View:
        """For the memory, images as they are beside the augmented ones."""
        return task.train.view("train", beside=None if self.memory is None else "test")

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Inputs, Tensor]:
        """images (B, 3, s, s), or with those for the memory behind them (B, 6, s, s)."""
        current, taught = images[:, :3], None
        if self.teacher and self.config.alpha:
            with self.runtime.autocast():
                if self.synthetic:
                    self.synthetic.targets.repeat_pass(self.teacher)
                taught = self.teacher(current)
        if self.memory is not None and len(self.memory):
            return Inputs(current, taught, *self._replay(images.device)), targets
        return Inputs(current, taught), targets

    def loss(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        return torch.stack(list(self._terms(net, inputs, targets).values())).sum()

    def _terms(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
        """Weighted. The student sees its batches one after another, never joined: BatchNorm tells them apart."""
        config, logits = self.config, net(inputs.images)  # (B, N)
        terms = {"ce": F.cross_entropy(logits, targets, label_smoothing=config.smoothing)}
        if inputs.taught is not None:
            penalty = self._distil(logits, inputs.taught)
            if self.synthetic:
                made = self.synthetic.targets
                assert made.images is not None and made.logits is not None
                penalty = penalty + self._distil(net(made.images), made.logits)
            terms["distil"] = config.alpha * penalty
        if inputs.replayed is not None and inputs.replayed_labels is not None:
            replayed = F.cross_entropy(net(inputs.replayed), inputs.replayed_labels, label_smoothing=config.smoothing)
            terms["replay"] = config.buffer_weight * replayed
        return terms

    def after_step(self, images: Tensor, targets: Tensor) -> None:
        """The batch joins the memory, in every process the whole of it."""
        if self.memory is not None:
            shares = (self.runtime.gather_tensors(values) for values in (self._as_bytes(images[:, 3:]), targets))
            for share, labels in zip(*shares, strict=True):
                self.memory.insert(share, labels)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Mean of class- and task-incremental accuracy over the tasks seen, on the images to choose by."""
        if self.config.select == "last" or self.data is None:
            return {}
        tasks = self.data.seen
        if self.config.select_on == "val":
            tasks = [replace(task, test=task.val) for task in tasks if task.val is not None]
        tasks = [task for task in tasks if len(task.test)]
        score = float("nan")
        if tasks:
            score = float(np.mean(100 * evaluate(self, tasks).main[:2] / [len(t.test) for t in tasks]))
        self.choice.offer(epoch - 1, score, self.network)
        chosen = self.choice.epoch
        return {"select_acc": score} | ({} if chosen is None else {"selected_epoch": chosen + 1})

    def after_task(self, task: Task) -> None:
        """The chosen epoch's network stands from here on; its layers' statistics are the next inversion's targets."""
        again = not task.is_last and self._continues(task.index + 1)
        self._notes["selected_epoch"].append(None if self.choice.epoch is None else self.choice.epoch + 1)
        self.choice.finish(self.network, keep_last=again and self.config.carry == "last")
        if self.synthetic is not None and not task.is_last:
            self.eval()
            self.synthetic.measure(self.network, task, self._pretrained)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        assert images is not None
        logits = self.network(images)
        return logits[:, : self.task.total_classes] if self.config.mask_unseen else logits

    def report(self) -> Report:
        """forward_acc[t-1]: accuracy in percent on task t of the student that is about to learn it. selected_epoch[t]:
        from 1; null: the last."""
        return Report(dict(self._notes), self._pictures or {})

    def get_extra_state(self) -> dict[str, Any]:
        notes = {name: list(values) for name, values in self._notes.items()}
        tasks = {"_task_of_network": self._task_of_network, "_task_of_teacher": self._task_of_teacher}
        return {**tasks, "_notes": notes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Called before the network's own weights are loaded: put a network of their shape in place."""
        if not self._entry(state["_task_of_network"]).same_network(self._entry(self._task_of_network)):
            self.network = self._student(state["_task_of_network"])
        self.network.head.grow(self.task.num_classes)
        self._task_of_network, self._task_of_teacher = state["_task_of_network"], state["_task_of_teacher"]
        self._notes = {name: list(values) for name, values in state["_notes"].items()}

    def _replay_view(self, images: Tensor) -> Tensor:
        """Images of the memory (B, 3, s, s) -> augmented, in [0, 1]."""
        assert self.memory is not None
        seeds = torch.randint(2**62, (len(images),), generator=self.memory.generator).numpy().astype(np.uint64)
        recipe, size = BATCHED[self.config.memory_transform], images.shape[-1]
        return apply(images.permute(0, 2, 3, 1), recipe, size, seeds).float().div_(255)

    @staticmethod
    def _as_bytes(images: Tensor) -> Tensor:
        """Pixels in [0, 1] as the memory keeps them: bytes, which is what they were."""
        return images.mul(255).round().to(torch.uint8)

    def _blank_teacher(self) -> Network:
        return self._student(self._task_of_teacher)

    def _replay(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A whole batch, also beside an epoch's smaller last one; each process reads it, and its loss counts once."""
        assert self.memory is not None
        images, labels = self.memory.sample(self.config.batch_size)
        return self._replay_view(images.to(device)), labels.to(device)

    def _distil(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Over all classes, or only those that the teacher has met."""
        if self.config.kd_classes == "old":
            student, teacher = student[:, : self.task.known_classes], teacher[:, : self.task.known_classes]
        return distillation(student, teacher, self.config.temperature)

    def _entry(self, task: int) -> NetworkEntry:
        return self._entries[min(task, len(self._entries) - 1)]

    def _student(self, task: int) -> Network:
        """A fresh network for a task, without its head's outputs."""
        size = self.config.image_size or input_size(self.config.backbone)
        backbone, resized_to = self._entry(task).make(self._make_backbone, size)
        network = Network(backbone, lambda width: LinearHead(width, init="torch"), self.config.normalize, resized_to)
        return network.to(self.runtime.device)

    @property
    def _pretrained(self) -> bool:
        return self.network.backbone.info.report.matched > 0

    def _continues(self, task: int) -> bool:
        """Whether a task goes on with the weights of the one before."""
        return self.config.reuse != "none" and self._entry(task).same_network(self._entry(task - 1))

    def _next_student(self, task: Task) -> None:
        if self._continues(task.index):
            if self.config.carry == "last":
                self.choice.recall_last(self.network)
        else:
            old, self.network = self.network, self._student(task.index)
            self.network.head.grow(task.num_classes)
            if self.config.reuse == "matching":
                copy_matching(old, self.network)
        self._task_of_network = task.index

    def _note_forward_transfer(self, task: Task) -> None:
        class_il, task_il = 100 * evaluate(self, [task]).main[:2, 0] / len(task.test)
        self._notes["forward_acc"].append(float(class_il))
        self._notes["forward_acc_task_il"].append(float(task_il))

    def _refuse_random_paths(self) -> None:
        """A teacher in training mode must answer alike twice; the networks of the reference drop units, not paths."""
        assert self.teacher.network is not None
        if self.teacher.training and any(getattr(m, "drop_prob", None) for m in self.teacher.network.modules()):
            raise ConfigError("teacher_mode", ['"train" with drop_path makes the teacher random: choose "eval"'])
