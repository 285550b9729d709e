"""Modules that a checkpoint may find larger or smaller than they were built: they take the size that it has."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Growing(nn.Module):
    """Its own parameters and buffers load in any shape; those made by `declare` grow along their first dimension."""

    def declare(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self.register_buffer(name, torch.zeros(0, *shape, dtype=dtype))

    def append(self, **rows: Tensor) -> None:
        for name, new in rows.items():
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, new.to(old)]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, value in [*self.named_parameters(recurse=False), *self.named_buffers(recurse=False)]:
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape != value.shape:
                fresh = value.detach().new_empty(saved.shape)
                parameter = isinstance(value, nn.Parameter)
                setattr(self, name, nn.Parameter(fresh, value.requires_grad) if parameter else fresh)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GrowingList(nn.ModuleList):
    """A list of modules that loads any number: `make(index)` builds what a checkpoint has more, what it has less goes.

    A made module that is itself `Growing` takes the saved shapes.
    """

    def __init__(self, make: Callable[[int], nn.Module]):
        super().__init__()
        self._make = make

    def grow(self) -> nn.Module:
        """Append one more and return it."""
        self.append(made := self._make(len(self)))
        return made

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = {key[len(prefix) :].partition(".")[0] for key in state_dict if key.startswith(prefix)}
        count = len({name for name in saved if name.isdigit()})
        while len(self) < count:
            self.grow()
        for _ in range(len(self) - count):
            del self[-1]
        super()._load_from_state_dict(state_dict, prefix, *args)
