"""Heads that grow with the classes: linear, one linear per task, cosine.

Shapes: features (B, D) -> logits (B, C), C = classes grown so far. A head loaded from a checkpoint takes the sizes of
the checkpoint, so resuming needs no replay of the growth. All share the protocol of `Head`, so that whatever trains a
whole head from outside (models/parts/alignment.py) does not ask which one it is.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convs.growing import Growing


class Head(Growing):
    """Features (B, D) -> logits (B, C)."""

    @property
    @abstractmethod
    def sizes(self) -> list[int]:
        """Outputs of each part that a task has added, in order; one part where the head is a single matrix."""

    @property
    def num_classes(self) -> int:
        """C, outputs grown so far."""
        return sum(self.sizes)

    @abstractmethod
    def grow(self, total_classes: int) -> None:
        """Add outputs up to `total_classes`; nothing happens when they are there."""

    @abstractmethod
    def stacked(self) -> tuple[Tensor, Tensor | None]:
        """Weight (C, D) and bias (C,) of all parts; None where there is no bias."""

    @abstractmethod
    def set_stacked(self, weight: Tensor, bias: Tensor | None) -> None:
        """Overwrite all parts: (C, D), (C,) or None."""


class LinearHead(Head):
    """z = W f + b, one matrix. New rows: Kaiming uniform (linear gain), bias 0; old rows are copied.

    init "torch": new rows and biases as `nn.Linear` draws them, uniform in +-1/sqrt(D). "trunc_normal": rows with std
    0.02, cut at +-2.
    """

    def __init__(self, feature_dim: int, init: Literal["kaiming", "torch", "trunc_normal"] = "kaiming"):
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(0, feature_dim))
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def sizes(self) -> list[int]:
        return [len(self.bias)]

    def grow(self, total_classes: int) -> None:
        new = total_classes - self.num_classes
        if new <= 0:
            return
        rows = self.weight.new_empty(new, self.weight.shape[1])
        offsets = self.bias.new_zeros(new)
        if self.init == "torch":
            bound = 1 / math.sqrt(rows.shape[1])
            nn.init.uniform_(rows, -bound, bound)
            nn.init.uniform_(offsets, -bound, bound)
        elif self.init == "trunc_normal":
            nn.init.trunc_normal_(rows, std=0.02)
        else:
            nn.init.kaiming_uniform_(rows, nonlinearity="linear")
        self.weight = nn.Parameter(torch.cat([self.weight.data, rows]))
        self.bias = nn.Parameter(torch.cat([self.bias.data, offsets]))

    def stacked(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def set_stacked(self, weight: Tensor, bias: Tensor | None) -> None:
        assert bias is not None
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


class TaskHeads(Head):
    """One linear head per task, logits concatenated in task order; head t reads s_t f:  z_t = W_t (s_t f) + b_t.

    Weights truncated normal (std 0.02, cut at +-2), biases 0. The scales s_t are 1 unless `scale_by_age` sets them.
    `backup` and `recall` keep and restore all heads around a stage whose result must not last (SLCA's alignment).
    """

    def __init__(self, feature_dim: int):
        super().__init__()
        self.feature_dim = feature_dim
        self.heads = nn.ModuleList()
        self.scales: Tensor
        self.register_buffer("scales", torch.empty(0))
        self.owner: Tensor
        self.register_buffer("owner", torch.empty(0, dtype=torch.int64), persistent=False)  # (C,): head of a column
        self._saved: dict[str, Tensor] | None = None

    @property
    def sizes(self) -> list[int]:
        return [head.out_features for head in self._linears()]

    def grow(self, total_classes: int, freeze_old: bool = True) -> None:
        """Add one head for the classes still missing, freezing the older ones; nothing when none is missing."""
        new = total_classes - self.num_classes
        if new <= 0:
            return
        if freeze_old:
            self.heads.requires_grad_(False)
        head = self._append(new)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def scale_by_age(self, mu: float) -> None:
        """s_t = 1 + mu (T - 1 - t): older heads read larger features (SLCA++)."""
        count = len(self.heads)
        self.scales = 1 + mu * torch.arange(count - 1, -1, -1, device=self.scales.device, dtype=self.scales.dtype)

    def backup(self) -> None:
        self._saved = {name: value.detach().clone() for name, value in self._tensors()}

    def recall(self) -> None:
        """Restore the last `backup` and forget it; nothing when there is none."""
        if self._saved is not None:
            saved, self._saved = self._saved, None
            with torch.no_grad():
                for name, value in self._tensors():
                    value.copy_(saved[name])

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Scales apart."""
        heads = list(self._linears())
        return torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])

    def set_stacked(self, weight: Tensor, bias: Tensor | None) -> None:
        assert bias is not None
        parts = zip(self._linears(), weight.split(self.sizes), bias.split(self.sizes), strict=True)
        with torch.no_grad():
            for head, rows, offsets in parts:
                head.weight.copy_(rows)
                head.bias.copy_(offsets)

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = self.stacked()  # one product, however many tasks
        return F.linear(features, weight) * self.scales[self.owner] + bias

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.named_parameters(), ("scales", self.scales)]

    def _linears(self) -> Iterator[nn.Linear]:
        return (head for head in self.heads if isinstance(head, nn.Linear))

    def _append(self, size: int) -> nn.Linear:
        head = nn.Linear(self.feature_dim, size, device=self.scales.device, dtype=self.scales.dtype)
        self.heads.append(head)
        self.scales = torch.cat([self.scales, self.scales.new_ones(1)])
        self.owner = torch.cat([self.owner, self.owner.new_full((size,), len(self.heads) - 1)])
        return head

    def get_extra_state(self) -> dict[str, Any]:
        return {"sizes": self.sizes, "saved": self._saved}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._saved = state["saved"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (extra := state_dict.get(prefix + "_extra_state")) is not None:
            self.heads, self.scales, self.owner = nn.ModuleList(), self.scales.new_empty(0), self.owner.new_empty(0)
            for size in extra["sizes"]:
                self._append(size)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CosineHead(Head):
    """z = sigma * cos(f, w_c), one weight block per task, no bias.

    init: "trunc_normal" (std 0.02, cut at +-2), "uniform" (+-1/sqrt(D)), or "zeros" (rows set from class means).
    learn_scale: sigma is a parameter that starts at 1; otherwise it is 1 and logits lie in [-1, 1].
    """

    def __init__(
        self,
        feature_dim: int,
        init: Literal["trunc_normal", "uniform", "zeros"] = "trunc_normal",
        learn_scale: bool = False,
    ):
        super().__init__()
        self.feature_dim, self.init = feature_dim, init
        self.blocks = nn.ParameterList()
        self.scale = nn.Parameter(torch.ones(())) if learn_scale else None
        self._like: Tensor  # where new blocks are made
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def sizes(self) -> list[int]:
        return [len(block) for block in self.blocks]

    @property
    def weight(self) -> Tensor:
        """(C, D): all blocks."""
        return torch.cat(list(self.blocks))

    def grow(self, total_classes: int) -> None:
        """Add one block for the classes still missing."""
        if (new := total_classes - self.num_classes) <= 0:
            return
        block = self._like.new_zeros(new, self.feature_dim)
        if self.init == "trunc_normal":
            nn.init.trunc_normal_(block, std=0.02)
        elif self.init == "uniform":
            nn.init.uniform_(block, -1 / math.sqrt(self.feature_dim), 1 / math.sqrt(self.feature_dim))
        self.blocks.append(nn.Parameter(block))

    def stacked(self) -> tuple[Tensor, None]:
        return self.weight, None

    def set_stacked(self, weight: Tensor, bias: Tensor | None = None) -> None:
        assert bias is None, "a cosine head has no bias"
        with torch.no_grad():
            for block, rows in zip(self.blocks, weight.split(self.sizes), strict=True):
                block.copy_(rows)

    def forward(self, features: Tensor) -> Tensor:
        logits = F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))
        return logits if self.scale is None else self.scale * logits

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        count = sum(key.startswith(f"{prefix}blocks.") for key in state_dict)
        saved = [state_dict[f"{prefix}blocks.{i}"] for i in range(count)]
        self.blocks = nn.ParameterList(nn.Parameter(self._like.new_empty(block.shape)) for block in saved)
        super()._load_from_state_dict(state_dict, prefix, *args)


def combine_heads(logits: Tensor, classes: int, how: Literal["max", "mean", "sum_softmax"]) -> Tensor:
    """Where every head scores every class (one head per domain): (B, heads * classes) -> (B, classes).

    max, mean: over the heads; sum_softmax: log of the summed probabilities.
    """
    votes = logits.unflatten(1, (-1, classes))  # (B, heads, classes)
    if how == "sum_softmax":
        return votes.log_softmax(dim=2).logsumexp(dim=1)
    return votes.amax(dim=1) if how == "max" else votes.mean(dim=1)


# The heads that a config can choose by name: feature width -> head.
HEADS: Mapping[str, Callable[[int], Head]] = {
    "linear": LinearHead,
    "cosine": lambda feature_dim: CosineHead(feature_dim, init="uniform", learn_scale=True),
}
