"""One adapter that trains in every block of a ViT, and frozen copies of it, one per task (EASE, MOS).

The copies of a block are stacked, so that a batch goes through all of them in one product (`AdapterNetwork.subspaces`).
They are buffers: no gradient, no optimiser's state, no decay, and they travel with the state. Between tasks EASE starts
the adapter anew; MOS goes on with it and draws it, A, towards the mean M of the copies:

    A <- (1 - m) A + m M         after every step,       or, as its public code does, before every block of a pass:
    block l (from 0) of L runs with A + (1 - (1-m)^(l+1)) (M - A), and A itself ends as after L such merges

In the second form the gradient is taken as if block l's weights were A's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convs.adapters import AdaptedBlock, AdapterNetwork, BranchedAdapter, open_blocks
from convs.growing import Growing

PLAIN = "plain"
TENSORS = ("down_w", "down_b", "up_w", "up_b")


class AdapterSets(Growing, BranchedAdapter):
    """The adapter of one block; `forward` runs the one that trains, `outputs` the copies."""

    kept_down_w: Tensor

    def __init__(self, width: int, bottleneck: int, scale: float = 0.1, dropout: float = 0.1, converged: bool = False):
        """converged: `outputs` runs copy i as the mean of copies 0 .. i-1, what merging it without end leads to."""
        super().__init__(width, bottleneck, 1, scale, dropout)
        self.converged = converged
        for name in TENSORS:
            self.register_buffer(f"kept_{name}", getattr(self, name).detach()[:0].clone())
        self.past = 0  # the first so many copies are what `means` is taken of
        self.pull = 0.0  # how far towards that mean `forward` runs

    @property
    def copies(self) -> int:
        return len(self.kept_down_w)

    @property
    def kept(self) -> list[Tensor]:
        """The copies' tensors, stacked: (T, b, D), (T, b), (T, D, b), (T, D)."""
        return [getattr(self, f"kept_{name}") for name in TENSORS]

    def keep(self) -> None:
        """Append a frozen copy of the adapter."""
        for name, old in zip(TENSORS, self.kept, strict=True):
            setattr(self, f"kept_{name}", torch.cat([old, getattr(self, name).detach()]))

    def forward(self, tokens: Tensor) -> Tensor:
        own: Sequence[Tensor] = self._tensors()
        if self.pull:
            # The mean moves the value alone: gradients are those of the adapter's own tensors.
            own = [p + self.pull * (m - p.detach()) for p, m in zip(own, self.means(), strict=True)]
        return self._apply_each(tokens[None], *own)[0]

    def outputs(self, tokens: Tensor, first: int, last: int) -> Tensor:
        run = [settled(tensor) for tensor in self.kept] if self.converged else self.kept
        return self._apply_each(tokens, *(tensor[first:last] for tensor in run))

    def means(self) -> list[Tensor]:
        """The mean of the copies that were there when the task began, (1, ...) each."""
        return [tensor[: self.past].mean(dim=0, keepdim=True) for tensor in self.kept]

    def expected_bytes(self, tasks: Sequence[Any]) -> int:
        return len(tasks) * sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"past": self.past, "pull": self.pull}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.past, self.pull = state["past"], state["pull"]


def settled(copies: Tensor) -> Tensor:
    """(T, ...): copy 0, then for each further one the mean of those before it."""
    counts = torch.arange(1, len(copies), device=copies.device, dtype=copies.dtype)
    means = copies.cumsum(dim=0)[:-1] / counts.view(-1, *[1] * (copies.dim() - 1))
    return torch.cat([copies[:1], means])


def add_adapter_sets(
    vit: Any, bottleneck: int, scale: float, dropout: float, converged: bool = False
) -> list[AdapterSets]:
    """Put an adapter and room for its copies into every block of a timm ViT, and freeze everything else.

    Raises ConfigError when the backbone has no plain blocks.
    """
    width = getattr(vit, "embed_dim", 0)
    adapters = [AdapterSets(width, bottleneck, scale, dropout, converged) for _ in getattr(vit, "blocks", [])]
    open_blocks(vit, lambda block, number: AdaptedBlock(block, adapters[number]))
    return adapters


def named_subspaces(network: AdapterNetwork, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Features (B, D) behind the copies of these numbers ("0", "1", ...) and of the ViT alone (`PLAIN`)."""
    numbers, plain = [int(name) for name in names if name != PLAIN], PLAIN in names
    first, last = (min(numbers), max(numbers) + 1) if numbers else (0, 0)
    found = network.subspaces(images, first, last, plain)
    return {name: found[0 if name == PLAIN else plain + int(name) - first] for name in names}


class Merging:
    """A of all blocks drawn towards the mean of the copies, which is computed once in a task."""

    def __init__(self, adapters: Sequence[AdapterSets], momentum: float):
        self.momentum = momentum
        self.own = [parameter.detach() for adapter in adapters for parameter in adapter.parameters()]
        self.means = [mean for adapter in adapters for mean in adapter.means()]

    def merge(self, times: int = 1) -> None:
        """A <- (1 - m)^times A + (1 - (1 - m)^times) M."""
        torch._foreach_lerp_(self.own, self.means, share(self.momentum, times))


def share(momentum: float, times: int) -> float:
    """Of M in A after so many merges."""
    return 1 - (1 - momentum) ** times


def begin_task(adapters: Sequence[AdapterSets], momentum: float, every_pass: bool) -> None:
    """The copies that are there now are what A is drawn to. every_pass: passes run with a merge before every block."""
    for number, adapter in enumerate(adapters):
        adapter.past = adapter.copies
        adapter.pull = share(momentum, number + 1) if every_pass and adapter.past else 0.0
