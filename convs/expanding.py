"""Networks that grow with the tasks: one branch more for each, and a head over all their features.

f(x) = [h_0(g(x)), ..., h_t(g(x))]     DER, FOSTER: h_i whole networks, g nothing     MEMO: h_i last blocks, g the rest

B images, D width of one branch, t + 1 branches: features (B, (t + 1) D). A new branch starts as a copy of the last one,
running statistics included; the older ones are frozen and stay in evaluation mode.
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import global_pool_nlc
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from convs.backbones import Backbone, BackboneInfo
from convs.growing import GrowingList
from convs.heads import LinearHead
from convs.network import Network
from utils.errors import ConfigError


class Branches(nn.Module):
    """g and the h_i. freeze_shared: g trains with the first branch alone; without g there is nothing to freeze."""

    def __init__(self, shared: nn.Module, branch: nn.Module, freeze_shared: bool = True):
        super().__init__()
        self.shared, self.freeze_shared = shared, freeze_shared
        self.at_most = sys.maxsize  # branches at a time; for what is said beforehand
        self.branches = GrowingList(self._copy_of_last)
        self.branches.append(branch)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.shared(images)
        return torch.cat([branch(maps) for branch in self.branches], dim=1)

    def stored_bytes(self) -> int:
        """All of it has been trained, also what no longer trains."""
        return sum(value.numel() * value.element_size() for value in (*self.parameters(), *self.buffers()))

    def held_bytes(self, tasks: Sequence[Any]) -> int:
        """Of the branches that tasks to come bring, one each, as long as `at_most` allows."""
        last = sum(value.numel() * value.element_size() for value in self.branches[-1].parameters())
        return max(0, min(len(tasks), self.at_most) - len(self.branches)) * last

    def grow(self) -> None:
        """One branch more; the others no longer train."""
        self.branches.grow()
        for module in self._old:
            module.eval().requires_grad_(False)

    def restart(self, branch: nn.Module) -> None:
        """This branch alone."""
        del self.branches[1:]
        self.branches[0] = branch

    def train(self, mode: bool = True) -> "Branches":
        super().train(mode)
        for module in self._old:
            module.eval()
        return self

    @property
    def _old(self) -> list[nn.Module]:
        shared = [self.shared] if self.freeze_shared and len(self.branches) > 1 else []
        return [*shared, *list(self.branches)[:-1]]

    def _copy_of_last(self, index: int) -> nn.Module:
        return copy.deepcopy(self.branches[index - 1]).train(self.training).requires_grad_(True)


class ExpandingBackbone(Backbone):
    """Its features widen with the branches."""

    model: Branches

    @property
    def feature_dim(self) -> int:
        return len(self.model.branches) * self.info.feature_dim


class WideningHead(LinearHead):
    """A linear head whose features grow as well as its classes."""

    def widen(self, feature_dim: int) -> None:
        """(C, D) -> (C, feature_dim): new columns as Kaiming draws a matrix of that width, old ones kept."""
        columns = self.weight.new_empty(self.num_classes, feature_dim)
        if self.num_classes:
            nn.init.kaiming_uniform_(columns, nonlinearity="linear")
            columns[:, : self.weight.shape[1]] = self.weight.data
        self.weight = nn.Parameter(columns)


class ExpandingNetwork(Network):
    """Branches, a head over all features, an auxiliary head over the newest branch's."""

    def __init__(self, branches: Branches, info: BackboneInfo, normalize: str):
        super().__init__(ExpandingBackbone(branches, info), WideningHead, normalize)
        self.branch_dim = info.feature_dim
        self.aux_head = LinearHead(info.feature_dim)

    @property
    def branches(self) -> Branches:
        assert isinstance(self.backbone, ExpandingBackbone)
        return self.backbone.model

    def forward(self, images: Tensor, auxiliary: bool = False) -> Any:
        """Logits (B, C); with `auxiliary` also those of the auxiliary head."""
        features = self.features(images)
        logits = self.head(features)
        return (logits, self.aux_head(features[:, -self.branch_dim :])) if auxiliary else logits

    def grow(self) -> None:
        """One branch more, the head as wide as all of them."""
        self.branches.grow()
        self.head.widen(self.feature_dim)

    def renew_aux_head(self, classes: int) -> None:
        """A fresh auxiliary head of so many outputs."""
        fresh = LinearHead(self.branch_dim).to(self.head.weight.device)
        fresh.grow(classes)
        self.aux_head = fresh


class TwoNetworks(ExpandingNetwork):
    """FOSTER's: one branch, later an old and a new one; the auxiliary head reads the new, `old_head` the old one."""

    def __init__(self, branches: Branches, info: BackboneInfo, normalize: str):
        super().__init__(branches, info, normalize)
        branches.at_most = 2
        self.old_head = LinearHead(info.feature_dim)

    def forward(self, images: Tensor, boosting: bool = False) -> Any:
        """Logits (B, C); boosting: also those of the new branch alone (B, C) and of the old network (B, K)."""
        features = self.features(images)
        logits = self.head(features)
        if not boosting:
            return logits
        return logits, self.aux_head(features[:, -self.branch_dim :]), self.old_head(features[:, : self.branch_dim])

    def restart(self, student: Network) -> None:
        """The student in the old network's place, and a copy of it beside it."""
        self.branches.restart(copy.deepcopy(student.backbone.model))
        self.old_head.load_state_dict(student.head.state_dict())
        self.old_head.requires_grad_(False)
        self.head.load_state_dict(student.head.state_dict())
        self.grow()


class _Trunk(nn.Module):
    """A timm model without its last part: (B, 3, s, s) -> tokens or maps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


class _ViTTail(nn.Module):
    """The last block and what follows it: (B, N, D) -> (B, D)."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.block, self.norm, self.fc_norm = vit.blocks[-1], vit.norm, vit.fc_norm
        self.pool, self.prefix_tokens = vit.global_pool, vit.num_prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(self.block(tokens))
        return self.fc_norm(global_pool_nlc(tokens, self.pool, self.prefix_tokens))


def split_backbone(
    model: nn.Module, last_block: Literal["checkpoint", "random"] = "checkpoint"
) -> tuple[nn.Module, nn.Module]:
    """(g, h) with h(g(x)) = model(x): a ViT is cut before its last block, a ConvNeXt, Swin or ResNet-32 before its last
    stage. The model itself is taken apart.

    last_block "random": h's block is drawn as PyTorch draws fresh layers, whatever the checkpoint holds; the norm
    behind it stays.
    Raises ConfigError for a network that nobody has said how to split.
    """
    shared: nn.Module = _Trunk(model)
    taken: Any = model  # apart
    if isinstance(model, VisionTransformer):
        tail: nn.Module = _ViTTail(model)
        taken.blocks, taken.norm, taken.fc_norm = taken.blocks[:-1], nn.Identity(), nn.Identity()
    elif isinstance(model, ConvNeXt):
        tail = nn.Sequential(taken.stages[-1], taken.norm_pre, taken.head)
        taken.stages, taken.norm_pre, taken.head = taken.stages[:-1], nn.Identity(), nn.Identity()
    elif isinstance(model, SwinTransformer):
        tail = nn.Sequential(taken.layers[-1], taken.norm, taken.head)
        taken.layers, taken.norm, taken.head = taken.layers[:-1], nn.Identity(), nn.Identity()
    elif callable(split := getattr(model, "split", None)):
        shared, tail = split()
    else:
        name = type(model).__name__
        raise ConfigError(
            "backbone", [f"{name} has no known last block for MEMO: give a ViT, ConvNeXt, Swin or small_resnet32"]
        )
    if last_block == "random":
        block = tail.block if isinstance(tail, _ViTTail) else tail[0] if isinstance(tail, nn.Sequential) else tail
        for module in block.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return shared, tail
