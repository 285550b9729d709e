"""Pixels -> normalisation -> backbone -> head, as one module."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.backbones import Backbone
from convs.heads import Head
from data.transforms import MEAN_STD


class Network(nn.Module):
    """images in [0, 1] (B, 3, s, s) -> logits (B, C).

    Normalisation is part of the network, so images outside it are plain pixels whatever the network expects.
    image_size: images of another size are resized to it (bilinear, differentiable), so that networks of several input
    sizes can read one stream; default: they pass as they are.
    """

    def __init__(self, backbone: Backbone, head: Callable[[int], Head], normalize: str, image_size: int | None = None):
        """head: feature width -> head. normalize: name of the mean and std that are subtracted; "model": those of the
        backbone's own recipe."""
        super().__init__()
        own = backbone.info.mean, backbone.info.std
        mean, std = own if normalize == "model" else MEAN_STD[normalize]
        self.image_size = image_size
        self.backbone: Backbone = backbone
        self.head: Any = head(backbone.feature_dim)  # any `Head`: a learner knows which one it made
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._plain = not any(mean) and set(std) == {1.0}

    @property
    def feature_dim(self) -> int:
        return self.backbone.feature_dim

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, s, s) -> (B, D)."""
        return self.backbone(self._resized(self.normalise(images)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def from_normalised(self, images: Tensor) -> Tensor:
        """`forward` of images that `normalise` has been through: what an inversion works on."""
        return self.head(self.backbone(self._resized(images)))

    def normalise(self, images: Tensor) -> Tensor:
        return images if self._plain else (images - self.mean) / self.std

    def pixels(self, normalised: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return normalised if self._plain else normalised * self.std + self.mean

    def _resized(self, images: Tensor) -> Tensor:
        if self.image_size is None or images.shape[-1] == self.image_size:
            return images
        return F.interpolate(images, size=(self.image_size,) * 2, mode="bilinear", align_corners=False, antialias=True)
