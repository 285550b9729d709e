"""HCL: Heterogeneous Continual Learning (Madaan et al., CVPR 2023, arXiv 2306.08593).

The architecture changes over the stream, so weights cannot be handed on: each task's student S, fresh where the
architecture is new, learns old classes from the network G of the task before, its teacher.

    task 0       L = CE(S(x), y)                                                          CE: smoothed labels, N classes
    distil       L = CE(S(x), y) + alpha KD(S(x), G(x))                                   KD: T^2 KL(G || S)
    distilbuf    ... + w CE(S(x_b), y_b)                                                  x_b from a reservoir memory
    qdi          L = CE(S(x), y) + alpha [KD(S(x), G(x)) + KD(S(X~), G(X~))]

X~: up to `synthetic_size` images of old classes made from images of the new task, once a task (Quick Deep Inversion,
models/parts/inversion.py); all of them are in every step. The head has all N outputs from the start. The network that a
task ends with is that of a chosen epoch (models/parts/selection.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from convs.backbones import input_size
from convs.heads import LinearHead
from convs.network import Network
from data.batched import BATCHED, apply
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.inversion import InversionSettings
from models.parts.loop import evaluate
from models.parts.losses import distillation
from models.parts.memory import ReservoirMemory
from models.parts.optim import build_optimizer, build_scheduler
from models.parts.selection import Selection
from models.parts.stream import StreamEntry, copy_matching, entry_faults
from models.parts.synthetic import SyntheticImages, SyntheticSettings
from models.parts.teacher import Teacher
from utils.config import Count, Rate, RunConfig, Whole
from utils.data_manager import Task
from utils.errors import ConfigError
from utils.runtime import Runtime
from utils.seed import mix

# What `"upstream": true` stands for, where the file does not say otherwise.
UPSTREAM: Mapping[str, Any] = {
    "shuffle": False, "momentum": 0.0, "weight_decay": 0.0, "scheduler": "constant", "statistics": "bn_or_conv",
    "statistics_source": "current", "inversion_start": "current", "select": "slack", "select_on": "test",
    "carry": "last", "reuse": "same_arch", "kd_classes": "all", "mask_unseen": False,
}  # fmt: skip
ONLY_WITH = {
    "distilbuf": {"memory_size", "memory_transform", "buffer_weight"},
    "qdi": {
        "synthetic_size", "inversion_steps", "inversion_lrate", "inversion_feature", "inversion_variation",
        "inversion_l2", "inversion_warmup", "inversion_start", "inversion_jitter", "statistics", "statistics_source",
        "statistics_ln", "statistics_norm",
    },
}  # fmt: skip


class HCLConfig(RunConfig):
    variant: Literal["distil", "distilbuf", "qdi"] = Field(
        "distil", description="distillation alone, with a replay buffer, or with inverted images"
    )
    stream: tuple[str | dict[str, Any] | None, ...] | None = Field(
        None,
        min_length=1,
        description='backbone of each task: a name, null (the run\'s "backbone" and "weights") or {"name", "weights", '
        '"image_size", "optimizer", "lrate", "weight_decay", "momentum", constructor arguments}; the last serves all '
        "later tasks; default: the run's backbone for all",
    )
    lrate: Rate = Field(0.03, description="learning rate of every later task")
    epochs: Whole = Field(200, description="epochs of every later task")
    alpha: Rate = Field(3.0, description="weight of the distillation; 0: fresh students without a teacher's help")
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="of the labels, over all classes")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="T of the distillation")
    kd_classes: Literal["all", "old"] = Field("all", description="classes over which teacher and student are compared")
    buffer_weight: Rate = Field(0.3, description="w, weight of the cross-entropy on the memory (distilbuf)")
    memory_size: Count = Field(200, description="images in the memory (distilbuf)")
    memory_transform: str = Field("pad4_crop_flip", description="recipe for images from the memory (distilbuf)")
    synthetic_size: Count = Field(200, description="inverted images per task, about equally many of each class (qdi)")
    inversion_steps: Whole = Field(500, description="steps of the inversion (qdi)")
    inversion_lrate: Rate = Field(0.03, description="peak rate of the inversion, in units of normalised pixels (qdi)")
    inversion_feature: Rate = Field(0.2, description="w_f, weight of the layer statistics (qdi)")
    inversion_variation: Rate = Field(0.003, description="w_v, weight of the total variation (qdi)")
    inversion_l2: Rate = Field(0.003, description="w_2, weight of the images' norm (qdi)")
    inversion_warmup: Count = Field(100, description="steps in which the rate rises (qdi)")
    inversion_start: Literal["current", "noise"] = Field(
        "current", description="images of the new task (Quick Deep Inversion) or noise (DeepInversion) (qdi)"
    )
    inversion_jitter: Whole = Field(0, description="pixels by which images are rolled before the teacher (qdi)")
    statistics: Literal["auto", "bn", "conv", "ln", "bn_or_conv", "none"] = Field(
        "auto",
        description="whose statistics are matched; auto: BatchNorm and LayerNorm layers, else convolutions (qdi)",
    )
    statistics_source: Literal["previous", "current"] = Field(
        "previous", description="targets of layers without running statistics: the teacher's task, or the new one (qdi)"
    )
    statistics_ln: Literal["auto", "in", "norm"] = Field(
        "auto", description="LayerNorm's input as it is or normalised; auto: normalised for pre-trained networks (qdi)"
    )
    statistics_norm: Literal["sum", "per_layer_mean"] = Field("sum", description="of the layers' terms (qdi)")
    select: Literal["last", "best", "slack"] = Field(
        "best", description="epoch whose network a task ends with; slack: the last that did not fall by more than slack"
    )
    slack: Rate = Field(0.2, description='points that "select": "slack" lets an epoch fall')
    select_on: Literal["val", "test"] = Field(
        "val", description='images that select reads; val: the share "validation" of the training images (default 0.1)'
    )
    carry: Literal["last", "selected"] = Field(
        "selected", description="weights that the next task goes on from where the architecture stays"
    )
    reuse: Literal["none", "same_arch", "matching"] = Field(
        "same_arch", description="weights handed on: none, all where the architecture stays, also matching tensors else"
    )
    teacher_mode: Literal["eval", "train"] = Field(
        "eval", description="train: the teacher's BatchNorm goes by the batch and drifts, its dropout drops"
    )
    mask_unseen: bool = Field(True, description="leave classes that have not come yet out of predictions")
    upstream: bool = Field(
        False,
        description="the reference's choices for all keys that are not given: natural order, bare SGD at a constant "
        "rate, BatchNorm or current convolution statistics, slack on the test images, a teacher in training mode "
        "(qdi), predictions among all classes, also those to come",
    )

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        upstream = given.get("upstream") is True
        mode = {"teacher_mode": "train"} if given.get("variant") == "qdi" else {}
        values = {**UPSTREAM, **mode} if upstream else {}
        choice = {
            key: (values | dict(given)).get(key, cls.model_fields[key].default) for key in ("select", "select_on")
        }
        return values | ({"validation": 0.1} if choice["select"] != "last" and choice["select_on"] == "val" else {})

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(given)
        for variant, keys in ONLY_WITH.items():
            if given.get("variant", "distil") != variant:
                for key in sorted(keys & set(given)):
                    yield key, f'has no effect unless "variant" is "{variant}": drop the key'
        if (name := given.get("memory_transform")) is not None and name not in BATCHED:
            yield "memory_transform", f'"{name}" is unknown: --list shows the transforms'
        if "slack" in given and (cls.implied(given) | dict(given)).get("select") != "slack":
            yield "slack", 'has no effect unless "select" is "slack": drop the key'
        if cls.implied(given).get("validation") and given.get("validation") == 0:
            yield "validation", 'is 0, but epochs are chosen on it: give a share, or "select": "last"'
        for sentence in entry_faults(given.get("stream")):
            yield "stream", sentence

    def synthetic_settings(self) -> SyntheticSettings:
        """The keys of qdi."""
        inversion = InversionSettings(
            steps=self.inversion_steps,
            lrate=self.inversion_lrate,
            feature=self.inversion_feature,
            variation=self.inversion_variation,
            l2=self.inversion_l2,
            warmup=self.inversion_warmup,
            jitter=self.inversion_jitter,
            per_layer=self.statistics_norm == "per_layer_mean",
            smoothing=self.smoothing,
        )
        return SyntheticSettings(
            self.synthetic_size,
            self.inversion_start,
            self.statistics,
            self.statistics_source,
            self.statistics_ln,
            inversion,
        )


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
    config: HCLConfig

    def __init__(self, config: HCLConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self._own_backbone = make_backbone
        self._entries = [StreamEntry.read(value) for value in config.stream or (None,)]
        self._task_of_network = self._task_of_teacher = 0
        self._notes: dict[str, list[Any]] = {"forward_acc": [], "forward_acc_task_il": [], "selected_epoch": []}
        self._pictures: dict[str, Tensor] = {}
        self.network = self._student(0)
        self.teacher = Teacher(lambda: self.network, self._blank_teacher, training=config.teacher_mode == "train")
        self.selection = Selection(config.select, config.slack)
        self.memory = ReservoirMemory(config.memory_size, mix(config.seeds[0], 6))
        synthetic = config.synthetic_settings()
        self.synthetic = SyntheticImages(synthetic, config.seeds[0], runtime, config.test_batch_size)

    def before_task(self, task: Task) -> None:
        """The network that stands becomes the teacher, images are made from it, the next student takes its place."""
        if task.index == 0:
            self._head(self.network).grow(task.num_classes)
        else:
            self.teacher.update()
            self._task_of_teacher = self._task_of_network
            self._refuse_random_paths()
            if self.config.variant == "qdi":
                self._pictures = self.synthetic.make(self.teacher, task, self._pretrained, self.restartable)
            self._next_student(task)
            self._note_forward_transfer(task)
        self.selection.restart()

    def train_data(self, task: Task):
        """For the memory, images as they are beside the augmented ones."""
        return task.train.view("train", beside="test" if self.config.variant == "distilbuf" else None)

    def make_optimizer(self, epochs: int) -> tuple[Optimizer, LRScheduler]:
        config = self.config.model_copy(update=dict(self._entry(self.task.index).training))
        optimizer = build_optimizer(config, self.param_groups(), fused=self.runtime.device.type == "cuda")
        return optimizer, build_scheduler(config, optimizer, epochs)

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Inputs, Tensor]:
        """images (B, 3, s, s), or with those for the memory behind them (B, 6, s, s)."""
        current, taught = images[:, :3], None
        if self.teacher and self.config.alpha:
            with self.runtime.autocast():
                if self.synthetic:
                    self.synthetic.targets.again(self.teacher)
                taught = self.teacher(current)
        if self.config.variant == "distilbuf" and len(self.memory):
            return Inputs(current, taught, *self._replay(len(targets), images.device)), targets
        return Inputs(current, taught), targets

    def loss(self, net: nn.Module, images: Inputs, targets: Tensor) -> Tensor:
        return torch.stack(list(self.terms(net, images, targets).values())).sum()

    def terms(self, net: nn.Module, inputs: Inputs, targets: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the loss. The student sees its batches one after another, never joined: BatchNorm
        tells them apart."""
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
        if self.config.variant == "distilbuf":
            shares = self.runtime.gather((self.stored(images[:, 3:]), targets))
            for share, labels in shares:
                self.memory.insert(share.to(images.device), labels.to(images.device))

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Mean of class- and task-incremental accuracy over the tasks seen, on the images to choose by."""
        if self.config.select == "last":
            return {}
        tasks = self.task.seen
        if self.config.select_on == "val":
            tasks = [replace(task, test=task.val) for task in tasks if task.val is not None]
        tasks = [task for task in tasks if len(task.test)]
        correct = evaluate(self, tasks)
        score = float(np.mean(100 * correct / [len(task.test) for task in tasks])) if tasks else float("nan")
        self.selection.offer(epoch - 1, score, self.network)
        chosen = self.selection.epoch
        return {"select_acc": score} | ({} if chosen is None else {"selected_epoch": chosen + 1})

    def after_task(self, task: Task) -> None:
        """The chosen epoch's network stands from here on; its layers' statistics are the next inversion's targets."""
        again = task.index + 1 < task.num_tasks and self._continues(task.index + 1)
        self._notes["selected_epoch"].append(None if self.selection.epoch is None else self.selection.epoch + 1)
        self.selection.finish(self.network, keep_last=again and self.config.carry == "last")
        if self.config.variant == "qdi" and task.index + 1 < task.num_tasks:
            self.eval()
            self.synthetic.measure(self.network, task, self._pretrained)

    def predict(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        return logits[:, : self.task.total_classes] if self.config.mask_unseen else logits

    @property
    def lrate(self) -> float:
        return float(self._entry(self.task.index).training.get("lrate", super().lrate))

    @property
    def weight_decay(self) -> float:
        return float(self._entry(self.task.index).training.get("weight_decay", super().weight_decay))

    def results(self) -> dict[str, Any]:
        """forward_acc[t-1]: accuracy in percent on task t of the student that is about to learn it. selected_epoch[t]:
        from 1; null: the last."""
        return dict(self._notes)

    def pictures(self) -> dict[str, Tensor]:
        return self._pictures

    def parts(self) -> dict[str, Any]:
        parts = {"teacher": self.teacher, "selection": self.selection}
        if self.config.variant == "distilbuf":
            return parts | {"memory": self.memory}
        return parts | {"synthetic": self.synthetic} if self.config.variant == "qdi" else parts

    def get_extra_state(self) -> dict[str, Any]:
        notes = {name: list(values) for name, values in self._notes.items()}
        return {"network": self._task_of_network, "teacher": self._task_of_teacher, "notes": notes}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Called before the network's own weights are loaded: put a network of their shape in place."""
        if not self._entry(state["network"]).same_network(self._entry(self._task_of_network)):
            self.network = self._student(state["network"])
        self._task_of_network, self._task_of_teacher = state["network"], state["teacher"]
        self._notes = state["notes"]

    def stored(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] as the memory keeps them: bytes, which is what they were."""
        return images.mul(255).round().to(torch.uint8)

    def replay_view(self, images: Tensor) -> Tensor:
        """Images of the memory (B, 3, s, s) -> augmented, in [0, 1]."""
        seeds = torch.randint(2**62, (len(images),), generator=self.memory.generator).numpy().astype(np.uint64)
        recipe, size = BATCHED[self.config.memory_transform], images.shape[-1]
        return apply(images.permute(0, 2, 3, 1), recipe, size, seeds).float().div_(255)

    def _replay(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Each process reads the same images: their loss counts once."""
        images, labels = self.memory.sample(min(count * self.runtime.world, self.config.batch_size))
        return self.replay_view(images.to(device)), labels.to(device)

    def _distil(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Over all classes, or only those that the teacher has met."""
        if self.config.kd_classes == "old":
            student, teacher = student[:, : self.task.known_classes], teacher[:, : self.task.known_classes]
        return distillation(student, teacher, self.config.temperature)

    def _entry(self, task: int) -> StreamEntry:
        return self._entries[min(task, len(self._entries) - 1)]

    def _student(self, task: int) -> Network:
        """A fresh network for a task, without its head's outputs."""
        size = self.config.image_size or input_size(self.config.backbone)
        backbone, info, resized_to = self._entry(task).make(self._own_backbone, size)
        network = self.build_network(lambda: (backbone, info), lambda width: LinearHead(width, init="torch"))
        network.image_size = resized_to
        return network.to(self.runtime.device)

    def _blank_teacher(self) -> Network:
        info, network = self.backbone_info, self._student(self._task_of_teacher)
        self.backbone_info = info
        return network

    @property
    def _pretrained(self) -> bool:
        return self.backbone_info.report.matched > 0

    def _continues(self, task: int) -> bool:
        """Whether a task goes on with the weights of the one before."""
        return self.config.reuse != "none" and self._entry(task).same_network(self._entry(task - 1))

    def _next_student(self, task: Task) -> None:
        if self._continues(task.index):
            if self.config.carry == "last":
                self.selection.recall_last(self.network)
        else:
            old, self.network = self.network, self._student(task.index)
            self._head(self.network).grow(task.num_classes)
            if self.config.reuse == "matching":
                copy_matching(old, self.network)
        self._task_of_network = task.index

    def _note_forward_transfer(self, task: Task) -> None:
        class_il, task_il = 100 * evaluate(self, [task])[:, 0] / len(task.test)
        self._notes["forward_acc"].append(float(class_il))
        self._notes["forward_acc_task_il"].append(float(task_il))

    def _refuse_random_paths(self) -> None:
        """A teacher in training mode must answer alike twice; the networks of the reference drop units, not paths."""
        assert self.teacher.network is not None
        if self.teacher.training and any(getattr(m, "drop_prob", None) for m in self.teacher.network.modules()):
            raise ConfigError("teacher_mode", ['"train" with drop_path makes the teacher random: choose "eval"'])

    @staticmethod
    def _head(network: Network) -> LinearHead:
        assert isinstance(network.head, LinearHead)
        return network.head
