"""Prompts for any timm ViT: tokens beside the sequence, and prefixes for the keys and values of its attention.

B images, N tokens, D width, H heads, d = D / H, P prompt tokens, L blocks.

VPT (Jia et al., 2022, arXiv 2203.12119): P trained tokens behind the sequence, without a position.

    deep      block i reads [x ; p_i] and its last P outputs are cut off       p (L, P, D)
    shallow   the first block reads [x ; p], all others what it gives          p (1, P, D)

Prefixes: keys and values in front of a block's own, behind its qkv; the sequence keeps its length.

    q, k, v from the tokens as usual,   k <- [pk ; k],   v <- [pv ; v],   softmax(q k^T / sqrt(d)) v

LAE gives its prefixes full strength, however little attention they get: their part is divided by its own sum,

    out = sum_tokens a_j v_j + sum_prefix a_p v_p / max(sum_prefix a_p, 1e-12),   a = softmax over tokens and prefixes

Attention stays one fused kernel; modules are replaced under their own names, so that weight files fit.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.adapters import OpenBlock, open_blocks

PromptInit = Literal["uniform", "zeros"]
SMALLEST_SUM = 1e-12  # of a prefix's attention, in LAE's compensation
LANES = 8  # channels that a fused kernel's head width is a multiple of


class PromptTokens(nn.Module):
    """P tokens behind a sequence: (B, N, D) -> (B, N + P, D). Not `active`, there are none."""

    def __init__(self, count: int, width: int, patch: int, init: PromptInit = "uniform"):
        """init "uniform": +-sqrt(6 / (3 patch^2 + D)). "zeros" makes the tokens of a block equal for ever."""
        super().__init__()
        bound = math.sqrt(6 / (3 * patch**2 + width)) if init == "uniform" else 0.0
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.active = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.tokens.to(x.dtype).expand(len(x), -1, -1)], dim=1) if self.active else x


class PromptedBlock(OpenBlock):
    """A block that reads `prompt` behind its tokens, and from whose output `leaving` is cut off again: nothing is
    computed for those tokens after the attention."""

    def __init__(self, block: Any, prompt: PromptTokens | None, leaving: PromptTokens | None):
        super().__init__(block)
        self.prompt = prompt
        self._leaving = (leaving,)  # in a tuple: they may be another block's, under whose name they are saved

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N', D)."""
        x = x if self.prompt is None else self.prompt(x)
        (leaving,) = self._leaving
        cut = len(leaving.tokens) if leaving is not None and leaving.active else 0
        staying = slice(0, self.keep or (x.shape[1] - cut))
        x = (x + self.drop_path1(self.ls1(self.attn(self.norm1(x)))))[:, staying]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def add_prompts(vit: Any, depth: Literal["deep", "shallow"], count: int, init: PromptInit) -> list[PromptTokens]:
    """Put `count` tokens before every block (deep) or the first (shallow) of a timm ViT and freeze everything else.

    Raises ConfigError when the backbone has no plain blocks.
    """
    prompts: list[PromptTokens] = []
    last = len(getattr(vit, "blocks", [])) - 1

    def opened(block: Any, number: int) -> PromptedBlock:
        if own := depth == "deep" or number == 0:
            prompts.append(PromptTokens(count, vit.embed_dim, vit.patch_embed.patch_size[0], init))
        leave = depth == "deep" or number == last
        return PromptedBlock(block, prompts[-1] if own else None, prompts[-1] if leave else None)

    open_blocks(vit, opened)
    return prompts


class PrefixAttention(nn.Module):
    """timm's `Attention` with room for prefixes; it takes over the children, under their names.

    prefix: None, or key and value, each (B or 1, H, P, d) or with fewer leading dimensions.
    """

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    norm: nn.Module
    gate: nn.Module | None
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, attention: Any):
        super().__init__()
        for name, child in attention.named_children():
            setattr(self, name, child)
        self.num_heads, self.head_dim, self.fused_attn = attention.num_heads, attention.head_dim, attention.fused_attn
        self.prefix: tuple[Tensor, Tensor] | None = None
        self.train(attention.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("prefixes and a mask of the attention do not go together")
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, d) each
        q, k = self.q_norm(q), self.k_norm(k)
        out = self.attend(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        if hasattr(self, "norm"):
            out = self.norm(out)
        if (gate := getattr(self, "gate", None)) is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, N, d) each -> (B, H, N, d)."""
        if self.prefix is not None:
            k, v = (in_front(own, rows) for own, rows in zip((k, v), self.prefix, strict=True))
        return attention(q, k, v, self.fused_attn, self.attn_drop.p if self.training else 0.0)


class CompensatedPrefix(PrefixAttention):
    """LAE's attention: P trained keys and values, each set with a trained scalar that starts at 1, at full strength."""

    def __init__(self, attention: Any, count: int):
        super().__init__(attention)
        width = self.num_heads * self.head_dim
        self.key = nn.Parameter(torch.empty(count, width).uniform_(0, 0.01))
        self.value = nn.Parameter(torch.empty(count, width).uniform_(0, 0.01))
        self.key_scale = nn.Parameter(torch.ones(()))
        self.value_scale = nn.Parameter(torch.ones(()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        pk = (self.key_scale * self.key).unflatten(1, heads).transpose(0, 1).to(k.dtype)  # (H, P, d)
        pv = (self.value_scale * self.value).unflatten(1, heads).transpose(0, 1).to(v.dtype)
        return compensated_attention(q, k, v, pk, pv, self.fused_attn)


def attention(q: Tensor, k: Tensor, v: Tensor, fused: bool, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """q (B, H, N, d), k (B, H, M, d), v (B, H, M, e) -> (B, H, N, e). scale: d^-1/2 where none is given."""
    if fused:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return F.dropout((scale * q @ k.mT).softmax(dim=-1), dropout) @ v


def compensated_attention(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, fused: bool = True) -> Tensor:
    """q, k, v (B, H, N, d), prefix pk, pv (H, P, d) -> (B, H, N, d).

    One pass over tokens and prefixes, in which prefixes have the value 0, gives the tokens' part; a channel more,
    1 at the prefixes, gives the sum of their weights. Within the prefixes the division leaves a plain softmax over
    them; only where their sum is below the clamp does something of it remain.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    batch, tokens = q.shape[0], k.shape[2]
    keys = torch.cat([k, pk.expand(batch, -1, -1, -1)], dim=2)
    values = F.pad(v, (0, LANES, 0, pk.shape[1]))  # (B, H, N + P, d + 8)
    mark = values.new_zeros(values.shape[2:])
    mark[tokens:, v.shape[-1]] = 1
    joint = attention(
        F.pad(q, (0, LANES)), F.pad(keys, (0, LANES)), values + mark, fused, scale=scale
    )  # (B, H, N, d + 8)
    share = joint[..., v.shape[-1], None].clamp(max=SMALLEST_SUM) / SMALLEST_SUM
    own = (scale * q @ pk.mT).softmax(dim=-1) @ pv
    return joint[..., : v.shape[-1]] + share * own


def in_front(own: Tensor, rows: Tensor) -> Tensor:
    """own (B, H, N, d), rows (..., H, P, d) -> (B, H, P + N, d)."""
    return torch.cat([rows.to(own.dtype).expand(len(own), -1, -1, -1), own], dim=2)


def embed(vit: Any, images: Tensor, tokens: Tensor | None = None) -> Tensor:
    """What the first block of a timm ViT reads, (B, N, D); tokens (B or 1, P, D): see `insert`."""
    x = vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))
    return vit.norm_pre(x) if tokens is None else insert(vit, x, tokens)


def insert(vit: Any, x: Tensor, tokens: Tensor) -> Tensor:
    """x (B, N, D), embedded, before the first norm -> (B, N + P, D) behind it: tokens (B or 1, P, D) between the class
    token (and registers) and the patches, with the class token's position."""
    position = getattr(vit, "pos_embed", None)
    if position is not None and vit.cls_token is not None and not vit.no_embed_class:
        tokens = tokens + position[:, :1]
    head, tail = x[:, : vit.num_prefix_tokens], x[:, vit.num_prefix_tokens :]
    return vit.norm_pre(torch.cat([head, tokens.to(x.dtype).expand(len(x), -1, -1), tail], dim=1))
