"""Google's ViT archives (AugReg and others, Flax layout) -> timm names."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_WRAPPER = re.compile(r"^(opt/target/|params/)")  # of archives that hold the optimiser as well


def from_flax(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Google's ViT archive -> timm names: kernels [in, out] are transposed, per-head q, k, v stacked to qkv.

    query/key/value kernels (D, H, d) -> (D, H d) transposed; out kernel (H, d, D) -> (H d, D) transposed;
    convolution kernels HWIO -> OIHW. What finds no timm name keeps its own. Raises ValueError where one is missing.
    """
    left = {_WRAPPER.sub("", key): torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}
    if "embedding/kernel" not in left:
        return left

    def take(key: str) -> Tensor:
        if key not in left:
            raise ValueError(f"a ViT archive without {key}")
        return left.pop(key)

    depth = len({key.split("/")[1] for key in left if key.startswith("Transformer/encoderblock_")})
    state = {
        "cls_token": take("cls"),
        "pos_embed": take("Transformer/posembed_input/pos_embedding"),
        "patch_embed.proj.weight": take("embedding/kernel").permute(3, 2, 0, 1),
        "patch_embed.proj.bias": take("embedding/bias"),
        "norm.weight": take("Transformer/encoder_norm/scale"),
        "norm.bias": take("Transformer/encoder_norm/bias"),
    }
    for block in range(depth):
        state |= _block(take, f"Transformer/encoderblock_{block}/", f"blocks.{block}.")
    return state | {key.replace("/", "."): value for key, value in left.items()}


def _block(take, source: str, target: str) -> dict[str, Tensor]:
    attention, mlp = source + "MultiHeadDotProductAttention_1/", source + "MlpBlock_3/"
    parts = ("query", "key", "value")
    state = {
        "attn.qkv.weight": torch.cat([take(f"{attention}{part}/kernel").flatten(1).T for part in parts]),
        "attn.qkv.bias": torch.cat([take(f"{attention}{part}/bias").flatten() for part in parts]),
        "attn.proj.weight": take(f"{attention}out/kernel").flatten(0, 1).T,
        "attn.proj.bias": take(f"{attention}out/bias"),
    }
    for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
        state |= {f"{ours}.weight": take(f"{source}{theirs}/scale"), f"{ours}.bias": take(f"{source}{theirs}/bias")}
    for ours, theirs in (("mlp.fc1", "Dense_0"), ("mlp.fc2", "Dense_1")):
        state |= {f"{ours}.weight": take(f"{mlp}{theirs}/kernel").T, f"{ours}.bias": take(f"{mlp}{theirs}/bias")}
    return {target + key: value for key, value in state.items()}
