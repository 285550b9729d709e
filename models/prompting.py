"""What L2P and DualPrompt share: keys of the config, the query pass, the loss with its pull.

    L = CE(z[:, K:T], y - K) - w r,    r: mean over images of the cosines between query and the keys in use

Entries are chosen for each image by its own query ("instance"). The published ports let a batch vote ("batch_vote"):
tests that come class by class then tell the task, and a prediction depends on its neighbours.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from convs.prompt_pool import Asked, PromptedNetwork
from data.stream import Task
from models.base import Learner
from models.parts.losses import slice_cross_entropy
from models.parts.stages import Stage, stage_of
from utils.config import Count, Rate, TrainConfig, Whole
from utils.keys import key, redefault


class PromptConfig(TrainConfig):
    """Training as the published prompt methods do it: Adam at a constant rate, no decay."""

    batch_size: Count = redefault(TrainConfig, "batch_size", 16)
    epochs: Whole = redefault(TrainConfig, "epochs", 5)
    optimizer: Literal["sgd", "adam", "adamw"] = redefault(TrainConfig, "optimizer", "adam")
    weight_decay: Rate = redefault(TrainConfig, "weight_decay", 0.0)
    scheduler: Literal["constant", "multistep", "cosine"] = redefault(TrainConfig, "scheduler", "constant")


class PoolConfig(PromptConfig):
    """Of methods that choose entries of a pool."""

    pool_size: Count = key(10, "M, entries of the pool")
    top_k: Count = key(5, "k, entries that an image reads")
    pull: Rate = key(0.1, "w, weight of the cosines between queries and the keys in use")
    prompt_selection: Literal["instance", "batch_vote"] = key(
        "instance",
        "who chooses entries: each image, or a vote of its batch, as the published ports do (only with upstream: "
        "predictions then depend on the test batch)",
    )
    upstream: bool = key(
        False, "reproduce the ports: prompt_selection batch_vote, a schedule without effect behind the first task"
    )

    def implied(self) -> dict[str, Any]:
        return super().implied() | ({"prompt_selection": "batch_vote"} if self.upstream else {})

    def faults(self) -> Iterator[tuple[str, str]]:
        yield from super().faults()
        if self.top_k > self.pool_size:
            yield "top_k", f"is {self.top_k}, more than the {self.pool_size} entries of the pool"
        if self.prompt_selection == "batch_vote" and not self.upstream:
            yield "prompt_selection", 'is "batch_vote", which only "upstream": true allows: it leaks the task at test'

    @property
    def batch_dependent(self) -> bool:
        return self.prompt_selection == "batch_vote"


class PromptLearner(Learner):
    """A learner over a frozen ViT that is asked for a query first; the queries of test images never change."""

    network: PromptedNetwork
    frozen_names: Sequence[str] = ("query",)

    def before_task(self, task: Task) -> None:
        """The head is whole from the start."""

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[Asked, Tensor]:
        with self.runtime.autocast():
            return self.network.ask(images), targets

    def frozen(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        return {"query": self.network.ask(images).query} if "query" in names else {}

    def _asked(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Asked:
        assert images is not None
        return self.network.ask(images, frozen["query"])


class PoolLearner(PromptLearner):
    """L2P and DualPrompt: the loss, and predictions among the classes seen."""

    def stages(self, task: Task) -> Sequence[Stage]:
        """The ports' scheduler belongs to an optimiser that they replace behind the first task."""
        stage = stage_of(self.config, task)
        if self.config.upstream and task.index > 0:
            stage = replace(stage, scheduler="constant")
        return (stage,) if stage.epochs else ()

    @property
    def _vote(self) -> bool:
        return self.config.prompt_selection == "batch_vote"

    def loss(self, net: nn.Module, inputs: Asked, targets: Tensor) -> Tensor:
        logits, pull = net(inputs, vote=self._vote, **self._training())
        return slice_cross_entropy(logits, targets, self.task.classes) - self.config.pull * pull

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        logits, _ = self.network(self._asked(images, frozen), vote=self._vote)
        return logits[:, : self.task.total_classes]

    def _training(self) -> dict[str, Any]:
        """What the network is told in training alone."""
        return {}
