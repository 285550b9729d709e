"""The small networks of HCL's fixtures, as `Network`s of ours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convs.heads import LinearHead
from convs.network import Network
from tests.conftest import bare_backbone


class SmallNet(nn.Module):
    """conv1 3x3 - [bn1] - ReLU - conv2 3x3 stride 2 - [bn2] - ReLU - mean over the map."""

    def __init__(self, width1: int, width2: int, norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width1, 3, padding=1, bias=not norm)
        self.conv2 = nn.Conv2d(width1, width2, 3, stride=2, padding=1, bias=not norm)
        self.bn1: nn.Module = nn.BatchNorm2d(width1) if norm else nn.Identity()
        self.bn2: nn.Module = nn.BatchNorm2d(width2) if norm else nn.Identity()
        self.num_features = width2

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        return self.bn2(self.conv2(x)).relu().mean(dim=(2, 3))


def weights_of(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The state "prefix.*" under the names of `Network`."""
    found = {key.removeprefix(f"{prefix}."): value for key, value in arrays.items() if key.startswith(f"{prefix}.")}
    named = {("head." + key[3:] if key.startswith("fc.") else f"backbone.model.{key}"): found[key] for key in found}
    return {key: torch.from_numpy(np.array(value)).double() for key, value in named.items()}


def stored_network(arrays: dict[str, np.ndarray], prefix: str) -> Network:
    """BNNet or PlainNet with the stored weights, in double precision."""
    state = weights_of(arrays, prefix)
    first, second = state["backbone.model.conv1.weight"], state["backbone.model.conv2.weight"]
    body = SmallNet(len(first), len(second), norm="backbone.model.bn1.weight" in state)
    network = Network(bare_backbone(body, body.num_features), LinearHead, "none")
    report: Any = network.double().load_state_dict(state, strict=False)
    assert not report.unexpected_keys and all("num_batches" in key for key in report.missing_keys)
    return network
