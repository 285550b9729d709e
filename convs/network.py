"""Pixels -> normalisation -> backbone -> head, as one module."""

import torch
from torch import Tensor, nn

from convs.backbones import Backbone
from convs.heads import Head


class Network(nn.Module):
    """images in [0, 1] (B, 3, s, s) -> logits (B, C).

    Normalisation is part of the network, so images outside it are plain pixels whatever the network expects.
    """

    def __init__(self, backbone: Backbone, head: Head, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.backbone: Backbone = backbone
        self.head: Head = head
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
        return self.backbone(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """What the backbone expects of pixels in [0, 1]."""
        return images if self._plain else (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
