"""A frozen copy of the network as it was: what distillation compares with."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.stream import Task


class Teacher:
    """images (B, 3, s, s) -> logits of the copied network (B, K), without gradient; in eval mode unless `training`.

    No module, so that neither `train()` nor the learner's parameters reach it; its state is its own.
    like: gives the learner's network, which `update` copies. blank: gives a network of the saved teacher's shape, into
    which its state is loaded; default: `like`, right for networks whose head takes its size from the state.
    training: BatchNorm normalises by the batch and keeps updating its running statistics, dropout drops.
    """

    def __init__(
        self,
        like: Callable[[], nn.Module],
        blank: Callable[[], nn.Module] | None = None,
        training: bool = False,
    ):
        self._like, self._blank, self.training = like, blank or like, training
        self.network: nn.Module | None = None

    def update(self) -> None:
        """Become the network as it is now."""
        self.network = self._copy(self._like())

    def __bool__(self) -> bool:
        """Whether there is a teacher yet: not in the first task."""
        return self.network is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        assert self.network is not None, "update() was never called"
        return self.network(images)

    def held_bytes(self, tasks: Sequence[Task]) -> int:
        """Of the copy that the second task makes, if it is not there yet; as large as the network is now."""
        if self.network is not None or len(tasks) < 2:
            return 0
        network = self._like()
        return sum(value.numel() * value.element_size() for value in (*network.parameters(), *network.buffers()))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.network is None else self.network.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network = self._copy(self._blank()) if state else None
        if self.network is not None:
            self.network.load_state_dict(state)

    def _copy(self, network: nn.Module) -> nn.Module:
        return copy.deepcopy(network).train(self.training).requires_grad_(False)
