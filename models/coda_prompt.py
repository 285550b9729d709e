"""CODA-Prompt (Smith et al., CVPR 2023, arXiv 2211.13218).

In each of some blocks of a frozen ViT a prefix is a weighted sum of components, with one attention vector and key each:

    p(x) = sum_k w_k P_k,   w_k = cos(q(x) * A_k, K_k)                 q: class token without prompts; * elementwise
    L = CE(z[:, K:T], y - K) + mu sum over blocks of o(K) + o(A) + o(P),    o(X) = mean of (X X^T - I)^2

M components are dealt out to the tasks, m = M // T each. A task trains its own; those of old tasks take part and are
held. New rows start by Gram-Schmidt, orthogonal to all before them (convs/prompt_pool.py).
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.prompt_pool import Asked, CodaPrefixes
from data.stream import Task
from models.base import LEARNERS
from models.parts.losses import slice_cross_entropy
from models.parts.optim import quarter_cosine
from models.prompting import PromptConfig, PromptLearner
from utils.config import Count, Rate, Whole
from utils.errors import ConfigError
from utils.keys import key, redefault

log = logging.getLogger(__name__)


@LEARNERS.register("coda_prompt")
class CodaPrompt(PromptLearner):
    """Weighted prompt components, expanded task by task. Keeps no images."""

    class Config(PromptConfig):
        batch_size: Count = redefault(PromptConfig, "batch_size", 128)
        epochs: Whole = redefault(PromptConfig, "epochs", 20)
        lrate: Rate = redefault(PromptConfig, "lrate", 1e-3)
        drop_last: bool = redefault(PromptConfig, "drop_last", True)
        scheduler: Literal["constant", "multistep", "cosine", "quarter_cosine"] = key(  # type: ignore[assignment]
            "quarter_cosine", "learning rate over the epochs of a task; quarter_cosine: from 1 down to 0.016"
        )
        pool_size: Count = key(100, "M, components of a block, dealt out to the tasks")
        prompt_length: Count = key(8, "n, rows of a component: half keys, half values")
        blocks: tuple[Whole, ...] = key((0, 1, 2, 3, 4), "blocks with prefixes, counted from 0")
        ortho: Rate = key(0.0, "mu, weight of the components' distance from orthonormal ones")
        upstream: bool = key(False, "reproduce the reference: its schedule is one epoch late")

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.prompt_length % 2:
                yield "prompt_length", f"is {self.prompt_length}; half of it are keys, half values: give an even number"

    example = {"pool_size": 6, "prompt_length": 4, "blocks": [0, 1], "lrate": 0.02, "drop_last": False}
    needs_num_tasks = True
    network: CodaPrefixes

    def build(self, make_backbone: BackboneMaker) -> None:
        config, backbone = self.config, make_backbone()
        depth, tasks = len(backbone._vit().blocks), self.task.num_tasks
        there = [index for index in config.blocks if index < depth]
        if config.names("blocks") and len(there) < len(config.blocks):
            raise ConfigError("blocks", [f"{list(config.blocks)}: the backbone has {depth} blocks (counted from 0)"])
        self._each = config.pool_size // tasks
        if self._each == 0:
            raise ConfigError("pool_size", [f"{config.pool_size} components for {tasks} tasks: give at least one each"])
        if config.pool_size > backbone.feature_dim:
            raise ConfigError(
                "pool_size", [f"{config.pool_size} rows cannot be orthogonal in width {backbone.feature_dim}"]
            )
        if rest := config.pool_size - self._each * tasks:
            log.warning("pool_size %d, %d tasks: %d components are never used", config.pool_size, tasks, rest)
        self.network = CodaPrefixes(
            backbone, lambda width: LinearHead(width, init="torch"), config.normalize, there, config.pool_size,
            config.prompt_length,
        )  # fmt: skip
        self.network.head.grow(self.task.num_classes)
        for parts in self.network.components.values():
            parts.start(0, self._each)  # type: ignore[operator]

    def before_task(self, task: Task) -> None:
        """The task's rows, orthogonal to all before them."""
        if task.index > 0:
            for parts in self.network.components.values():
                parts.start(*self._rows(task.index))  # type: ignore[operator]

    def make_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        optimizer, scheduler = super().make_optimizer()
        assert self.stage is not None
        if self.stage.scheduler != "quarter_cosine":
            return optimizer, scheduler
        epochs, lag = self.stage.epochs, int(self.config.upstream)
        return optimizer, LambdaLR(optimizer, lambda epoch: quarter_cosine(max(epoch - lag, 0), epochs))

    def loss(self, net: nn.Module, inputs: Asked, targets: Tensor) -> Tensor:
        rows = self._rows(self.task.index)
        loss = slice_cross_entropy(net(inputs, *rows), targets, self.task.classes)
        return loss + self.config.ortho * self.network.penalty(*rows) if self.config.ortho else loss

    def features(self, images: Tensor) -> Tensor:
        return self.network.prompted(self.network.ask(images), *self._rows(self.task.index))

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        logits = self.network(self._asked(images, frozen), *self._rows(self.task.index))
        return logits[:, : self.task.total_classes]

    def _rows(self, task: int) -> tuple[int, int]:
        """(first, last) of a task's own components."""
        return task * self._each, (task + 1) * self._each
