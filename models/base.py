"""The contract between a learner and the harness.

A learner is a module that answers a few hooks; the harness owns the loop, the loaders, the device, evaluation, results
and checkpoints. Order in one task (`models/parts/loop.py: learn`):

    before_task -> stage* -> after_task,   then frozen and predict on the test images of all tasks seen
    stage: [[prepare -> (part -> loss)* -> after_backward -> after_step]* -> after_epoch]* -> after_stage
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from convs.backbones import BackboneMaker
from convs.network import Network
from data.loading import View
from data.stream import Task, TaskInfo
from models.parts.gradient import rows_of
from models.parts.optim import build_optimizer, build_scheduler, group
from models.parts.stages import Progress, Stage, stage_of
from models.parts.varied import Varied, Weights
from utils.config import RunConfig, TrainConfig
from utils.registry import Registry
from utils.runtime import Runtime

LEARNERS: Registry[type["Learner"]] = Registry("learner")


@dataclass(frozen=True)
class Report:
    """numbers: what a method adds to result.json, under its own keys. pictures: name -> images (N, 3, s, s) in [0, 1]
    for the run's plots."""

    numbers: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)


class Learner(nn.Module):
    """Base of every learner; a subclass answers the hooks that it needs and registers itself.

    Config: the method's own keys; of a learner that trains nothing a `RunConfig`.
    streams: "class" and, where the method defines it, "domain". example: the smallest settings that make sense, for
    tests. needs_num_tasks: the length of the stream must be known beforehand. waits: {what: why} of the waits for the
    device inside a step that are meant. transient: attributes that live within a step or a task; the harness sets them
    to None, a checkpoint leaves them out.
    frozen_names: names of values that `frozen` knows; may grow with the tasks. needs_images: False where `predict`
    reads these values alone.

    task: the task at hand; there from before `build` on, also in a resumed run. data: the same with its images, while
    it is learned. stage: what is being trained, or None. progress: how far it is.
    State is automatic (models/parts/state.py): parameters, buffers, generators, and whatever has a state_dict.
    """

    Config: ClassVar[type[RunConfig]] = TrainConfig
    streams: ClassVar[set[str]] = {"class"}
    example: ClassVar[dict[str, Any]] = {}
    needs_num_tasks: ClassVar[bool] = False
    waits: ClassVar[dict[str, str]] = {}
    transient: ClassVar[set[str]] = set()
    frozen_names: Sequence[str] = ()
    needs_images: bool = True

    config: Any
    network: Network
    task: TaskInfo
    data: Task | None
    stage: Stage | None
    progress: Progress

    def __init__(self, config: RunConfig, runtime: Runtime, task: TaskInfo):
        super().__init__()
        self.config, self.runtime, self.task = config, runtime, task
        self.data, self.stage, self.progress = None, None, Progress()

    def build(self, make_backbone: BackboneMaker) -> None:
        """Once: make `self.network` and all parts, also those that later tasks fill."""
        raise NotImplementedError(
            f"{type(self).__name__}.build is missing: it has to make self.network, for example "
            "self.network = Network(make_backbone(), LinearHead, self.config.normalize)"
        )

    def before_task(self, task: Task) -> None:
        """Make room for the task's classes: grow heads, freeze, design branches, undo what must not last."""
        raise NotImplementedError(
            f"{type(self).__name__}.before_task is missing: it has to make the head as wide as task.total_classes, "
            "for example self.network.head.grow(task.total_classes)"
        )

    def stages(self, task: Task) -> Sequence[Stage]:
        """What is trained in this task, in order; (): nothing. Asked again before each stage and on resume: draws
        nothing, changes nothing. Default: one stage, from the config."""
        stage = stage_of(self.config, task)
        return (stage,) if stage.epochs else ()

    def train_data(self, task: Task) -> View:
        """The images that the stage trains on; asked once a stage."""
        return task.train.view("train")

    def param_groups(self) -> list[dict[str, Any]]:
        """What the optimiser moves in this stage, as torch parameter groups; default: all of its module that is not
        frozen."""
        assert self.stage is not None
        module: nn.Module = getattr(self, self.stage.module)
        return [group(module.parameters(), self.stage.lrate, self.stage.weight_decay)]

    def make_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        """Fresh for each stage; the scheduler is stepped once an epoch."""
        assert self.stage is not None
        fused = self.runtime.device.type == "cuda"
        optimizer = build_optimizer(self.stage, self.param_groups(), fused, self.config.sam)
        return optimizer, build_scheduler(self.stage, optimizer)

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Any, Any]:
        """Once a batch, before `loss`, which may run twice on it, or on its parts: what need not be computed twice, and
        what is drawn once."""
        return images, targets

    def part(self, inputs: Any, targets: Any, rows: slice) -> tuple[Any, Any]:
        """With "accumulate", what `loss` gets of those rows of a batch. Default: of every tensor with as many rows as
        `targets` those, and all the rest of what `prepare` gave, which then counts in each part as in the batch."""
        count = len(targets)
        return rows_of(inputs, rows, count), rows_of(targets, rows, count)

    def loss(self, net: nn.Module, inputs: Any, targets: Any) -> Tensor:
        """Mean loss over the batch, or over a part of it, on the device. Changes no state.

        net: the stage's module, maybe wrapped for several processes or compiled: call it, not `self.network`.
        inputs, targets: what `prepare` gave.
        """
        raise NotImplementedError(
            f"{type(self).__name__}.loss is missing: return the mean loss of a batch, for example "
            "cross_entropy(net(inputs), targets), or let stages() return () if nothing is trained"
        )

    def after_backward(self) -> None:
        """Gradients of the whole batch are there and may be changed, or dropped (None); twice a step with SAM, once
        with "accumulate"."""

    def after_step(self, images: Tensor, targets: Tensor) -> None:
        """Once a batch, after the optimiser's step: pixels in [0, 1] and labels of the batch."""

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Numbers for the epoch's log line. epoch: from 1."""
        return {}

    def after_stage(self, task: Task) -> None:
        """After each stage, the last included; `self.stage` is the one that ended."""

    def after_task(self, task: Task) -> None:
        """Statistics, alignment, merging, exemplars. Evaluation comes after this."""

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, s, s) in [0, 1] -> (B, D): what probes, nearest means and drift read."""
        return self.network.features(images)

    def frozen(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Of these names, what will never change again for an image: name -> (B, ...). Computed once an image, then
        stored."""
        return {}

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """(B, 3, s, s) in [0, 1] and the stored values of these images -> scores of all classes seen (B, C), which
        must not depend on the rest of the batch; several scores by name, the main one first, the same names in every
        task. images: None where `needs_images` is False and all values are stored. A class that cannot be scored yet
        scores lowest."""
        assert images is not None
        return self.network(images)

    def report(self) -> Report:
        """What the method adds to results and plots; asked after `before_task` (pictures) and `after_task`."""
        return Report()

    def landscape(self) -> Varied:
        """After a task, how its loss landscape is drawn; default: the training loss over every weight that trained.
        `self.task` may be an older task than the head's last."""
        weights = {name: Weights(p) for name, p in self.named_parameters() if p.requires_grad}
        return Varied(weights, lambda images, targets: self.loss(self.network, *self.prepare(images, targets)))
