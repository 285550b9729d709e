"""LAE (Gao et al., ICCV 2023, arXiv 2303.10070): learning, accumulation, ensemble, of small modules in a frozen ViT.

learning      prefixes, adapters or low-rank branches in chosen blocks (convs/pet.py) train with a head per task: CE on
              the task's columns. From the second task on, the modules rest for the first epochs.
accumulation  an offline copy of the modules, made after the first task, follows them:  o <- d o + (1 - d) a  each step
ensemble      z = max(softmax(z_online), softmax(z_offline)),  one head for both;  in the first task z_online alone

LAMDA-PILOT's form copies the modules as they are drawn, lets them rest in the first task too, has one head for all.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from convs.backbones import BackboneMaker
from convs.growing import Growing
from convs.heads import LinearHead, TaskHeads
from convs.network import Network
from convs.pet import Pet, add_pet
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.losses import slice_cross_entropy
from utils.config import Count, Rate, TrainConfig, Whole
from utils.keys import GIVEN, key, redefault

HEAD_STD = 0.001  # of a new head of its own
SIZES = {"prefix": 10, "adapter": 5, "lora": 5}


class OfflineCopy(Growing):
    """An exponential average of a list of tensors, kept as one vector; empty until it is started."""

    vector: Tensor

    def __init__(self, shapes: Sequence[torch.Size]):
        super().__init__()
        self.shapes = list(shapes)
        self.declare("vector")

    def start(self, tensors: Sequence[Tensor]) -> None:
        self.vector = parameters_to_vector(tensors).detach().clone()

    @torch.no_grad()
    def follow(self, tensors: Sequence[Tensor], decay: float) -> None:
        self.vector.lerp_(parameters_to_vector(tensors), 1 - decay)

    def tensors(self) -> list[Tensor]:
        parts = self.vector.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@LEARNERS.register("lae")
class LAE(Learner):
    """Small modules and their slow copy, each with its own answer; the surer one counts. Keeps no images."""

    class Config(TrainConfig):
        pet: Pet = key("prefix", "what is put into the blocks")
        pet_size: Count | None = key(None, "prefix length, bottleneck or rank; default: 10, 5, 5")
        adapt_blocks: tuple[Whole, ...] = key((0, 1, 2, 3, 4), "numbers of the blocks", min_length=1)
        freeze_epochs: Whole = key(3, "first epochs of a later task in which the head alone trains")
        freeze_first: bool = key(False, "let the modules rest in the first task too", only={"freeze_epochs": GIVEN})
        answer: Literal["surer", "online", "offline"] = key(
            "surer", "class by class the larger probability of modules and offline copy, or one of the two alone"
        )
        ema: Annotated[float, Field(ge=0, le=1)] = key(
            0.9999, "d, decay of the offline copy", only={"answer": ("surer", "offline")}
        )
        offline_start: Literal["trained", "drawn"] = key(
            "trained",
            "the offline copy begins after the first task, or before it",
            only={"answer": ("surer", "offline")},
        )
        head: Literal["per_task", "one"] = key("per_task", "a head for each task, or one for all classes")
        batch_size: Count = redefault(TrainConfig, "batch_size", 24)
        drop_last: bool = redefault(TrainConfig, "drop_last", True)
        epochs: Whole = redefault(TrainConfig, "epochs", 5)
        optimizer: Literal["sgd", "adam", "adamw"] = redefault(TrainConfig, "optimizer", "adam")
        lrate: Rate = redefault(TrainConfig, "lrate", 0.0028125)
        weight_decay: Rate = redefault(TrainConfig, "weight_decay", 0.0)
        scheduler: Literal["constant", "multistep", "cosine"] = redefault(TrainConfig, "scheduler", "constant")
        upstream: bool | Literal["pilot"] = key(  # type: ignore[assignment]
            False,
            "reproduce a reference: true, the authors' (torch seeded with 1); pilot: freeze_first, head one, "
            "offline_start drawn, drop_last false",
        )
        fixed_torch_seeds = {True: 1}

        def implied(self) -> dict[str, Any]:
            pilot = {"freeze_first": True, "offline_start": "drawn", "head": "one", "drop_last": False}
            return super().implied() | (pilot if self.upstream == "pilot" else {})

        def faults(self) -> Iterator[tuple[str, str]]:
            yield from super().faults()
            if len(set(self.adapt_blocks)) < len(self.adapt_blocks):
                yield "adapt_blocks", f"names a block twice, {list(self.adapt_blocks)}: name each once"

    example = {"adapt_blocks": [0, 1], "pet_size": 2, "freeze_epochs": 1, "ema": 0.9}

    def build(self, make_backbone: BackboneMaker) -> None:
        config = self.config
        head = TaskHeads if config.head == "per_task" else LinearHead
        self.network = Network(make_backbone(), head, config.normalize)
        size = config.pet_size or SIZES[config.pet]
        self._names = list(add_pet(self.network.backbone.model, config.pet, config.adapt_blocks, size))
        self.offline = OfflineCopy([parameter.shape for parameter in self._online()])
        if config.offline_start == "drawn" and config.answer != "online":
            self.offline.start(self._online())

    def train(self, mode: bool = True) -> "LAE":
        """The frozen ViT stays in evaluation mode."""
        return super().train(False)

    def before_task(self, task: Task) -> None:
        head = self.network.head
        new = task.total_classes > head.num_classes
        head.grow(task.total_classes)
        if isinstance(head, TaskHeads) and new:
            nn.init.normal_(head.heads[-1].get_parameter("weight"), std=HEAD_STD)
        if task.index == 1 and self.config.offline_start == "trained" and self.config.answer != "online":
            self.offline.start(self._online())

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return slice_cross_entropy(net(inputs), targets, self.task.classes)

    def after_backward(self) -> None:
        """No gradient, not a zero one: the optimiser does not count these steps for the modules."""
        first = self.task.index == 0 and not self.config.freeze_first
        if self.progress.epoch < self.config.freeze_epochs and not first:
            for parameter in self._online():
                parameter.grad = None

    def after_step(self, images: Tensor, targets: Tensor) -> None:
        if len(self.offline.vector):
            self.offline.follow(self._online(), self.config.ema)

    def predict(self, images: Tensor | None, frozen: Mapping[str, Tensor]) -> Tensor:
        assert images is not None
        if not len(self.offline.vector):
            return self.network(images).softmax(dim=1)
        names = [f"backbone.model.{name}" for name in self._names]
        weights = dict(zip(names, self.offline.tensors(), strict=True))
        offline = functional_call(self.network, weights, (images,))
        return surer(self.network(images), offline) if self.config.answer == "surer" else offline.softmax(dim=1)

    def _online(self) -> list[nn.Parameter]:
        return [self.network.backbone.model.get_parameter(name) for name in self._names]


def surer(online: Tensor, offline: Tensor) -> Tensor:
    """Elementwise larger probability of two logits (B, C)."""
    return torch.maximum(online.softmax(dim=1), offline.softmax(dim=1))
