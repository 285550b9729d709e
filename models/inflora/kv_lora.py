"""Per-task low-rank branches on the key and value projections of a ViT (InfLoRA), and the moments of their inputs.

B images, N tokens, D width, r rank. For the tokens h (B, N, D) that enter a fused projection W (3D, D), rows q | k | v:

    k = h W_k^T + (h A^T) B_k^T        v = h W_v^T + (h A^T) B_v^T        q = h W_q^T

One A (r, D) serves both, so h A^T is computed once: 6 r D flop a token instead of 4 D^2 for the dense sum of all
branches. Past branches live in W, so a step costs the same in every task.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.cast_once import CastOnceLinear
from utils.errors import ConfigError


class KeyValueLoRA(CastOnceLinear):
    """A ViT's `attn.qkv` with the current task's branch; it takes over weight and bias, under their names, frozen.

    B = 0 means no branch. A is fixed unless a learner lets it train.
    """

    def __init__(self, qkv: nn.Linear, rank: int):
        super().__init__(qkv)
        width = qkv.in_features
        self.A = nn.Parameter(self.weight.new_zeros(rank, width), requires_grad=False)
        self.B = nn.Parameter(self.weight.new_zeros(2, width, rank))  # key, value
        self.remainder: Tensor
        self.register_buffer("remainder", self.weight.new_zeros(2 * width, width))
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def width(self) -> int:
        return self.A.shape[1]

    def start(self, reduction: Tensor) -> None:
        """Begin a task with A = reduction (r, D) and B = 0: the output is unchanged until the first step."""
        with torch.no_grad():
            self.A.copy_(reduction)
            self.B.zero_()

    def fold(self) -> None:
        """W_k += B_k A, W_v += B_v A, then B = 0.

        The sum is taken in float64 and what rounding to W's type drops is carried into the next fold: after any number
        of tasks W is the rounded exact sum, and updates smaller than the spacing of W's numbers are not lost.
        """
        with torch.no_grad():
            projections = self.weight[self.width :]  # (2D, D): key, value
            branch = self.B.double().flatten(0, 1) @ self.A.double()  # (2D, D)
            exact = projections.double() + self.remainder.double() + branch
            projections.copy_(exact)
            self.remainder.copy_(exact - projections.double())
            self.B.zero_()

    def stored_bytes(self) -> int:
        """B, and the key and value weights that hold the past branches, with what they lost in rounding."""
        folded = self.remainder.numel() * (self.weight.element_size() + self.remainder.element_size())
        return folded + self.B.numel() * self.B.element_size()

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 3D)."""
        out = super().forward(tokens)
        reduced = F.linear(tokens, self.A)  # (B, N, r)
        expand = F.pad(self.B.flatten(0, 1), (0, 0, self.width, 0)).to(out.dtype)  # (3D, r), zero for q
        # In place on the projection: no (B, N, 2D) product beside it, and no copy of its gradient.
        out.flatten(0, -2).addmm_(reduced.flatten(0, -2), expand.mT)
        return out


def add_kv_lora(vit: Any, blocks: Literal["all"] | Sequence[int], rank: int) -> list[KeyValueLoRA]:
    """Put a branch into the attention of the given blocks of a timm ViT, by replacing `blocks[i].attn.qkv`; they come
    in the order of the blocks.

    Raises ConfigError when the backbone has no such projections, or not that many blocks.
    """
    found = list(getattr(vit, "blocks", []))
    chosen = range(len(found)) if blocks == "all" else sorted(set(blocks))
    if wrong := [index for index in chosen if index >= len(found)]:
        raise ConfigError("blocks", [f"block {wrong[0]} of a backbone with {len(found)} blocks (counted from 0)"])
    layers = []
    for index in chosen:
        attention: Any = getattr(found[index], "attn", None)
        qkv = getattr(attention, "qkv", None)
        if not isinstance(qkv, nn.Linear) or qkv.out_features != 3 * qkv.in_features:
            raise ConfigError(
                "backbone",
                [f"{type(vit).__name__} has no fused attn.qkv of size D -> 3D in its blocks; choose a ViT of timm"],
            )
        if rank > qkv.in_features:
            raise ConfigError("rank", [f"{rank} exceeds the width of the backbone, {qkv.in_features}"])
        attention.qkv = KeyValueLoRA(qkv, rank)
        layers.append(attention.qkv)
    if not layers:
        raise ConfigError("blocks", [f"no blocks to adapt in {type(vit).__name__}; choose a ViT of timm"])
    return layers


class InputMoments:
    """Second moments C = sum h h^T / n of the tokens entering each of L layers, n = images * tokens, not centred.

    One matrix product per layer and batch, summed on the device in the type of the weights (never in the lower
    precision of autocast); the forward pass ends at the last layer, since nothing behind it is needed.
    """

    def __init__(self, layers: Sequence[KeyValueLoRA]):
        weight = layers[0].weight
        self.layers = layers
        self.sums = weight.new_zeros(len(layers), weight.shape[1], weight.shape[1])  # (L, D, D)
        self.tokens = torch.zeros((), dtype=torch.float64, device=weight.device)

    def add(self, forward: Callable[[Tensor], Any], images: Tensor) -> None:
        """Run forward(images) up to the last layer and add what the layers see."""
        hooks = [layer.register_forward_pre_hook(self._watch(i)) for i, layer in enumerate(self.layers)]
        try:
            forward(images)
        except _AllSeen:
            pass
        finally:
            _remove(hooks)

    def mean(self) -> Tensor:
        """C (L, D, D)."""
        return self.sums / self.tokens.to(self.sums.dtype)

    def _watch(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens = inputs[0].detach().flatten(0, -2).to(self.sums.dtype)  # (B N, D)
            with torch.autocast(tokens.device.type, enabled=False):
                self.sums[index].addmm_(tokens.mT, tokens)
            if index == len(self.layers) - 1:
                self.tokens += len(tokens)
                raise _AllSeen

        return see


class _AllSeen(Exception):  # noqa: N818 - not an error: the rest of the forward pass is not needed
    pass


def _remove(hooks: Iterable[Any]) -> None:
    for hook in hooks:
        hook.remove()
