"""The small ViT of a fixture, and what tests of its adapters, prompts and scales share."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from convs.backbones import Backbone, BackboneInfo
from convs.weights import RANDOM

BRANCHED = {"down.weight": "down_w", "down.bias": "down_b", "up.weight": "up_w", "up.bias": "up_b"}


def stored_vit(arrays: Mapping[str, np.ndarray]) -> VisionTransformer:
    """The fixture's pre-trained ViT, in float64."""
    size, patch, width, depth, heads = arrays["arch"].tolist()
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
    ).double()
    model.load_state_dict(group(arrays, "vit/"))
    return model.eval()


def backbone_of(model: VisionTransformer) -> Backbone:
    size = model.patch_embed.img_size[0]
    return Backbone(model, BackboneInfo("vit", model.embed_dim, size, (0.0,) * 3, (1.0,) * 3, RANDOM))


def group(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """name -> tensor of the keys under `prefix`."""
    return {key[len(prefix) :]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(prefix)}


def numbers(arrays: Mapping[str, np.ndarray], pattern: str) -> list[int]:
    """The numbers that stand in keys in the place of a pattern's group, ascending."""
    return sorted({int(found[1]) for key in arrays if (found := re.match(pattern, key))})


def bottleneck_of(arrays: Mapping[str, Any]) -> int:
    """Width of the adapters of a fixture."""
    return len(next(value for key, value in arrays.items() if key.endswith("adapter.down.bias")))


def fill(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Every parameter from the fixture, each of which must be used."""
    assert parameters.keys() == stored.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(stored[name].view_as(parameter))


def adapter_parameters(model: Any) -> dict[str, Tensor]:
    """The adapters' tensors under the fixtures' names: blocks.{i}.adapter.{down,up}.{weight,bias}."""
    return {
        f"blocks.{i}.adapter.{theirs}": getattr(block.adapter, ours)
        for i, block in enumerate(model.blocks)
        for theirs, ours in BRANCHED.items()
    }


def ssf_parameters(model: Any) -> dict[str, Tensor]:
    return {n.replace(".ssf.", "."): p for n, p in model.named_parameters() if ".ssf." in n}


def close(ours: Tensor, stored: Any, atol: float, name: str = "") -> None:
    expected = stored.numpy() if isinstance(stored, Tensor) else stored
    found = ours.detach().numpy()
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=atol, rtol=0, err_msg=name)


def check_forward(model: Any, parameters: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], atol: float) -> None:
    """Features and gradients at the fixture's parameters."""
    fill(parameters, group(arrays, "params/"))
    features = model(torch.from_numpy(arrays["x"]))
    close(features, arrays["features"], atol)
    (features * torch.from_numpy(arrays["weight"])).sum().backward()
    stored = group(arrays, "grads/")
    assert stored.keys() == parameters.keys()
    for name, parameter in parameters.items():
        close(parameter.grad, stored[name], atol, name)
