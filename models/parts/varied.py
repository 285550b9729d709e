"""What a learner says of its loss landscape: which weights are varied, between what, under which loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # a part imports no learner; `over_seen_classes` receives one
    from models.base import Learner


@dataclass(frozen=True)
class Weights:
    """What is varied: a tensor of the network, or one entry of a tensor that stacks several along its first axis."""

    tensor: Tensor
    index: int | None = None

    @property
    def value(self) -> Tensor:
        """The numbers themselves, not a copy."""
        return self.select(self.tensor.detach())

    def select(self, whole: Tensor) -> Tensor:
        """Of something shaped like the whole tensor (a gradient), the part that belongs to these weights."""
        return whole if self.index is None else whole[self.index]


@dataclass(frozen=True)
class Varied:
    """weights: what is varied, by name. loss: (pixels in [0, 1], labels) -> mean loss, in evaluation mode. branches:
    sets of weights trained side by side, under the names of `weights`, into whose place each of them can be put."""

    weights: Mapping[str, Weights]
    loss: Callable[[Tensor, Tensor], Tensor]
    branches: Sequence[Mapping[str, Weights]] = ()


def over_seen_classes(learner: "Learner") -> Varied:
    """The cross-entropy over all classes that the task at hand had seen, over the network's weights that trained: for
    a learner whose own loss holds a teacher, a memory or a head that is gone when the task is over."""

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(learner.network(images)[:, : learner.task.total_classes], targets)

    trained = {name: Weights(p) for name, p in learner.network.named_parameters() if p.requires_grad}
    return Varied(trained, loss)
