"""The gradient of the loss over a batch: in one pass, or part by part where the batch would not fit."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from convs.norms import batch_norms, frozen_statistics
from utils.errors import ConfigError

if TYPE_CHECKING:  # a part imports no learner
    from models.base import Learner


class BatchGradient:
    """The closure that an optimiser's step calls, once or, with SAM, twice: gradients of the batch at hand, at the
    weights as they are, and its loss.

    With "accumulate": n the batch goes through in n parts, forward and backward one after another, so that the
    activations of one part alone are in memory; each part's mean loss counts by its share of the images. Processes
    exchange gradients in the last part, `after_backward` follows it. "clip_norm" then scales the gradient that the
    optimiser moves by, with SAM that of the second pass: the ascent has a length of its own.
    """

    def __init__(self, learner: "Learner", module: nn.Module, optimizer: Optimizer):
        self.learner, self.optimizer = learner, optimizer
        self.net = learner.runtime.wrap(module)
        self.norms = batch_norms(module)
        config = learner.config
        self._clip, self._last = config.clip_norm, 2 if config.sam else 1
        self._parts: list[tuple[Any, Any, float]] = []
        self._passes = 0  # over the batch at hand: SAM makes a second one, at weights that are not kept

    def take(self, images: Tensor, targets: Tensor, weight: float) -> None:
        """The next batch. weight: of this process's share in the mean over processes."""
        inputs, labels = self.learner.prepare(images, targets)
        self._passes = 0
        self._parts = [
            (*(self.learner.part(inputs, labels, rows) if rows else (inputs, labels)), weight * share)
            for rows, share in shares(len(images), self.learner.config.accumulate)
        ]

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with frozen_statistics(self.norms if self._passes else ()):
            losses = [self._backward(number) for number in range(len(self._parts))]
        self.learner.runtime.settle(self.net)
        self._passes += 1
        self.learner.after_backward()
        if self._clip is not None and self._passes == self._last:
            clip_gradient((p for group in self.optimizer.param_groups for p in group["params"]), self._clip)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _backward(self, number: int) -> Tensor:
        """Add the gradient of a part; its share of the loss."""
        learner, (inputs, labels, weight) = self.learner, self._parts[number]
        learner.progress = replace(learner.progress, part=number)
        alone = getattr(self.net, "no_sync", nullcontext) if number < len(self._parts) - 1 else nullcontext
        with alone():
            with learner.runtime.autocast():
                loss = learner.loss(self.net, inputs, labels)
            (loss if weight == 1 else loss * weight).backward()
        return loss.detach() * weight


def clip_gradient(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale the gradient of all parameters together to this norm where it is longer. Parameters without one are left
    out; the host does not wait."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        factor = largest / (get_total_norm(gradients, foreach=True) + 1e-6)
        torch._foreach_mul_(gradients, factor.clamp(max=1.0))


def shares(count: int, parts: int) -> Iterator[tuple[slice | None, float]]:
    """(rows, share of them) of the parts of `count` rows, as equal as can be, none of them empty; one part: (None, 1),
    all rows as they are."""
    parts = min(parts, count)
    if parts == 1:
        yield None, 1.0
        return
    for number in range(parts):
        rows = slice(number * count // parts, (number + 1) * count // parts)
        yield rows, (rows.stop - rows.start) / count


def rows_of(value: Any, rows: slice, count: int) -> Any:
    """What belongs to some rows of a batch of `count`: those of every tensor that has so many, also inside of tuples,
    lists and mappings; the rest as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == count else value
    if isinstance(value, Mapping):
        return {key: rows_of(item, rows, count) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [rows_of(item, rows, count) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def refuse_accumulation(learner: "Learner") -> None:
    """Raises ConfigError where a batch in parts would train another network: one that normalises by the batch."""
    parts, mode = getattr(learner.config, "accumulate", 1), learner.training
    if parts == 1:
        return
    learner.train()
    found = [m for m in learner.modules() if isinstance(m, _BatchNorm) and (m.training or not m.track_running_stats)]
    learner.train(mode)
    if found:
        raise ConfigError(
            "accumulate",
            [
                f"is {parts}, but {learner.config.model_name} trains {learner.network.backbone.info.name} with "
                "BatchNorm, which would normalise by each part alone and so train another network: use 1 and a smaller "
                "batch_size, or a backbone without BatchNorm"
            ],
        )
