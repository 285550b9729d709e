"""Optimisers and learning rate schedules by name; SAM and SAM+ around any of them.

SAM (Foret et al., 2021, arXiv 2010.01412) with the damped step of RAA (AAAI 2026), "SAM+"; w: all parameters, i: one
tensor, or one branch of a tensor that stacks branches:

    g1 = grad L(w)      eps = rho g1 / ||g1||      g2 = grad L(w + eps)
    w_i += k_i u_i,     u: the optimiser's step by g2 at w
    k_i = min(1, T (1 - exp(cos(-u_i, eps_i) - 1)))          T = 0: k = 1, plain SAM
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler, MultiStepLR

from convs.network import Network
from models.parts.stages import Stage
from utils.config import Sam
from utils.errors import ConfigError


def build_optimizer(stage: Stage, groups: Iterable[dict[str, Any]], fused: bool, sam: Sam | None = None) -> Optimizer:
    """stage.optimizer over `groups`, each with its own lr and weight_decay, inside SAM when it is asked for.

    fused: one kernel a step, on CUDA; on a CPU torch's default is as fast.
    """
    groups = list(groups)
    if stage.optimizer == "sgd":
        optimizer: Optimizer = SGD(groups, momentum=stage.momentum, fused=fused)
    else:
        optimizer = (Adam if stage.optimizer == "adam" else AdamW)(groups, fused=fused)
    return optimizer if sam is None else SAM(optimizer, sam.rho, sam.damping)


def build_scheduler(stage: Stage, optimizer: Optimizer) -> LRScheduler:
    """Stepped once an epoch. cosine: lr_e = min_lr + (lr_0 - min_lr)(1 + cos(pi e / E)) / 2, e = 0..E-1."""
    if stage.scheduler == "multistep":
        return MultiStepLR(optimizer, list(stage.milestones), gamma=stage.lrate_decay)
    if stage.scheduler == "cosine":
        rates = [float(entry["lr"]) for entry in optimizer.param_groups]
        if rates and min(rates) < stage.min_lr:
            sentence = f"is {stage.min_lr:g}, above the rate of a group of weights ({min(rates):g}), which would rise"
            raise ConfigError("min_lr", [f"{sentence}: lower min_lr, or raise the rate"])
        return CosineAnnealingLR(optimizer, T_max=stage.epochs, eta_min=stage.min_lr)
    return ConstantLR(optimizer, factor=1.0)


def quarter_cosine(epoch: int, epochs: int) -> float:
    """cos(99 pi e / (200 (E - 1))): from 1 down to 0.016 in the last epoch. E = 1: constant."""
    return math.cos(99 * math.pi * epoch / (200 * (epochs - 1))) if epochs > 1 else 1.0


def group(
    parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, stacked: bool = False
) -> dict[str, Any]:
    """A parameter group of those parameters that train. stacked: each holds several weights along its first dimension,
    which SAM+ damps one by one."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    return {"params": trainable, "lr": lr, "weight_decay": weight_decay, "stacked": stacked}


def backbone_and_head(network: Network, stage: Stage | None, backbone_factor: float = 1.0) -> list[dict[str, Any]]:
    """Two groups, the backbone's at lrate * backbone_factor; a frozen backbone has none."""
    assert stage is not None
    backbone = group(network.backbone.parameters(), stage.lrate * backbone_factor, stage.weight_decay)
    head = group(network.head.parameters(), stage.lrate, stage.weight_decay)
    return [backbone, head] if backbone["params"] else [head]


class SAM(Optimizer):
    """The two passes of SAM around `base`, whose groups and state are its own; `step` needs a closure.

    rho: radius of the ascent, the same norm for all parameters together.  damping: T of SAM+, 0 for plain SAM.
    Only parameters with a gradient are touched, and k stays on their device: a step reads nothing back, so it costs a
    few passes over the trained weights beside its two over the network. Gradients are those that the closure leaves,
    reduced over processes and, under autocast, in the type of the weights.
    """

    def __init__(self, base: Optimizer, rho: float, damping: float):
        self.base, self.rho, self.damping = base, rho, damping
        self.defaults = base.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """closure: gradients of the loss at the weights as they are, and the loss. Returns that of the second pass.

        The weights are put back from a copy: adding and subtracting eps would leave a rounding error behind.
        """
        gradient_of = torch.enable_grad()(closure)
        gradient_of()
        groups = [[p for p in entry["params"] if p.grad is not None] for entry in self.param_groups]
        parameters = [p for members in groups for p in members]
        if not parameters:
            return gradient_of()
        ascent = [p.grad for p in parameters]
        start = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(start, parameters)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(ascent)))
        torch._foreach_add_(parameters, torch._foreach_mul(ascent, self.rho / (norm + 1e-16)))
        loss = gradient_of()
        torch._foreach_copy_(parameters, start)
        self.base.step()
        if self.damping:
            pairs = zip(self.param_groups, groups, strict=True)
            stacked = [entry.get("stacked", False) for entry, members in pairs for _ in members]
            self._damp(parameters, start, ascent, stacked)
        return loss

    def _damp(
        self, parameters: list[Tensor], start: list[Tensor], ascent: list[Tensor], stacked: Sequence[bool]
    ) -> None:
        """Take back 1 - k of the step from `start`. Its direction is the momentum where there is one: the difference
        of the weights has lost digits."""
        moved = torch._foreach_sub(parameters, start)
        momenta = [self.state[p].get("momentum_buffer") for p in parameters]
        down = torch._foreach_neg(moved) if any(m is None for m in momenta) else momenta
        factors = damping_factors(_pieces(down, stacked), _pieces(ascent, stacked), self.damping)
        shortened = scaled(_pieces(moved, stacked), factors)
        torch._foreach_copy_(parameters, start)
        torch._foreach_add_(_pieces(parameters, stacked), shortened)


def damping_factors(down: list[Tensor], ascent: list[Tensor], damping: float) -> Tensor:
    """(P,): k = min(1, T (1 - exp(c - 1))), c the cosine of two tensors, 0 where one of them is zero; P pairs.

    1 - c is half the squared distance of the two unit vectors: exact near c = 1, the only place where k < 1.
    """
    pairs, count = [*down, *ascent], len(down)
    sizes = torch.stack(torch._foreach_norm(pairs))
    units = scaled(pairs, sizes.clamp(min=torch.finfo(sizes.dtype).tiny).reciprocal())
    gap = torch.stack(torch._foreach_norm(torch._foreach_sub(units[:count], units[count:]))).square() / 2  # 1 - c
    gap = torch.where((sizes[:count] > 0) & (sizes[count:] > 0), gap, torch.ones_like(gap))
    return (-damping * torch.expm1(-gap)).clamp(max=1)


def scaled(vectors: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Each vector times its own of factors (P,), which stay on the device. Those of one shape go together: CUDA takes a
    kernel for each of a list of factors."""
    shapes: dict[torch.Size, list[int]] = {}
    for row, vector in enumerate(vectors):
        shapes.setdefault(vector.shape, []).append(row)
    found, each = list(vectors), factors.unbind()
    for shape, rows in shapes.items():
        k = torch.stack([each[row] for row in rows]).view(-1, *[1] * len(shape))
        for row, vector in zip(rows, torch.stack([vectors[row] for row in rows]).mul_(k).unbind(), strict=True):
            found[row] = vector
    return found


def _pieces(tensors: Iterable[Tensor], stacked: Sequence[bool]) -> list[Tensor]:
    """The tensors, those that stack branches as their branches."""
    found: list[Tensor] = []
    for tensor, several in zip(tensors, stacked, strict=True):
        found += tensor.unbind() if several else [tensor]
    return found


def hold_rows(optimizer: Optimizer, parameters: Sequence[Tensor], count: int) -> None:
    """The first `count` rows of the parameters stay as they are, whatever the optimiser does to a weight whose gradient
    is zero: weight decay and momentum move it."""
    base = optimizer.base if isinstance(optimizer, SAM) else optimizer
    rows = [parameter.detach()[:count] for parameter in parameters]
    held = [row.clone() for row in rows]

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_copy_(rows, held)

    base.register_step_post_hook(put_back)
