"""What a teacher answers to a batch that never changes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.parts.teacher import Teacher


class FixedTargets:
    """What a teacher answers to a batch that never changes: asked once, then kept.

    Exact also for a teacher in training mode: the batch statistics that BatchNorm normalises by are those of the batch
    alone. What a repeated pass would leave in its running statistics is kept too, and `repeat_pass` applies it:

        running <- (1 - momentum) running + momentum batch

    Only dropout makes the answer random; then `repeat_pass` asks anew. A part: `state_dict` holds batch and answer.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.images: Tensor | None = None  # (n, 3, s, s)
        self.logits: Tensor | None = None  # (n, K)
        self._batch: dict[str, Tensor] = {}  # running statistics that the batch alone would leave, by name

    def ask(self, teacher: Teacher, images: Tensor) -> None:
        """The answer to `images`, without a trace in the teacher's running statistics."""
        assert teacher.network is not None, "update() was never called"
        norms, before = _norms(teacher), {}
        for norm in norms.values():
            before[norm] = (norm.momentum, norm.running_mean.clone(), norm.running_var.clone())  # type: ignore[union-attr]
            norm.momentum = 1.0
        self.images, self.logits = images, teacher(images)
        self._batch = {}
        for name, norm in norms.items():
            momentum, mean, var = before[norm]
            self._batch |= {f"{name}.mean": norm.running_mean.clone(), f"{name}.var": norm.running_var.clone()}  # type: ignore[union-attr]
            norm.momentum, norm.running_mean, norm.running_var = momentum, mean, var

    def repeat_pass(self, teacher: Teacher) -> Tensor:
        """(n, K): the same answer, and the trace of one more pass."""
        assert self.images is not None and self.logits is not None, "ask() was never called"
        if teacher.training and teacher.network is not None and is_random(teacher.network):
            self.logits = teacher(self.images)
            return self.logits
        for name, norm in _norms(teacher).items():
            for value, kind in ((norm.running_mean, "mean"), (norm.running_var, "var")):
                value.lerp_(self._batch[f"{name}.{kind}"], norm.momentum)  # type: ignore[union-attr, arg-type]
        return self.logits

    def clear(self) -> None:
        self.images, self.logits, self._batch = None, None, {}

    def __bool__(self) -> bool:
        return self.images is not None and len(self.images) > 0

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images, "logits": self.logits, "batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        if state["images"] is not None:
            self.images, self.logits = state["images"].to(self.device), state["logits"].to(self.device)
            self._batch = {name: value.to(self.device) for name, value in state["batch"].items()}


def is_random(network: nn.Module) -> bool:
    """Whether the network drops units or paths when in training mode."""
    rates = (getattr(module, name, None) for module in network.modules() for name in ("p", "drop_prob"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _norms(teacher: Teacher) -> dict[str, _BatchNorm]:
    """The layers whose running statistics a pass changes."""
    if not teacher.training or teacher.network is None:
        return {}
    found = teacher.network.named_modules()
    return {name: m for name, m in found if isinstance(m, _BatchNorm) and m.running_mean is not None}
