"""DER++ (Buzzega et al., 2020, "Dark experience for general continual learning: a strong, simple baseline").

A reservoir of images, each with its label and with the logits s that the network gave it when it came in. One step on a
batch (x, y), with two draws (x1, s1) and (x2, y2) from the reservoir:

    derpp    CE(z, y) + alpha mean((z(x1) - s1)^2) + beta CE(z(x2), y2)
    dark     CE(z, y) + alpha mean((z(x1) - s1)^2)
    er       CE over the batch and one draw together

Logits are those of the augmented image before the step; the image is kept as it is and augmented anew at each draw.
They are never refreshed: an entry of before a class came is compared in the columns that it has. With "full_head" the
head is as wide as the whole stream from the start and CE is over all of it, as in mammoth.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.batched import BATCHED, apply
from data.loading import View
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.memory import ReservoirMemory, written
from models.parts.varied import Varied, over_seen_classes
from utils.config import Count, Rate, TrainConfig
from utils.keys import key
from utils.seed import mix

Drawn = tuple[Tensor, Tensor, Tensor, Tensor]  # images, labels, logits, widths


class LogitReservoir(ReservoirMemory):
    """A reservoir whose images remember the network's answer: logits (n, C), of which the first `widths` (n,) columns
    were there when the image came."""

    def __init__(self, capacity: int, seed: int):
        super().__init__(capacity, seed)
        self.logits, self.widths = torch.empty(0), torch.empty(0, dtype=torch.int64)

    def insert_all(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """(B, 3, s, s), (B,), (B, C): one after another, in this order."""
        slots = [self._slot() for _ in range(len(labels))]
        self.write(slots, images, labels)
        if len(self.logits) and (missing := logits.shape[1] - self.logits.shape[1]) > 0:
            self.logits = F.pad(self.logits, (0, missing))
        self.logits = written(self.logits, slots, logits)
        self.widths = written(self.widths, slots, torch.full_like(labels, logits.shape[1]))

    def draw(self, count: int) -> Drawn:
        """min(count, n) different images, all equally likely, with all that is known of them."""
        chosen = self._choice(min(count, len(self))).to(self.labels.device, non_blocking=True)
        return self.images[chosen], self.labels[chosen], self.logits[chosen], self.widths[chosen]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"logits": self.logits, "widths": self.widths}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.logits, self.widths = state["logits"], state["widths"]


@LEARNERS.register("derpp")
class DERpp(Learner):
    """Replay from a reservoir, by labels and by logits."""

    class Config(TrainConfig):
        variant: Literal["derpp", "dark", "er"] = key("derpp", "terms of the loss")
        memory_size: Count = key(500, "images in the reservoir")
        minibatch_size: Count = key(32, "images of a draw")
        alpha: Rate = key(0.3, "weight of the stored logits", only={"variant": ("derpp", "dark")})
        beta: Rate = key(0.5, "weight of the stored labels", only={"variant": "derpp"})
        full_head: bool = key(False, "a head of all classes of the stream, drawn as torch draws one, from the start")

        def undivided(self) -> str | None:
            if self.variant == "er":
                return 'the mean of "er" is over images and draws together ("derpp" and "dark" have a mean for each)'
            return super().undivided()

    streams = {"class", "domain"}
    example = {"memory_size": 12, "minibatch_size": 4}
    transient = {"_logits"}

    def build(self, make_backbone: BackboneMaker) -> None:
        full = self.config.full_head
        head = partial(LinearHead, init="torch" if full else "kaiming")
        self.network = Network(make_backbone(), head, self.config.normalize)
        self.memory = LogitReservoir(self.config.memory_size, mix(self.config.seeds[0], 8))
        self._logits: list[Tensor] | None = None  # of this step's batch, part by part
        self._unanswered = 0  # images of it that have none yet

    def before_task(self, task: Task) -> None:
        self.network.head.grow(self.task.num_classes if self.config.full_head else task.total_classes)

    def train_data(self, task: Task) -> View:
        """Images as they are beside the augmented ones."""
        return task.train.view("train", beside="test")

    def prepare(self, images: Tensor, targets: Tensor) -> tuple[tuple[Tensor, list[Drawn]], Tensor]:
        """The batch, without its images as they are (B, 6, s, s), and the draws."""
        self._logits, self._unanswered = [], len(images)
        draws = 2 if self.config.variant == "derpp" else 1
        drawn = [self._replayed(images.device) for _ in range(draws if len(self.memory) else 0)]
        return (images[:, :3], drawn), targets

    def part(
        self, inputs: tuple[Tensor, list[Drawn]], targets: Tensor, rows: slice
    ) -> tuple[tuple[Tensor, list[Drawn]], Tensor]:
        """Draws are read whole in every part: entries differ in how many columns they count by."""
        return (inputs[0][rows], inputs[1]), targets[rows]

    def loss(self, net: nn.Module, inputs: tuple[Tensor, list[Drawn]], targets: Tensor) -> Tensor:
        images, drawn = inputs
        current, *replayed = self._answers(net, [images, *(entry[0] for entry in drawn)])
        if self._unanswered and self._logits is not None:  # the batch's first pass
            self._logits.append(current.detach())
            self._unanswered -= len(current)
        config, labels = self.config, [targets, *(entry[1] for entry in drawn)]
        if config.variant == "er":
            return F.cross_entropy(torch.cat([current, *replayed]), torch.cat(labels))
        loss = F.cross_entropy(current, targets)
        if drawn:
            loss = loss + config.alpha * square_distance(replayed[0], *drawn[0][2:])
        if len(drawn) > 1:
            loss = loss + config.beta * F.cross_entropy(replayed[1], labels[2])
        return loss

    def after_step(self, images: Tensor, targets: Tensor) -> None:
        """The batch joins the reservoir, in every process the whole of it."""
        assert self._logits is not None
        stored = images[:, 3:].mul(255).round().to(torch.uint8)
        shares = (self.runtime.gather_tensors(values) for values in (stored, targets, torch.cat(self._logits).float()))
        for share in zip(*shares, strict=True):
            self.memory.insert_all(*share)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        assert images is not None
        return self.network(images)[:, : self.task.total_classes]

    def landscape(self) -> Varied:
        return over_seen_classes(self)

    def _answers(self, net: nn.Module, batches: list[Tensor]) -> list[Tensor]:
        """One pass over all of them; upstream, as many as there are: BatchNorm tells them apart, nothing else does.
        ER's batch is one in either."""
        if self.config.upstream and self.config.variant != "er":
            return [net(images) for images in batches]
        return list(net(torch.cat(batches)).split([len(images) for images in batches]))

    def _replayed(self, device: torch.device) -> Drawn:
        """A draw, augmented as training images are."""
        images, labels, logits, widths = (value.to(device) for value in self.memory.draw(self.config.minibatch_size))
        seeds = torch.randint(2**62, (len(images),), generator=self.memory.generator).numpy().astype(np.uint64)
        recipe, size = BATCHED[self.config.train_transform], images.shape[-1]
        return apply(images.permute(0, 2, 3, 1), recipe, size, seeds).float().div_(255), labels, logits, widths


def square_distance(logits: Tensor, stored: Tensor, widths: Tensor) -> Tensor:
    """(n, C), (n, C' <= C), (n,) -> the mean over the columns that an entry has."""
    known = torch.arange(stored.shape[1], device=stored.device) < widths[:, None]
    squares = (logits[:, : stored.shape[1]] - stored).square() * known
    return squares.sum() / known.sum()
