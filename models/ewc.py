"""EWC (Kirkpatrick et al., 2017, "Overcoming catastrophic forgetting in neural networks").

Weights that past tasks need are held by springs: F the diagonal of the Fisher information, theta* the weights after the
last task, both over the rows of the head that it had,

    L = CE(z[:, K:], y - K) + lamda / 2 sum_j F_j (theta_j - theta*_j)^2

    fisher      of a task                                                  over tasks (a = K / C)
    "sample"    mean over images of g^2, g = grad log p(y|x)               F <- a F_old + (1 - a) F_new
    "batch"     mean over batches of the batch gradient squared, capped    the same
    "online"    mean over images of p(y|x) g^2                             F <- gamma F_old + F_new

A square of a batch's gradient is smaller by up to the batch size than the mean of squares. "online" (Schwarz et al.,
2018, as mammoth builds it) penalises lamda sum F (theta - theta*)^2 without the half, and its CE is over all logits.
SGD with momentum m diverges on the penalty where lr lamda max F reaches 2 (1 + m).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from convs.backbones import BackboneMaker
from convs.heads import LinearHead
from convs.network import Network
from data.loading import for_each_batch
from data.stream import Task
from models.base import LEARNERS, Learner
from models.parts.losses import slice_cross_entropy
from models.parts.varied import Varied, over_seen_classes
from utils.config import Positive, Rate, Share, TrainConfig
from utils.keys import key
from utils.seed import mix

log = logging.getLogger(__name__)

NUMBERS_AT_ONCE = 1 << 27  # gradients of single images that lie in memory together: half a gigabyte


class Springs:
    """F and theta* by parameter name; empty before the first task's end. A head that has grown since is held where it
    was: first rows alone."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    @torch.no_grad()
    def penalty(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """sum_j F_j (theta_j - theta*_j)^2, without a gradient: see `pull`."""
        fisher, moved = list(self.fisher.values()), self._moved(parameters)
        energies = torch._foreach_mul(torch._foreach_mul(fisher, moved), moved)
        return torch.stack(torch._foreach_norm(energies, 1)).sum()  # none is negative

    @torch.no_grad()
    def pull(self, parameters: Mapping[str, Tensor], factor: float) -> None:
        """Add the gradient of factor * penalty: a few kernels over all weights, where autograd takes ten a tensor."""
        grads = []
        for name, fisher in self.fisher.items():
            if (weight := parameters[name]).grad is None:  # the loss does not reach it, its spring does
                weight.grad = torch.zeros_like(weight)
            assert weight.grad is not None
            grads.append(_rows(weight.grad, fisher))
        torch._foreach_addcmul_(grads, list(self.fisher.values()), self._moved(parameters), value=2 * factor)

    def _moved(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """theta - theta*, by parameter."""
        now = [_rows(parameters[name], fisher) for name, fisher in self.fisher.items()]
        return list(torch._foreach_sub(now, [self.anchor[name] for name in self.fisher]))

    def update(self, fisher: Mapping[str, Tensor], parameters: Mapping[str, Tensor], keep: float, add: float) -> None:
        """F <- keep F_old + add F_new where there is an old one, F_new elsewhere; theta* the weights now."""
        merged = {name: value.clone() for name, value in fisher.items()}
        for name, old in self.fisher.items():
            _rows(merged[name], old).mul_(add).add_(old, alpha=keep)
        self.fisher = merged
        self.anchor = {name: parameters[name].detach().clone() for name in merged}

    def __bool__(self) -> bool:
        return bool(self.fisher)

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher, "anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind, values in state.items():
            setattr(self, kind, {name: value.to(self.device) for name, value in values.items()})


def _rows(value: Tensor, like: Tensor) -> Tensor:
    """The first rows of a tensor, as many as another has; a number without dimensions whole."""
    return value[: len(like)] if value.dim() else value


def batch_square(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Squares of the gradient of a batch's loss; zero for what the loss does not reach."""
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad.square() for (name, p), grad in pairs}


def sum_of_squares(
    network: nn.Module, parameters: Mapping[str, Tensor], images: Tensor, targets: Tensor, weighted: bool
) -> dict[str, Tensor]:
    """sum_i w_i g_i^2 over the images, g_i = grad log p(y_i|x_i), w_i = p(y_i|x_i) or 1. The network is in evaluation
    mode: an image must not depend on the others. In 32 bits under autocast too: squares of small gradients, and on CUDA
    the batched backward pass of attention refuses mixed types."""
    weights = {name: parameter.detach() for name, parameter in parameters.items()}

    def log_likelihood(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(network, weights, (image[None],))
        return -F.cross_entropy(logits, target[None])

    per_image: Callable[..., Any] = vmap(grad_and_value(log_likelihood), in_dims=(None, 0, 0))
    size = max(1, NUMBERS_AT_ONCE // sum(p.numel() for p in weights.values()))
    sums = {name: torch.zeros_like(p) for name, p in weights.items()}
    with torch.autocast(images.device.type, enabled=False):
        for part, labels in zip(images.split(size), targets.split(size), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batched form: image by image
                grads, values = per_image(weights, part, labels)
            factors = values.exp() if weighted else torch.ones_like(values)
            for name, grad in grads.items():
                sums[name] += torch.einsum("i,i...->...", factors, grad.square())
    return sums


@LEARNERS.register("ewc")
class EWC(Learner):
    """Fine-tuning of the new slice on springs; stores two numbers for each weight."""

    class Config(TrainConfig):
        lamda: Rate = key(1000.0, "weight of the penalty")
        fisher: Literal["sample", "batch", "online"] = key("sample", "how the Fisher is measured and merged")
        fishermax: Positive | None = key(1e-4, "cap of the Fisher; null: none", only={"fisher": "batch"})
        gamma: Share = key(0.9, "what is left of the Fisher after a task", only={"fisher": "online"})

    def build(self, make_backbone: BackboneMaker) -> None:
        self.network = Network(make_backbone(), LinearHead, self.config.normalize)
        self.springs = Springs(self.runtime.device)

    def before_task(self, task: Task) -> None:
        self.network.head.grow(task.total_classes)

    def loss(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy + stiffness sum_j F_j (theta_j - theta*_j)^2; the gradient of the second term is added in
        `after_backward`."""
        online, logits = self.config.fisher == "online", net(inputs)
        loss = F.cross_entropy(logits, targets) if online else slice_cross_entropy(logits, targets, self.task.classes)
        return loss + self._stiffness * self.springs.penalty(self._moved()) if self.springs else loss

    def after_backward(self) -> None:
        if self.springs:
            self.springs.pull(self._moved(), self._stiffness)

    def after_task(self, task: Task) -> None:
        self.eval()
        share = task.known_classes / task.total_classes
        keep, add = (self.config.gamma, 1.0) if self.config.fisher == "online" else (share, 1 - share)
        with self.runtime.stopwatch("fisher"):
            fisher = self._batch_fisher(task) if self.config.fisher == "batch" else self._image_fisher(task)
        self.springs.update(fisher, self._moved(), keep, add)
        self._warn_of_divergence()

    def landscape(self) -> Varied:
        return over_seen_classes(self)

    @property
    def _stiffness(self) -> float:
        return self.config.lamda * (1.0 if self.config.fisher == "online" else 0.5)

    def _moved(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def _batch_fisher(self, task: Task) -> dict[str, Tensor]:
        """Upstream, BatchNorm normalises by the batch here, and goes on learning."""
        self.network.train(self.config.upstream)
        parameters = self._moved()
        sums, count = {name: torch.zeros_like(p) for name, p in parameters.items()}, torch.zeros(1)

        def add(images: Tensor, targets: Tensor) -> None:
            with torch.enable_grad():
                squares = batch_square(F.cross_entropy(self.network(images), targets), parameters)
            torch._foreach_add_(list(sums.values()), [squares[name] for name in sums])
            count.add_(1)

        size, seed = self.config.batch_size, mix(self.config.seeds[0], task.index)
        for_each_batch(task.train.view("train"), add, self.runtime, size, shuffle=seed)
        batches = self.runtime.reduce_sum(count.to(self.runtime.device))
        means = {name: self.runtime.reduce_sum(value) / batches for name, value in sums.items()}
        return {name: value.clamp(max=self.config.fishermax) for name, value in means.items()}

    def _image_fisher(self, task: Task) -> dict[str, Tensor]:
        self.network.eval()
        online, parameters = self.config.fisher == "online", self._moved()
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}

        def add(images: Tensor, targets: Tensor) -> None:
            squares = sum_of_squares(self.network, parameters, images, targets, weighted=online)
            torch._foreach_add_(list(sums.values()), [squares[name] for name in sums])

        view = task.train.view("train" if online and self.config.upstream else "test")
        for_each_batch(view, add, self.runtime, self.config.test_batch_size)
        count, size = len(task.train), self.config.batch_size
        if online and self.config.upstream:
            count = -(-count // size) * size  # a partial last batch counts as a full one
        return {name: self.runtime.reduce_sum(value) / count for name, value in sums.items()}

    def _warn_of_divergence(self) -> None:
        config = self.config
        largest = max(value.max().item() for value in self.springs.fisher.values())
        pull = config.lrate * config.lamda * largest * (2 if config.fisher == "online" else 1)
        if config.optimizer == "sgd" and pull >= 2 * (1 + config.momentum):
            limit = config.lamda * 2 * (1 + config.momentum) / pull
            log.warning("EWC: SGD diverges on this penalty (largest Fisher %.2g): lamda below %.3g", largest, limit)
