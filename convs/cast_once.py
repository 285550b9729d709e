"""Frozen linear layers under mixed precision: the low-precision copies of weight and bias are made once, not in every
pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastOnceLinear(nn.Linear):
    """A linear layer over another's weight and bias, under their names: (..., in) -> (..., out).

    Autocast keeps its copy of a parameter that trains within a pass, and makes one of a frozen one each time that it is
    read: a tenth of a step of InfLoRA in bf16 (ViT-B/16, 4 images, one core), four kernels a block and pass for the
    biases. Here the copy of a frozen one stays until it is written to; one that trains is left to autocast.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._copied_from: dict[str, tuple[Tensor, int, int]] = {}
        self.low_precision: dict[str, Tensor] = {}  # by name, in the type of autocast; no part of the state

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        bias = None if self.bias is None else self._operand("bias", device)
        return F.linear(x, self._operand("weight", device), bias)

    def _operand(self, name: str, device: str) -> Tensor:
        own: Tensor = getattr(self, name)
        if own.requires_grad:  # a fused optimiser moves it without a trace in its version: what was cast is stale
            self.low_precision.pop(name, None)
        if own.requires_grad or torch.compiler.is_compiling() or not torch.is_autocast_enabled(device):
            return own
        dtype, source = torch.get_autocast_dtype(device), (own, own.data_ptr(), own._version)
        kept, known = self.low_precision.get(name), self._copied_from.get(name)
        if kept is None or known is None or kept.dtype != dtype or known[0] is not own or known[1:] != source[1:]:
            with torch.inference_mode(False), torch.no_grad():  # a pass without gradient may be the first to read it
                kept = own.to(dtype)
            self.low_precision[name], self._copied_from[name] = kept, source
        return kept

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the layer begins without: versions count from 0 in its parameters."""
        return self.__dict__ | {"low_precision": {}, "_copied_from": {}}


def cast_frozen_once(model: nn.Module) -> None:
    """Replace the plain linear layers of a network by `CastOnceLinear`."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                setattr(parent, name, CastOnceLinear(layer))
