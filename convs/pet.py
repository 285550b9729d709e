"""What LAE (Gao et al., ICCV 2023, arXiv 2303.10070) puts into chosen blocks of a frozen ViT: one of three.

n = ln1(x), what the attention reads; g: trained scalars that start at 1.

    prefix    keys and values beside the block's own, at full strength                         (convs/prompts.py)
    lora      k += g_k n A_k^T B_k^T,  v += g_v n A_v^T B_v^T                                   (convs/lora.py)
    adapter   x + attn(n) + g (U gelu(V n + c) + e)
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from convs.lora import SeparateKeyValueLoRA
from convs.prompts import CompensatedPrefix
from utils.errors import ConfigError

Pet = Literal["prefix", "adapter", "lora"]


class AttentionAdapter(nn.Module):
    """A bottleneck beside the attention: (B, N, D) -> (B, N, D). V Kaiming uniform, the rest 0: starts as zero."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scale * self.up(F.gelu(self.down(tokens)))


def add_pet(vit: Any, kind: Pet, numbers: Sequence[int], size: int) -> dict[str, nn.Parameter]:
    """Adapt the blocks of these numbers, freeze everything else; the new parameters, by their name in the ViT.

    size: prefix length, bottleneck or rank. Raises ConfigError when the blocks are not there or of another kind.
    """
    blocks = list(getattr(vit, "blocks", []))
    if not blocks or any(type(getattr(block, "attn", None)) is not Attention for block in blocks):
        raise ConfigError(
            "backbone", [f"{type(vit).__name__} has no plain attention in its blocks; choose a ViT of timm"]
        )
    if wrong := [number for number in numbers if number >= len(blocks)]:
        raise ConfigError("adapt_blocks", [f"block {wrong[0]} of a backbone with {len(blocks)} blocks (from 0)"])
    vit.requires_grad_(False)
    for number in numbers:
        attention = blocks[number].attn
        if kind == "prefix":
            blocks[number].attn = CompensatedPrefix(attention, size)
        elif kind == "lora":
            attention.qkv = SeparateKeyValueLoRA(attention.qkv, size)
        else:
            attention.adapter = AttentionAdapter(vit.embed_dim, size)
            attention.register_forward_hook(_add_beside)
    return {name: parameter for name, parameter in vit.named_parameters() if parameter.requires_grad}


def _add_beside(attention: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + attention.adapter(inputs[0])
