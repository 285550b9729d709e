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
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from convs.branches import InputMoments, add_branches
from convs.heads import TaskHeads
from models.base import LEARNERS, Learner, MakeBackbone
from models.parts.loop import for_each_batch
from models.parts.optim import build_optimizer, build_scheduler, group
from models.parts.subspace import GPM, DualGPM, Energy
from utils.config import Count, Rate, RunConfig, Whole
from utils.data_manager import Task
from utils.runtime import Runtime

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
    fresh_norm: bool = Field(False, description="replace the final LayerNorm by a fresh, frozen one (CA on CIFAR-100)")
    domain_reduce: Literal["max", "mean"] = Field(
        "max", description="score of a class over the heads of all domains, in a domain-incremental stream"
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().conflicts(given)
        if given.get("memory") == "none":
            for key in sorted({"lamb", "lame", "energy"} & set(given)):
                yield key, 'has no effect with "memory": "none": drop the key'
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
        if config.fresh_norm:
            vit.norm = nn.LayerNorm(self.network.feature_dim)
        vit.requires_grad_(False)
        self.layers = add_branches(vit, config.blocks, config.rank)
        self.memory = None if config.memory == "none" else self._make_memory()

    def before_task(self, task: Task) -> None:
        heads = self._heads
        heads.grow(heads.num_classes + len(task.classes))
        heads.heads[-1].reset_parameters()  # type: ignore[operator]  # torch's own initialisation, as the reference
        if self.memory is None:
            for layer in self.layers:
                layer.start(nn.init.kaiming_uniform_(torch.empty_like(layer.A), a=math.sqrt(5)))
                layer.A.requires_grad_()
            return
        designs, ranks = self.memory.design(self._moments(task), self.config.rank)
        for layer, design in zip(self.layers, designs, strict=True):
            layer.start(design)
        self._warn_of_lack(ranks.tolist())

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
        own = net(images)[:, -len(self.task.classes) :]  # the task's own head
        return F.cross_entropy(own, targets - self.task.classes.start)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Columns that the memory stores, summed over the layers; directions left in the fullest layer."""
        if self.memory is None:
            return {}
        return {"memory_columns": int(self.memory.columns.sum()), "least_free": int(self.memory.free.min())}

    def after_task(self, task: Task) -> None:
        if self.memory is not None:
            self.memory.update(self._moments(task), task.index, task.num_tasks)
            self._describe_memory(task)
        for layer in self.layers:
            layer.fold()

    def predict(self, images: Tensor) -> Tensor:
        votes = self.network(images).unflatten(1, (-1, self.task.total_classes))  # (B, heads of one class, C)
        return self._reduce(votes)

    def stored_bytes(self) -> int:
        """Also the key and value weights that hold the past branches."""
        folded = sum(layer.remainder.numel() * layer.weight.element_size() for layer in self.layers)
        return super().stored_bytes() + folded

    @property
    def _heads(self) -> TaskHeads:
        assert isinstance(self.network.head, TaskHeads)
        return self.network.head

    def _reduce(self, votes: Tensor) -> Tensor:
        """(B, H, C) -> (B, C): H = 1, or one vote of each domain's head."""
        return votes.amax(dim=1) if self.config.domain_reduce == "max" else votes.mean(dim=1)

    def _make_memory(self) -> GPM:
        config, kind = self.config, DualGPM if self.config.memory == "dualgpm" else GPM
        width = self.layers[0].width
        return kind(len(self.layers), width, config.lamb, config.lame, config.energy, config.upstream)

    def _moments(self, task: Task) -> Tensor:
        """C (L, D, D) of the task's training images, as the network is now."""
        moments = InputMoments(self.layers)
        view, size = task.train.view("train"), self.config.test_batch_size
        with self.runtime.stopwatch("statistics"):
            for_each_batch(view, lambda images, _: moments.add(self.network.features, images), self.runtime, size)
        self.runtime.reduce_sum(moments.sums)
        self.runtime.reduce_sum(moments.tokens)
        return moments.mean()

    def _warn_of_lack(self, ranks: list[int]) -> None:
        rank, short = self.config.rank, [i for i, r in enumerate(ranks) if r < self.config.rank]
        if short:
            log.warning(
                "layers %s: the task's inputs reach fewer than %d free directions (%s); %s. A lower lamb or rank helps",
                _listed(short), rank, _listed(ranks[i] for i in short),
                "the rest of A interferes with old tasks, as in the reference" if self.config.upstream
                else "their branches get that rank",
            )  # fmt: skip

    def _describe_memory(self, task: Task) -> None:
        assert self.memory is not None
        columns, retain, free = (getattr(self.memory, name).tolist() for name in ("columns", "retain", "free"))
        kinds = [f"{n} {'retain' if kept else 'remove'}" for n, kept in zip(columns, retain, strict=True)]
        log.info("task %d/%d  memory columns by layer: %s; left for new branches: %s of %d directions", task.index + 1,
                 task.num_tasks, ", ".join(kinds), _listed(free), self.memory.width)  # fmt: skip
        rank = self.config.rank
        if task.index + 1 < task.num_tasks and min(free) < rank:
            log.warning("layers %s: the next branch finds less room than its rank %d; a lower lamb leaves more",
                        _listed(i for i, f in enumerate(free) if f < rank), rank)  # fmt: skip


def lagging_cosine(epoch: int, epochs: int) -> float:
    """cos(99 pi max(e - 1, 0) / (200 (K - 1))): the reference steps its cosine one epoch late. K = 1: constant."""
    return math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * (epochs - 1))) if epochs > 1 else 1.0


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))
