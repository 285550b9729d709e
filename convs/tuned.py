"""A ViT that is tuned once, in the first task, and then stays as it is (APER, RanPAC, FeCAM).

Everything else of the ViT is frozen, so it can still be read without what was tuned: APER's features are both, side by
side. With adapters the two share the patch embedding and the first attention and go through as replicas of one batch.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convs.adapters import AdapterNetwork, add_adapters
from convs.backbones import Backbone
from convs.heads import Head
from convs.prompts import PromptInit, add_prompts
from convs.ssf import add_ssf, merge_ssf

Petl = Literal["adapter", "ssf", "vpt_deep", "vpt_shallow", "finetune", "none"]


class TunedNetwork(AdapterNetwork):
    """`features` are those of the tuned ViT; `plain_features` those of the ViT as it was.

    keep_plain: whether `plain_features` are wanted, for which "finetune" keeps a copy of the whole ViT.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Callable[[int], Head],
        normalize: str,
        petl: Petl,
        *,
        bottleneck: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        tokens: int = 5,
        prompt_init: PromptInit = "uniform",
        keep_plain: bool = False,
    ):
        """Raises ConfigError when `petl` needs a ViT and the backbone is none."""
        super().__init__(backbone, head, normalize)
        self.petl, vit = petl, backbone.model
        self.original: Backbone | None = None
        if petl == "finetune" and keep_plain:
            self.original = copy.deepcopy(backbone).requires_grad_(False)
        if petl == "finetune":
            self.tuned: Sequence[Any] = [vit]
        elif petl == "adapter":
            self.tuned = add_adapters(vit, 1, bottleneck, scale, dropout)
        elif petl == "ssf":
            self.tuned = add_ssf(vit)
        elif petl == "none":
            self.tuned = []
            vit.requires_grad_(False)
        else:
            self.tuned = add_prompts(vit, "deep" if petl == "vpt_deep" else "shallow", tokens, prompt_init)

    def train(self, mode: bool = True) -> "TunedNetwork":
        """The ViT stays in evaluation mode; adapters alone have a dropout."""
        nn.Module.train(self, False)
        for module in self.tuned if self.petl == "adapter" else ():
            module.train(mode)
        return self

    def tuned_parameters(self) -> Iterator[nn.Parameter]:
        """What the first session moves, beside its head."""
        return (parameter for module in self.tuned for parameter in module.parameters())

    def finish(self, merge: bool = False) -> None:
        """Nothing trains any more. merge: what can become part of the weights does, and costs nothing afterwards;
        there are no `plain_features` then."""
        self.requires_grad_(False)
        if merge and self.petl == "ssf":
            merge_ssf(self.backbone.model)

    def plain_features(self, images: Tensor) -> Tensor:
        """(B, D) of the ViT as it was before the first session."""
        if self.petl == "adapter":
            return self.subspaces(images, 0, 0, plain=True)[0]
        if self.original is not None:
            return self.original(self.normalise(images))
        with self._untuned():
            return self.features(images)

    def both(self, images: Tensor) -> Tensor:
        """[plain, tuned] features, (B, 2D)."""
        if self.petl == "adapter":
            return self.subspaces(images, 0, 1, plain=True).transpose(0, 1).flatten(1)
        return torch.cat([self.plain_features(images), self.features(images)], dim=1)

    @contextmanager
    def _untuned(self) -> Iterator[None]:
        for module in self.tuned:
            module.active = False
        try:
            yield
        finally:
            for module in self.tuned:
                module.active = True
