"""DualPrompt (Wang et al., ECCV 2022, arXiv 2204.04799).

Prefixes for the keys and values of a frozen ViT's attention: a G-prompt for all images in the first blocks, and in the
next ones an entry of a pool, which is a task's own in training and chosen at test by the image's query q(x):

    k <- [pk ; k],  v <- [pv ; v];     training: entry t of task t;     test: argmax_m cos(q(x), key_m)

A new task's entry starts as the one before it was left. Loss: models.prompting.py; network: convs/prompt_pool.py.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.prompt_pool import DualPrefixes
from data.stream import Task, TaskInfo
from models.base import LEARNERS
from models.prompting import PoolConfig, PoolLearner
from utils.config import Count, Rate, Whole
from utils.errors import ConfigError
from utils.keys import key, redefault


@LEARNERS.register("dualprompt")
class DualPrompt(PoolLearner):
    """General and task-expert prefixes. Keeps no images."""

    class Config(PoolConfig):
        batch_size: Count = redefault(PoolConfig, "batch_size", 24)
        lrate: Rate = redefault(PoolConfig, "lrate", 1e-3)
        top_k: Count = redefault(PoolConfig, "top_k", 1)
        g_blocks: tuple[Whole, ...] = key((0, 1), "blocks with the G-prompt, counted from 0")
        g_length: Count = key(5, "prefix of the G-prompt")
        e_blocks: tuple[Whole, ...] = key(
            (2, 3, 4), "blocks with entries of the pool; one that has the G-prompt keeps it"
        )
        e_length: Count = key(5, "n, prefix of an entry")
        task_mask: bool = key(True, "in training entry t serves task t, whatever the keys say, while the pool has one")
        transfer: bool = key(True, "a new task's entry starts as the one before it")
        transfer_keys: bool = key(False, "and so does its key")
        prefix_layout: Literal["permuted", "reshaped"] = key(
            "permuted",
            "reshaped: axes of the chosen entries are not moved, as in the published ports, so that keys, values and "
            "rows of the batch mix",
        )
        upstream: bool = key(
            False,
            "reproduce the ports: prompt_selection batch_vote, prefix_layout reshaped, a schedule without effect "
            "behind the first task",
        )

        def implied(self) -> dict[str, Any]:
            return super().implied() | ({"prefix_layout": "reshaped"} if self.upstream else {})

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if self.prefix_layout == "reshaped" and not self.upstream:
                yield (
                    "prefix_layout",
                    'is "reshaped", which only "upstream": true allows: predictions mix with others\'',
                )

        @property
        def batch_dependent(self) -> bool:
            return super().batch_dependent or self.prefix_layout == "reshaped"

    example = {
        "pool_size": 4, "g_blocks": [0], "g_length": 2, "e_blocks": [1], "e_length": 2, "lrate": 0.02,
    }  # fmt: skip
    network: DualPrefixes

    def build(self, make_backbone: BackboneMaker) -> None:
        config, backbone = self.config, make_backbone()
        depth = len(backbone._vit().blocks)
        for name in ("g_blocks", "e_blocks"):
            if wrong := [index for index in getattr(config, name) if index >= depth]:
                raise ConfigError(name, [f"block {wrong[0]} of a backbone with {depth} blocks (counted from 0)"])
        self.network = DualPrefixes(
            backbone,
            lambda width: LinearHead(width, init="trunc_normal"),
            config.normalize,
            g_blocks=config.g_blocks,
            g_length=config.g_length,
            e_blocks=config.e_blocks,
            e_length=config.e_length,
            entries=config.pool_size,
            count=config.top_k,
            reshaped=config.prefix_layout == "reshaped",
        )
        self.network.head.grow(self.task.num_classes)

    @torch.no_grad()
    def before_task(self, task: Task) -> None:
        """The new task's entries start as those before them, while the pool has some."""
        new = self._own_entries(task)
        if task.index == 0 or new is None:
            return
        old = slice(new.start - len(new), new.start)
        if self.config.transfer:
            self.network.e_prompts[:, :, new.start : new.stop] = self.network.e_prompts[:, :, old]
        if self.config.transfer_keys:
            self.network.keys[new.start : new.stop] = self.network.keys[old]

    def _own_entries(self, task: TaskInfo) -> range | None:
        """Those of a task; None where the pool is at its end."""
        count = self.config.top_k
        entries = range(task.index * count, (task.index + 1) * count)
        return entries if entries.stop <= self.config.pool_size else None

    def _training(self) -> dict[str, Any]:
        return {"entries": self._own_entries(self.task) if self.config.task_mask else None}
