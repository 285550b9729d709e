"""SSF (Lian et al., 2022, arXiv 2210.08823): scale and shift the features of a frozen ViT, channel by channel.

    y' = gamma * y + beta,     gamma ~ N(1, 0.02),  beta ~ N(0, 0.02)

behind eight places: the patch embedding, in each block both LayerNorms, the fused qkv, the attention's projection and
both layers of the MLP, and the final norm. What stands there is affine, so after training gamma and beta go into its
weights and cost nothing:  diag(gamma) (W x + b) + beta = (diag(gamma) W) x + (gamma * b + beta).
"""

from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import ConfigError

IN_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


class ScaleShift(nn.Module):
    """(..., D) -> (..., D). Not `active`, it passes what it gets; `merged`, its work is done by the layer before it."""

    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width).normal_(1.0, 0.02))
        self.shift = nn.Parameter(torch.empty(width).normal_(0.0, 0.02))
        self.active = True
        self.merged = False

    def forward(self, y: Tensor) -> Tensor:
        return torch.addcmul(self.shift, y, self.scale) if self.active and not self.merged else y

    def get_extra_state(self) -> dict[str, Any]:
        return {"merged": self.merged}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.merged = state["merged"]


def add_ssf(vit: Any) -> list[ScaleShift]:
    """Put a `ScaleShift` behind the eight places of a timm ViT, as their child `ssf`, and freeze everything else.

    Raises ConfigError when the model has no such places.
    """
    names = [
        "patch_embed",
        *(f"blocks.{i}.{name}" for i in range(len(getattr(vit, "blocks", []))) for name in IN_BLOCK),
    ]
    try:
        places = [vit.get_submodule(name) for name in [*names, "norm"]]
        widths = [affine(place).weight.shape[0] for place in places]
    except AttributeError as error:
        message = f"SSF finds no place in {type(vit).__name__} ({error}); choose a ViT of timm"
        raise ConfigError("backbone", [message]) from None
    if len(names) == 1:
        raise ConfigError("backbone", [f"{type(vit).__name__} has no transformer blocks; choose a ViT of timm"])
    for place, width in zip(places, widths, strict=True):
        place.ssf = ScaleShift(width)
        if (layer := affine(place)).bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(width))  # room for the shift in `merge_ssf`
        place.register_forward_hook(_scale_and_shift)
    vit.requires_grad_(False)
    for place in places:
        place.ssf.requires_grad_(True)
    return [place.ssf for place in places]


@torch.no_grad()
def merge_ssf(vit: nn.Module) -> None:
    """Write every scale and shift into the weights before it; the features stay the same, up to rounding."""
    for place in vit.modules():
        ssf = getattr(place, "ssf", None)
        if isinstance(ssf, ScaleShift) and not ssf.merged:
            layer = affine(place)
            scale, bias = ssf.scale.double(), layer.bias.double()
            layer.weight.copy_(layer.weight.double() * scale.view(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.copy_(scale * bias + ssf.shift.double())
            ssf.merged = True


def affine(place: nn.Module) -> Any:
    """The layer whose weight and bias a place's output leaves: itself, or what a patch embedding ends with."""
    if not hasattr(place, "proj"):
        return place
    return place.norm if hasattr(getattr(place, "norm", None), "weight") else place.proj


def _scale_and_shift(place: Any, _: Any, output: Tensor) -> Tensor:
    return place.ssf(output)
