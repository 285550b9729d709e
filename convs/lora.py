"""Low-rank branches beside the linear layers of any timm ViT (Hu et al., 2022; as SLCA++ uses them).

    y = x W^T + b + s (x A^T) B^T        A (r, in), B (out, r); the product B A is never formed in training

LAE adapts keys and values alone, each with its own A and B and a trained scalar in the place of s.

SLCA++ starts A at the first r right singular vectors of W and B at 0, so a branch begins as the identity and looks
along the directions that the pre-trained layer uses most. s = 0.8 is its reference's constant.
"""

import math
from collections.abc import Iterator, Sequence

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.cast_once import CastOnceLinear
from utils.errors import ConfigError


class LoRALinear(CastOnceLinear):
    """A linear layer with a branch: (..., in) -> (..., out). weight and bias keep their names, so weight files fit."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float):
        """Takes over the parameters of `linear`. A truncated normal (std 0.02), B zero."""
        super().__init__(linear)
        self.scale = scale
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.trunc_normal_(self.lora_A, std=0.02)
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.merged:
            return y
        reduced = F.linear(x, self.lora_A).flatten(0, -2)
        # In place on the projection: no second (..., out) beside it.
        y.flatten(0, -2).addmm_(reduced, self.lora_B.to(y.dtype).mT, alpha=self.scale)
        return y

    @torch.no_grad()
    def start_from_svd(self) -> None:
        """A = the first r right singular vectors of W, strongest first, each up to its sign; B stays."""
        self.lora_A.copy_(right_singular_vectors(self.weight, len(self.lora_A)))

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + s B A: the plain layer's cost in inference. Not to be saved or trained until `unmerge`."""
        if not self.merged:
            self.weight += self.scale * self.lora_B @ self.lora_A
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.merged:
            self.weight -= self.scale * self.lora_B @ self.lora_A
            self.merged = False


class SeparateKeyValueLoRA(CastOnceLinear):
    """A fused qkv with a branch each for key and value:  k += g_k x A_k^T B_k^T,  v += g_v x A_v^T B_v^T.

    A Kaiming uniform, B zero, g trained from 1: starts as the layer itself. Both branches are one pair of products.
    """

    def __init__(self, qkv: nn.Linear, rank: int):
        super().__init__(qkv)
        width = qkv.in_features
        self.key_A, self.value_A = (nn.Parameter(self.weight.new_empty(rank, width)) for _ in range(2))
        self.key_B, self.value_B = (nn.Parameter(self.weight.new_zeros(width, rank)) for _ in range(2))
        self.key_scale, self.value_scale = (nn.Parameter(self.weight.new_ones(())) for _ in range(2))
        for reduction in (self.key_A, self.value_A):
            nn.init.kaiming_uniform_(reduction, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 3D)."""
        y = super().forward(x)
        reduced = F.linear(x, torch.cat([self.key_A, self.value_A]))  # (B, N, 2r)
        up = torch.block_diag(self.key_scale * self.key_B, self.value_scale * self.value_B)  # (2D, 2r)
        up = F.pad(up, (0, 0, y.shape[-1] - len(up), 0)).to(y.dtype)  # zero for q
        # In place on the projection: no (B, N, 2D) product beside it.
        y.flatten(0, -2).addmm_(reduced.flatten(0, -2), up.mT)
        return y


def add_lora(model: nn.Module, rank: int, scale: float = 0.8, targets: Sequence[str] = ("attn.qkv",)) -> None:
    """Replace the linear layers called `targets` in every block of a ViT by `LoRALinear`.

    Raises ConfigError when the model has no blocks with such layers.
    """
    found = [
        (parent, name, layer)
        for path, parent in model.named_modules()
        for name, layer in parent.named_children()
        if any(f"{path}.{name}".endswith(f".{target}") for target in targets) and isinstance(layer, nn.Linear)
    ]
    if not found:
        wanted = ", ".join(targets)
        raise ConfigError(
            "lora_rank", [f"the backbone ({type(model).__name__}) has no linear layers called {wanted}: use a ViT"]
        )
    for parent, name, layer in found:
        setattr(parent, name, LoRALinear(layer, rank, scale))


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def right_singular_vectors(weight: Tensor, count: int) -> Tensor:
    """(out, in) -> the first `count` rows of V^T in W = U S V^T, as eigenvectors of the smaller Gram matrix.

    A full SVD also finds U and all of V, and for fc2 of ViT-B/16 that V is 3072 x 3072; LAPACK can stop at the `count`
    largest eigenvalues. Squaring W costs digits of the small singular values only: for the first ones this is nearer
    to the float64 answer than a float32 SVD. On the processor, so that every device starts from the same branches.
    """
    w = weight.detach().cpu()
    wide = w.shape[0] < w.shape[1]
    gram = (w @ w.T if wide else w.T @ w).numpy()
    size = len(gram)
    vectors = torch.from_numpy(scipy.linalg.eigh(gram, subset_by_index=(size - count, size - 1))[1])
    if wide:  # W^T u_i = s_i v_i
        vectors = F.normalize(w.T @ vectors, dim=0)
    return vectors.flip(1).T.to(weight)
