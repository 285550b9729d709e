"""InfLoRA (Liang & Li, CVPR 2024, arXiv 2404.00228): low-rank branches that do not touch what old tasks feed a layer.

For task t every adapted attention layer gets one branch beside its frozen key and value projections:

    k = h W_k^T + (h A_t^T) B_k^T,   v = h W_v^T + (h A_t^T) B_v^T        A_t (r, D) fixed, B (D, r) trained from 0
    A_t = U[:, :r]^T / sqrt(3),      U: left singular vectors of Q C

C: second moment of the layer's inputs on task t; Q: projector onto what old tasks leave free (DualGPM or GPM). Training
B is training the full weight within the rows of A_t: orthogonal to old inputs, inside the new ones. Each task has its
own linear head and a cross-entropy over it alone; all heads answer at test time.

    L_t = CE(W_t f(x) + b_t, y - K)        K: first class of the task

Variants are fields: InfLoRA-b5 (blocks, subspace "gpm"), +CA (ca_epochs), DomainNet (fc_lrate, multistep), plain LoRA
(subspace "none"). In a domain-incremental stream there is one head per domain, combined by `domain_reduce`.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from convs.backbones import BackboneMaker, renew_final_norm
from convs.heads import TaskHeads, combine_heads
from convs.network import Network
from data.loading import for_each_batch
from data.stream import Task
from models.base import LEARNERS, Learner
from models.inflora.kv_lora import InputMoments, add_kv_lora
from models.inflora.subspace import GPM, DualGPM, Energy
from models.parts.alignment import AlignmentConfig, align_head
from models.parts.optim import group, quarter_cosine
from utils.config import Count, Rate, Whole
from utils.keys import key, redefault

log = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1)]
PROTECTED = {"subspace": ("dualgpm", "gpm")}


@LEARNERS.register("inflora")
class InfLoRA(Learner):
    """InfLoRA: interference-free low-rank branches on key and value, with b5, +CA and DomainNet variants."""

    class Config(AlignmentConfig):
        optimizer: Literal["sgd", "adam", "adamw"] = redefault(AlignmentConfig, "optimizer", "adam")
        lrate: Rate = redefault(AlignmentConfig, "lrate", 5e-4)
        weight_decay: Rate = redefault(AlignmentConfig, "weight_decay", 0.0)
        scheduler: Literal["constant", "multistep", "cosine", "cosine_lagging"] = key(  # type: ignore[assignment]
            "cosine_lagging",
            "learning rate over the epochs of a task; cosine_lagging: the reference's schedule for Adam, "
            "a cosine one epoch late, so that two epochs run at the full rate",
        )
        fc_lrate: Rate | None = key(None, "learning rate of the heads in all tasks; default: as the branches")
        rank: Count = key(10, "rows of each branch's A")
        blocks: Literal["all"] | tuple[Whole, ...] = key(
            "all", 'transformer blocks that get branches, counted from 0; InfLoRA-b5: "[0, 1, 2, 3, 4]"'
        )
        subspace: Literal["dualgpm", "gpm", "none"] = key(
            "dualgpm", "how old inputs are kept; none: plain LoRA, A drawn at random and trained too"
        )
        lamb: Share = key(0.95, "share of the input energy that is kept in the first task", only=PROTECTED)
        lame: Share = key(1.0, "the share that this grows towards, linearly over all tasks", only=PROTECTED)
        energy: Energy = key(
            "upstream",
            "what lamb is a share of: squared singular values of the moment C (the published runs), "
            "or those of the inputs, as the paper writes it, which keeps about twice as many directions",
            only=PROTECTED,
        )
        fresh_final_norm: bool = key(
            False, "replace the final norm by a fresh, frozen one, as the reference's +CA does on CIFAR-100"
        )
        ca_epochs: Whole = key(0, "epochs of classifier alignment (+CA: 5); 0: neither it nor its statistics")
        ca_lrate: Rate | None = redefault(AlignmentConfig, "ca_lrate", 0.01)
        ca_weight_decay: Rate | None = redefault(AlignmentConfig, "ca_weight_decay", 5e-4)
        domain_reduce: Literal["max", "mean", "sum_softmax"] = key(
            "max", "domain-incremental: a class's score from its scores over the domains' heads"
        )
        upstream: bool = key(
            False,
            "reproduce the reference: a branch fills rows that have no free direction with interfering ones, "
            "the first task's subspace of half the width or more is not complemented, a class's task in the alignment "
            "is counted as label // size of the current task",
        )

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.subspace != "none" and self.lame < self.lamb:
                yield "lame", f"is {self.lame}, below lamb ({self.lamb}): the share that is kept must not fall"

    streams = {"class", "domain"}
    needs_num_tasks = True  # lame is reached in the last task

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        self.network = Network(make_backbone(), TaskHeads, config.normalize)
        vit: Any = self.network.backbone.model
        if config.fresh_final_norm:
            renew_final_norm(self.network.backbone)
        vit.requires_grad_(False)
        self.layers = add_kv_lora(vit, config.blocks, config.rank)
        kind = {"dualgpm": DualGPM, "gpm": GPM, "none": None}[config.subspace]
        limits = config.lamb, config.lame, config.energy, config.upstream
        self.subspace = kind(len(self.layers), self.layers[0].width, *limits) if kind else None
        self.gaussians = config.class_gaussians(self.network.feature_dim, self.task, self.runtime)

    def before_task(self, task: Task) -> None:
        heads = self.network.head
        heads.grow(heads.num_classes + len(task.classes))
        heads.heads[-1].reset_parameters()  # torch's own initialisation, as the reference
        if self.subspace is None:
            for layer in self.layers:
                layer.start(nn.init.kaiming_uniform_(torch.empty_like(layer.A), a=math.sqrt(5)))
                layer.A.requires_grad_()
            return
        designs, ranks = self.subspace.design(self._input_moments(task), self.config.rank)
        for layer, design in zip(self.layers, designs, strict=True):
            layer.start(design)
        self._warn_of_lack(ranks.tolist(), "the task's inputs reach too few free directions")

    def train(self, mode: bool = True) -> "InfLoRA":
        """The network stays in evaluation mode: nothing in it may depend on the batch."""
        super().train(mode)
        self.network.eval()
        return self

    def param_groups(self) -> list[dict[str, Any]]:
        stage = self.stage
        assert stage is not None
        head_rate = stage.lrate if self.config.fc_lrate is None else self.config.fc_lrate
        return [
            group(self.network.backbone.parameters(), stage.lrate, stage.weight_decay),
            group(self.network.head.parameters(), head_rate, stage.weight_decay),
        ]

    def make_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        optimizer, scheduler = super().make_optimizer()
        assert self.stage is not None
        if self.stage.scheduler != "cosine_lagging":
            return optimizer, scheduler
        epochs = self.stage.epochs
        return optimizer, LambdaLR(optimizer, lambda epoch: lagging_cosine(epoch, epochs))

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        first = sum(self.network.head.sizes[: self.task.index])
        own = net(inputs)[:, first : first + len(self.task.classes)]  # the task's own head
        return F.cross_entropy(own, targets - self.task.classes.start)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Columns that the subspace stores, summed over the layers; directions left in the fullest layer."""
        if self.subspace is None:
            return {}
        columns, free = torch.stack([self.subspace.columns.sum(), self.subspace.free.min()]).tolist()  # one wait
        return {"memory_columns": columns, "least_free": free}

    def after_task(self, task: Task) -> None:
        if self.subspace is not None:
            self.subspace.update(self._input_moments(task), task.index, task.num_tasks)
            log.info("task %d/%d  subspace: %s", task.index + 1, task.num_tasks, self.subspace.describe())
            if not task.is_last:
                self._warn_of_lack(self.subspace.free.tolist(), "the subspace leaves too few directions")
        for layer in self.layers:
            layer.fold()
        if self.gaussians is not None:
            config = self.config
            view, size = task.train.view("test"), config.test_batch_size
            self.gaussians.measure(self.network.features, view, task.index, self.runtime, size)
            if task.index > 0:
                align_head(
                    self.network.head,
                    self.gaussians,
                    config.alignment(task),
                    task,
                    self.runtime,
                    decay=config.mean_decay,
                    upstream_index=config.upstream,
                    reduce=self._class_scores,
                    seed=config.seeds[0],
                )

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        assert images is not None
        return self._class_scores(self.network(images))

    def _class_scores(self, logits: Tensor) -> Tensor:
        """(B, outputs of all heads) -> (B, C): every class has one score, or one from each domain's head."""
        if self.task.domain is None:
            return logits
        return combine_heads(logits, self.task.total_classes, self.config.domain_reduce)

    def _input_moments(self, task: Task) -> Tensor:
        """C (L, D, D) of the task's training images, as the network is now."""
        moments = InputMoments(self.layers)
        view, size = task.train.view("train"), self.config.test_batch_size
        with self.runtime.stopwatch("statistics"):
            for_each_batch(view, lambda images, _: moments.add(self.network.features, images), self.runtime, size)
        self.runtime.reduce_sum(moments.sums)
        self.runtime.reduce_sum(moments.tokens)
        return moments.mean()

    def _warn_of_lack(self, found: list[int], when: str) -> None:
        """found: by layer, directions that are there for a branch."""
        if short := [layer for layer, count in enumerate(found) if count < self.config.rank]:
            listed = ", ".join(f"layer {layer} {found[layer]}" for layer in short)
            log.warning("%s for a branch of rank %d: %s. A lower lamb or rank helps", when, self.config.rank, listed)


def lagging_cosine(epoch: int, epochs: int) -> float:
    """The reference steps its cosine one epoch late."""
    return quarter_cosine(max(epoch - 1, 0), epochs)
