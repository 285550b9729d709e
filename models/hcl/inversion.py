"""Images made from a trained teacher: DeepInversion (Yin et al., CVPR 2020) and Quick Deep Inversion (HCL, CVPR 2023).

All n images X are optimised as one batch until the frozen teacher G sees the wanted labels y in them and its layers see
the channel statistics that they saw in training:

    J(X) = CE(G(X), y) + w_f sum_l R_l + w_v TV(X) + w_2 ||X||_2
    R_l  = ||mean_l(X) - mean*_l||_2 + ||var_l(X) - var*_l||_2       over images and positions, biased variance
    TV   = sum of the norms of the differences to the right, lower, lower right and lower left neighbours

by Adam with betas (0.5, 0.9), its rate rising linearly over the warm-up, then falling to 0 along half a cosine. X are
images as the teacher's normalisation leaves them. Quick means started from images of the current task, not from noise.

Letters: B images, D channels of a layer, N positions (pixels or tokens).
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from data.loading import View, for_each_batch
from utils.errors import ConfigError
from utils.runtime import Runtime
from utils.seed import mix

log = logging.getLogger(__name__)

Kind = Literal["auto", "bn", "conv", "ln", "bn_or_conv", "none"]
Moments = dict[str, tuple[Tensor, Tensor]]  # tap -> per channel (mean (D,), biased variance (D,))


class Taps:
    """Where channel statistics are read in a network, and how.

    bn: what BatchNorm2d layers receive. ln: what LayerNorm layers receive, or with ln_norm the same normalised, before
    the affine part (scale-free: outlier channels of pre-trained networks do not dominate). conv: what Conv2d layers
    give. auto: bn and ln layers, whichever there are, else conv. bn_or_conv: bn if there is one, else conv.
    Class and register tokens are no positions; where a network has them, the final norm's class token is a tap of its
    own, being the feature that the head reads.
    Raises ConfigError when the network has no such layer.
    """

    def __init__(self, network: nn.Module, kind: Kind, ln_norm: bool = False):
        self.ln_norm = ln_norm
        types = {
            "bn": _named(network, nn.BatchNorm2d),
            "ln": _named(network, nn.LayerNorm),
            "conv": _named(network, nn.Conv2d),
            "none": {},
        }
        if kind == "auto":
            self.layers = types["bn"] | types["ln"] or types["conv"]
        elif kind == "bn_or_conv":
            self.layers = types["bn"] or types["conv"]
        else:
            self.layers = types[kind]
        if not self.layers and kind != "none":
            raise ConfigError("statistics", [f'"{kind}" finds no layer in {type(network).__name__}: choose "auto"'])
        # timm's transformers name their class and register tokens; the norm before the head is called norm.
        self.prefix = max((getattr(m, "num_prefix_tokens", 0) for m in network.modules()), default=0)
        named_norm = [name for name in self.layers if name.rpartition(".")[2] == "norm"]
        self.final = min(named_norm, key=lambda name: name.count("."), default=None)

    @property
    def needs_pass(self) -> bool:
        """Whether some target must be measured: BatchNorm layers bring theirs along."""
        return any(not isinstance(layer, nn.BatchNorm2d) for layer in self.layers.values())

    def running(self) -> Moments:
        """What the BatchNorm layers saw in training."""
        found: Moments = {}
        for name, layer in self.layers.items():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_mean is not None and layer.running_var is not None
                found[name] = (layer.running_mean.clone(), layer.running_var.clone())
        return found

    def watch(self, function: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Moments]:
        """function(images), which runs the network, and the moments of every tap on the way; with gradient."""
        output, seen = self._watch(function, images)
        return output, {name: _ChannelMoments.apply(values) for name, values in seen.items()}

    @torch.no_grad()
    def measure(self, function: Callable[[Tensor], Tensor], view: View, runtime: Runtime, batch_size: int) -> Moments:
        """Moments over the images of a view, summed in double precision over batches and processes; BatchNorm layers
        have theirs already."""
        sums: dict[str, Tensor] = {}

        def add(images: Tensor, _: Tensor) -> None:
            for name, values in self._watch(function, images)[1].items():
                x = values.movedim(1, -1).flatten(0, -2).double()
                new = torch.stack([torch.full_like(x[0], len(x)), x.sum(dim=0), x.square().sum(dim=0)])
                sums[name] = sums[name] + new if name in sums else new

        for_each_batch(view, add, runtime, batch_size)
        found: Moments = {}
        for name in sorted(sums):  # one order in all processes
            count, first, second = runtime.reduce_sum(sums[name])
            mean = first / count
            found[name] = (mean.float(), (second / count - mean.square()).clamp(min=0).float())
        return found | self.running()

    def _watch(self, function: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """function(images), and (N, D) or (B, D, h, w) of every tap. The hooks are gone afterwards."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, layer: nn.Module) -> Callable[..., None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                seen.update(self._channels(name, layer, output if isinstance(layer, nn.Conv2d) else inputs[0]))

            return hook

        hooks = [layer.register_forward_hook(keep(name, layer)) for name, layer in self.layers.items()]
        try:
            return function(images), seen
        finally:
            for hook in hooks:
                hook.remove()

    def _channels(self, name: str, layer: nn.Module, values: Tensor) -> dict[str, Tensor]:
        """The channel axis follows from the type of the layer: maps (B, D, h, w), tokens (B, n, D) or (B, h, w, D)."""
        last = isinstance(layer, nn.LayerNorm) and not any("2d" in cls.__name__ for cls in type(layer).__mro__)
        if values.dtype in (torch.bfloat16, torch.float16):
            values = values.float()
        if not isinstance(layer, nn.LayerNorm):
            # What follows a convolution may change its output in place.
            return {name: values.clone() if isinstance(layer, nn.Conv2d) else values}
        values = values if last else values.movedim(1, -1)
        if self.ln_norm:
            values = F.layer_norm(values, values.shape[-1:], eps=layer.eps)
        if not (last and self.prefix and values.dim() == 3):
            return {name: values.flatten(0, -2)}
        found = {name: values[:, self.prefix :].flatten(0, -2)}
        return found | {f"{name}:class": values[:, 0]} if name == self.final else found


def pool_moments(first: Moments, second: Moments, weight: float) -> Moments:
    """Moments of a mixture: `weight` of the second, the rest of the first."""
    mixed: Moments = {}
    for name, (mean, var) in first.items():
        other_mean, other_var = second[name]
        centre = torch.lerp(mean, other_mean, weight)
        power = torch.lerp(var + (mean - centre).square(), other_var + (other_mean - centre).square(), weight)
        mixed[name] = (centre, power)
    return mixed


def statistics_loss(found: Moments, targets: Moments) -> Tensor:
    """sum_l ||var_l - var*_l||_2 + ||mean_l - mean*_l||_2 over the taps: un-squared, unweighted."""
    terms = [(var - targets[name][1]).norm() + (mean - targets[name][0]).norm() for name, (mean, var) in found.items()]
    return torch.stack(terms).sum()


def total_variation(images: Tensor) -> Tensor:
    """The norms, over the whole batch, of the differences to four neighbours. (B, 3, h, w) -> ()."""
    right = images[..., :, 1:] - images[..., :, :-1]
    lower = images[..., 1:, :] - images[..., :-1, :]
    lower_right = images[..., 1:, 1:] - images[..., :-1, :-1]
    lower_left = images[..., 1:, :-1] - images[..., :-1, 1:]
    return right.norm() + lower.norm() + lower_right.norm() + lower_left.norm()


@dataclass(frozen=True)
class InversionSettings:
    """Weights as in the formula; steps and warmup in optimiser steps. jitter: pixels by which the batch is rolled, at
    random, before the teacher sees it; 0: not. per_layer: R is divided by the number of taps. smoothing: of labels."""

    steps: int
    lrate: float
    feature: float
    variation: float
    l2: float
    warmup: int = 100
    jitter: int = 0
    per_layer: bool = False
    smoothing: float = 0.0

    def rate(self, step: int) -> float:
        """Of step 0..steps: lrate (step + 1) / warmup, then lrate (1 + cos(pi progress)) / 2, which ends at 0."""
        if step < self.warmup:
            return self.lrate * (step + 1) / self.warmup
        span = self.steps - self.warmup
        return self.lrate / 2 * (1 + math.cos(math.pi * ((step - self.warmup) / span if span > 0 else 1.0)))


class StoredMoments:
    """The targets of one teacher, measured when its task ended. A part with a state."""

    def __init__(self, device: torch.device):
        self.device = device
        self.values: Moments = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: torch.stack(pair) for name, pair in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pairs = {name: value.to(self.device) for name, value in state.items()}
        self.values = {name: (mean, var) for name, (mean, var) in pairs.items()}


Watch = Callable[[int, dict[str, Tensor]], None]


class Inversion:
    """One inversion, which can be interrupted: its `state_dict` holds images and optimiser while `run` is at work, and
    `run` called again with the same arguments goes on from a loaded state to the same images."""

    def __init__(self, settings: InversionSettings):
        self.settings = settings
        self._progress: dict[str, Any] = {}

    def run(
        self,
        start: Tensor,
        labels: Tensor,
        teacher: Callable[[Tensor], Tensor],
        taps: Taps,
        targets: Moments,
        seed: int = 0,
        safe_point: Callable[[], None] = lambda: None,
        watch: Watch = lambda step, terms: None,
    ) -> Tensor:
        """start (n, 3, s, s) normalised, labels (n,) -> images (n, 3, s, s) normalised.

        teacher: normalised images -> logits, in eval mode, its weights without gradient (with them a step costs half
        as much again). targets: of every tap. seed: of the jitter. safe_point: called after every step, when the state
        may be saved. watch: receives step and weighted terms, before the step is taken.
        """
        settings = self.settings
        images = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], settings.lrate, betas=(0.5, 0.9), eps=1e-8)
        first = 0
        if self._progress:
            optimizer.load_state_dict(self._progress["optimizer"])
            first = int(self._progress["step"])
            with torch.no_grad():
                images.copy_(self._progress["images"])
        # Step `steps` is counted in: its rate is 0 after a warm-up, and a pass that changes nothing is dropped.
        for step in range(first, settings.steps + 1):
            if (rate := settings.rate(step)) == 0:
                break
            optimizer.param_groups[0]["lr"] = rate
            terms = self._terms(images, labels, teacher, taps, targets, mix(seed, step))
            watch(step, {name: term.detach() for name, term in terms.items()})
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
            self._progress = {"step": step + 1, "images": images.detach(), "optimizer": optimizer.state_dict()}
            safe_point()
        self._progress = {}
        return images.detach()

    def _terms(
        self,
        images: Tensor,
        labels: Tensor,
        teacher: Callable[[Tensor], Tensor],
        taps: Taps,
        targets: Moments,
        seed: int,
    ) -> dict[str, Tensor]:
        settings, seen = self.settings, images
        if settings.jitter:
            reach = 2 * settings.jitter + 1
            shift = (seed % reach - settings.jitter, seed // reach % reach - settings.jitter)
            seen = images.roll(shift, dims=(2, 3))
        logits, found = taps.watch(teacher, seen)
        terms = {"ce": F.cross_entropy(logits, labels, label_smoothing=settings.smoothing)}
        if found:
            scale = settings.feature / len(found) if settings.per_layer else settings.feature
            terms["feature"] = scale * statistics_loss(found, targets)
        terms["variation"] = settings.variation * total_variation(images)
        terms["l2"] = settings.l2 * images.norm()
        return terms

    def state_dict(self) -> dict[str, Any]:
        return dict(self._progress)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._progress = dict(state)


def label_plan(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """count // classes labels of each class 0..classes-1, shuffled; with fewer images than classes some, one each."""
    each = count // classes
    if each == 0:
        return torch.randperm(classes, generator=generator)[:count]
    labels = torch.arange(classes).repeat_interleave(each)
    return labels[torch.randperm(len(labels), generator=generator)]


def _named(network: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


class _ChannelMoments(torch.autograd.Function):
    """(N, D) or (B, D, h, w) -> per channel (mean (D,), biased variance (D,)). What torch.var_mean over the other axes
    gives, without its slow reduction and the five tensors of the input's size that its backward makes: with those, the
    taps of a ResNet-18 cost as much as its forward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = torch.batch_norm_update_stats(values, None, None, 0.0)
        ctx.save_for_backward(values, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        values, mean = ctx.saved_tensors
        count, shape = values.numel() // len(mean), (1, -1, *[1] * (values.dim() - 2))
        slope = 2 / count * grad_var
        return (values * slope.view(shape)).add_((grad_mean / count - slope * mean).view(shape))
