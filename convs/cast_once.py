"""Frozen linear layers under mixed precision: the low-precision copy of a weight is made once, not in every pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastOnceLinear(nn.Linear):
    """A linear layer over another's weight and bias, under their names: (..., in) -> (..., out).

    Autocast keeps its copy of a weight that trains within a pass, and makes one of a frozen weight each time that it is
    read: a tenth of a step of InfLoRA in bf16 (ViT-B/16, 4 images, one core). Here a frozen weight's copy stays until
    the weight is written to; a weight that trains is left to autocast.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._copied_from: tuple[Tensor, int, int] | None = None
        self.low_precision: Tensor | None = None  # the weight in the type of autocast; no part of the state

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._operand(x.device.type), self.bias)

    def _operand(self, device: str) -> Tensor:
        weight = self.weight
        if weight.requires_grad:  # a fused optimiser moves it without a trace in its version: what was cast is stale
            self.low_precision, self._copied_from = None, None
        if weight.requires_grad or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
            return weight
        dtype = torch.get_autocast_dtype(device)
        source = (weight, weight.data_ptr(), weight._version)
        stale = self._copied_from is None or self._copied_from[0] is not weight or self._copied_from[1:] != source[1:]
        if self.low_precision is None or self.low_precision.dtype != dtype or stale:
            with torch.inference_mode(False), torch.no_grad():  # a pass without gradient may be the first to read it
                self.low_precision, self._copied_from = weight.to(dtype), source
        return self.low_precision

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer begins without: versions count from 0 in its weight."""
        return self.__dict__ | {"low_precision": None, "_copied_from": None}


def cast_frozen_once(model: nn.Module) -> None:
    """Replace the plain linear layers of a network by `CastOnceLinear`."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, CastOnceLinear(layer))
