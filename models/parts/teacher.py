"""A frozen copy of the network as it was: what distillation compares with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """images (B, 3, s, s) -> logits of the copied network (B, K), in eval mode, without gradient.

    No module, so that neither `train()` nor the learner's parameters reach it; put it in `Learner.parts`.
    like: gives the learner's network, of which a restored teacher is a copy before its own state is loaded.
    """

    def __init__(self, like: Callable[[], nn.Module]):
        self._like = like
        self.network: nn.Module | None = None

    def update(self) -> None:
        """Become the network as it is now."""
        self.network = self._copy()

    def __bool__(self) -> bool:
        """Whether there is a teacher yet: not in the first task."""
        return self.network is not None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        assert self.network is not None, "update() was never called"
        return self.network(images)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.network is None else self.network.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network = self._copy() if state else None
        if self.network is not None:
            self.network.load_state_dict(state)

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self._like()).eval().requires_grad_(False)
