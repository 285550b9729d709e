"""InfLoRA (Liang & Li, CVPR 2024, arXiv 2404.00228): low-rank branches that do not touch what old tasks feed a layer.

For task t every adapted attention layer gets one branch beside its frozen key and value projections:

    k = h W_k^T + (h A_t^T) B_k^T,   v = h W_v^T + (h A_t^T) B_v^T        A_t (r, D) fixed, B (D, r) trained from 0
    A_t = U[:, :r]^T / sqrt(3),      U: left singular vectors of Q C

C: second moment of the layer's inputs on task t; Q: projector onto what old tasks leave free (DualGPM or GPM). Training
B is training the full weight within the rows of A_t: orthogonal to old inputs, inside the new ones. Each task has its
own linear head and a cross-entropy over it alone; all heads answer at test time.

    L_t = CE(W_t f(x) + b_t, y - K)        K: first class of the task

Variants are fields: InfLoRA-b5 (blocks, memory "gpm"), +CA (ca_epochs), DomainNet (fc_lrate, multistep), plain LoRA
(memory "none"). In a domain-incremental stream there is one head per domain, combined by `domain_reduce`.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from convs.backbones import renew_final_norm
from convs.branches import InputMoments, add_branches
from convs.heads import TaskHeads, combine_heads
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.alignment import Alignment, align, mean_decay, upstream_tasks
from models.parts.gaussians import ClassGaussians
from models.parts.loop import for_each_batch
from models.parts.optim import build_optimizer, build_scheduler, group
from models.parts.subspace import GPM, DualGPM, Energy
from utils.config import Count, Rate, RunConfig, Whole
from utils.data_manager import Task
from utils.runtime import Runtime
from utils.seed import mix

log = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1)]


class InfLoRAConfig(RunConfig):
    optimizer: Literal["sgd", "adam", "adamw"] = Field("adam", description="built anew for each task")
    lrate: Rate = Field(5e-4, description="learning rate of every later task")
    weight_decay: Rate = Field(0.0, description="weight decay of every later task")
    scheduler: Literal["constant", "multistep", "cosine", "cosine_lagging"] = Field(  # type: ignore[assignment]
        "cosine_lagging",
        description="learning rate over the epochs of a task; cosine_lagging: the reference's schedule for Adam, "
        "a cosine one epoch late, so that two epochs run at the full rate",
    )
    fc_lrate: Rate | None = Field(None, description="learning rate of the heads in all tasks; default: as the branches")
    rank: Count = Field(10, description="rows of each branch's A")
    blocks: Literal["all"] | tuple[Whole, ...] = Field(
        "all", description='transformer blocks that get branches, counted from 0; InfLoRA-b5: "[0, 1, 2, 3, 4]"'
    )
    memory: Literal["dualgpm", "gpm", "none"] = Field(
        "dualgpm", description="how old inputs are kept; none: plain LoRA, A drawn at random and trained too"
    )
    lamb: Share = Field(0.95, description="share of the input energy that the memory keeps in the first task")
    lame: Share = Field(1.0, description="the share that this grows towards, linearly over all tasks")
    energy: Energy = Field(
        "upstream",
        description="what lamb is a share of: squared singular values of the moment C (the published runs), "
        "or those of the inputs, as the paper writes it, which keeps about twice as many directions",
    )
    fresh_final_norm: bool = Field(
        False, description="replace the final norm by a fresh, frozen one, as the reference's +CA does on CIFAR-100"
    )
    ca_epochs: Whole = Field(0, description="epochs of classifier alignment (+CA: 5); 0: neither it nor its statistics")
    ca_lrate: Rate = Field(0.01, description="learning rate of the alignment")
    ca_weight_decay: Rate = Field(5e-4, description="weight decay of the alignment")
    ca_samples: Count = Field(256, description="features drawn per class and alignment epoch, and per step")
    ca_with_logit_norm: Rate = Field(0.1, description="temperature of the normalised logits; 0: plain logits")
    mean_decay: Rate = Field(0.1, description="how far the means of the oldest classes shrink in alignment; 0: not")
    domain_reduce: Literal["max", "mean", "sum_softmax"] = Field(
        "max", description="domain-incremental: a class's score from its scores over the domains' heads"
    )
    upstream: bool = Field(
        False,
        description="reproduce the reference: a branch fills rows that have no free direction with interfering ones, "
        "the first task's memory of half the width or more is not complemented, a class's task in the alignment is "
        "counted as label // size of the current task",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(given)
        if given.get("memory") == "none":
            for key in sorted({"lamb", "lame", "energy"} & set(given)):
                yield key, 'has no effect with "memory": "none": drop the key'
        if not given.get("ca_epochs"):
            alignment = {"ca_lrate", "ca_weight_decay", "ca_samples", "ca_with_logit_norm", "mean_decay"}
            for key in sorted(alignment & set(given)):
                yield key, 'has no effect without "ca_epochs": give that too, or drop the key'
        lamb, lame = (given.get(key, cls.model_fields[key].default) for key in ("lamb", "lame"))
        if isinstance(lamb, int | float) and isinstance(lame, int | float) and lame < lamb:
            yield "lame", f"is {lame}, below lamb ({lamb}): the share that is kept must not fall"


@LEARNERS.register("inflora")
class InfLoRA(Learner):
    """InfLoRA: interference-free low-rank branches on key and value, with b5, +CA and DomainNet variants."""

    Config = InfLoRAConfig
    config: InfLoRAConfig

    def __init__(self, config: InfLoRAConfig, make_backbone: MakeBackbone, runtime: Runtime):
        super().__init__(config, make_backbone, runtime)
        self.network = self.build_network(make_backbone, TaskHeads)
        vit: Any = self.network.backbone.model
        if config.fresh_final_norm:
            renew_final_norm(self.network.backbone)
        vit.requires_grad_(False)
        self.layers = add_branches(vit, config.blocks, config.rank)
        kind = {"dualgpm": DualGPM, "gpm": GPM, "none": None}[config.memory]
        limits = config.lamb, config.lame, config.energy, config.upstream
        self.memory = kind(len(self.layers), self.layers[0].width, *limits) if kind else None
        self.gaussians = ClassGaussians(self.network.feature_dim) if config.ca_epochs else None

    def before_task(self, task: Task) -> None:
        heads = self._heads
        heads.grow(heads.num_classes + len(task.classes))
        heads.heads[-1].reset_parameters()  # type: ignore[operator]  # torch's own initialisation, as the reference
        if self.memory is None:
            for layer in self.layers:
                layer.start(nn.init.kaiming_uniform_(torch.empty_like(layer.A), a=math.sqrt(5)))
                layer.A.requires_grad_()
            return
        designs, ranks = self.memory.design(self.input_moments(task), self.config.rank)
        for layer, design in zip(self.layers, designs, strict=True):
            layer.start(design)
        self._warn_of_lack(ranks.tolist(), "the task's inputs reach too few free directions")

    def train(self, mode: bool = True) -> "InfLoRA":
        """The network stays in evaluation mode: nothing in it may depend on the batch."""
        super().train(mode)
        self.network.eval()
        return self

    def param_groups(self) -> list[dict[str, Any]]:
        head_rate = self.lrate if self.config.fc_lrate is None else self.config.fc_lrate
        return [
            group(self.network.backbone.parameters(), self.lrate, self.weight_decay),
            group(self.network.head.parameters(), head_rate, self.weight_decay),
        ]

    def make_optimizer(self, epochs: int) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(self.config, self.param_groups(), fused=self.runtime.device.type == "cuda")
        if self.config.scheduler != "cosine_lagging":
            return optimizer, build_scheduler(self.config, optimizer, epochs)
        return optimizer, LambdaLR(optimizer, lambda epoch: lagging_cosine(epoch, epochs))

    def loss(self, net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        first = sum(self._heads.sizes[: self.task.index])
        own = net(images)[:, first : first + len(self.task.classes)]  # the task's own head
        return F.cross_entropy(own, targets - self.task.classes.start)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Columns that the memory stores, summed over the layers; directions left in the fullest layer."""
        if self.memory is None:
            return {}
        return {"memory_columns": int(self.memory.columns.sum()), "least_free": int(self.memory.free.min())}

    def after_task(self, task: Task) -> None:
        if self.memory is not None:
            self.memory.update(self.input_moments(task), task.index, task.num_tasks)
            log.info("task %d/%d  memory: %s", task.index + 1, task.num_tasks, self.memory.describe())
            if task.index + 1 < task.num_tasks:
                self._warn_of_lack(self.memory.free.tolist(), "the memory leaves too few directions")
        for layer in self.layers:
            layer.fold()
        if self.gaussians is not None:
            view, size = task.train.view("test"), self.config.test_batch_size
            self.gaussians.measure(self.network.features, view, task.index, self.runtime, size)
            if task.index > 0:
                with self.runtime.stopwatch("alignment"):
                    self._align(task, self.gaussians)

    def predict(self, images: Tensor) -> Tensor:
        return self._class_scores(self.network(images))

    def statistics_bytes(self, tasks: Sequence[Task]) -> int:
        classes = sum(len(task.classes) for task in tasks)
        return self.gaussians.planned_bytes(classes, len(tasks)) if self.gaussians is not None else 0

    def stored_bytes(self) -> int:
        """Also the key and value weights that hold the past branches."""
        folded = sum(layer.remainder.numel() * layer.weight.element_size() for layer in self.layers)
        return super().stored_bytes() + folded

    @property
    def _heads(self) -> TaskHeads:
        assert isinstance(self.network.head, TaskHeads)
        return self.network.head

    def _class_scores(self, logits: Tensor) -> Tensor:
        """(B, outputs of all heads) -> (B, C): every class has one score, or one from each domain's head."""
        if self.task.domain is None:
            return logits
        return combine_heads(logits, self.task.total_classes, self.config.domain_reduce)

    def input_moments(self, task: Task) -> Tensor:
        """C (L, D, D) of the task's training images, as the network is now."""
        moments = InputMoments(self.layers)
        view, size = task.train.view("train"), self.config.test_batch_size
        with self.runtime.stopwatch("statistics"):
            for_each_batch(view, lambda images, _: moments.add(self.network.features, images), self.runtime, size)
        self.runtime.reduce_sum(moments.sums)
        self.runtime.reduce_sum(moments.tokens)
        return moments.mean()

    def _align(self, task: Task, gaussians: ClassGaussians) -> None:
        """Train all heads on samples of the class Gaussians; they stay so, and later heads join them."""
        config, heads, tau = self.config, self._heads, self.config.ca_with_logit_norm
        tasks = gaussians.tasks
        if config.upstream and task.domain is None:
            tasks = upstream_tasks(gaussians.labels, len(task.classes))
        aligned = align(
            *heads.stacked(),
            heads.sizes,
            gaussians,
            Alignment(
                config.ca_epochs, config.ca_lrate, config.ca_weight_decay, config.momentum, config.ca_samples, tau=tau
            ),
            mean_factor=mean_decay(tasks, task.index, config.mean_decay),
            reduce=self._class_scores,
            generator=torch.Generator(self.runtime.device).manual_seed(mix(config.seeds[0], task.index)),
        )  # fmt: skip
        assert aligned.bias is not None
        heads.set_stacked(aligned.weight, aligned.bias)

    def _warn_of_lack(self, found: list[int], when: str) -> None:
        """found: by layer, directions that are there for a branch."""
        if short := [layer for layer, count in enumerate(found) if count < self.config.rank]:
            listed = ", ".join(f"layer {layer} {found[layer]}" for layer in short)
            log.warning("%s for a branch of rank %d: %s. A lower lamb or rank helps", when, self.config.rank, listed)


def lagging_cosine(epoch: int, epochs: int) -> float:
    """cos(99 pi max(e - 1, 0) / (200 (K - 1))): the reference steps its cosine one epoch late. K = 1: constant."""
    return math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * (epochs - 1))) if epochs > 1 else 1.0
