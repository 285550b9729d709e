"""K parallel bottleneck adapters in every block of a timm ViT, and replicas of a batch that go through them.

B images, N tokens, D width, b bottleneck, K branches, L blocks. Branch i of a block reads the residual stream x1 after
attention, without a LayerNorm, beside the MLP:

    x1 = x + attn(ln1 x)        x' = x1 + mlp(ln2 x1) + A_i(x1)        A_i(x) = s (U_i drop(relu(D_i x + c_i)) + e_i)

`AdapterNetwork.subspaces` gives the features of several branches, and of the ViT without one, in batched passes:
APER's two, those of EASE and MOS (convs/adapter_sets.py).

RAA and SSIAT train all branches at once: the batch goes through as K + 1 replicas, [branch 0 | ... | branch K-1 |
amalgam]. Each block draws in each forward pass alpha = u / sum(u), u ~ U(0, 1)^K, and the amalgam's replica gets

    "upstream"     sum_i alpha_i A_i(x1 of replica i)        outputs are mixed, on the branches' own streams
    "parameter"    A with U, D, c, e = sum_i alpha_i (U_i, D_i, c_i, e_i), on its own stream
    "none"         there is no such replica

What the replicas share is computed once, for all passes over a batch: the patch embedding and the first block up to its
adapter depend on nothing that trains (`AdapterNetwork.prefix`). A frozen branch 0 goes through in a batch of its own
without gradient. Behind the last attention only the tokens go on that the features are made of.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from convs.backbones import Backbone
from convs.heads import Head
from convs.network import Network
from utils.errors import ConfigError

Amalgam = Literal["upstream", "parameter", "none"]
ROWS = 1024  # images times subspaces in one pass: more would take memory that grows with the tasks


class BranchedAdapter(nn.Module):
    """The K branches of one block, stacked along the first dimension of each parameter.

    Starts as the zero function: D Kaiming uniform, the rest 0, so the branches differ in D alone.
    """

    def __init__(self, width: int, bottleneck: int, branches: int, scale: float = 0.1, dropout: float = 0.1):
        super().__init__()
        self.down_w = nn.Parameter(torch.empty(branches, bottleneck, width))
        self.down_b = nn.Parameter(torch.zeros(branches, bottleneck))
        self.up_w = nn.Parameter(torch.zeros(branches, width, bottleneck))
        self.up_b = nn.Parameter(torch.zeros(branches, width))
        self.restart()
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.frozen = 0
        self.active = True

    @property
    def branches(self) -> int:
        return len(self.down_w)

    @torch.no_grad()
    def restart(self) -> None:
        """All branches at their start: the zero function."""
        for parameter in (self.down_b, self.up_w, self.up_b):
            parameter.zero_()
        for branch in self.down_w.data:
            nn.init.kaiming_uniform_(branch, a=math.sqrt(5))

    def freeze(self, count: int) -> None:
        """The first `count` branches train no more: their gradients are zero. What else an optimiser does to weights
        without a gradient, decay and momentum, is the business of `models.parts.optim.hold_rows`."""
        self.frozen = count

    def num_frozen(self) -> int:
        """Numbers of its parameters that do not train although their gradient is asked for."""
        return sum(parameter[: self.frozen].numel() for parameter in self.parameters())

    @torch.no_grad()
    def merge(self) -> None:
        """Branch 0 becomes the mean of all branches; the others stay."""
        for parameter in self.parameters():
            parameter[0] = parameter.mean(dim=0)

    def forward(self, tokens: Tensor) -> Tensor:
        """Branch 0: (B, N, D) -> (B, N, D)."""
        return self._apply_each(tokens[None], *(parameter[:1] for parameter in self._tensors()))[0]

    def outputs(self, tokens: Tensor, first: int, last: int) -> Tensor:
        """Branches first .. last-1, each on its own tokens, in one batched product: (k, B, N, D) -> (k, B, N, D)."""
        return self._apply_each(tokens, *(parameter[first:last] for parameter in self._tensors()))

    def _apply_each(self, tokens: Tensor, down_w: Tensor, down_b: Tensor, up_w: Tensor, up_b: Tensor) -> Tensor:
        """(k, B, N, D) -> (k, B, N, D) by k stacked adapters."""
        # The scale goes into the weights: no pass over (k, B, N, D) for it.
        return self.through(tokens, (down_w, down_b, self.scale * up_w, self.scale * up_b))

    def through(self, tokens: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """(k, B, N, D) -> (k, B, N, D) by k adapters whose weights are given, with the scale in the last two."""
        down_w, down_b, up_w, up_b = weights
        hidden = torch.baddbmm(down_b[:, None], tokens.flatten(1, 2), down_w.mT).relu()  # (k, B N, b)
        hidden = self.dropout(hidden.unflatten(1, tokens.shape[1:3])).flatten(1, 2)
        return torch.baddbmm(up_b[:, None], hidden, up_w.mT).view(tokens.shape)

    def amalgam(self, kind: Amalgam, outputs: Sequence[Tensor], tokens: Tensor, alpha: Tensor) -> Tensor:
        """The amalgam's output (B, N, D) with weights alpha (K,).

        outputs: of all branches on their own streams, (B, N, D) each, read by "upstream"; tokens (B, N, D): of the
        amalgam's stream, read by "parameter", whose mean gives frozen branches no gradient.
        """
        if kind == "upstream":
            mixed = alpha[0] * outputs[0]
            for weight, output in zip(alpha[1:], outputs[1:], strict=True):
                mixed = torch.addcmul(mixed, weight, output)
            return mixed
        down_w, down_b, up_w, up_b = (
            torch.tensordot(alpha, torch.cat([p[: self.frozen].detach(), p[self.frozen :]]), dims=1)
            for p in self._tensors()
        )
        hidden = self.dropout(nn.functional.linear(tokens, down_w, down_b).relu())
        return nn.functional.linear(hidden, self.scale * up_w, self.scale * up_b)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.down_w, self.down_b, self.up_w, self.up_b

    def get_extra_state(self) -> dict[str, Any]:
        return {"frozen": self.frozen}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.frozen = state["frozen"]


class Entered(NamedTuple):
    """A block before its adapter. tokens: x1, what the adapter reads; passed: x1 + mlp(ln2 x1). Both (..., N, D)."""

    tokens: Tensor
    passed: Tensor


class OpenBlock(nn.Module):
    """A timm block whose parts a subclass can reach between; it takes over the block's modules, under their names."""

    def __init__(self, block: Any):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2
        self.keep: int | None = None  # leading tokens that leave the block; all of them

    def enter(self, x: Tensor) -> Entered:
        """(..., N, D), any number of leading dimensions."""
        flat = x.flatten(0, -3)
        tokens = (flat + self.drop_path1(self.ls1(self.attn(self.norm1(flat)))))[:, : self.keep]
        passed = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        leading = x.shape[:-2]
        return Entered(tokens.unflatten(0, leading), passed.unflatten(0, leading))


class AdaptedBlock(OpenBlock):
    """A block with adapters."""

    def __init__(self, block: Any, adapter: BranchedAdapter):
        super().__init__(block)
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """Branch 0: (B, N, D) -> (B, N, D), fewer tokens behind the last block."""
        tokens, passed = self.enter(x)
        return passed + self.adapter(tokens) if self.adapter.active else passed


def open_blocks(vit: Any, opened: Callable[[Any, int], OpenBlock]) -> list[OpenBlock]:
    """Freeze a timm ViT and replace its blocks by opened(block, number). Behind the last attention only the tokens go
    on that the features are made of. Blocks that are open already are opened again.

    Raises ConfigError when the backbone has no plain blocks (timm's `Block`).
    """
    blocks = list(getattr(vit, "blocks", []))
    if not blocks or any(type(block) is not Block and not isinstance(block, OpenBlock) for block in blocks):
        raise ConfigError("backbone", [f"{type(vit).__name__} has no plain transformer blocks; choose a ViT of timm"])
    vit.requires_grad_(False)
    found = [opened(block, number) for number, block in enumerate(blocks)]
    if vit.global_pool == "token" and getattr(vit, "attn_pool", None) is None:
        found[-1].keep = 1
    vit.blocks = nn.Sequential(*found)
    return found


def add_adapters(vit: Any, branches: int, bottleneck: int, scale: float, dropout: float) -> list[BranchedAdapter]:
    """Replace the blocks of a timm ViT by adapted ones and freeze everything else; the adapters, block by block.
    Adapters that are there already are replaced.

    Raises ConfigError when the backbone has no plain blocks.
    """
    shape = getattr(vit, "embed_dim", 0), bottleneck, branches, scale, dropout
    adapters = [BranchedAdapter(*shape) for _ in getattr(vit, "blocks", [])]
    open_blocks(vit, lambda block, number: AdaptedBlock(block, adapters[number]))
    return adapters


class AdapterNetwork(Network):
    """A network over an adapted ViT; images give branch 0's logits."""

    @property
    def blocks(self) -> Sequence[AdaptedBlock]:
        return self.backbone.model.blocks  # type: ignore[return-value]

    def train(self, mode: bool = True) -> "AdapterNetwork":
        """The frozen ViT stays in evaluation mode; the adapters alone have a dropout."""
        super().train(False)
        for block in self.blocks:
            block.adapter.train(mode)
        return self

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Entered:
        """The first block up to its adapter, which all replicas and passes over a batch share. (B, N, D) each."""
        return self.blocks[0].enter(self.backbone.embed(self.normalise(images)))

    @torch.no_grad()
    def subspaces(self, images: Tensor, first: int, last: int, plain: bool = False) -> Tensor:
        """Features of branches first .. last-1, behind those of the ViT without adapters if `plain`: (k, B, D)."""
        prefix, some = self.prefix(images), max(1, ROWS // max(1, len(images)))
        starts = range(first - plain, last, some)  # the place before the first branch is that of the plain ViT
        parts = [self._subspaces(prefix, max(start, first), min(start + some, last), start < first) for start in starts]
        return torch.cat(parts)

    def _subspaces(self, prefix: Entered, first: int, last: int, plain: bool) -> Tensor:
        """In one batched pass."""
        x, count = torch.empty(0), last - first + plain
        for number, block in enumerate(self.blocks):
            entered = block.enter(x) if number else repeat(prefix, count)
            x = entered.passed if number else entered.passed.clone()
            if last > first:
                x[plain:] += block.adapter.outputs(entered.tokens[plain:], first, last)
        return self.backbone.pool(x.flatten(0, 1)).unflatten(0, (count, -1))


class ReplicaNetwork(AdapterNetwork):
    """A network over an adapted ViT. Images give branch 0's logits; a `prefix` gives those of all replicas."""

    def __init__(self, backbone: Backbone, head: Callable[[int], Head], normalize: str, amalgam: Amalgam = "upstream"):
        super().__init__(backbone, head, normalize)
        self.amalgam = amalgam

    def forward(self, inputs: Tensor | Entered, mixtures: Tensor | None = None) -> Tensor:
        """Images (B, 3, s, s) -> (B, C), or a prefix of B images -> ((K + 1) B, C), replica after replica.

        mixtures (L, K): as `mixtures` gives them; default: drawn here.
        """
        if isinstance(inputs, Tensor):
            return self.head(self.features(inputs))
        return self.head(self.replica_features(inputs, mixtures))

    def replica_features(self, prefix: Entered, mixtures: Tensor | None = None) -> Tensor:
        """Features of [branch 0 | ... | branch K-1 | amalgam], ((K + 1) B, D)."""
        mixtures = self.mixtures(prefix.tokens) if mixtures is None else mixtures
        blocks = self.blocks
        frozen, branches = blocks[0].adapter.frozen, blocks[0].adapter.branches
        moving = branches - frozen + (self.amalgam != "none")  # replicas with a gradient
        still = fixed = x = prefix.tokens.new_empty(0)
        with torch.no_grad():
            of_frozen = ready(blocks, 0, frozen)
        of_moving = ready(blocks, frozen, branches)
        for number, (block, alpha) in enumerate(zip(blocks, mixtures, strict=True)):
            if frozen:
                with torch.no_grad():
                    entered = block.enter(still) if number else repeat(prefix, frozen)
                    fixed = block.adapter.through(entered.tokens, of_frozen[number])  # (frozen, B, N, D)
                    still = entered.passed + fixed
            entered = block.enter(x) if number else repeat(prefix, moving)  # (moving, B, N, D)
            own = block.adapter.through(entered.tokens[: branches - frozen], of_moving[number])
            if self.amalgam != "none":
                mixed = block.adapter.amalgam(self.amalgam, [*fixed, *own], entered.tokens[-1], alpha)
                own = torch.cat([own, mixed[None]])
            x = entered.passed + own
        rows = torch.cat([still, x]) if frozen else x
        return self.backbone.pool(rows.flatten(0, 1))

    def mixtures(self, like: Tensor) -> Tensor:
        """(L, K) of the type of `like`: alpha of each block, for a pass over a batch or over all its parts. Evaluation
        is not random: the plain mean."""
        adapter = self.blocks[0].adapter
        shape = (len(self.blocks), adapter.branches)
        uniform = torch.rand(shape, device=like.device) if adapter.training else like.new_ones(shape)
        return (uniform / uniform.sum(dim=1, keepdim=True)).to(like.dtype)


def ready(blocks: Sequence[AdaptedBlock], first: int, last: int) -> list[tuple[Tensor, ...]]:
    """Weights of the branches first .. last-1 of each block as `BranchedAdapter.through` takes them. Scaled and cast
    for all blocks together: one by one that is a dozen kernels a block, and as many on the way back."""
    device = blocks[0].adapter.down_w.device.type
    found = []
    for name in ("down_w", "down_b", "up_w", "up_b"):
        weights = torch.stack([getattr(block.adapter, name) for block in blocks])[:, first:last]  # (L, k, ...)
        if name.startswith("up"):
            weights = blocks[0].adapter.scale * weights
        if torch.is_autocast_enabled(device):
            weights = weights.to(torch.get_autocast_dtype(device))
        found.append(weights.unbind())
    return list(zip(*found, strict=True))


def repeat(entered: Entered, count: int) -> Entered:
    """The same for `count` replicas, without a copy: (count, B, N, D) each."""
    return Entered(*(part.expand(count, *part.shape) for part in entered))
