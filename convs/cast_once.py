"""Frozen linear layers under mixed precision: the low-precision copies of weight and bias are made once, not in every
pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Watched(nn.Parameter):
    """A parameter of which there is a copy. opened: how often its memory was given out, or exchanged, as `.data`; what
    is written there leaves its version as it was."""

    opened = 0

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        self.opened += 1
        return super().data

    @data.setter
    def data(self, values: Tensor) -> None:
        self.opened += 1
        nn.Parameter.data.__set__(self, values)  # type: ignore[attr-defined]


class CastOnceLinear(nn.Linear):
    """A linear layer over another's weight and bias, under their names: (..., in) -> (..., out).

    Autocast keeps its copy of a parameter that trains within a pass, and makes one of a frozen one each time that it is
    read: a tenth of a step of InfLoRA in bf16 (ViT-B/16, 4 images, one core), four kernels a block and pass for the
    biases. Here the copy of a frozen one stays until it is written to; one that trains is left to autocast, and so is
    whatever stands in a parameter's place for a while (`functional_call`, parametrisations). A write through an alias
    that is older than the copy (a numpy view) goes unseen.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._copied_from: dict[str, tuple[Tensor, tuple[int, int]]] = {}
        self.low_precision: dict[str, Tensor] = {}  # by name, in the type of autocast; no part of the state

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        bias = None if self.bias is None else self._operand("bias", device)
        return F.linear(x, self._operand("weight", device), bias)

    def _operand(self, name: str, device: str) -> Tensor:
        own: Tensor = getattr(self, name)
        if own.requires_grad:  # a fused optimiser moves it without a trace in its version: what was cast is stale
            self.low_precision.pop(name, None)
        if own.requires_grad or torch.compiler.is_compiling() or not _cast_by_autocast(own, device):
            return own
        dtype, kept, known = torch.get_autocast_dtype(device), self.low_precision.get(name), self._copied_from.get(name)
        if kept is None or known is None or kept.dtype != dtype or known[0] is not own or known[1] != _writes(own):
            with torch.inference_mode(False), torch.no_grad():  # a pass without gradient may be the first to read it
                kept = own.to(dtype)
            if type(own) is nn.Parameter:
                own.__class__ = Watched
            self.low_precision[name], self._copied_from[name] = kept, (own, _writes(own))
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer begins without: versions count from 0 in its parameters."""
        return self.__dict__ | {"low_precision": {}, "_copied_from": {}}


def _cast_by_autocast(own: Tensor, device: str) -> bool:
    """Whether autocast would cast this parameter, float64 it leaves alone; False also where its writes are not counted
    (inference mode) and for other tensors."""
    active = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return active and isinstance(own, nn.Parameter) and own.dtype != torch.float64 and not own.is_inference()


def _writes(own: Tensor) -> tuple[int, int]:
    """Other numbers after every write."""
    return own._version, getattr(own, "opened", -1)


def cast_frozen_once(model: nn.Module) -> None:
    """Replace the plain linear layers of a network by `CastOnceLinear`."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, CastOnceLinear(layer))
